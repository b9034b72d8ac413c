"""Prompts to rollouts to minibatches, as one sized, stateful loader that Lightning can train from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.core.batches import (
    AnswerRollouts,
    Batch,
    Generated,
    PairRollouts,
    PromptBatch,
    Rollouts,
    TokenBatch,
    step_totals,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed

BatchT = TypeVar("BatchT")
AnyRollouts = Rollouts | PairRollouts | AnswerRollouts
"""What is cut into minibatches: sequences, or pairs of them."""


class Collector(Protocol):
    """What the loader asks of the module that owns the policy."""

    def collect(self, draw: Callable[[], PromptBatch]) -> AnyRollouts:
        """Rollouts to train on; `draw` gives the next batch of prompts, once or several times."""


@dataclass(frozen=True)
class UpdateSpec:
    """How often and in what pieces each batch of rollouts is trained on.

    Args:
        inner_epochs: passes over each batch of rollouts.
        num_minibatches: optimiser steps per pass.
        shuffle: draw the minibatches of each pass anew from all rollouts; false: cut them in the order of the prompts,
            answers to one prompt side by side, every pass alike.
        async_rollouts: sample the first batch of each rollout by the policy as it was before it was trained on the
            rollout before, in the background, while it is (one step off policy; PPO, GRPO and GKD).
    """

    inner_epochs: int = 4
    num_minibatches: int = 1
    shuffle: bool = True
    async_rollouts: bool = False

    def __post_init__(self) -> None:
        if self.inner_epochs < 1 or self.num_minibatches < 1:
            raise ValueError(
                f"updates.inner_epochs={self.inner_epochs}, num_minibatches={self.num_minibatches}: both at least 1"
            )


class RolloutLoader:
    """Sized, stateful iterable: prompts -> `collect` -> inner epochs x minibatches x micro-batches.

    Sized, because Lightning fetches an unsized iterable one batch ahead of the step and would train on stale
    rollouts. A collector may draw more than one batch of prompts for its rollouts (dynamic sampling): an epoch is as
    many rollouts as there are batches of prompts, and whoever draws more goes round the data more often.

    Every micro-batch carries the totals of its optimiser step over micro-batches and ranks, so that losses are
    averaged exactly. State is a plain dict of tensors and numbers, kept by the module that owns the loader.

    Args:
        prompts: yields `PromptBatch`es; sized.
        collector: turns a prompt batch into rollouts, at the moment they are needed.
        updates: inner epochs and minibatches.
        accumulate: micro-batches per optimiser step (the Trainer's accumulate_grad_batches).
        seed: of the minibatch order, with rollout index and rank.
        add_over_ranks: adds a vector over all ranks.
        extra: yields the batches of a second source, one per micro-batch, or None.
        rank: of this process.
        limit: batches that the trainer will take per epoch (limit_train_batches).
        measure: sums over the micro-batches of a step, taken before it, that join its totals.
        kind: what the collector gives; a saved buffer is rebuilt as one.
    """

    def __init__(
        self,
        prompts: Iterable[PromptBatch],
        collector: Collector,
        updates: UpdateSpec,
        *,
        accumulate: int = 1,
        seed: int = 0,
        add_over_ranks: Callable[[Tensor], Tensor] = lambda vector: vector,
        extra: Iterable[TokenBatch] | None = None,
        rank: int = 0,
        limit: Callable[[], float] = lambda: float("inf"),
        measure: Callable[[Sequence[Batch]], Mapping[str, float]] = lambda batches: {},
        kind: type[AnyRollouts] = Rollouts,
    ) -> None:
        self.prompts = prompts
        self.collector = collector
        self.updates = updates
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self._add_over_ranks = add_over_ranks
        self._limit = limit
        self._measure = measure
        self._kind = kind
        self._stream = _Endless(prompts)
        self._extra = None if extra is None else _Endless(extra)
        self._buffer: AnyRollouts | None = None
        self._given = 0
        """Micro-batches of the buffer that were yielded."""
        self._rollouts_done = 0
        """Rollouts of this epoch that are used up."""
        self.rollouts = 0
        """Rollouts collected since the run began."""
        self.drawn = 0
        """Batches of prompts drawn since the run began; names the seeds of their answers."""
        self._resumed = False

    @property
    def batches_per_rollout(self) -> int:
        return self.updates.inner_epochs * self.updates.num_minibatches * self.accumulate

    @property
    def steps_of_rollout(self) -> int:
        """Optimiser steps on the rollout that is being collected or trained on."""
        left = self._limit() - self._rollouts_done * self.batches_per_rollout
        return -(-int(min(left, self.batches_per_rollout)) // self.accumulate)

    @property
    def another_in_epoch(self) -> bool:
        """Whether the epoch has a rollout behind the one that is being collected or trained on."""
        index = self._rollouts_done + 1
        return index < len(self.prompts) and index * self.batches_per_rollout < self._limit()  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.prompts) * self.batches_per_rollout  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[AnyRollouts]:
        # a generator: its body begins at the first next(), after Lightning's on_train_epoch_start
        return self._run()

    def _run(self) -> Iterator[AnyRollouts]:
        # Lightning stops after len() batches without exhausting us: counters are reset here, not at the end
        if not self._resumed or self._finished_epoch():
            self._buffer, self._given, self._rollouts_done = None, 0, 0
        self._resumed = False
        for index in range(self._rollouts_done, len(self.prompts)):  # type: ignore[arg-type]
            if index * self.batches_per_rollout >= self._limit():
                return
            if self._buffer is None:
                self._buffer = self.collector.collect(self._draw)
                self.rollouts += 1
                self._given = 0
            yield from self._steps(self._buffer)
            self._buffer = None
            self._rollouts_done = index + 1

    def _draw(self) -> PromptBatch:
        """The next batch of prompts, data without end."""
        batch = self._stream.at(self.drawn)
        self.drawn += 1
        return batch

    def draw_again(self) -> None:
        """Of a loader that was restored: the batch of prompts that was drawn last comes once more."""
        self.drawn -= 1

    def _finished_epoch(self) -> bool:
        """The state was saved after the last batch of an epoch."""
        given = self._rollouts_done * self.batches_per_rollout + (0 if self._buffer is None else self._given)
        return given >= min(len(self), self._limit())

    def _steps(self, buffer: AnyRollouts) -> Iterator[AnyRollouts]:
        # what the trainer will not take must not be in the totals of the step that it cuts short
        left = self._limit() - self._rollouts_done * self.batches_per_rollout
        pieces = self._pieces(buffer.tokens.shape[0])[: int(min(left, self.batches_per_rollout))]
        for first in range(0, len(pieces), self.accumulate):
            if first + self.accumulate <= self._given:
                continue
            group = [_pick(buffer, rows) for rows in pieces[first : first + self.accumulate]]
            if self._extra is not None:
                group = [
                    replace(part, extra=self._extra.at(self._extra_index(first + i))) for i, part in enumerate(group)
                ]
            totals = step_totals(group, self._add_over_ranks, self._measure)
            for offset, part in enumerate(group):
                if first + offset < self._given:
                    continue
                self._given = first + offset + 1
                yield part.with_totals(totals)

    def _extra_index(self, piece: int) -> int:
        return (self.rollouts - 1) * self.batches_per_rollout + piece

    def _pieces(self, num_rows: int) -> list[Tensor]:
        """Row indices of every micro-batch of the buffer, in the order they are trained on."""
        pieces: list[Tensor] = []
        for epoch in range(self.updates.inner_epochs):
            generator = torch.Generator().manual_seed(
                counter_seed(self.seed, "minibatches", self.rollouts, self.rank, epoch)
            )
            order = torch.randperm(num_rows, generator=generator) if self.updates.shuffle else torch.arange(num_rows)
            for minibatch in order.tensor_split(self.updates.num_minibatches):
                pieces.extend(minibatch.tensor_split(self.accumulate))
        return pieces

    # the protocol that Lightning recognises a resumable loader by; the module saves `progress()`, of all ranks
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def progress(self) -> dict[str, Any]:
        """Everything needed to go on exactly here: counters, and the rollouts being trained on."""
        return {
            "rollouts": self.rollouts,
            "drawn": self.drawn,
            "rollouts_done": self._rollouts_done,
            "given": self._given,
            "buffer": None if self._buffer is None else buffer_to_dict(self._buffer),
            "cut": self._cut,
            "batches": self._size,
        }

    @property
    def _size(self) -> int:
        """Micro-batches that the trainer takes per epoch."""
        return int(min(len(self), self._limit()))

    @property
    def _cut(self) -> dict[str, int]:
        """What an epoch is cut into, by the options that decide it; checkpoints of before may lack some."""
        plan = getattr(getattr(self.prompts, "sampler", None), "plan", None)
        return {
            "updates.inner_epochs": self.updates.inner_epochs,
            "updates.num_minibatches": self.updates.num_minibatches,
            "updates.shuffle": self.updates.shuffle,
            "trainer.accumulate_grad_batches": self.accumulate,
            "data.batch_size": 0 if plan is None else plan.batch_size,
            "batches of prompts per epoch": len(self.prompts),  # type: ignore[arg-type]
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on where `progress` was taken.

        Behind the last batch of an epoch, everything may be cut otherwise from the next one on.

        Raises:
            UserError: `progress` was taken in the middle of an epoch that was cut otherwise.
        """
        now, then = self._cut, progress.get("cut", self._cut)
        of_rollout = then["updates.inner_epochs"] * then["updates.num_minibatches"]
        done = progress["rollouts_done"] * of_rollout * then["trainer.accumulate_grad_batches"]
        done += 0 if progress["buffer"] is None else progress["given"]
        is_over = done >= progress.get("batches", self._size)
        changed = [f"{name} was {value} and is {now[name]} now" for name, value in then.items() if now[name] != value]
        if changed and done and not is_over:
            raise UserError(
                f"cannot resume in the middle of an epoch of rollouts ({done} of its {progress['batches']} "
                f"micro-batches were used) that is cut otherwise: {'; '.join(changed)}. Resume with the values of "
                "before, or start from the weights alone"
            )
        self.rollouts = progress["rollouts"]
        self._rollouts_done = progress["rollouts_done"]
        self.drawn = progress["drawn"]
        self._given = progress["given"]
        self._buffer = None if progress["buffer"] is None else self._kind(**progress["buffer"])
        self._resumed = True
        if is_over and changed:
            self._buffer, self._given, self._rollouts_done = None, 0, 0
            # the next epoch begins with the first batch of a round, and no batch is named twice
            self.drawn += -self.drawn % len(self.prompts)  # type: ignore[arg-type]


def buffer_to_dict(rollouts: AnyRollouts | Generated) -> dict[str, Tensor]:
    """The tensors of `rollouts` on the CPU, safe to pickle with weights_only."""
    return {name: value.cpu() for name, value in vars(rollouts).items() if isinstance(value, Tensor)}


def start_epoch(loader: Any, epoch: int) -> None:
    """Tell whatever shuffles inside `loader` which epoch begins."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _pick(buffer: AnyRollouts, rows: Tensor) -> AnyRollouts:
    if rows.numel():
        return buffer.select(rows.to(buffer.tokens.device))
    # fewer rows than pieces: an empty share still takes part in the step, with nothing in it that counts
    return buffer.select(torch.zeros(1, dtype=torch.long, device=buffer.tokens.device)).without_loss()


class _Endless(Generic[BatchT]):
    """The n-th batch of a source that starts over when it ends; asked for in rising order."""

    def __init__(self, loader: Iterable[BatchT]) -> None:
        self.loader = loader
        self._iterator: Iterator[BatchT] | None = None
        self._next = 0

    def at(self, index: int) -> BatchT:
        size = len(self.loader)  # type: ignore[arg-type]
        if self._iterator is None:
            self._next = index - index % size
        while True:
            if self._iterator is None or self._next % size == 0:
                start_epoch(self.loader, self._next // size)
                self._iterator = iter(self.loader)
            batch = next(self._iterator)
            self._next += 1
            if self._next > index:
                return batch
