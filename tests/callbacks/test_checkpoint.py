"""last.ckpt: written at every end, one file only, resumable."""

import shutil

import lightning as L
import torch

from rlhf_lightning import ModelSpec, RewardModule, RLHFDataModule
from rlhf_lightning.callbacks import LastCheckpoint, MetricsCSV


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


def test_what_the_end_of_an_epoch_changes_is_in_it(trainer_of, tiny_model, write_jsonl, tmp_path):
    """Also where the epoch's last step has been written before: a reward model is normalised behind it."""
    pairs = [{"prompt": "the film", "chosen": f" was {word}", "rejected": " dull"} for word in ("good", "great")]
    data = RLHFDataModule(train=write_jsonl("pairs.jsonl", pairs), batch_size=1)
    module = RewardModule(ModelSpec(path=str(tiny_model)), normalise_on="train", seed=0)
    trainer_of(LastCheckpoint(every_n_train_steps=1)).fit(module, data)
    assert load(tmp_path)["state_dict"]["model.score_std"] == module.model.score_std != 1


def test_every_minutes(sft, trainer_of, monkeypatch):
    written = []
    callback = LastCheckpoint(every_minutes=0.0)
    monkeypatch.setattr(callback, "_save_checkpoint", lambda trainer, path: written.append(trainer.global_step))
    trainer_of(callback).fit(*sft)
    assert 1 in written


def test_gradients_that_wait_for_their_step_are_not_lost(sft, trainer_of, monkeypatch):
    written = []
    callback = LastCheckpoint(every_minutes=0.0)
    monkeypatch.setattr(
        callback,
        "_save_checkpoint",
        lambda trainer, path: written.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready),
    )
    module, data = sft
    data.options["batch_size"] = 1
    # whatever step was saved last: the time to save may come between two micro-batches
    monkeypatch.setattr(callback, "_should_skip_saving_checkpoint", lambda trainer: False)
    trainer_of(callback, accumulate_grad_batches=2).fit(module, data)
    assert set(written) == {2, 4}


def test_a_ppo_checkpoint_loads_without_pickles(ppo, trainer_of, tmp_path):
    trainer_of(LastCheckpoint(every_n_train_steps=1), max_steps=3).fit(*ppo)
    assert load(tmp_path)["global_step"] == 3


def test_what_was_logged_after_the_checkpoint_is_logged_once(sft, trainer_of, tmp_path):
    options = {"log_every_n_steps": 1, "max_epochs": 2}
    trainer_of(LastCheckpoint(), logger=MetricsCSV(tmp_path), **{**options, "max_epochs": 1}).fit(*sft)
    early = shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "early.ckpt")
    for _ in range(2):  # the second time the file already holds steps 2 and 3
        trainer_of(LastCheckpoint(), logger=MetricsCSV(tmp_path), **options).fit(*sft, ckpt_path=early)
    steps = [row.split(",")[1] for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3"]


def test_metrics_from_before_a_checkpoint_are_on_disk_with_it(sft, trainer_of, tmp_path, monkeypatch):
    module, data = sft
    written = []
    save = L.Trainer.save_checkpoint

    def look(self, *args, **kwargs):
        file = tmp_path / "metrics.csv"
        written.append(len(file.read_text().splitlines()) - 1 if file.exists() else 0)
        save(self, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", look)
    callbacks = [LastCheckpoint(tmp_path, every_n_train_steps=1)]
    trainer_of(*callbacks, logger=MetricsCSV(tmp_path), max_epochs=2, log_every_n_steps=1).fit(module, datamodule=data)
    assert written == [0, 1, 2, 2, 3, 4]  # behind every step, and at the end of each epoch
