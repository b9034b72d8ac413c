"""Tokens of the environment come into nothing that a run writes or says; local models need no network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.__main__ import main
from rlhf_lightning.cli.secrets import secret_in

REPOSITORY = Path(__file__).resolve().parents[2]

SECRETS = {
    "HF_TOKEN": "marker-of-hf-token",
    "HUGGING_FACE_HUB_TOKEN": "marker-of-old-hf-token",
    "WANDB_API_KEY": "marker-of-wandb-api-key",
    "OPENAI_API_KEY": "marker-of-openai-api-key",
    "AWS_SECRET_ACCESS_KEY": "marker-of-aws-secret",
    "MLFLOW_TRACKING_PASSWORD": "marker-of-mlflow-password",
}


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


RUN = """
import json, socket, sys

asked = []

class NoNetwork(BaseException):  # no library tries again after that
    pass

def refuse(*args, **kwargs):
    asked.append(repr(args[-1:]))
    raise NoNetwork

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

from rlhf_lightning.__main__ import main

codes = [main(command) for command in json.loads(sys.argv[1])]
ours = list(asked)
try:
    from transformers import AutoConfig
    AutoConfig.from_pretrained("owner/name")
except NoNetwork:
    pass
print(json.dumps({"codes": codes, "asked": ours, "asked by a hub id": len(asked) - len(ours)}))
"""


@pytest.mark.slow
def test_a_whole_run_tells_nothing_and_asks_nobody(config, tiny_model, tmp_path):
    shutil.copytree(tiny_model, "base")
    config["model"]["init_args"]["policy"] = {"path": "base"}
    config["default_callbacks"] = [
        "checkpoint",
        "learning_rate",
        "throughput",
        "samples",
        "nan_guard",
        "health",
        "export",
    ]
    config["trainer"]["logger"] = [
        {"class_path": "rlhf_lightning.callbacks.MetricsCSV", "init_args": {"folder": "run"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "run", "name": "tensorboard"}},
    ]
    commands = [
        ["fit", "--config", write(config)],
        ["fit", "--config", "fit.yaml", "--data.batch_size", "four", "--debug"],  # a traceback
        ["generate", "--config", "run/config.yaml", "--prompt", "the film", "--sampling.max_new_tokens", "4"],
        ["export", "--config", "run/config.yaml", "--folder", "out"],
    ]
    # without HF_HUB_OFFLINE, which the tests set elsewhere
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | SECRETS
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    ended = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["codes"] == [0, 2, 0, 0], ended.stderr
    assert result["asked"] == []
    assert result["asked by a hub id"] > 0  # the guard sees what there is to see
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt", "README.md", "metrics.csv", "samples.jsonl"} <= {path.name for path in written}
    assert "Traceback" in ended.stderr
    for said in (ended.stdout.encode(), ended.stderr.encode(), *(path.read_bytes() for path in written)):
        assert b"marker-of-" not in said


PLACES = {
    "a file": lambda config, value: config["trainer"].update(
        logger=[{"class_path": "WandbLogger", "init_args": {"project": f"key={value}"}}]
    ),
    "a list": lambda config, value: config["data"].update(train=["train.jsonl", value]),
    "a key": lambda config, value: config.update({value: 1}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_a_config_that_holds_a_secret_is_refused_and_not_repeated(config, monkeypatch, refused, place, name):
    monkeypatch.setenv(name, SECRETS[name])
    PLACES[place](config, SECRETS[name])
    said = refused("fit", "--config", write(config))
    assert f"the value of the environment variable {name}" in said
    assert "leave it to the environment" in said
    assert "fit.yaml:" in said
    assert SECRETS[name] not in said
    assert not Path("run").exists()


def test_so_is_a_command_line(config, monkeypatch, refused):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    write(config)
    secret = SECRETS["WANDB_API_KEY"]
    chain = {"variables": {"name": "a"}, "stages": {"sft": {"config": "fit.yaml"}}}
    for args in (
        ["fit", "--config", "fit.yaml", f"--data.train={secret}"],
        ["generate", "--config", "fit.yaml", "--prompt", secret],
        ["chain", "--config", write(chain, "chain.yaml"), "--set", f"name={secret}"],
        ["chain", "--config", write(chain | {"variables": {"name": secret}}, "chain.yaml")],
    ):
        said = refused(*args)
        assert "the value of the environment variable WANDB_API_KEY" in said
        assert secret not in said


def test_tokens_are_known_by_their_form_too(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "unlikely-word")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    assert secret_in("tokens: unlikely-word, true, hf_short, sk-short") is None
    assert secret_in("x: hf_" + "a1" * 17) == ("a Hugging Face token", 3)
    assert secret_in("sk-" + "a1" * 20) == ("an API key", 0)


def test_without_the_check_the_token_would_have_been_kept(config, monkeypatch):
    # set after the config was read: what a config holds is what config.yaml and the model card hold
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config["data"]["train"] = {"path": "train.jsonl", "columns": {"prompt": "prompt"}}
    Path("marker-of-hf-token").mkdir()
    config["trainer"]["default_root_dir"] = "marker-of-hf-token/run"
    assert main(["fit", "--config", write(config)]) == 0
    for name in ("config.yaml", "hf/README.md"):
        assert SECRETS["HF_TOKEN"] in Path("marker-of-hf-token/run", name).read_text()
