"""Stage after stage from one YAML: what is finished and valid is skipped, what broke goes on from its checkpoint."""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.pipelines.chain_report import StageResult, last_metrics, readable_time, show_summary
from rlhf_lightning.pipelines.chain_spec import FIT_OUTPUTS, ChainSpec, StageSpec, references, strays, substitute
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.pipelines.fingerprint import existing_paths, fingerprint, fingerprint_path
from rlhf_lightning.pipelines.rooms import import_rooms

Launch = Callable[[list[str]], int]
"""Runs one command line (`fit --config ...`) and returns its exit code."""

STEP_FAMILY = ("rlhf_lightning",)
"""Where steps may come from, beside what the user names."""


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with every reference filled in: all that decides what it does."""

    spec: StageSpec
    folder: Path
    settings: Mapping[str, Any]
    """Overrides of a training stage, init_args of a step."""

    def fingerprint(self) -> str:
        config = None if self.spec.config is None else yaml.safe_load(Path(self.spec.config).read_text("utf-8"))
        return fingerprint([self.spec.config and config, self.spec.class_path, self.settings])

    def inputs(self, outputs: Iterable[str] = ()) -> dict[str, str]:
        """Every file and folder that the settings or the config name, less what the stage itself writes."""
        config = None if self.spec.config is None else yaml.safe_load(Path(self.spec.config).read_text("utf-8"))
        own = [self.folder, *map(Path, outputs)]
        inside = {path.resolve() for path in own}
        paths = [p for p in existing_paths([self.settings, config]) if not inside & set(_line(Path(p)))]
        return {path: fingerprint_path(path, without=own) for path in paths}

    def outputs(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What the stage has written: a training stage its export, a step its folder and the paths it gave back."""
        if self.spec.config is not None:
            return {str(self.folder / "hf"): fingerprint_path(self.folder / "hf")}
        inside = [p for p in sorted(self.folder.glob("*")) if p.name not in ("started.json", "finished.json")]
        paths = {str(path) for path in inside} | set(existing_paths(list(values.values())))
        return {path: fingerprint_path(path) for path in sorted(paths)}

    def command(self, resume: str, overwrite: bool) -> list[str]:
        args = ["fit", "--config", str(self.spec.config), f"--trainer.default_root_dir={self.folder}"]
        args += [f"--{key}={_argument(value)}" for key, value in self.settings.items()]
        return [*args, f"--resume={resume}", f"--overwrite={str(overwrite).lower()}"]


def run_chain(
    spec: ChainSpec,
    launch: Launch,
    *,
    check: Launch | None = None,
    start_at: str | None = None,
    force: bool = False,
    options: Sequence[str] = (),
) -> int:
    """Runs the stages in order.

    Args:
        spec: the chain.
        launch: runs a training stage in this process.
        check: reads a training stage's command line without running it; so a misspelt key in the last stage is found
            before the first one starts.
        start_at: run this stage and all later ones anew.
        force: run all stages anew.
        options: further options of every training stage.
    Returns:
        0, or the exit code of the stage that failed.
    """
    names = [stage.name for stage in spec.stages]
    if start_at is not None and start_at not in names:
        raise UserError(f"--from {start_at}: the chain has no such stage; it has {', '.join(names)}")
    anew = set(names if force else [] if start_at is None else names[names.index(start_at) :])
    check_chain(spec, check, options)
    known: dict[str, Any] = dict(spec.variables)
    results: list[StageResult] = []
    for number, stage in enumerate(spec.stages, start=1):
        title = f"[{number}/{len(names)}] {stage.name}"
        resolved = _resolve(spec, stage, known)
        finished = None if stage.name in anew else _finished(resolved)
        if finished is not None:
            print(f"{title}: finished before, in {readable_time(finished['seconds'])}; skipped", flush=True)
            result = StageResult(stage.name, stage.what, "skipped", finished["seconds"], finished["values"])
        else:
            print(f"{title}: {stage.what}", flush=True)
            code, result = _run_stage(resolved, launch, stage.name in anew, options)
            if code != 0:
                results += [
                    result,
                    *(StageResult(s.name, s.what, "not reached", 0.0, {}) for s in spec.stages[number:]),
                ]
                show_summary(results)
                remedy = "the same command goes on from here"
                print(f"chain stopped at {stage.name} (exit code {code}); {remedy}", file=sys.stderr)
                return code
            print(f"{title}: done in {readable_time(result.seconds)}", flush=True)
        results.append(result)
        known |= {f"{stage.name}.{key}": value for key, value in _given(resolved, result.values).items()}
    show_summary(results)
    return 0


# --- one stage


def _resolve(spec: ChainSpec, stage: StageSpec, known: Mapping[str, Any]) -> ResolvedStage:
    folder = spec.folder(stage.name)
    names = {**known, "folder": str(folder)}
    where = f"{spec.file}: stages.{stage.name}"
    settings = substitute(stage.overrides if stage.config else stage.init_args, names, where)
    config = substitute(stage.config, names, f"{where}.config")
    if config is not None and not Path(config).is_file():
        raise UserError(f"{where}.config: there is no file {config}")
    elsewhere = settings.get("trainer.default_root_dir", str(folder)) if config is not None else str(folder)
    if Path(elsewhere) != folder:
        raise UserError(
            f"{where}: trainer.default_root_dir is {elsewhere}; a chain's stage runs in {folder}: leave it out"
        )
    filled = StageSpec(stage.name, config, settings, stage.own_process, stage.class_path, settings)
    return ResolvedStage(filled, folder, settings)


def _finished(stage: ResolvedStage) -> dict[str, Any] | None:
    """The stage's finished.json, if it is there and nothing that it speaks of has changed since."""
    try:
        record = json.loads((stage.folder / "finished.json").read_text(encoding="utf-8"))
        valid = (
            record["config"] == stage.fingerprint()
            and record["inputs"] == stage.inputs(record["outputs"])
            and record["outputs"] == stage.outputs(record["values"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if valid else None


def _run_stage(stage: ResolvedStage, launch: Launch, anew: bool, options: Sequence[str]) -> tuple[int, StageResult]:
    started = {"config": stage.fingerprint(), "inputs": stage.inputs()}
    before = _read_json(stage.folder / "started.json")
    same = before == started and not anew
    if stage.spec.config is not None and before is None and not anew and _holds_a_run(stage.folder):
        raise UserError(
            f"the folder {stage.folder} holds a run that this chain has not started; delete it by "
            f"--from {stage.spec.name}, or name another place by --set run_dir=FOLDER"
        )
    (stage.folder / "finished.json").unlink(missing_ok=True)
    resumes = same and (stage.folder / "checkpoints" / "last.ckpt").exists()
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / "started.json", started)
    begin, code, values = time.monotonic(), 1, {}
    try:
        if stage.spec.config is None:
            code, values = 0, _run_step(stage)
        else:
            code = _fit(stage, launch, [*stage.command("auto" if same else "never", not same), *options])
            values = last_metrics(stage.folder / "metrics.csv") if code == 0 else {}
    finally:
        seconds = time.monotonic() - begin
        gc.collect()
    state = "failed" if code else "resumed" if resumes else "ran"
    if code == 0:
        outputs = stage.outputs(values)
        record = {"config": started["config"], "inputs": stage.inputs(outputs), "outputs": outputs, "values": values}
        write_json(stage.folder / "finished.json", {**record, "seconds": round(seconds, 3)})  # last, and all at once
    return code, StageResult(stage.spec.name, stage.spec.what, state, seconds, values)


def _fit(stage: ResolvedStage, launch: Launch, command: list[str]) -> int:
    if not (stage.spec.own_process or _needs_own_process(stage)):
        return launch(command)
    # several processes: Lightning starts the others by repeating this process's command line, which must be fit's
    return subprocess.run([sys.executable, "-m", "rlhf_lightning", *command], check=False).returncode


def _needs_own_process(stage: ResolvedStage) -> bool:
    config = yaml.safe_load(Path(str(stage.spec.config)).read_text("utf-8")) or {}
    trainer = {**(config.get("trainer") or {})}
    trainer |= {key.removeprefix("trainer."): v for key, v in stage.settings.items() if key.startswith("trainer.")}
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if devices in ("auto", -1, "-1") and trainer.get("accelerator", "auto") != "cpu":
        import torch

        return nodes > 1 or torch.cuda.device_count() > 1
    return nodes > 1 or not (devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1))


def _run_step(stage: ResolvedStage) -> dict[str, Any]:
    import_rooms("rewards")
    parser = ArgumentParser(exit_on_error=False)
    cls = _step_class(stage.spec)
    parser.add_class_arguments(cls, "step", fail_untyped=False)
    try:
        step = parser.instantiate_classes(parser.parse_object({"step": dict(stage.settings)})).step
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"stage {stage.spec.name}: {stage.spec.class_path}: {error}") from error
    values = step.run()
    if values is not None and not isinstance(values, Mapping):
        raise UserError(f"stage {stage.spec.name}: {cls.__name__}.run returned {type(values).__name__}, not a mapping")
    return {
        str(key): value if isinstance(value, int | float | str) else str(value) for key, value in (values or {}).items()
    }


def _step_class(spec: StageSpec) -> type:
    path = str(spec.class_path)
    # not of every package that a config may name: many have classes whose run() starts a process
    if not trust.allows(path, STEP_FAMILY):
        raise UserError(f"stage {spec.name}: {trust.refusal(path, STEP_FAMILY)}")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"stage {spec.name}: cannot import {spec.class_path}: {error}") from error
    home = f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', name)}"
    if not trust.allows(home, STEP_FAMILY):  # something that a module of ours has imported for itself
        raise UserError(f"stage {spec.name}: {path} is {home}: name it where it is defined")
    if not callable(getattr(cls, "run", None)):
        raise UserError(f"stage {spec.name}: {spec.class_path} has no run(self)")
    return cls


def check_chain(spec: ChainSpec, check: Launch | None, options: Sequence[str] = ()) -> None:
    """Reads every stage before the first one starts; values that steps will give back are stood in for."""
    known = dict(spec.variables)
    for stage in spec.stages:
        for name in (
            n for n in references([stage.overrides, stage.init_args, stage.config]) if n not in known and n != "folder"
        ):
            known[name] = "given-back-by-an-earlier-stage"
        resolved = _resolve(spec, stage, known)
        if stage.class_path is not None:
            _check_arguments(stage, _step_class(stage))
        else:
            _check_strays(spec, resolved)
            if check is not None:
                _check_options(
                    f"{spec.file}: stages.{stage.name}", check, [*resolved.command("never", False), *options]
                )
        known |= {f"{stage.name}.{key}": value for key, value in _given(resolved, {}).items()}


def _check_options(stage: str, check: Launch, command: list[str]) -> None:
    try:
        code = check(command)
    except UserError as error:
        raise UserError(f"{stage}: {error}") from error
    if code != 0:
        raise UserError(f"{stage} cannot be read")


def _check_strays(spec: ChainSpec, stage: ResolvedStage) -> None:
    """In another folder than usual, no config may go on reading what lies in the usual one."""
    if spec.run_dir == spec.usual_run_dir:
        return
    config = yaml.safe_load(Path(str(stage.spec.config)).read_text("utf-8"))
    for key, value in strays(config, stage.settings, spec.usual_run_dir):
        raise UserError(
            f"{spec.file}: stages.{stage.spec.name}: {stage.spec.config} has {key}: {value}, which is not in "
            f"{spec.run_dir}, this run's folder: override {key} by what an earlier stage writes here"
        )


def _check_arguments(stage: StageSpec, cls: type) -> None:
    parameters = signature(cls).parameters
    for key in stage.init_args:
        name = key.split(".")[0]
        if name not in parameters:
            near = get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(parameters)}"
            raise UserError(f"stage {stage.name}: {name} is not an option of {stage.class_path}; {hint}")
    given = {key.split(".")[0] for key in stage.init_args}
    missing = [n for n, p in parameters.items() if p.default is Parameter.empty and n not in given]
    if missing:
        raise UserError(f"stage {stage.name}: {stage.class_path} needs {', '.join(missing)} in init_args")


def _given(stage: ResolvedStage, values: Mapping[str, Any]) -> dict[str, Any]:
    """What later stages may refer to."""
    if stage.spec.config is None:
        return {"folder": str(stage.folder), **values}
    return {name: str(stage.folder / below) if below else str(stage.folder) for name, below in FIT_OUTPUTS.items()}


# --- small things


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _line(path: Path) -> list[Path]:
    resolved = path.resolve()
    return [resolved, *resolved.parents]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints", "hf"))
