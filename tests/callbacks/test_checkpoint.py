"""last.ckpt: written at every end, one file only, resumable."""

import torch

from rlhf_lightning.callbacks import LastCheckpoint


def load(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_one_file_with_the_newest_step(sft, trainer_of, tmp_path):
    trainer_of(LastCheckpoint(), max_epochs=2).fit(*sft)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert load(tmp_path)["global_step"] == 4


def test_the_end_of_a_run_inside_an_epoch_is_kept(sft, trainer_of, tmp_path):
    trainer_of(LastCheckpoint(), max_steps=1).fit(*sft)
    assert load(tmp_path)["global_step"] == 1


def test_every_n_steps(sft, trainer_of, tmp_path, monkeypatch):
    written = []
    callback = LastCheckpoint(every_n_train_steps=1)
    monkeypatch.setattr(callback, "_save_checkpoint", lambda trainer, path: written.append(trainer.global_step))
    trainer_of(callback).fit(*sft)
    assert sorted(set(written)) == [1, 2]


def test_every_minutes(sft, trainer_of, monkeypatch):
    written = []
    callback = LastCheckpoint(every_minutes=0.0)
    monkeypatch.setattr(callback, "_save_checkpoint", lambda trainer, path: written.append(trainer.global_step))
    trainer_of(callback).fit(*sft)
    assert 1 in written


def test_a_ppo_checkpoint_loads_without_pickles(ppo, trainer_of, tmp_path):
    trainer_of(LastCheckpoint(every_n_train_steps=1), max_steps=3).fit(*ppo)
    assert load(tmp_path)["global_step"] == 3
