"""Which records share a row or a batch: best-fit decreasing packing, and batches by a budget of tokens."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack records into rows of `capacity` tokens: longest first, each into the fullest row that still has room.

    Needs at most 11/9 of the fewest rows possible, plus one.

    Args:
        lengths: tokens of each record; none above `capacity`.
        capacity: tokens of a row.
    Returns:
        The indices of each row's records.
    References:
        Ding et al., Fewer Truncations Improve Language Modeling, 2024. arXiv:2404.10830
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity, "records are cut to max_length before they are packed"
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        rows[row].append(index)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return rows


def batch_by_tokens(
    widths: Sequence[int], rows: Sequence[int], budget: int, tie_breaks: Sequence[int]
) -> list[list[int]]:
    """Batches of records of like length whose padded size, rows times width, stays within `budget`.

    Args:
        widths: of each record's longest row, in tokens.
        rows: how many rows each record has (a pair has 2).
        budget: tokens of a batch, padding included.
        tie_breaks: order among records of equal width; it changes who shares a batch, never how many batches there are.
    """
    order = np.lexsort((np.asarray(tie_breaks), -np.asarray(rows), -np.asarray(widths)))
    batches: list[list[int]] = []
    width = filled = 0
    for index in order.tolist():
        if not batches or (filled + rows[index]) * width > budget:
            batches.append([])
            width, filled = widths[index], 0
        batches[-1].append(index)
        filled += rows[index]
    return batches
