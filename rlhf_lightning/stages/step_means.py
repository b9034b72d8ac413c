"""Metrics of an optimiser step: every element with equal weight, over micro-batches and ranks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf_lightning.core.masked import masked_sum


class StepMeans:
    """Adds up sums and counts over the micro-batches of a step, then gives the means.

    A mean of micro-batch means would weigh a short micro-batch like a long one, and count an empty one as zero.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def __copy__(self) -> "StepMeans":
        same = StepMeans()
        same._sums = dict(self._sums)
        return same

    def add(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Count the entries of `values` where `mask` is True. Tensors only: nothing waits for the device."""
        count = mask.sum().float()
        for name, value in values.items():
            total, so_far = self._sums.get(name, (count.new_zeros(()), count.new_zeros(())))
            self._sums[name] = (total + masked_sum(value.detach().float(), mask), so_far + count)

    def take(self, add_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means of what was added, over all ranks; starts over."""
        if not self._sums:
            return {}
        flat = add_over_ranks(torch.stack([part for pair in self._sums.values() for part in pair]))
        means = {name: flat[2 * i] / flat[2 * i + 1].clamp(min=1) for i, name in enumerate(self._sums)}
        self._sums = {}
        return means
