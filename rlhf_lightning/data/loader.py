"""The loader: sized, sharded over ranks, shuffled by a counter, and resumable between any two batches."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from rlhf_lightning.core.batches import Batch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.data.packing import batch_by_tokens, pack_best_fit


class ItemDataset(Dataset[Any]):
    """Items by index; a list of indices gives a list of items, and a list of lists rows of them."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return [self[i] for i in index] if isinstance(index, list) else self.items[index]


@dataclass(frozen=True)
class Plan:
    """What an epoch is made of, before it is divided among ranks."""

    counts: tuple[int, ...]
    """Records of each source; the items stand source after source."""
    weights: tuple[float, ...]
    """How often each source's records are seen per epoch."""
    batch_size: int
    """Records (packed: rows) per rank and batch."""
    widths: tuple[int, ...] = ()
    """Tokens of each item's longest row; needed for packing and token budgets."""
    rows: tuple[int, ...] = ()
    """Rows of each item."""
    pack_length: int | None = None
    """Pack items into rows of this length."""
    tokens_per_batch: int | None = None
    """Group items of like length into batches of at most so many tokens, padding included."""
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False

    def draw(self, epoch: int) -> np.ndarray:
        """Indices of the items of an epoch: each source as often as its weight says; a part of it is drawn."""
        drawn, start = [], 0
        for source, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            total = max(round(count * weight), 1)
            whole, rest = divmod(total, count)
            parts = [np.arange(count)] * whole
            if rest:
                generator = np.random.default_rng(counter_seed(self.seed, "weight", epoch, source))
                parts.append(np.sort(generator.permutation(count)[:rest]))
            drawn.append(start + np.concatenate(parts))
            start += count
        return np.concatenate(drawn)

    def units(self, epoch: int) -> list[Any]:
        """What is shuffled and divided: items, packed rows, or whole batches (by token budget).

        The number of units is the same in every epoch, so that a loader has one length.
        """
        generator = np.random.default_rng(counter_seed(self.seed, "shuffle", epoch))
        if self.pack_length is None and self.tokens_per_batch is None:
            units = self.draw(epoch).tolist()
        else:
            items = self.draw(0)
            widths = [self.widths[i] for i in items]
            if self.pack_length is not None:
                groups = pack_best_fit(widths, self.pack_length)
            else:
                rows = [self.rows[i] for i in items]
                ties = generator.permutation(len(items)) if self.shuffle else np.arange(len(items))
                assert self.tokens_per_batch is not None
                groups = batch_by_tokens(widths, rows, self.tokens_per_batch, ties.tolist())
            units = [items[group].tolist() for group in groups]
        if self.shuffle:
            units = [units[i] for i in generator.permutation(len(units))]
        return units


class EpochSampler(DistributedSampler[Any]):
    """Yields this rank's batches of an epoch, as lists of indices.

    The batches of all ranks at one step are neighbours in the epoch's order, so that what a step sees depends on the
    size of the global batch alone, not on how many ranks share it. Ranks get equally many batches: the last units are
    repeated (or dropped by `drop_last`), as torch's DistributedSampler does.
    """

    def __init__(self, plan: Plan, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(ItemDataset(()), num_replicas=num_replicas, rank=rank, shuffle=plan.shuffle, seed=plan.seed)
        self.plan = plan
        self.epoch = 0
        self.start = 0
        self._made: tuple[int, list[Any]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; staying in the same one keeps a position that was restored."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def batches(self) -> list[Any]:
        """All batches of this rank in the current epoch."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = (self.epoch, self._make())
        return self._made[1]

    def _make(self) -> list[Any]:
        units = self.plan.units(self.epoch)
        size = 1 if self.plan.tokens_per_batch is not None else self.plan.batch_size
        together = self.num_replicas * (size if self.plan.drop_last else 1)
        if self.plan.drop_last:
            units = units[: len(units) // together * together]
        missing = -len(units) % self.num_replicas
        if missing:  # there are fewer units than ranks, perhaps: repeat them as often as it takes
            units += (units * (missing // len(units) + 1))[:missing]
        mine = units[self.rank :: self.num_replicas]
        if self.plan.tokens_per_batch is not None:
            return mine
        return [mine[start : start + size] for start in range(0, len(mine), size)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches()[self.start :])

    def __len__(self) -> int:
        return len(self.batches())


class ResumableLoader(StatefulDataLoader):
    """A StatefulDataLoader whose state is two numbers: the epoch, and how many of its batches were handed out.

    Orders are functions of (seed, epoch), so nothing else needs saving; the state does not depend on workers or what
    they prefetched, and a state saved behind the last batch is the beginning of the next epoch.
    """

    def __init__(
        self, items: Sequence[Any], sampler: EpochSampler, collate: Callable[[Any], Batch], **options: Any
    ) -> None:
        with warnings.catch_warnings():  # torchdata 0.11 calls torch.set_vital, which newer torch deprecates
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            super().__init__(ItemDataset(items), batch_size=None, sampler=sampler, collate_fn=collate, **options)
        self._handed_out = 0

    @property
    def items(self) -> Sequence[Any]:
        return self.dataset.items

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch (its order is drawn anew)."""
        self.sampler.set_epoch(epoch)
        self._handed_out = self.sampler.start

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._run()

    def _run(self) -> Iterator[Batch]:
        # a generator: nothing happens before the first batch is asked for, so an unused iterator changes nothing
        sampler = self.sampler
        epoch, self._handed_out = sampler.epoch, sampler.start
        batches = super().__iter__()
        first = next(batches, None)
        sampler.start = 0
        while first is not None:
            self._handed_out += 1
            yield first
            first = next(batches, None)
        if sampler.epoch == epoch:
            self.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.sampler.epoch, "batches": self._handed_out, "length": len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        epoch, batches, length = state_dict["epoch"], state_dict["batches"], state_dict["length"]
        if batches >= length:
            epoch, batches = epoch + 1, 0
        elif batches and length != len(self):
            raise UserError(
                f"cannot resume in the middle of an epoch: it had {length} batches (of which {batches} were used) and "
                f"has {len(self)} now. Resume with the same data, batch size and number of devices, or start from the "
                "weights alone"
            )
        self.sampler.epoch, self.sampler.start = epoch, batches
        self._handed_out = batches
