"""The subcommands beside `fit`, and its help."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import torch
from command_line import fit, write

from rlhf_lightning.__main__ import main


def test_generate_answers_with_the_weights_of_the_run(config, capsys):
    assert fit(config) == 0
    args = [
        "generate",
        "--config",
        "sft.yaml",
        "--prompt",
        "the film",
        "--sampling.max_new_tokens",
        "3",
        "--out",
        "o.jsonl",
    ]
    assert main(args) == 0
    assert "runs/a/checkpoints/last.ckpt, step 4" in capsys.readouterr().out
    rows = [json.loads(row) for row in Path("o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the film"]
    assert main([*args, "--prompts", "train.jsonl"]) == 0
    assert len(Path("o.jsonl").read_text().splitlines()) == 9


def test_generate_without_a_prompt(config, capsys):
    assert main(["generate", "--config", write(config)]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_export_of_a_checkpoint_equals_that_of_the_run(config):
    from safetensors.torch import load_file

    assert fit(config) == 0
    assert main(["export", "--config", "runs/a/config.yaml", "--folder", "out"]) == 0
    ours, theirs = load_file("out/model.safetensors"), load_file("runs/a/hf/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_export_before_the_first_checkpoint(config, capsys):
    assert main(["export", "--config", write(config)]) == 2
    assert "last.ckpt" in capsys.readouterr().err


def test_preview_prints_records_without_training(config, capsys):
    assert main(["preview", "--config", write(config), "--num_records", "2"]) == 0
    printed = capsys.readouterr().out
    assert "train.jsonl, line 1" in printed
    assert "good" in printed
    assert "line 3" not in printed
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "--prompt", "the", "--batch_size", "0"), "--batch_size 0: give at least 1"),
        (("generate", "--prompts", "latin.txt"), "--prompts latin.txt: not UTF-8 text (byte 3)"),
        (("preview", "--num_records", "0"), "--num_records 0: give at least 1"),
        (("preview", "--split", "tst"), "--split: tst is not one of the choices; did you mean test?"),
    ],
)
def test_other_subcommands_refuse_what_cannot_be_meant(config, capsys, command, message):
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert main([command[0], "--config", write(config), *command[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(config):
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbfthe film\r\n\r\na plot\r\n")
    options = ["--prompts", "prompts.txt", "--out", "o.jsonl", "--sampling.max_new_tokens", "2", "--ckpt_path", "null"]
    assert main(["generate", "--config", write(config), *options]) == 0
    assert [json.loads(row)["prompt"] for row in Path("o.jsonl").read_text().splitlines()] == ["the film", "a plot"]


def test_plan_predicts_without_weights_or_the_machine_that_it_is_for(config, capsys):
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "fsdp2", "precision": "bf16-mixed"}
    assert main(["plan", "--config", write(config), "--memory", "80GB", "--json", "plan.json"]) == 0
    said = capsys.readouterr().out
    assert "SFTModule, 8 records of up to 6 tokens in data.train: peak memory of each of 8 processes (fsdp2)" in said
    assert "The run fits" in said
    assert "--data.batch_size 4 --trainer.accumulate_grad_batches 1" in said
    plan = json.loads(Path("plan.json").read_text())
    assert plan["run"]["device"] == "cuda"
    assert plan["phases"][0]["peak"]["total"] == plan["peak"] < plan["budget"] == 72 * 10**9
    assert not Path("runs").exists()


def test_plan_says_what_it_assumes_of_a_vocabulary_in_parts(config, capsys):
    strategy = {"class_path": "FSDP2Strategy", "init_args": {"tensor_parallel_size": 2}}
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": strategy}
    assert main(["plan", "--config", write(config), "--memory", "80GB", "--json", "plan.json"]) == 0
    assert "tensor_parallel_size: 2 is planned as if each process computed all logits" in capsys.readouterr().out
    assert json.loads(Path("plan.json").read_text())["run"]["shards"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "lots"], "--memory 'lots' is no amount of memory: give one like 80GB, 24GiB or 512MB"),
        (["--length", "1"], "--length 1 is the length of a whole row: give at least 2 tokens"),
        (["--data.train", "null"], "set data.train, or give --length N, tokens of prompt and answer together"),
        (["--data.train", "gone.jsonl"], "gone.jsonl"),
        (["--json", "no/such/folder/plan.json"], "--json"),
        (
            ["--trainer.strategy", "deepspeed_stage_3", "--trainer.devices", "4"],
            "plan knows one process, ddp and fsdp2",
        ),
        (["--trainer.strategy", "fsdp", "--trainer.devices", "4"], "of fsdp, what fsdp2 takes is an estimate"),
    ],
)
def test_plans_of_nothing(config, capsys, options, said):
    if "--json" in options:
        Path("no").touch()
    assert main(["plan", "--config", write(config), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_that_cannot_be(config, capsys):
    policy = config["model"]["init_args"]["policy"]
    policy["config"] = policy["config"] | {"hidden_size": 128, "intermediate_size": 512}
    assert main(["plan", "--config", write(config), "--memory", "1MB"]) == 2
    said = capsys.readouterr()
    assert "The run does not fit" in said.out
    assert "nothing fits in 0.9 MB (90% of 1.0 MB): without any batch weights, gradients, optimiser" in said.err


def test_plan_of_a_config_without_a_model(config, capsys):
    tokenizer = config["model"]["init_args"]["policy"]["tokenizer"]
    config["model"]["init_args"]["policy"] = {"tokenizer": tokenizer}
    assert main(["plan", "--config", write(config)]) == 2
    assert "a model needs either `path` or `config`" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_lightning():
    code = "import sys; from rlhf_lightning.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert "chain" in done.stdout


def test_help_of_fit_answers(config, capsys):
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


ANOTHER_ORDER = """
import importlib, sys, typing
import lightning.pytorch
for clear in typing._cleanups:
    clear()
typing.Optional[typing.Union[float, int]]
lightning.pytorch.Trainer = importlib.reload(sys.modules["lightning.pytorch.trainer.trainer"]).Trainer
from rlhf_lightning.__main__ import main
sys.exit(main(["fit", "--config", "sft.yaml", "--trainer.limit_val_batches=1", "--print_config"]))
"""


def test_one_batch_is_one_batch_whatever_types_other_packages_wrote_first(config):
    """`typing` would turn Lightning's int | float into their float | int, and 1 batch into all of them."""
    write(config)
    done = subprocess.run([sys.executable, "-c", ANOTHER_ORDER], capture_output=True, text=True, check=True)
    assert "limit_val_batches: 1\n" in done.stdout
