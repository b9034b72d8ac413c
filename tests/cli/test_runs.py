"""`fit` in process, as a shell would call it: a run, its folder, going on with it, stopping it."""

from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import torch
import yaml
from command_line import ALLOW, fit, metrics

from rlhf_lightning.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_leaves_config_metrics_samples_checkpoint_and_export(config):
    assert fit(config) == 0
    for name in ("config.yaml", "metrics.csv", "samples.jsonl", "checkpoints/last.ckpt", "hf/config.json"):
        assert (Path("runs/a") / name).is_file(), name
    steps = [float(row["train/loss"]) for row in metrics("runs/a") if row["train/loss"]]
    assert len(steps) == 4  # 8 records, batches of 4, 2 epochs
    assert "lr-AdamW" in metrics("runs/a")[0]


def test_a_run_that_is_shorter_than_the_logging_interval_logs_its_last_step(config):
    assert fit(config) == 0
    assert fit(config, "--trainer.log_every_n_steps", "5", "--trainer.default_root_dir", "runs/b") == 0
    [row], last = metrics("runs/b"), metrics("runs/a")[-1]
    assert (row["step"], row["train/loss"]) == (last["step"], last["train/loss"])


def test_a_saved_config_runs_again_and_repeats_the_run(config):
    assert fit(config) == 0
    first = Path("runs/a/config.yaml").read_text()
    assert main(["fit", "--config", "runs/a/config.yaml", "--trainer.default_root_dir", "runs/b"]) == 0
    again = yaml.safe_load(Path("runs/b/config.yaml").read_text())
    assert again == yaml.safe_load(first) | {
        "trainer": yaml.safe_load(first)["trainer"] | {"default_root_dir": "runs/b"}
    }
    losses = [[row["train/loss"] for row in metrics(folder)] for folder in ("runs/a", "runs/b")]
    assert losses[0] == losses[1]


def test_a_second_run_into_the_same_folder_is_refused_with_both_remedies(config, capsys):
    assert fit(config, "--trainer.max_steps", "1") == 0
    assert fit(config) == 2
    message = capsys.readouterr().err
    assert "runs/a already holds a run" in message
    assert "--resume auto" in message
    assert "--overwrite true" in message
    assert "Traceback" not in message


def test_resume_goes_on_and_keeps_the_metrics_of_before(config):
    assert fit(config, "--trainer.max_epochs", "1") == 0
    assert fit(config, "--resume", "auto") == 0
    assert [row["step"] for row in metrics("runs/a") if row["train/loss"]] == ["0", "1", "2", "3"]
    assert fit({**config, "trainer": {**config["trainer"], "default_root_dir": "runs/whole"}}) == 0
    ours, whole = (
        torch.load(f"runs/{n}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("a", "whole")
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_resuming_with_fewer_epochs_than_were_run_is_an_error(config, capsys):
    assert fit(config, "--trainer.max_epochs", "3") == 0
    assert fit(config, "--resume", "auto", "--trainer.max_epochs", "1") == 2
    assert "trainer: You restored a checkpoint with current_epoch=2" in capsys.readouterr().err


def test_overwrite_starts_anew(config):
    assert fit(config) == 0
    Path("runs/a/notes.txt").write_text("mine")
    assert fit(config, "--trainer.max_epochs", "1", "--overwrite", "true") == 0
    assert [row["step"] for row in metrics("runs/a") if row["train/loss"]] == ["0", "1"]
    assert Path("runs/a/notes.txt").exists()  # only what a run writes is deleted
    assert "overwrite" not in yaml.safe_load(Path("runs/a/config.yaml").read_text())


def test_resume_from_a_checkpoint_that_is_not_there(config, capsys):
    assert fit(config, "--resume", "nowhere.ckpt") == 2
    assert "nowhere.ckpt" in capsys.readouterr().err


def test_resume_from_a_checkpoint_that_was_cut_off_or_is_of_another_model(config, tiny_config, capsys):
    assert fit(config, "--trainer.max_steps", "1") == 0
    whole = Path("runs/a/checkpoints/last.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert fit(config, "--resume", "cut.ckpt") == 2
    assert "cut.ckpt is no checkpoint, or was cut off" in capsys.readouterr().err
    assert main(["export", "--config", "sft.yaml", "--ckpt_path", "cut.ckpt"]) == 2
    config["model"]["init_args"]["policy"]["config"] = {**tiny_config, "hidden_size": 32}
    capsys.readouterr()
    assert fit(config, "--resume", "auto") == 2
    assert "runs/a/checkpoints/last.ckpt does not fit the model of the config" in capsys.readouterr().err


def test_auto_takes_the_newest_checkpoint_that_is_whole_and_says_what_it_skips(config, capsys):
    assert fit(config) == 0
    last, previous = (Path("runs/a/checkpoints") / name for name in ("last.ckpt", "last.previous.ckpt"))
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert fit(config, "--resume", str(last)) == 2  # a path that is named is taken or refused
    assert "last.ckpt is damaged" in capsys.readouterr().err
    assert fit(config, "--resume", "auto", "--trainer.max_epochs", "3") == 0
    said = capsys.readouterr()
    assert "skipped runs/a/checkpoints/last.ckpt, which is damaged" in said.err
    assert "resuming from runs/a/checkpoints/last.previous.ckpt, step 2" in said.out
    steps = [row["step"] for row in metrics("runs/a") if row["train/loss"]]
    assert steps == ["0", "1", "2", "3", "4", "5"]
    for path in (last, previous):
        path.write_bytes(b"")
    assert fit(config, "--resume", "auto") == 2
    assert "no checkpoint of runs/a can be read; --overwrite true" in capsys.readouterr().err
    assert last.exists()


def test_the_stage_of_another_checkpoint_is_refused(config, tiny_config, tiny_tokenizer, capsys):
    assert fit(config, "--trainer.max_steps", "1") == 0
    model = {"config": tiny_config, "tokenizer": str(tiny_tokenizer)}
    config["model"] = {"class_path": "RewardModule", "init_args": {"model": model}}
    Path("pairs.jsonl").write_text('{"prompt": "the film", "chosen": "good", "rejected": "bad"}\n' * 4)
    config["data"] = {"train": "pairs.jsonl", "batch_size": 2}
    assert fit(config, "--resume", "runs/a/checkpoints/last.ckpt", "--trainer.default_root_dir", "runs/b") == 2
    assert (
        "the checkpoint was written by SFTModule and cannot be gone on with by RewardModule" in capsys.readouterr().err
    )


def test_a_stage_of_the_same_weights_does_not_go_on_with_another_ones_run(config, tiny_config, tiny_tokenizer, capsys):
    assert fit(config, "--trainer.max_steps", "1") == 0
    model = {"config": tiny_config, "tokenizer": str(tiny_tokenizer)}
    other = {"class_path": "DPOModule", "init_args": {"policy": model, "loss": "CPO"}}
    Path("pairs.jsonl").write_text('{"prompt": "the film", "chosen": "good", "rejected": "bad"}\n' * 4)
    data = {"train": "pairs.jsonl", "batch_size": 2}
    assert fit({**config, "model": other, "data": data}, "--resume", "auto") == 2
    assert "the checkpoint was written by SFTModule and cannot be gone on with by DPOModule" in capsys.readouterr().err
    own = {"class_path": "mine.MySFT", "init_args": config["model"]["init_args"]}
    assert fit({**config, "model": own}, "--resume", "auto", *ALLOW) == 0  # a kind of it does


def test_a_run_that_stopped_before_its_first_step_may_be_started_again(config, capsys):
    assert fit(config, "--data.train", "nowhere.jsonl") == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert fit(config) == 0


def test_overlays_of_the_trainer_section_keep_what_they_do_not_name(config, capsys):
    for overlay in ("cpu", "gpu", "ddp", "fsdp2", "fsdp"):
        file = REPOSITORY / "configs" / "trainer" / f"{overlay}.yaml"
        assert fit(config, "--trainer", str(file), "--print_config") == 0
        trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
        assert trainer["max_epochs"] == 2
        for key, value in yaml.safe_load(file.read_text()).items():
            assert trainer[key] == value


def test_the_command_line_beats_the_checkpoint(config):
    own = {**config, "model": {"class_path": "mine.MySFT", "init_args": {**config["model"]["init_args"], "gain": 0.2}}}
    assert fit(own, "--trainer.max_epochs", "1", *ALLOW) == 0
    assert fit(own, "--ckpt_path", "runs/a/checkpoints/last.ckpt", "--model.gain", "0.9", *ALLOW) == 0
    gains = [float(row["train/gain"]) for row in metrics("runs/a") if row["train/gain"]]
    assert gains == pytest.approx([0.2, 0.2, 0.9, 0.9])


def test_interrupt_exits_with_130(config):
    assert fit(config, "--model", "mine.Interrupted", *ALLOW) == 130


def test_out_of_memory(config, capsys):
    config["model"]["class_path"] = "mine.Full"
    assert fit(config, *ALLOW) == 0  # in smaller pieces
    assert fit(config, *ALLOW, "--model.seed", "5", "--overwrite", "true") == 2
    said = capsys.readouterr().err
    assert "error: out of memory in training: one sequence of 6 tokens does not fit: cut records with data.max_" in said
    assert fit(config, *ALLOW, "--data.val", "train.jsonl", "--overwrite", "true") == 2
    said = capsys.readouterr().err
    assert "error: out of memory: CUDA out of memory.: lower data.batch_size or data.eval_batch_size" in said
    assert "Traceback" not in said


def test_default_callbacks_can_be_named_away_and_replaced(config):
    config["default_callbacks"] = ["progress", "samples"]
    config["trainer"]["callbacks"] = [{"class_path": "SampleLogger", "init_args": {"num_prompts": 1}}]
    assert fit(config) == 0
    assert not Path("runs/a/checkpoints").exists()
    assert not Path("runs/a/hf").exists()
    assert len(Path("runs/a/samples.jsonl").read_text().splitlines()) == 1
