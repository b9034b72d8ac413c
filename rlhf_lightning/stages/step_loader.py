"""Batches grouped into optimiser steps, each stamped with the totals of its step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_lightning.core.batches import Batch, step_totals
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout.loader import start_epoch


class StepLoader:
    """Sized, stateful iterable over another loader: every batch knows the denominators of its optimiser step.

    Lightning averages micro-batch losses with equal weight, which is not the token mean when lengths differ. Here the
    batches of one optimiser step are fetched together, their counts are added over micro-batches and ranks, and each
    leaves with those totals: the loss of a step does not depend on how it was cut.

    Args:
        loader: yields batches; sized. A `StatefulDataLoader` resumes from its own state, any other is fast-forwarded.
        accumulate: batches per optimiser step.
        limit: batches that the trainer will take per epoch (limit_train_batches), asked for when an epoch starts.
        add_over_ranks: adds a vector over all ranks.
        epoch: number of the epoch that begins.
        measure: sums over a step's micro-batches of this rank, asked for when the step begins; they join its totals,
            added over ranks.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        accumulate: int = 1,
        limit: Callable[[], float] = lambda: float("inf"),
        add_over_ranks: Callable[[Tensor], Tensor] = lambda vector: vector,
        epoch: Callable[[], int] = lambda: 0,
        measure: Callable[[Sequence[Batch]], Mapping[str, float]] = lambda batches: {},
    ) -> None:
        self.loader = loader
        self.accumulate = accumulate
        self._limit = limit
        self._add_over_ranks = add_over_ranks
        self._epoch = epoch
        self._measure = measure
        self._given = 0
        """Batches of this epoch that were yielded."""
        self._resumed = False
        self._before: Any = None
        """The loader's own state before the current window was fetched; None at the start of an epoch."""
        self._after: Any = None
        """The same after it was fetched."""

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._run()

    def _size(self) -> int:
        """Batches that the trainer takes per epoch."""
        return int(min(len(self), self._limit()))

    def _run(self) -> Iterator[Batch]:
        size = self._size()
        # a state saved after the last batch of an epoch begins the next one
        skip = self._given if self._resumed and self._given < size else 0
        state = self._before if self._resumed else None
        self._resumed = False
        self._given = skip
        start_epoch(self.loader, self._epoch())
        first = skip - skip % self.accumulate
        batches = self._from(first, state)
        while first < size:
            self._before = self._own_state() if first else None
            window = [next(batches) for _ in range(min(self.accumulate, size - first))]
            self._after = self._own_state()
            totals = step_totals(window, self._add_over_ranks, self._measure)
            for index, batch in enumerate(window, start=first):
                if index >= skip:
                    self._given = index + 1
                    yield batch.with_totals(totals)
            first += len(window)

    def _from(self, first: int, state: Any) -> Iterator[Batch]:
        """The loader's batches from number `first` on."""
        if first and state is not None:
            self.loader.load_state_dict(state)  # type: ignore[attr-defined]
            return iter(self.loader)
        batches = iter(self.loader)
        for _ in range(first):
            next(batches)
        return batches

    def _own_state(self) -> Any:
        state_dict = getattr(self.loader, "state_dict", None)
        return state_dict() if callable(state_dict) else None

    # the protocol that Lightning recognises a resumable loader by; the module saves `progress()`, of all ranks
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def progress(self) -> dict[str, Any]:
        """Everything needed to go on exactly here."""
        window_is_done = self._given % self.accumulate == 0
        loader = self._after if window_is_done else self._before
        return {"given": self._given, "loader": loader, "batches": self._size()}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on where `progress` was taken; raises if the epoch it was taken in was cut into other batches."""
        now, then = self._size(), progress.get("batches")
        if then is not None and now != then and 0 < progress["given"] < then:
            raise UserError(
                f"cannot resume in the middle of an epoch: it had {then} batches (of which {progress['given']} were "
                f"used) and has {now} now. Resume with the same data, batch size and number of devices, or start from "
                "the weights alone"
            )
        is_over = then is not None and progress["given"] >= then
        self._given = 0 if is_over else progress["given"]
        self._before = None if is_over else progress["loader"]
        self._resumed = True
