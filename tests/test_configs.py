"""Every YAML that we ship: read by the command line, printed and read again, headed by the command that runs it."""

from pathlib import Path

import pytest
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.app import check_command_line
from rlhf_lightning.pipelines.chain import check_chain
from rlhf_lightning.pipelines.chain_spec import read_chain

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml"))


def content(config: str) -> dict:
    return yaml.safe_load((REPOSITORY / config).read_text())


STAGES = [config for config in CONFIGS if "model" in content(config)]
CHAINS = [config for config in CONFIGS if "stages" in content(config)]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_begins_with_the_command_that_runs_it(config):
    first = (REPOSITORY / config).read_text().splitlines()[0]
    assert first.startswith("# rlhf-lightning ")
    assert config in first


@pytest.mark.parametrize("config", STAGES)
def test_print_config_round_trips(config, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    assert main(["fit", "--config", config, "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert main(["fit", "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


@pytest.mark.parametrize("config", CHAINS)
def test_every_stage_of_a_chain_can_be_read(config, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["rlhf-lightning"])
    check_chain(read_chain(config), check_command_line)
