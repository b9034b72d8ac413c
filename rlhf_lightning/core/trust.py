"""Whose code a config may call: that of the packages this project is made of, and what the user names besides.

The command line switches the list on (`only_from`). A program in Python imports what it likes before it calls us: there
nothing is refused.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_lightning.core.errors import UserError

FLAG = "--allow_module"

FAMILY = (
    "rlhf_lightning",
    "rlhf_kernels",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "bitsandbytes",
    "peft",
)
"""Packages whose classes and functions any config may name."""

PLAIN = ("datetime.timedelta", "lightning.pytorch.cli.ReduceLROnPlateau")
"""Exactly these too: a value that options of these packages take and that does nothing, and a scheduler of torch's to
which Lightning adds the name of a metric. What else is in the modules around them stays as it is."""

DENIED = (
    "torch.hub",
    "torch.load",
    "torch.serialization",
    "torch.package",
    "torch.jit",
    "torch.fx",
    "torch.export",
    "torch.compiler",
    "torch.multiprocessing",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.utils.data.datapipes",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.distributed.rpc",
    "torch._dynamo",
    "torch._inductor",
    "lightning.app",
    "lightning.fabric.cli",
    "lightning.pytorch.cli",
    "transformers.cli",
    "transformers.commands",
    "transformers.dynamic_module_utils",
    "transformers.pipeline",
    "transformers.pipelines",
)
"""What these packages have to start processes, to open pickles and to load code: no option needs it."""

PYTHONS_OWN = "Python's own, not a class or function made for training; name one of yours"

_named: tuple[str, ...] | None = None


@contextmanager
def only_from(named: Sequence[str]) -> Iterator[None]:
    """While inside, nothing is imported for a config but from `FAMILY` and `named`.

    Args:
        named: modules (`mine`, `mine.rewards`), Python files (`my_rewards.py`), or models (a folder, a hub id) that
            bring code of their own. Inside another `only_from` those named there count too.
    """
    global _named
    before = _named
    for name in named:
        root = name.split(".")[0]
        if not name.endswith(".py") and root in {*sys.stdlib_module_names, "jsonargparse"}:
            raise UserError(f"{FLAG} {name} is not a module made for training: name one of yours")
    _named = tuple(dict.fromkeys([*(before or ()), *named]))
    try:
        yield
    finally:
        _named = before


def named_modules() -> tuple[str, ...]:
    """Those of the named that are modules, not files or models."""
    return tuple(name for name in _named or () if not name.endswith(".py") and is_dotted(name))


def is_dotted(path: str) -> bool:
    """Whether `path` is written as a module, class or function is."""
    return all(part.isidentifier() for part in path.split("."))


def allows(path: str, family: Sequence[str] = FAMILY) -> bool:
    """Whether a config may name the class or function `path`.

    Args:
        path: dotted.
        family: what is allowed beside what the user named.
    """
    if _named is None:
        return True
    # the longest entry that fits decides, as in jsonargparse
    verdicts = dict.fromkeys((*family, *PLAIN), True) | dict.fromkeys(DENIED, False)
    verdicts |= dict.fromkeys(named_modules(), True)
    parts = path.split(".")
    return next((verdicts[e] for n in range(len(parts), 0, -1) if (e := ".".join(parts[:n])) in verdicts), False)


def allows_function(home: str) -> bool:
    """Whether a config may take a function, with arguments of its choice, from `home`, a module or a file.

    Our own packages do not count: `torch.hub.load` with the right arguments runs anything.
    """
    if _named is None:
        return True
    if home.endswith(".py"):
        files = [Path(name).expanduser().resolve() for name in _named if name.endswith(".py")]
        return Path(home).expanduser().resolve() in files
    return any(home == name or home.startswith(f"{name}.") for name in named_modules())


def allows_model(path: str) -> bool:
    """Whether the code that comes with a model, a folder or hub id, may run."""
    if _named is None:
        return True
    folder = Path(path).expanduser()
    return any(path == name or (folder.is_dir() and folder.resolve() == Path(name).resolve()) for name in _named)


def refusal(path: str, family: Sequence[str] = FAMILY) -> str:
    """What is said of a class or function that a config may not name.

    Args:
        path: as the config has it.
        family: what is allowed beside what the user named.
    """
    root = path.split(".")[0]
    if any(path == entry or path.startswith(f"{entry}.") for entry in DENIED):
        return f"{path} starts processes or loads code; no config needs it"
    if root in sys.stdlib_module_names:
        return f"{path} is {PYTHONS_OWN}"
    return (
        f"{path} is not imported, for it is not of {', '.join(family)}; if it is yours, add "
        f"{FLAG} {path.rpartition('.')[0] or path} to the command line"
    )


def function_refusal(path: str, home: str) -> str:
    """What is said of a function that a config may not name."""
    root = home.split(".")[0]
    if not home.endswith(".py") and root in sys.stdlib_module_names:
        return f"{path} is {PYTHONS_OWN}"
    return f"the function {path} is not yours as far as anybody said; if it is, add {FLAG} {home} to the command line"
