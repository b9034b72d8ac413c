"""A batch that memory has no room for is cut in halves, and the halves in halves: the same loss, the same gradient.

Every batch carries the totals of its optimiser step, so the losses of its parts add up to its own. What a pass that
failed had added already (to gradients, to metrics) is taken back before the parts are computed.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from rlhf_lightning.core.batches import Batch, step_totals
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.sharded import is_sharded

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
CPU_ALLOCATOR, CUBLAS = "DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED"
"""What torch says where it has no class of its own for being out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and (CPU_ALLOCATOR in said or CUBLAS in said)
    )


class Splitter:
    """Takes a module's training steps and measurements, in as large pieces as fit.

    A step is taken anew from its first micro-batch on where a backward pass broke off: some of its gradients were
    added, and nothing tells which.

    Under DDP each process does that for itself: it exchanges gradients in the backward pass of a step's last part, and
    in nothing before. Where memory runs out in that pass, or where weights are sharded and every layer is exchanged,
    the others would wait for the one that is behind: there the run ends with what to set instead.

    Args:
        module: the stage; `step_state`, `put_back`, `inseparable` and `smaller_batches` are asked for.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.more_follow = False
        """Whether what is being computed is not the end of its micro-batch, or is computed for its gradient only."""
        self.keeps_gradients = False
        """Whether gradients of the present step are there already, before the trainer's own backward pass."""
        self._limits: dict[str, int] = {}
        """Tokens with padding that are computed at a time, by what they are computed for; without an entry all."""
        self._unsaid: set[str] = set()
        """Limits that have sunk, and nobody has been told."""
        self._window: list[tuple[Batch, int]] = []
        """Micro-batches of the present optimiser step up to now."""
        self._value: Tensor | None = None
        """What the trainer was given as the loss: its value alone."""
        self._graph: Tensor | None = None
        """The loss that is behind it; held here alone, so that letting go of it frees its activations."""
        self._before: Any = None
        self._own_step: Callable[..., Any] | None = None

    # ---- training --------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """From now on the trainer's training steps go through `step`."""
        own = self.module.training_step
        if getattr(own, "__self__", None) is not self:  # a run that an error has ended leaves us attached
            self._own_step, self.module.training_step = own, self.step

    def detach(self) -> None:
        """Undo `attach`."""
        del self.module.training_step
        if getattr(self._own_step, "__func__", None) is not type(self.module).training_step:
            self.module.training_step = self._own_step

    def step(self, batch: Batch, batch_idx: int) -> Any:
        """The stage's training step on a micro-batch, or on its parts."""
        self.keeps_gradients, self._value, self._graph = False, None, None
        if batch_idx % self._accumulate == 0:
            self._window = []
        if not isinstance(batch, Batch):
            return self._own(batch, batch_idx)
        if batch.totals is None:
            batch = batch.with_totals(step_totals([batch], self.module.add_over_ranks, self.module.measure_step))
        if self._exchanges_layers:
            self._window = [(batch, batch_idx)]
            loss, failed = _attempt(lambda: self._own(batch, batch_idx))
            if failed is not None:
                raise UserError(self._alone(batch, failed))
            return loss
        self._before = self.module.step_state()
        loss, failed = _attempt(lambda: self._parts_of_step(batch, batch_idx))
        while failed is not None:
            self._graph = self._value = None
            self._lower("training", batch, failed)
            self.module.put_back(self._before)
            self._let_go()
            loss, failed = _attempt(lambda: self._again(batch, batch_idx, with_last=False))
        self._say("training", batch)
        self._window.append((batch, batch_idx))
        return loss

    def backward(self, loss: Tensor, own: Callable[[Tensor], None]) -> None:
        """The backward pass of a loss that `step` gave; `own` is that of any other."""
        if self._value is None and not self._window:  # of a batch that is none of ours
            own(loss)
            return
        if self._value is None:
            _, failed = _attempt(lambda: own(loss))
            if failed is not None:
                raise UserError(self._alone(self._window[-1][0], failed))
            return
        loss.backward()  # to the value, no further: what the trainer multiplied the loss by
        factor, self._value = self._value.grad, None
        _, failed = _attempt(lambda: self._backward_of_graph(factor))
        if failed is None:
            return
        # the forward pass was whole: metrics and what the loss keeps between steps are as they should be
        after = self.module.step_state()
        batch, batch_idx = self._window[-1]
        while failed is not None:
            self._graph = None
            self._lower("training", batch, failed)
            self._let_go()
            self.module.put_back(self._before)
            del self._window[-1]
            _, failed = _attempt(lambda: self._again(batch, batch_idx, with_last=True))
            self._window.append((batch, batch_idx))
        self.module.put_back(after)
        self._say("training", batch)

    def _parts_of_step(self, batch: Batch, batch_idx: int) -> Any:
        """Loss of a micro-batch; where it is cut, all parts but the last have had their backward pass."""
        *first, last = self._cut(batch, "training")
        total: Any = 0.0
        if first and not self._window:
            self._zero_grad()
        for part in first:
            total = total + self._train(part, batch_idx)
        loss = self._own(last, batch_idx)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return loss
        if self.module.trainer.world_size > 1:  # the trainer's own backward pass is where gradients are exchanged
            return total + loss if first else loss
        self._graph = loss
        self._value = (total + loss.detach()).requires_grad_()
        return self._value

    def _again(self, batch: Batch, batch_idx: int, *, with_last: bool) -> Any:
        """The optimiser step up to this micro-batch, from its beginning.

        Args:
            with_last: also the backward pass of the last part, and nothing is counted.
        """
        batch = self.module.ready_to_cut(batch)
        self._zero_grad()
        for earlier, index in self._window:
            for part in self._cut(earlier, "training"):
                self._train(part, index)
        if not with_last:
            self.module.put_back(self._before)
            return self._parts_of_step(batch, batch_idx)
        for part in self._cut(batch, "training"):
            self._train(part, batch_idx)
        return None

    def _train(self, part: Batch, batch_idx: int) -> Tensor:
        """Forward and backward of a part that ends nothing; its loss."""
        self.more_follow = True
        try:
            loss = self._own(part, batch_idx)
        finally:
            self.more_follow = False
        scaled = loss / self._accumulate
        scaler = getattr(self.module.trainer.precision_plugin, "scaler", None)
        scaled = scaled if scaler is None else scaler.scale(scaled)
        # the trainer's own backward pass is not under autocast either
        with torch.autocast(self.module.device.type, enabled=False):
            scaled.backward()
        torch.clear_autocast_cache()
        self.keeps_gradients = True
        return loss.detach()

    def _own(self, batch: Batch, batch_idx: int) -> Any:
        assert self._own_step is not None
        with self.module.trainer.precision_plugin.train_step_context():
            return self._own_step(batch, batch_idx)

    def _backward_of_graph(self, factor: Tensor | None) -> None:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.backward(factor)

    def _zero_grad(self) -> None:
        for optimizer in self.module.trainer.optimizers:
            optimizer.zero_grad()

    @property
    def _accumulate(self) -> int:
        return int(self.module.trainer.accumulate_grad_batches)

    @property
    def _exchanges_layers(self) -> bool:
        """Whether processes meet in a forward pass, or may: of other strategies than DDP nothing is known."""
        trainer = self.module.trainer
        return is_sharded(self.module) or (trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy))

    # ---- measuring -------------------------------------------------------------------------------------------------

    def results(self, batch: Batch, run: Callable[[Any], ResultT], purpose: str = "measuring") -> list[ResultT]:
        """What `run` says of a batch, or one after the other of its parts; `run` leaves nothing behind.

        Args:
            purpose: names what the pieces are computed for; each remembers its own size.
        """
        waiting, done = [batch], []
        while waiting:
            part, *rest = self._cut(waiting.pop(0), purpose)  # now: the limit may have sunk since it was put there
            waiting = [*rest, *waiting]
            result, failed = _attempt(lambda part=part: run(part))  # type: ignore[misc]
            if failed is None:
                done.append(result)
                continue
            if is_sharded(self.module):
                raise UserError(self._alone(part, failed, purpose))
            self._lower(purpose, part, failed)
            self._let_go()
            waiting = [part, *waiting]
        self._say(purpose, batch)
        return done  # type: ignore[return-value]

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def cuts(self, batch: Batch) -> bool:
        """Whether a micro-batch will be trained on in parts."""
        return len(self._cut(batch, "training")) > 1

    def _cut(self, batch: Batch, purpose: str) -> list[Any]:
        """The batch in parts that are no larger than what has fitted."""
        limit = self._limits.get(purpose)
        if limit is None or batch.num_cells <= limit or batch.num_units == 1:
            return [batch]
        return [piece for half in batch.halves() for piece in self._cut(half, purpose)]

    def _lower(self, purpose: str, batch: Batch, failed: str) -> None:
        """Half as much at a time from now on; an error where nothing can be halved."""
        largest = max(self._cut(batch, purpose), key=lambda part: part.num_cells)
        if largest.num_units == 1:
            lengths = " and ".join(map(str, largest.lengths))
            raise UserError(
                f"out of memory in {purpose}: one {largest.unit} of {lengths} tokens does not fit: cut records with "
                "data.max_length (answers with generation.max_new_tokens), or set gradient_checkpointing: true, lora "
                f"or dtype: bfloat16 of the model; rlhf-lightning plan says what fits ({failed})"
            )
        if purpose == "training" and (why := self.module.inseparable()) is not None:
            raise UserError(
                f"out of memory in training: a micro-batch of {_sized(batch)} does not fit, and {why}: cut into parts "
                f"it would have another loss. Set gradient_checkpointing: true of the model, or data.batch_size="
                f"{max(batch.num_units // 2, 1)}; rlhf-lightning plan says what fits ({failed})"
            )
        self._limits[purpose] = max(half.num_cells for half in largest.halves())
        self._unsaid.add(purpose)

    def _say(self, purpose: str, batch: Batch) -> None:
        """What has become of the batch that did not fit, once it is through."""
        if purpose not in self._unsaid:
            return
        self._unsaid.remove(purpose)
        pieces = len(self._cut(batch, purpose))
        log.warning(
            f"out of memory in {purpose}: {_sized(batch)} at a time did not fit and were taken in {pieces} parts, with "
            f"the same result; from now on at most {self._limits[purpose]} tokens at a time, padding counted. To begin "
            f"like that set {self.module.smaller_batches(purpose, batch, pieces)}"
        )

    def _alone(self, batch: Batch, failed: str, purpose: str = "training") -> str:
        """Why this process cannot help itself."""
        rank = self.module.trainer.global_rank
        return (
            f"out of memory: {_sized(batch)} at a time did not fit on process {rank}. Where processes exchange weights "
            "or gradients, one of them cannot go on in smaller pieces while the others wait for it: set "
            f"{self.module.smaller_batches(purpose, batch, 2)}, the same loss in smaller pieces, or "
            f"gradient_checkpointing: true of the model; rlhf-lightning plan says what fits ({failed})"
        )

    def _let_go(self) -> None:
        """Give back what the pass that failed held."""
        gc.collect()
        torch.clear_autocast_cache()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def told(what: str, remedy: str) -> Iterator[None]:
    """Being out of memory inside is an error that says what to set."""
    failed = None
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = _first_line(error)
    if failed is not None:
        raise UserError(f"out of memory in {what}: set {remedy}; rlhf-lightning plan says what fits ({failed})")


def _attempt(run: Callable[[], ResultT]) -> tuple[ResultT | None, str | None]:
    """What `run` gives, or what it said when memory ran out.

    The exception does not leave: its traceback holds the frames that hold the tensors.
    """
    try:
        return run(), None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sized(batch: Batch) -> str:
    """How large a batch is, in words."""
    lengths = batch.lengths
    plural = "s" if batch.num_units > 1 else ""
    return f"{batch.num_units} {batch.unit}{plural} of up to {max(lengths)} tokens"
