"""What a rollout is doing: seconds per phase, and word to the callbacks that want to know."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L


def tell(module: L.LightningModule, hook: str, *arguments: Any) -> None:
    """Call a rollout hook on every callback that has it: on_rollout_{start, phase, scored, end}."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        method = getattr(callback, hook, None)
        if callable(method):
            method(module.trainer, module, *arguments)


class Phases:
    """Times the phases of one rollout: `with phase("generate"): ...`; tells the callbacks when one begins."""

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        tell(self.module, "on_rollout_phase", phase)
        began = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - began

    def times(self) -> dict[str, float]:
        """Seconds of each phase and of the rollout so far, as metrics."""
        whole = time.perf_counter() - self.began
        return {f"time/{phase}_s": s for phase, s in self.seconds.items()} | {"time/rollout_s": whole}
