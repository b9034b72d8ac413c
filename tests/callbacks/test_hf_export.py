"""The hand-over at the end and on the way."""

from transformers import AutoModelForCausalLM

from rlhf_lightning.callbacks import HFExport, LastCheckpoint


def test_hf_folder_at_the_end_and_on_the_way(sft, trainer_of, tmp_path):
    trainer_of(HFExport(every_n_steps=1)).fit(*sft)
    for name in ("hf", "hf-step-1", "hf-step-2"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_a_run_resumed_at_its_end_still_exports(sft, trainer_of, tmp_path):
    trainer_of(LastCheckpoint()).fit(*sft)
    assert not (tmp_path / "hf").exists()
    trainer_of(HFExport(), LastCheckpoint()).fit(*sft, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "hf" / "config.json").exists()
