import json
import sys
from pathlib import Path

import pytest
from command_line import OWN_STAGE


@pytest.fixture
def config(tmp_path, tiny_tokenizer, tiny_config, monkeypatch) -> dict:
    """A small SFT config; the working directory is a fresh folder that also holds a user's module `mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf-lightning"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(OWN_STAGE)
    records = [{"prompt": "the film", "completion": f" was {word}"} for word in ("good", "bad", "long", "short") * 2]
    Path("train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yield {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": "runs/a",
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "SFTModule",
            "init_args": {
                "policy": {"config": tiny_config, "tokenizer": str(tiny_tokenizer)},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
            },
        },
        "data": {"train": "train.jsonl", "batch_size": 4, "max_length": 16},
    }
    sys.modules.pop("mine", None)
