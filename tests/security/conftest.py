"""A folder of the user's with a small SFT config, beside a module that leaves a mark when it is imported."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lightning.pytorch  # noqa: F401  imported here so that its log handler does not keep one test's captured stderr
import pytest
import yaml

from rlhf_lightning.__main__ import main

STRANGER = """
from pathlib import Path
from lightning.pytorch import Callback
from torch.optim import AdamW
from rlhf_lightning import SFTModule

MARK = Path({mark!r})
MARK.touch()


class Stage(SFTModule):
    pass


class Optimizer(AdamW):
    pass


class Spy(Callback):
    pass


class Step:
    def run(self):
        MARK.touch()


def reward(completions):
    MARK.touch()
    return [0.0 for _ in completions]
"""


@pytest.fixture
def mark(tmp_path) -> Path:
    """What an attack leaves behind when it works."""
    return tmp_path / "mark"


@pytest.fixture
def config(tmp_path, mark, tiny_tokenizer, tiny_config, monkeypatch) -> dict:
    """A config that runs; the working directory, on Python's path, also holds the module `stranger`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf-lightning"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # harder than what the command line itself does
    Path("stranger.py").write_text(STRANGER.format(mark=str(mark)))
    records = [{"prompt": "the film", "completion": f" was {word}"} for word in ("good", "bad", "long", "short")]
    Path("train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yield {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": "run",
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
        },
        "default_callbacks": ["checkpoint", "export"],
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "policy": {"config": tiny_config, "tokenizer": str(tiny_tokenizer)},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
            },
        },
        "data": {"train": "train.jsonl", "batch_size": 4, "max_length": 16},
    }
    sys.modules.pop("stranger", None)


@pytest.fixture
def refused(config, mark, capsys) -> Callable[..., str]:
    """Runs a command line that must end as a user's mistake; gives what was said. Nothing of it may have run."""

    def run(*args: str) -> str:
        capsys.readouterr()
        assert main(list(args)) == 2
        assert not mark.exists()
        assert "stranger" not in sys.modules
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def works(mark) -> Callable[[Callable[[], object]], None]:
    """Shows that an attack leaves its mark where nobody defends: without that a test would show nothing."""

    def run(attack: Callable[[], object]) -> None:
        with suppress(Exception):  # what it breaks once it has run is no matter
            attack()
        assert mark.exists()
        mark.unlink()
        sys.modules.pop("stranger", None)

    return run


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file
