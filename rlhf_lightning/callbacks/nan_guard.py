"""An optimiser step whose loss or gradient is NaN or infinite is not taken, and what caused it is kept."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.sharded import plain_name

NAMES_SHOWN = 5


class NaNGuard(Callback):
    """Refuses steps that are not finite, on all processes alike; after `stop_after` in a row ends the run.

    A refused step changes neither weights nor the optimiser's moments; the learning rate moves on. Its micro-batches
    and what was wrong go to `nonfinite/` in the run folder. Under 16-mixed precision infinite gradients are the
    scaler's business, and only the loss is looked at.

    Args:
        stop_after: refused steps in a row that end the run with a diagnosis.

    Costs one wait for the device per optimiser step: whether to take it is decided on the host.
    """

    def __init__(self, stop_after: int = 3) -> None:
        if stop_after < 1:
            raise UserError(f"stop_after={stop_after}: give at least 1")
        self.stop_after = stop_after
        self._in_a_row = 0
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_a_row = 0
        self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._forget()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [p.grad for group in optimizer.param_groups for p in group["params"]]
        is_bad = ~all_finite([*self._losses, *(g for g in gradients if g is not None)])
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.float().to(pl_module.device), reduce_op="max") > 0
        if not bool(is_bad):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        report = self._report(trainer, pl_module)
        kept = self._keep(trainer, report)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # an optimiser passes over these: no decay, no momentum, no count
        for logger in trainer.loggers:
            logger.log_metrics({"health/refused_steps": float(self._in_a_row)}, step=trainer.global_step)
        if trainer.is_global_zero:
            print(f"step {trainer.global_step} refused: {summary(report)}; kept in {kept}", file=sys.stderr, flush=True)
        if self._in_a_row >= self.stop_after:
            raise UserError(diagnosis(report, self._in_a_row, trainer.global_step, kept))

    def _report(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What is finite and what is not, on this process."""
        named = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        return {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "losses": [str(float(loss)) for loss in self._losses],
            "gradients": [n for n, p in named.items() if p.grad is not None and not bool(all_finite([p.grad]))],
            "weights": [n for n, p in named.items() if not bool(all_finite([p.detach()]))],
        }

    def _keep(self, trainer: Trainer, report: Mapping[str, Any]) -> Path:
        """Writes the micro-batches whose own loss is not finite, or all of the step, and the report."""
        bad = [not math.isfinite(float(loss)) for loss in self._losses]
        chosen = [plain(batch) for batch, is_bad in zip(self._batches, bad, strict=False) if is_bad or not any(bad)]
        file = Path(trainer.default_root_dir) / "nonfinite" / f"step-{trainer.global_step}-rank-{trainer.global_rank}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".json").write_text(json.dumps(report, indent=1))
            torch.save({"batches": chosen}, file.with_suffix(".pt"))
        except OSError as error:
            print(f"cannot keep the batches of step {trainer.global_step}: {error}", file=sys.stderr, flush=True)
        return file.with_suffix(".pt")

    def _forget(self) -> None:
        self._batches, self._losses = [], []


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no entry is NaN or infinite, on any process that holds a share; a bool tensor: no wait for the device."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        alike.setdefault((mesh, tensor.dtype, tensor.device), []).append(tensor)
    finite = torch.tensor(True)
    for (mesh, _, device), some in alike.items():
        here = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in some]
        here = [tensor for tensor in here if tensor.numel()]  # one row, a value head, leaves nothing to most processes
        # the largest entry, not a sum: sums of finite numbers may overflow
        largest = torch.nn.utils.get_total_norm(here, norm_type=math.inf) if here else torch.zeros((), device=device)
        is_bad = (~torch.isfinite(largest)).float()
        if mesh is not None:  # whether it is bad, not the entry itself: the largest of NaN and 1 may be 1
            is_bad = DTensor.from_local(is_bad, mesh, [Partial("max")] * mesh.ndim).full_tensor()
        finite = finite.to(device) & (is_bad == 0)
    return finite


def plain(value: Any) -> Any:
    """A batch as dicts, lists, tensors on the CPU, numbers and strings, which `torch.load` reads by weights_only."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def summary(report: Mapping[str, Any]) -> str:
    """One line of a report."""
    said = []
    bad = [loss for loss in report["losses"] if not math.isfinite(float(loss))]
    if bad:
        said.append(f"{len(bad)} of {len(report['losses'])} micro-batches have a loss of {bad[0]}")
    if report["gradients"]:
        said.append(f"gradients that are not finite: {_some(report['gradients'])}")
    return ", ".join(said) or "another process has a loss or gradient that is not finite"


def diagnosis(report: Mapping[str, Any], in_a_row: int, step: int, kept: Path) -> str:
    """Why the run ends, and what to try."""
    if report["weights"]:
        cause = (
            f"The weights themselves are not finite ({_some(report['weights'])}): the model came like this, or an "
            "earlier step broke it. Load another one, or resume from an older checkpoint"
        )
    elif any(not math.isfinite(float(loss)) for loss in report["losses"]):
        cause = (
            "The weights are finite and the loss is not: look at the kept batches for records that are out of the "
            "ordinary; with fp16 weights take bf16-mixed; lower the learning rate if it happened after a while"
        )
    else:
        cause = (
            "Weights and loss are finite and the gradient is not: lower the learning rate, set "
            "trainer.gradient_clip_val, and take bf16-mixed or 32-bit precision"
        )
    return (
        f"{in_a_row} optimiser steps in a row were refused, the last one at step {step}: {summary(report)}. {cause}. "
        f"The batches are in {kept.parent}; the weights are those from before"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
