"""What may stand under a key: the options of the class that the config names there."""

import dataclasses
import inspect
from abc import ABC
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from rlhf_lightning.advantages.kl_control import KLControl
from rlhf_lightning.cli.sources import ConfigSources, Place, short_key
from rlhf_lightning.core import interfaces, trust
from rlhf_lightning.losses.divergence import Divergence
from rlhf_lightning.losses.supervised import TokenLoss


def valid_children(parent: str, place: Place | None, sources: ConfigSources, parser: Any) -> set[str]:
    """Names that may stand under `parent`; empty if that cannot be told.

    Args:
        parent: a dotted key without its init_args levels; empty for the root.
        place: where the key in question was set: tells list items apart.
        sources: which class each key names.
        parser: of the subcommand.
    """
    dests = [action.dest for action in parser._actions]
    if not parent:
        return {dest.split(".")[0] for dest in dests} - {"help", "print_config", "print_shtab"}
    direct = {dest[len(parent) + 1 :].split(".")[0] for dest in dests if dest.startswith(f"{parent}.")}
    direct.discard("help")
    if direct:
        return direct
    head, rest = parent, ""
    while head:
        name = class_of(head, place, sources)
        if name is not None:
            cls = _import(name)
            return set() if cls is None else _options(cls, rest)
        head, _, last = head.rpartition(".")
        rest = f"{last}.{rest}".rstrip(".")
    if parent.startswith("data."):
        from rlhf_lightning.data.datamodule import RLHFDataModule

        return _options(RLHFDataModule, parent.removeprefix("data."))
    return set()


def class_of(key: str, place: Place | None, sources: ConfigSources) -> str | None:
    """The class that the config names for `key`, as written there; of several list items the one above `place`."""
    found = None
    for candidate in sources.places:
        is_class = short_key(candidate.key) == f"{key}.class_path"
        is_short = short_key(candidate.key) == key and candidate.value and candidate.value[0] not in "{["
        same_file = place is not None and candidate.file == place.file and bool(place.file)
        if (is_class or is_short) and not (same_file and place is not None and candidate.line > place.line):
            found = candidate.value
    return found


def known_classes(bases: Iterable[type] = ()) -> dict[str, type]:
    """Classes that a config may name without their module: those below `bases`, or all of them."""
    from rlhf_lightning.stages.base import RLHFModule

    # those that it defines: below ABC itself is half the world
    own = [v for v in vars(interfaces).values() if isinstance(v, type) and v.__module__ == interfaces.__name__]
    ours = [RLHFModule, *(cls for cls in own if issubclass(cls, ABC)), KLControl, Divergence, TokenLoss]
    bases = list(bases) or [*ours, Callback, Logger]
    found: dict[str, type] = {}
    while bases:
        for sub in type.__subclasses__(bases.pop()):
            if not (sub.__name__.startswith("_") or inspect.isabstract(sub)):
                found[sub.__name__] = sub
            bases.append(sub)
    return found


def wanted_bases(key: str, sources: ConfigSources) -> list[type]:
    """The classes of which one below is wanted under `key`; none if that cannot be told."""
    from rlhf_lightning.stages.base import RLHFModule

    by_key: dict[str, list[type]] = {"model": [RLHFModule], "trainer.callbacks": [Callback], "trainer.logger": [Logger]}
    if key in by_key:
        return by_key[key]
    head, _, rest = key.rpartition(".")
    while head:
        name = class_of(head, None, sources)
        cls = None if name is None else _import(name)
        if cls is not None:
            return [found for found in _classes_in(_hint(cls, rest.split("."))) if found.__module__ != "builtins"]
        head, _, last = head.rpartition(".")
        rest = f"{last}.{rest}"
    return []


def in_other_packages(name: str, bases: Iterable[type]) -> str | None:
    """The full name of a class that is not imported until a config names it."""
    home = "bitsandbytes.optim"
    with suppress(ImportError):
        if Optimizer in bases and hasattr(import_module(home), name):
            return f"{home}.{name}"
    return None


def _import(name: str) -> type | None:
    if "." not in name:
        return known_classes().get(name)
    if not trust.allows(name):
        return None
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute, None)
    except ImportError:
        return None


@lru_cache
def _options(cls: type, below: str) -> set[str]:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(cls, fail_untyped=False)
    except ValueError:
        return set()
    dests = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    if not below:
        return {dest.split(".")[0] for dest in dests}
    direct = {dest[len(below) + 1 :].split(".")[0] for dest in dests if dest.startswith(f"{below}.")} - {"help"}
    return direct or _fields(cls, below.split("."))


def _fields(cls: type, path: list[str]) -> set[str]:
    """Fields of the dataclasses that the annotation of an (optional, listed) argument mentions."""
    for found in _dataclasses_in(_hints(cls).get(path[0])):
        if len(path) == 1:
            return {field.name for field in dataclasses.fields(found)}
        return _fields(found, path[1:])
    return set()


def _hint(cls: type, path: list[str]) -> Any:
    """How an argument, or a field of the dataclasses that its annotation mentions, is annotated."""
    hint = _hints(cls).get(path[0])
    for name in path[1:]:
        hint = next((_hints(found).get(name) for found in _dataclasses_in(hint)), None)
    return hint


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of what `cls` is built from, those of its parents' arguments too."""
    if dataclasses.is_dataclass(cls):
        return get_type_hints(cls)
    found: dict[str, Any] = {}
    for parent in reversed(cls.__mro__):
        made = vars(parent).get("__init__")
        with suppress(NameError):  # of somebody who imports for type checkers only
            found |= get_type_hints(made) if inspect.isfunction(made) else {}
    return found


def _classes_in(hint: Any) -> list[type]:
    """The classes that an annotation mentions; of a function's, what it gives."""
    if isinstance(hint, type) and not get_args(hint):
        return [hint]
    arguments = get_args(hint)
    if get_origin(hint) is Callable:
        arguments = arguments[-1:]
    return [found for argument in arguments for found in _classes_in(argument)]


def _dataclasses_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for argument in get_args(hint) for found in _dataclasses_in(argument)]
