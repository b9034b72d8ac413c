"""No config, file or variable names code that is then imported, unless the user allows it on the command line."""

import copy
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable

from rlhf_lightning.__main__ import SUBCOMMANDS, main
from rlhf_lightning.cli.app import family
from rlhf_lightning.cli.imports import only_from
from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.chain_spec import read_chain
from rlhf_lightning.rewards.python_function import PythonFunction

REPOSITORY = Path(__file__).resolve().parents[2]


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def naive(kind: object, value: object) -> object:
    """What jsonargparse does for an option of this type when nobody tells it what to import."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser.parse_object({"value": value})


STAGE = {"class_path": "stranger.Stage"}
OPTIMIZER = {"class_path": "stranger.Optimizer"}
SPY = {"class_path": "stranger.Spy"}

PLACES = {
    "stage": (("model", "class_path"), "stranger.Stage"),
    "stage, short": (("model",), "stranger.Stage"),
    "optimiser": (("model", "init_args", "optimizer", "class_path"), "stranger.Optimizer"),
    "optimiser, short": (("model", "init_args", "optimizer"), "stranger.Optimizer"),
    "callback": (("trainer", "callbacks"), [SPY]),
    "callback, short": (("trainer", "callbacks"), ["stranger.Spy"]),
    "callbacks as a text": (("trainer", "callbacks"), json.dumps([SPY])),
    "optimiser as a text": (("model", "init_args", "optimizer"), "{class_path: stranger.Optimizer}"),
    "through another module": (("model", "init_args", "optimizer"), "rlhf_lightning.stranger.Optimizer"),
    "what a module of ours imports": (
        ("model", "init_args", "optimizer"),
        "rlhf_lightning.rewards.sandbox.subprocess.run",
    ),
    "torch's own loader": (("model", "init_args", "optimizer"), "torch.hub.load"),
    "Python's own": (("model", "init_args", "optimizer"), "os.system"),
}


def put(config: dict, keys: tuple[str, ...], value: object) -> dict:
    config = copy.deepcopy(config)
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return config


@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_a_config_names_is_imported(config, refused, place):
    keys, value = PLACES[place]
    said = refused("fit", "--config", write(put(config, keys, value)))
    assert "fit.yaml:" in said
    assert ".".join(keys) in said or keys[-1] in said
    assert any(text in said for text in ("stranger", "subprocess", "torch.hub.load", "os.system"))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Callback, SPY),
        (Callback, "stranger.Spy"),
        (list[Callback], json.dumps([SPY])),
        (OptimizerCallable, OPTIMIZER),
        (OptimizerCallable, "stranger.Optimizer"),
        (family()[0], STAGE),
    ],
    ids=str,
)
def test_where_nobody_defends_the_same_values_are_imported(config, works, mark, kind, value):
    with only_from(()), pytest.raises((jsonargparse.ArgumentError, SystemExit)):
        naive(kind, value)
    assert not mark.exists()
    works(lambda: naive(kind, value))  # and the list is gone again where it ends


def test_a_callable_is_followed_to_where_it_was_defined(config):
    found = naive(OptimizerCallable | None, None)
    assert found.value is None
    for path in ("rlhf_lightning.rewards.sandbox.subprocess.run", "torch.os.system"):
        module, _, name = path.rpartition(".")
        home, _, inner = module.rpartition(".")
        assert callable(getattr(getattr(import_module(home), inner), name))  # it is there to be had
        with only_from(()), pytest.raises((jsonargparse.ArgumentError, SystemExit)):
            naive(OptimizerCallable, path)


OPTIONS = {
    "--model": "stranger.Stage",
    "--model.class_path": "stranger.Stage",
    "--model.optimizer": "stranger.Optimizer",
    "--trainer.callbacks": json.dumps([SPY]),
    "--trainer.callbacks+": "stranger.Spy",
    "--trainer.logger": "stranger.Spy",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_command_line_are_held_to_the_same_list(config, refused, option):
    write(config)
    assert "stranger" in refused("fit", "--config", "fit.yaml", f"{option}={OPTIONS[option]}")


@pytest.mark.parametrize("subcommand", sorted(set(SUBCOMMANDS) - {"chain"}))
def test_every_subcommand_reads_configs_alike(config, refused, subcommand):
    write(put(config, ("model", "class_path"), "stranger.Stage"))
    assert "--allow_module stranger" in refused(subcommand, "--config", "fit.yaml")
    write(put(config, ("trainer", "callbacks"), ["stranger.Spy"]))
    assert "--allow_module stranger" in refused(subcommand, "--config", "fit.yaml")


def test_files_that_a_config_names_are_read_too(config, refused):
    config["model"]["init_args"]["optimizer"] = "inner.yaml"
    Path("inner.yaml").write_text("class_path: torch.optim.AdamW\nclass_path: stranger.Optimizer\n")
    assert "inner.yaml:2: model.init_args.optimizer.class_path is set twice" in refused(
        "fit", "--config", write(config)
    )
    Path("inner.yaml").write_text("class_path: stranger.Optimizer\n")
    assert "inner.yaml:1: " in refused("fit", "--config", write(config))


def test_environment_variables_are_no_config(config, monkeypatch, mark, works):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PL_FIT__MODEL", "stranger.Stage")
    monkeypatch.setenv("RLHF_LIGHTNING_FIT__MODEL", "stranger.Stage")
    assert main(["fit", "--config", write(config), "--trainer.fast_dev_run", "true"]) == 0
    assert not mark.exists()

    def unguarded() -> None:
        monkeypatch.setenv("APP_MODEL", "stranger.Stage")
        parser = jsonargparse.ArgumentParser(env_prefix="APP", exit_on_error=False)
        parser.add_argument("--model", type=family()[0])
        parser.parse_args([])

    works(unguarded)


# --- functions


@pytest.mark.parametrize(
    "path",
    ["stranger.reward", "stranger:reward", "stranger.py:reward", "torch.hub:load", "rlhf_lightning.__main__:main"],
)
def test_functions_are_those_that_the_user_names(config, refused, path):
    model = config["model"]["init_args"]["policy"]
    rewards = [{"reward": {"class_path": "PythonFunction", "init_args": {"path": path}}}]
    config["model"] = {"class_path": "PPOModule", "init_args": {"policy": model, "rewards": rewards}}
    said = refused("fit", "--config", write(config))
    assert "fit.yaml:" in said
    assert path in said
    given = json.dumps(rewards)
    assert path in refused("fit", "--config", write(config), f"--model.rewards={given}")


def test_a_function_of_a_stranger_runs_where_nobody_defends(config, works):
    works(lambda: PythonFunction("stranger.reward"))  # from Python, where whoever calls decides
    works(lambda: PythonFunction("stranger.py:reward"))


# --- chains

CHAINS = {
    "step": {"class_path": "stranger.Step"},
    "step of torch": {"class_path": "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent"},
    "what a step's module imports": {"class_path": "rlhf_lightning.pipelines.files.tempfile.TemporaryDirectory"},
    "override": {"config": "fit.yaml", "overrides": {"model": "stranger.Stage"}},
    "override of a key": {"config": "fit.yaml", "overrides": {"model.class_path": "stranger.Stage"}},
    "override as a mapping": {"config": "fit.yaml", "overrides": {"model.optimizer": OPTIMIZER}},
    "override by a variable": {"config": "fit.yaml", "overrides": {"model.class_path": "${evil}"}},
    "config": {"config": "evil.yaml"},
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_refused_before_its_first_stage_runs(config, refused, name):
    write(config)
    write(put(config, ("model", "class_path"), "stranger.Stage"), "evil.yaml")
    chain = {"variables": {"evil": "stranger.Stage"}, "stages": {"first": {"config": "fit.yaml"}, "x": CHAINS[name]}}
    assert "error: " in refused("chain", "--config", write(chain, "chain.yaml"))
    assert not Path("runs").exists()


def test_a_step_runs_where_nobody_defends(config, works):
    write({"stages": {"x": CHAINS["step"]}}, "chain.yaml")
    step = read_chain("chain.yaml").stages[0]
    works(lambda: import_module(str(step.class_path).split(".")[0]).Step().run())


# --- what the user allows


def test_a_module_that_is_named_is_imported(config, mark):
    own = put(config, ("model", "class_path"), "stranger.Stage")
    for flag in (["--allow_module", "stranger"], ["--allow-module=other,stranger"]):
        assert main(["fit", "--config", write(own), "--trainer.fast_dev_run", "true", *flag]) == 0
        assert mark.exists()
    sys.modules.pop("stranger")
    assert main(["fit", "--config", "fit.yaml"]) == 2  # for that one start only


def test_a_chain_passes_on_what_is_allowed(config, mark):
    write(put(config, ("model", "class_path"), "stranger.Stage"))
    chain = {"stages": {"fit": {"config": "fit.yaml"}, "step": {"class_path": "stranger.Step"}}}
    assert main(["chain", "--config", write(chain, "chain.yaml"), "--allow_module", "stranger"]) == 0
    assert mark.exists()


def test_a_config_cannot_allow_itself(config, refused):
    said = refused("fit", "--config", write(config | {"allow_module": "stranger"}))
    assert "allow_module is not a section" in said


@pytest.mark.parametrize("name", ["os", "subprocess.run", "jsonargparse"])
def test_python_itself_cannot_be_allowed(config, refused, name):
    assert "name one of yours" in refused("fit", "--config", write(config), "--allow_module", name)


def test_the_flag_needs_a_name(config, refused):
    assert "--allow_module needs a name" in refused("fit", "--config", write(config), "--allow_module")


def test_the_longest_entry_decides():
    with trust.only_from(["mine", "torch.hub"]):
        allowed = ("torch.optim.AdamW", "mine.rewards.polite", "torch.hub.load", "datetime.timedelta")
        assert all(trust.allows(path) for path in allowed)
        assert not any(trust.allows(path) for path in ("torch.load", "minefield.X", "torchx.Y", "os.system", "Short"))
    with trust.only_from(()):
        assert not trust.allows("torch.hub.load")
    assert trust.allows("os.system")  # outside: a program in Python
    with pytest.raises(UserError, match="sys is not a module made for training"), trust.only_from(["sys"]):
        pass


def test_a_file_beside_the_config_is_not_taken_for_a_package(config, mark):
    # uninstalled packages are looked for, and installed ones imported, everywhere on the path
    for name in ("bitsandbytes", "transformers", "flash_attn"):
        Path(f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config["model"]["init_args"]["optimizer"] = {"class_path": "bitsandbytes.optim.NoSuchOptimizer"}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, "-m", "rlhf_lightning", "fit", "--config", write(config)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert not mark.exists()
    subprocess.run([sys.executable, "-c", "import bitsandbytes"], check=True)
    assert mark.exists()


def test_an_option_of_any_type_builds_nothing():
    value = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {}}

    def built() -> object:
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=Any)
        return parser.instantiate_classes(parser.parse_object({"value": value})).value

    with only_from(()):
        assert not isinstance(built(), Callback)
    assert isinstance(built(), Callback)  # as jsonargparse does by itself
