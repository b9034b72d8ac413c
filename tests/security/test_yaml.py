"""What YAML lets pass without a word: tags, doubles, numbers that are none, aliases without an end."""

import time
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli.sources import ConfigSources
from rlhf_lightning.core.errors import UserError


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


TAGS = {
    "call": "!!python/object/apply:os.mknod ['{mark}']",
    "object": "!!python/object/new:os.mknod ['{mark}']",
    "module": "!!python/module:stranger",
    "name": "!!python/name:stranger.Step",
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["value", "key", "item"])
def test_tags_do_nothing(config, refused, works, mark, tag, place):
    if place == "key" and tag in ("call", "object"):
        pytest.skip("YAML has no such key")
    evil = TAGS[tag].format(mark=mark)
    line = {"value": f"x: {evil}", "key": f"? {evil}\n: 1", "item": f"x:\n- 1\n- {evil}"}[place]
    write(config)
    with Path("fit.yaml").open("a") as file:
        file.write(f"{line}\n")
    for command in (["fit"], ["generate"], ["export"], ["chain"]):
        said = refused(*command, "--config", "fit.yaml")
        assert "is not allowed" in said
        assert "fit.yaml:" in said
    if tag in ("call", "module"):
        works(lambda: yaml.unsafe_load(f"import: !!python/module:stranger\n{line}"))


BAD = {
    "twice": ("batch_size: 4", "batch_size: 4\n  batch_size: 5", "data.batch_size is set twice, first in line"),
    "twice, deep": ("lr: 0.001", "{lr: 0.001, lr: 1}", "lr is set twice"),
    "nan": ("lr: 0.001", "lr: .nan", ".nan is not a number"),
    "infinite": ("lr: 0.001", "lr: -.inf", "-.inf is not a number"),
    "too large for a float": ("lr: 0.001", "lr: 1e999", "inf is not a number"),
    "seed": ("seed_everything: 1", "seed_everything: -1", "seed_everything=-1: a seed is"),
    "seed, large": ("seed_everything: 1", "seed_everything: 4294967296", "seed_everything=4294967296: a seed is"),
    "decay": ("lr: 0.001", "lr: 0.001\n        weight_decay: -0.1", "weight_decay=-0.1: give 0 or more"),
    "eps": ("lr: 0.001", "lr: 0.001\n        eps: -1.0", "eps=-1.0: give 0 or more"),
    "betas": ("lr: 0.001", "lr: 0.001\n        betas: [0.9, 1.0]", "betas=1.0: give 0 or more, below 1"),
    "share of batches": ("max_epochs: 1", "limit_train_batches: 1.5", "limit_train_batches=1.5: give a share"),
    "negative share": ("max_epochs: 1", "limit_val_batches: -1", "limit_val_batches=-1: give a share"),
    "logging": ("max_epochs: 1", "log_every_n_steps: -1", "log_every_n_steps=-1: give 0 (never) or more"),
    "epochs": ("max_epochs: 1", "max_epochs: -5", "max_epochs` must be a non-negative integer or -1"),
    "batch": ("batch_size: 4", "batch_size: 0", "batch_size=0 must be at least 1"),
    "adapter": ("tokenizer:", "lora: {alpha: -1.0}\n      tokenizer:", "lora.alpha=-1.0: the scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_cannot_be_meant_are_named_with_their_place(config, refused, name):
    right, wrong, said = BAD[name]
    text = Path(write(config)).read_text()
    assert right in text
    Path("bad.yaml").write_text(text.replace(right, wrong, 1))
    message = refused("fit", "--config", "bad.yaml")
    assert said in message
    if name != "epochs":  # Lightning's own words
        assert "bad.yaml:" in message


def test_doubles_in_quoted_yaml_are_seen_too(config, refused):
    config["model"]["init_args"]["optimizer"] = "{class_path: torch.optim.AdamW, init_args: {lr: 0.1, lr: 0.2}}"
    text = Path(write(config)).read_text()
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "optimizer" in row)
    assert f"fit.yaml:{line}: model.init_args.optimizer.init_args.lr is set twice" in refused(
        "fit", "--config", "fit.yaml"
    )


ENDLESS = {
    "many": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "itself": "a: &a {b: *a}\n",
    "itself, in a list": "a: &a [*a]\n",
    "deep": "a: " + "[" * 90 + "]" * 90 + "\n",
    "deeper": "a: " + "[" * 20_000 + "]" * 20_000 + "\n",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_config_without_an_end_is_refused_at_once(tmp_path, monkeypatch, refused, name):
    Path("endless.yaml").write_text(ENDLESS[name])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"endless\.yaml.*(no config is as deep or as large|nested too deeply)"):
        ConfigSources.of_command_line(["--config", "endless.yaml"]).check()
    assert time.monotonic() - began < 20
