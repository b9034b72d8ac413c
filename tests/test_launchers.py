"""The overlays of several machines, on one: processes that torchrun or SLURM started make one run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(folder: Path, commands: dict[str, list[str]]) -> list[str]:
    """The exit codes of two processes for each launcher's command; what they print is in `folder`."""
    runs = json.dumps([[launcher, free_port(), command] for launcher, command in commands.items()])
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/support/launched.py"), runs],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        timeout=250,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_runs_of_torchrun_and_of_slurm_share_out_one_model(tmp_path, tiny_tokenizer, tiny_config):
    """hsdp.yaml by the one (two copies of the model), slurm.yaml by the other (two parts of it): the same weights."""
    records = [{"prompt": "the film", "completion": f" was {word}"} for word in ("good", "bad", "long", "short") * 2]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "trainer": {"max_epochs": 1, "enable_model_summary": False, "enable_progress_bar": False},
        "model": {
            "class_path": "SFTModule",
            "init_args": {"policy": {"config": tiny_config, "tokenizer": str(tiny_tokenizer)}},
        },
        "data": {"train": "train.jsonl", "batch_size": 2},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    here = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.num_nodes=1", "--trainer.precision=32-true"]
    commands, exported = {}, {}
    for launcher, overlay in (("torchrun", "hsdp"), ("slurm", "slurm")):
        options = ["--trainer", str(REPOSITORY / f"configs/trainer/{overlay}.yaml"), *here]
        commands[launcher] = ["fit", "--config", "fit.yaml", *options, f"--trainer.default_root_dir={launcher}"]
    codes = launched(tmp_path, commands)
    for launcher in commands:
        first, second = ((tmp_path / f"{launcher}.{rank}.txt").read_text() for rank in (0, 1))
        assert codes == ["0 0", "0 0"], first[-2000:] + second[-2000:]
        assert first.count(f"exported to {launcher}/hf") == 1
        assert "exported" not in second
        state = torch.load(tmp_path / launcher / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 2  # eight records, two processes of two
        exported[launcher] = load_file(tmp_path / launcher / "hf" / "model.safetensors")
    assert exported["torchrun"].keys() == exported["slurm"].keys()
    for name, weight in exported["slurm"].items():
        torch.testing.assert_close(exported["torchrun"][name], weight, rtol=1e-5, atol=1e-5, msg=name)
