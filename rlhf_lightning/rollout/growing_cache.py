"""A cache of keys and values that is written in place: transformers' own is copied whole at every token."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

AT_LEAST = 64
"""Positions that a full layer grows by at least."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one attention layer, in memory with room for more positions.

    A layer that is full grows by half, so that a position is moved twice on average, however many follow. It is not
    differentiable.

    Args:
        limit: positions that there will be at most.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._room: tuple[Tensor, Tensor] | None = None
        """What `keys` and `values` are the beginning of [rows, heads, positions, width]."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new positions behind the old ones; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            # `end` is beyond the limit only where the limit is wrong; a cache that goes on is slow then, not broken
            positions = max(end, min(self.limit, max(length * 3 // 2, length + AT_LEAST)))
            # one after the other: the old keys are gone before the new values are there
            keys = _moved(self.keys, key_states, length, positions)
            self._room, self.keys = None, keys.narrow(2, 0, length)
            self._room = keys, _moved(self.values, value_states, length, positions)
        keys, values = self._room
        keys.narrow(2, length, end - length).copy_(key_states)
        values.narrow(2, length, end - length).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`; with no room for more until one is written."""
        super().batch_select_indices(indices)
        self._room = None


def _moved(old: Tensor | None, new: Tensor, length: int, positions: int) -> Tensor:
    room = new.new_empty((*new.shape[:2], positions, new.shape[3]))
    if length:
        assert old is not None
        room.narrow(2, 0, length).copy_(old)
    return room


def growing_cache(config: Any, limit: int) -> DynamicCache:
    """transformers' cache for a model, in which layers that see everything are `GrowingLayer`s."""
    cache: Any = DynamicCache(config=config)
    # a layer with a window forgets positions, and stays as it is
    cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
