"""Hub ids, end to end: weights, tokenizer and records come from a hub over HTTP, once; then from its cache alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_hub import COMMIT, serve

RECORDS = [{"prompt": "the film was", "completion": " great and long"}, {"prompt": "a plot", "completion": " not bad"}]


def fit(folder: str, policy: dict, environment: dict) -> subprocess.CompletedProcess:
    config = {
        "seed_everything": 1,
        "trainer": {"default_root_dir": folder, "accelerator": "cpu", "max_steps": 2},
        "model": {"class_path": "SFTModule", "init_args": {"policy": policy}},
        "data": {"train": "somebody/reviews", "val_frac": 0.0, "batch_size": 2},
    }
    Path(f"{folder}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "--config", f"{folder}.yaml"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_model_and_records_by_hub_id(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "records"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS * 4))
    with serve({"models/somebody/tiny": tiny_model, "datasets/somebody/reviews": data}) as (address, asked):
        online = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        first = fit("first", {"path": "somebody/tiny"}, online)
        assert first.returncode == 0, first.stderr + "\n".join(asked)
        fetched = [line for line in asked if line.startswith("GET")]
        assert any(line.endswith("/somebody/tiny/resolve/" + COMMIT + "/model.safetensors") for line in fetched)
        assert any("/datasets/somebody/reviews/resolve/" in line and line.endswith(".jsonl") for line in fetched)

        # a name the hub does not know is the user's mistake, and so is a revision
        missing = fit("missing", {"path": "somebody/else"}, online)
        assert missing.returncode == 2
        assert "somebody/else" in missing.stderr
        assert "Traceback" not in missing.stderr

    again = fit("again", {"path": "somebody/tiny"}, online | {"HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0, again.stderr
    assert Path("first/metrics.csv").read_text().count("\n") > 1
    weights = [Path(run, "hf", "model.safetensors").read_bytes() for run in ("first", "again")]
    assert weights[0] == weights[1] != (tiny_model / "model.safetensors").read_bytes()
