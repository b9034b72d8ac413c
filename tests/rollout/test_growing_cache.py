"""A cache that is written in place holds what transformers' own holds, and moves little."""

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.rollout.growing_cache import GrowingLayer, growing_cache


def written(steps: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many positions [rows, 2 heads, steps, 4]."""
    numbers = torch.Generator().manual_seed(steps)
    return torch.randn(rows, 2, steps, 4, generator=numbers), torch.randn(rows, 2, steps, 4, generator=numbers)


def test_it_holds_what_is_written_over_growth_and_rows_that_leave():
    """A prompt of 5, then 100 tokens one by one: 5 -> 69 -> 103 -> 105. Rows are copied first and some leave later."""
    ours, theirs = GrowingLayer(limit=105), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*written(5))
    rows = torch.tensor([0, 0, 2, 2])
    for step in range(100):
        if step in (0, 40):
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
            rows = torch.tensor([3, 1])
        new = [x[:, :, -1:] for x in written(step + 1, len(ours.keys))]
        for ours_of, theirs_of in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(ours_of, theirs_of)
        assert ours.get_seq_length() == theirs.get_seq_length() == 6 + step
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_position_is_not_moved_at_every_token():
    """By 64 or by a half, whichever is more, and never beyond the limit: 1000 positions are moved eight times."""
    layer, rooms = GrowingLayer(limit=1000), []
    for step in range(1000):
        layer.update(*written(1))
        if not rooms or layer._room[0] is not rooms[-1]:
            rooms.append(layer._room[0])
        assert layer.keys.shape[-2] == step + 1
    assert [room.shape[-2] for room in rooms] == [64, 128, 192, 288, 432, 648, 972, 1000]


def test_a_longer_answer_than_was_said_is_held_too():
    layer = GrowingLayer(limit=2)
    for _ in range(4):
        keys, _ = layer.update(*written(1))
    assert torch.equal(keys, written(1)[0].expand(3, 2, 4, 4))


def test_a_window_stays_transformers_own():
    full = LlamaConfig(num_hidden_layers=2)
    assert [type(layer) for layer in growing_cache(full, 8).layers] == [GrowingLayer] * 2
    mixed = LlamaConfig(num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    assert [type(layer) for layer in DynamicCache(config=mixed).layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    assert [type(layer) for layer in growing_cache(mixed, 8).layers] == [DynamicSlidingWindowLayer, GrowingLayer]
