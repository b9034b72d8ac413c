"""verl and OpenRLHF, which the tests compare with: in a folder of their own, imported without what computes nothing.

Both ask for an older transformers, an engine and a cluster, so `make setup` puts their code alone (and the few small
packages that it cannot do without) into `.venv/peers`, outside of `sys.path`. `peer_module` looks there for the length
of one import, and gives stand-ins for the packages in `STAND_INS`. Afterwards the process is as before, but for the
peers' own modules: nothing that asks whether deepspeed is installed is told that it is.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PEERS = Path(sys.prefix) / "peers"
STAND_INS = frozenset(
    {
        "ray",
        "deepspeed",
        "vllm",
        "flash_attn",
        "pylatexenc",
        "orjson",
        "cachetools",
        "fastapi",
        "uvicorn",
        "transfer_queue",
        "hydra",
    }
)
"""Clusters, engines, servers, other kernels, parsers: none of them takes part in the arithmetic that is compared."""


def peer_module(name: str) -> ModuleType:
    """A module of verl or OpenRLHF, such as `verl.trainer.ppo.core_algos`; skips where `make setup` did not put them.

    For the top of a file of tests: `core_algos = peer_module("verl.trainer.ppo.core_algos")`.
    """
    if name in sys.modules:
        return sys.modules[name]
    package = name.split(".")[0]
    if not (PEERS / package).is_dir():
        pytest.skip(f"{package} is not in {PEERS}: `make setup` puts it there", allow_module_level=True)
    import transformers.utils.import_utils as asked  # both peers import it anyway

    with _stand_ins(), _nothing_else_changed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    for answer in vars(asked).values():
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()  # such as is_deepspeed_available, if it was called meanwhile
    return module


def peer_file(name: str) -> Path:
    """A file in the folder of the peers, such as `verl/trainer/config/_generated_ppo_trainer.yaml`; skips without."""
    if not (PEERS / name).is_file():
        pytest.skip(f"{name} is not in {PEERS}: `make setup` puts it there", allow_module_level=True)
    return PEERS / name


class _Anything(type):
    """A class of which every attribute is itself: good for annotations, decorators and base classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


def _stand_in(name: str) -> type:
    def call(self: Any, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self  # a decorator leaves what it is put on

    def new(cls: type, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else object.__new__(cls)

    return _Anything(name, (), {"__new__": new, "__init__": lambda *_, **__: None, "__call__": call})


class _StandIn(ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in STAND_INS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.append(finder)  # after all others: what is installed is not replaced
    sys.path.append(str(PEERS))  # likewise: openrlhf's wheel has a `tests` and a `scripts` of its own
    try:
        yield
    finally:
        sys.path.remove(str(PEERS))
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
        importlib.invalidate_caches()


@contextmanager
def _nothing_else_changed() -> Iterator[None]:
    """verl sets environment variables, the root logger, and what torch.load may make of a file, all on import."""
    environment, handlers, level = dict(os.environ), logging.root.handlers[:], logging.root.level
    loadable = torch.serialization.get_safe_globals()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(environment)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(loadable)
