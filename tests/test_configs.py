"""Every YAML that we ship: its command is real, it prints and reads back the same, and it runs a step."""

import math
import re
import shlex

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml
from shipped_configs import (
    CHAINS,
    CONFIGS,
    ENGINES,
    OVERLAYS,
    RECORDS,
    REPOSITORY,
    SETTINGS,
    STAGES,
    content,
    needing_packages,
    run_one_step,
    stand_ins,
    untrained_reward,
    write_records,
)

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.app import check_command_line
from rlhf_lightning.pipelines.chain import check_chain
from rlhf_lightning.pipelines.chain_spec import read_chain


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])


def printed(args: list[str], capsys) -> str:
    capsys.readouterr()
    assert main([*args, "--print_config"]) == 0
    return capsys.readouterr().out


def test_no_config_is_left_out():
    assert CONFIGS
    assert sorted(STAGES + CHAINS + ENGINES + OVERLAYS) == CONFIGS, (
        "a YAML that is neither a stage, a chain, an engine nor a trainer overlay"
    )


@pytest.mark.parametrize("config", needing_packages(CONFIGS))
def test_the_commands_in_its_head_are_real(config):
    head = [line for line in (REPOSITORY / config).read_text().splitlines() if line.startswith("#")]
    commands = [shlex.split(match[1]) for line in head if (match := re.match(r"#\s+rlhf-lightning (.*)", line))]
    assert head[0].startswith("# rlhf-lightning ")
    assert config in commands[0]
    for command in commands:
        if command[0] == "chain":
            settings = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
            read_chain(command[command.index("--config") + 1], settings)
        else:
            check_command_line(command)


@pytest.mark.parametrize("config", needing_packages(STAGES))
def test_what_print_config_prints_is_read_back_the_same(config, capsys, tmp_path):
    first = printed(["fit", "--config", config], capsys)
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(["fit", "--config", str(tmp_path / "printed.yaml")], capsys) == first


@pytest.mark.parametrize("config", OVERLAYS)
def test_an_overlay_sets_its_keys_and_leaves_the_others(config, capsys):
    plain = yaml.safe_load(printed(["fit", "--config", "configs/sft.yaml"], capsys))
    overlaid = yaml.safe_load(printed(["fit", "--config", "configs/sft.yaml", "--trainer", config], capsys))
    assert overlaid["trainer"] == plain["trainer"] | content(config)
    assert {**overlaid, "trainer": None} == {**plain, "trainer": None}


@pytest.mark.parametrize("config", ENGINES)
def test_an_engine_is_set_and_all_else_is_left(config, capsys):
    """What it samples is shown in tests/vllm."""
    plain = yaml.safe_load(printed(["fit", "--config", "configs/grpo.yaml"], capsys))
    with_engine = yaml.safe_load(printed(["fit", "--config", "configs/grpo.yaml", "--model.engine", config], capsys))
    engine = with_engine["model"]["init_args"].pop("engine")
    assert plain["model"]["init_args"].pop("engine") == {"class_path": "rlhf_lightning.rollout.HFGenerate"}
    assert engine["class_path"] == f"rlhf_lightning.rollout.{content(config)['class_path']}"
    assert engine["init_args"].items() >= content(config)["init_args"].items()
    assert with_engine == plain


@pytest.mark.parametrize("config", CHAINS)
def test_every_stage_of_a_chain_can_be_read(config):
    spec = read_chain(config)
    assert {stage.config for stage in spec.stages if stage.config} <= set(STAGES)
    check_chain(spec, check_command_line)


# --- one step of each


@pytest.fixture(scope="module")
def tiny_reward(tmp_path_factory, tiny_model) -> str:
    return untrained_reward(str(tiny_model), tmp_path_factory.mktemp("models") / "reward")


@pytest.mark.parametrize("config", needing_packages(STAGES))
def test_a_stage_takes_a_step_and_exports(config, tmp_path, tiny_model, wide_model, tiny_tokenizer, tiny_reward):
    run = content(config)
    in_few_bits = run["model"]["init_args"].get("policy", {}).get("quantization")
    options = stand_ins(run, tmp_path, str(wide_model if in_few_bits else tiny_model), str(tiny_tokenizer), tiny_reward)
    metrics = run_one_step(["--config", config, *options], tmp_path)
    loss = "policy/loss" if run["model"]["class_path"] in ("PPOModule", "GRPOModule") else "train/loss"
    assert math.isfinite(metrics[loss])
    assert all(math.isfinite(value) for value in metrics.values())
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


@pytest.mark.parametrize("config", OVERLAYS)
def test_an_overlay_takes_a_step_on_one_cpu(config, tmp_path, tiny_model, tiny_tokenizer, tiny_reward):
    options = stand_ins(content("configs/sft.yaml"), tmp_path, str(tiny_model), str(tiny_tokenizer), tiny_reward)
    here = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    metrics = run_one_step(["--config", "configs/sft.yaml", "--trainer", config, *options, *here], tmp_path)
    assert math.isfinite(metrics["train/loss"])


def test_three_stages_from_one_yaml(tmp_path, tiny_model):
    """configs/chain.yaml as it stands, but for where things are and how much is done."""
    for name, kind in (("train", "SFTModule"), ("pairs", "BradleyTerry"), ("prompts", "PPOModule")):
        write_records(tmp_path / f"{name}.jsonl", RECORDS[kind])
    settings = {"model": tiny_model, "data": tmp_path, "run_dir": tmp_path / "runs"}
    for stage in ("sft", "reward", "ppo"):
        settings |= {f"{stage}.{key}": value for key, value in SETTINGS.items()}
        settings |= {
            f"{stage}.data.batch_size": 4,
            f"{stage}.data.val_frac": 0.4,
            f"{stage}.trainer.accelerator": "cpu",
        }
    settings |= {"sft.data.max_length": 32, "reward.data.max_length": 32, "ppo.data.max_prompt_length": 16}
    settings["ppo.model.init_args.generation.max_new_tokens"] = 4
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert main(["chain", "--config", "configs/chain.yaml", *given]) == 0
    for folder in ("sft/hf", "reward/hf", "ppo/hf", "ppo/hf/critic"):
        assert (tmp_path / "runs" / folder / "model.safetensors").is_file()
