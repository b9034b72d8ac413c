"""A chain's YAML: its variables, its stages, and the `${...}` by which one stage names what another has written."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.core.errors import UserError

REFERENCE = re.compile(r"\$\{([^}]*)\}")
CHAIN_KEYS = ("run_dir", "variables", "stages")
FIT_KEYS = ("config", "overrides", "own_process")
STEP_KEYS = ("class_path", "init_args")
FIT_OUTPUTS = {"folder": "", "hf": "hf", "checkpoint": "checkpoints/last.ckpt", "metrics": "metrics.csv"}
"""What a training stage writes, by the name that later stages call it."""


@dataclass(frozen=True)
class StageSpec:
    """One stage as it stands in the YAML, references not yet filled in."""

    name: str
    config: str | None = None
    """A config for `rlhf-lightning fit`; None for a step in Python."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of that config and their values here."""
    own_process: bool = False
    class_path: str | None = None
    """A dataclass with `run(self)`; None for training."""
    init_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"fit {self.config}" if self.config else str(self.class_path)


@dataclass(frozen=True)
class ChainSpec:
    """A whole chain."""

    file: str
    run_dir: str
    variables: Mapping[str, Any]
    stages: Sequence[StageSpec]
    usual_run_dir: str = ""
    """The run_dir of the file, before settings."""

    def folder(self, stage: str) -> Path:
        return Path(self.run_dir) / stage


def read_chain(
    file: str | Path, settings: Sequence[str] = (), check_yaml: Callable[[str], None] | None = None
) -> ChainSpec:
    """Reads a chain and applies settings from the command line.

    Args:
        file: the YAML.
        settings: NAME=VALUE, where NAME is a variable, run_dir, or STAGE.KEY of a stage's config or init_args.
        check_yaml: told the file's name before it is read; raises where YAML would keep silent.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such chain file")
    if check_yaml is not None:
        check_yaml(str(file))
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file}: a chain has the keys {', '.join(CHAIN_KEYS)}")
    _known(content, CHAIN_KEYS, f"{file}")
    if not content.get("stages"):
        raise UserError(f"{file}: stages is missing: name at least one, such as sft: {{config: configs/sft.yaml}}")
    stages = {name: _stage(file, name, entry) for name, entry in content["stages"].items()}
    variables = dict(content.get("variables") or {})
    run_dir = usual_run_dir = str(content.get("run_dir") or f"runs/{path.stem}")
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write NAME=VALUE, such as --set seed=2")
        value = yaml.safe_load(text)
        stage, _, key = name.partition(".")
        if name == "run_dir":
            run_dir = str(value)
        elif name in variables:
            variables[name] = value
        elif stage in stages and key:
            stages[stage] = _set(stages[stage], key, value)
        else:
            known = [*variables, "run_dir", *(f"{stage}." for stage in stages)]
            raise UserError(f"--set {name}: the chain has no such variable or stage; {_nearest(name, known)}")
    variables["run_dir"] = run_dir = str(substitute(run_dir, variables, f"{file}: run_dir"))
    variables = {name: substitute(value, variables, f"{file}: variables.{name}") for name, value in variables.items()}
    spec = ChainSpec(str(file), run_dir, variables, list(stages.values()), usual_run_dir)
    _check_references(spec)
    return spec


def substitute(value: Any, names: Mapping[str, Any], where: str) -> Any:
    """`value` with every `${name}` in its texts filled in; a text that is one reference alone keeps the type.

    Args:
        value: any JSON-like value.
        names: what may be referred to.
        where: where the value stands, for the message.
    """
    if isinstance(value, Mapping):
        return {key: substitute(inner, names, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [substitute(inner, names, where) for inner in value]
    if not isinstance(value, str):
        return value

    def filled(name: str) -> Any:
        if name not in names:
            raise UserError(f"{where}: there is no ${{{name}}}; {_nearest(name, names)}")
        return names[name]

    if match := REFERENCE.fullmatch(value):
        return filled(match[1])
    return REFERENCE.sub(lambda match: str(filled(match[1])), value)


def _stage(file: str | Path, name: str, entry: Any) -> StageSpec:
    where = f"{file}: stages.{name}"
    if not re.fullmatch(r"[A-Za-z_][\w-]*", str(name)):
        raise UserError(f"{where}: a stage's name is also its folder; use letters, digits, _ and -")
    if not isinstance(entry, dict) or ("config" in entry) == ("class_path" in entry):
        raise UserError(f"{where}: give either config (a YAML for fit) or class_path (a dataclass with run(self))")
    _known(entry, FIT_KEYS if "config" in entry else STEP_KEYS, where)
    return StageSpec(name, **{key: value for key, value in entry.items() if value is not None})


def _set(stage: StageSpec, key: str, value: Any) -> StageSpec:
    if stage.config is not None:
        return replace(stage, overrides={**stage.overrides, key: value})
    return replace(stage, init_args={**stage.init_args, key.removeprefix("init_args."): value})


def _known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}: {key} is not a key here; {_nearest(str(key), known)}")


def _check_references(spec: ChainSpec) -> None:
    """Before anything runs: every `${stage.output}` names an earlier stage, and one that it can write."""
    earlier: dict[str, StageSpec] = {}
    for stage in spec.stages:
        where = f"{spec.file}: stages.{stage.name}"
        for name in references([stage.overrides, stage.init_args, stage.config]):
            owner, _, output = name.partition(".")
            if name in spec.variables or name == "folder":
                continue
            if owner not in earlier or not output:
                known = [*spec.variables, "folder", *(f"{e}.{o}" for e in earlier for o in FIT_OUTPUTS)]
                later = " (it runs later)" if owner in {s.name for s in spec.stages} else ""
                raise UserError(f"{where}: there is no ${{{name}}} yet{later}; {_nearest(name, known)}")
            if earlier[owner].config is not None and output not in FIT_OUTPUTS:
                raise UserError(f"{where}: fit does not write ${{{name}}}; {_nearest(output, FIT_OUTPUTS)}")
        earlier[stage.name] = stage


def strays(config: Any, overrides: Mapping[str, Any], folder: str) -> list[tuple[str, str]]:
    """Keys of a config, none of them overridden, whose value lies in `folder`; the run folder itself aside.

    Args:
        config: a stage's config as it stands in its file.
        overrides: dotted keys, whose init_args levels may be left out.
        folder: where nothing should lie.
    """
    replaced = [_short(key) for key in overrides] + ["trainer.default_root_dir"]

    def walk(value: Any, key: str) -> list[tuple[str, str]]:
        if any(_short(key) == other for other in replaced):
            return []
        if isinstance(value, str):
            return [(key, value)] if value.startswith(folder.rstrip("/") + "/") else []
        pairs = value.items() if isinstance(value, Mapping) else []
        found = [stray for name, inner in pairs for stray in walk(inner, f"{key}.{name}" if key else str(name))]
        items = value if isinstance(value, list) else []
        return found + [stray for inner in items for stray in walk(inner, key)]

    return walk(config, "")


def _short(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def references(value: Any) -> list[str]:
    """Names of all `${...}` in a JSON-like value."""
    if isinstance(value, str):
        return REFERENCE.findall(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [name for item in inner for name in references(item)]


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
