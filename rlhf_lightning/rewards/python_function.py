"""Any Python function as a reward."""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_lightning.core import trust
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, Sample, Scores
from rlhf_lightning.rewards.conversation import prompt_messages

ALLOWED = "RLHF_LIGHTNING_REWARD_MODULES"
"""Environment variable: the only modules and files that functions may come from."""
OWN_ARGUMENTS = ("samples", "prompts", "completions", "completion_ids", "finished")


class PythonFunction(RewardFn):
    """A reward from a function of your own.

    The function is called with a list per argument, one entry per sample, and only with the arguments that it names:

        def reward(prompts, completions, **columns) -> list[float]

    `prompts` and `completions` are strings; of conversational records they are lists of messages. `completion_ids` are
    the answers' tokens, `finished` says whether each ended by itself, every other name is a column of the records
    (`answer`, `category`, ...; None where a record has no such column), and `samples` is the list of
    `core.interfaces.Sample`. It returns one number per sample, or for each sample a list with one number per token. It
    may be `async def`: one call answers the whole batch, and awaits what it asks for side by side.

    The path is a name in the config, never in the data. Where the environment variable RLHF_LIGHTNING_REWARD_MODULES
    is set (module names and files, separated by commas), nothing outside of it is imported.

    Args:
        path: where the function is: `package.module.function`, or `folder/file.py:function`.
        kwargs: further arguments, the same in every call.
    """

    def __init__(self, path: str, kwargs: dict[str, Any] | None = None) -> None:
        self.path = path
        self.kwargs = dict(kwargs or {})
        self._function = _find(path)
        self.name = path.replace(":", ".").rpartition(".")[2]
        self._parameters = _parameters(path, self._function)
        self._takes_everything = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        self._check_kwargs()

    def __reduce__(self) -> tuple[Any, ...]:
        # by name: a function from a file cannot be pickled
        return PythonFunction, (self.path, self.kwargs)

    def __call__(self, samples: Sequence[Sample]) -> Scores | Awaitable[Scores]:
        offered = _arguments(samples) | self.kwargs
        if self._takes_everything:
            taken = {name: value for name, value in offered.items() if name != "samples" or name in self._parameters}
        else:
            taken = {name: value for name, value in offered.items() if name in self._parameters}
        for name, parameter in self._parameters.items():
            if parameter.default is parameter.empty and parameter.kind not in _VARIADIC and name not in taken:
                columns = sorted(set(offered) - set(OWN_ARGUMENTS) - set(self.kwargs))
                raise UserError(
                    f"reward function {self.path} asks for {name!r}, which is neither a column of the records "
                    f"({', '.join(columns) or 'they have none'}) nor in kwargs, nor one of {', '.join(OWN_ARGUMENTS)}"
                )
        result: Scores | Awaitable[Scores] = self._function(**taken)
        return result

    def _check_kwargs(self) -> None:
        for name in self.kwargs:
            if name in OWN_ARGUMENTS:
                raise UserError(f"kwargs.{name} of reward function {self.path}: this argument is filled by the samples")
            if name not in self._parameters and not self._takes_everything:
                near = difflib.get_close_matches(name, self._parameters, 1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(self._parameters)}"
                raise UserError(f"kwargs.{name}: reward function {self.path} has no such argument; {hint}")


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _arguments(samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything that a function may ask for, by name."""
    prompts: list[Any] = []
    completions: list[Any] = []
    for sample in samples:
        messages = prompt_messages(sample)
        prompts.append(sample.prompt if messages is None else messages)
        answer = [{"role": "assistant", "content": sample.completion}]
        completions.append(sample.completion if messages is None else answer)
    columns = {name for sample in samples for name in sample.record} - {"prompt", "completion"}
    return {name: [sample.record.get(name) for sample in samples] for name in sorted(columns)} | {
        "samples": list(samples),
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [list(sample.tokens) for sample in samples],
        "finished": [sample.finished for sample in samples],
    }


def _find(path: str) -> Callable[..., Any]:
    """The function that `path` names."""
    home, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not home or not name:
        raise UserError(f"reward function {path!r}: give package.module.function, or folder/file.py:function")
    if not trust.allows_function(home):
        raise UserError(f"reward function {path!r}: {trust.function_refusal(path, home)}")
    _check_allowed(path, home)
    module = _load_file(path, Path(home)) if home.endswith(".py") else _load_module(path, home)
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, vars(module), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"reward function {path!r}: {home} has no {name!r}{hint}")
    if isinstance(found, type):
        raise UserError(f"reward function {path!r} is a class: name a function, or give the class as class_path")
    if not callable(found):
        raise UserError(f"reward function {path!r} is {found!r:.60}, which cannot be called")
    function: Callable[..., Any] = found
    return function


def _check_allowed(path: str, home: str) -> None:
    """The list of whoever runs the machine, if there is one, holds the module (or one above it) or the file."""
    allowed = [entry.strip() for entry in os.environ.get(ALLOWED, "").split(",") if entry.strip()]
    if not allowed:
        return
    if home.endswith(".py"):
        inside = any(Path(home).expanduser().resolve() == Path(entry).expanduser().resolve() for entry in allowed)
    else:
        inside = any(home == entry or home.startswith(f"{entry}.") for entry in allowed)
    if not inside:
        raise UserError(
            f"reward function {path!r}: {home} is not among what {ALLOWED} allows ({', '.join(allowed)}): add it there"
        )


def _load_module(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(f"reward function {path!r}: importing {name} raised {error!r}") from error
        raise UserError(
            f"reward function {path!r}: there is no module {error.name!r} on Python's path; install it, put its folder "
            "on PYTHONPATH, or give the file: folder/file.py:function"
        ) from error
    except Exception as error:
        raise UserError(f"reward function {path!r}: importing {name} raised {error!r}") from error


def _load_file(path: str, file: Path) -> ModuleType:
    if not file.expanduser().is_file():
        raise UserError(f"reward function {path!r}: there is no file {file.expanduser().absolute()}")
    spec = importlib.util.spec_from_file_location(f"_reward_{file.stem}", file.expanduser())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"reward function {path!r}: running {file} raised {error!r}") from error
    return module


def _parameters(path: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise UserError(f"reward function {path!r} does not say what it takes: wrap it in a def of your own") from error
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(f"reward function {path!r}: {name!r} is positional-only, but arguments are given by name")
    return parameters
