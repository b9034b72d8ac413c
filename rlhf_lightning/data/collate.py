"""Encoded records to frozen batches. Every collator keeps three promises.

Positions count from 0 at each record's first real token, whatever the padding side; `mask` is False on that token (no
token predicts it) and on padding; packed rows number their records 1, 2, ... in `segments`, 0 on padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from rlhf_lightning.core.batches import PromptBatch, TokenBatch
from rlhf_lightning.data.encode import Encoded

PaddingSide = Literal["left", "right"]


def collate_tokens(
    encoded: Sequence[Encoded], pad_id: int, *, padding_side: PaddingSide = "right", multiple_of: int = 1
) -> TokenBatch:
    """One record per row, padded to the longest.

    Args:
        encoded: the records.
        pad_id: written where there is no token.
        padding_side: where the padding goes.
        multiple_of: the rows' length is rounded up to a multiple of this.
    """
    lengths = [len(record.ids) for record in encoded]
    width = -(-max(lengths) // multiple_of) * multiple_of
    shape = (len(encoded), width)
    tokens, real, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    positions = np.zeros(shape, np.int64)
    for row, (record, length) in enumerate(zip(encoded, lengths, strict=True)):
        start = width - length if padding_side == "left" else 0
        place = slice(start, start + length)
        tokens[row, place] = record.ids
        real[row, place] = True
        mask[row, place] = record.scored
        positions[row, place] = np.arange(length)
    batch = TokenBatch(*map(torch.from_numpy, (tokens, real, mask, positions)))
    measured = [record.ref_logprobs for record in encoded if record.ref_logprobs is not None]
    if len(measured) < len(encoded):
        return batch
    ref_logprobs = np.zeros(shape, np.float32)
    ref_logprobs[mask] = np.concatenate(measured)  # row-major, as the records stand
    return replace(batch, ref_logprobs=torch.from_numpy(ref_logprobs))


def collate_packed(
    rows: Sequence[Sequence[Encoded]], pad_id: int, *, width: int | None = None, multiple_of: int = 1
) -> TokenBatch:
    """Several records per row, one behind the other; `segments` keeps them apart.

    Args:
        rows: the records of each row.
        pad_id: written behind a row's last record.
        width: the rows' length; by default that of the fullest row.
        multiple_of: the rows' length is rounded up to a multiple of this.
    """
    longest = max(sum(len(record.ids) for record in row) for row in rows)
    width = -(-(width or longest) // multiple_of) * multiple_of
    shape = (len(rows), width)
    tokens, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.bool_)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, records in enumerate(rows):
        start = 0
        for segment, record in enumerate(records, start=1):
            length = len(record.ids)
            place = slice(start, start + length)
            tokens[row, place] = record.ids
            mask[row, place] = record.mask
            mask[row, start] = False
            positions[row, place] = np.arange(length)
            segments[row, place] = segment
            start += length
    return TokenBatch(*map(torch.from_numpy, (tokens, segments > 0, mask, positions, segments)))


def collate_prompts(
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    pad_id: int,
) -> PromptBatch:
    """Prompts, left-padded so that all end at the same index.

    Args:
        prompts: ids of each prompt.
        texts: each prompt as the model reads it.
        records: each prompt's whole record.
        indices: row of each prompt in its data set.
        pad_id: written in front of the shorter prompts.
    """
    width = max(len(ids) for ids in prompts)
    tokens = np.full((len(prompts), width), pad_id, np.int64)
    real = np.zeros(tokens.shape, np.bool_)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        real[row, width - len(ids) :] = True
    return PromptBatch(
        torch.from_numpy(tokens), torch.from_numpy(real), list(texts), list(records), torch.tensor(list(indices))
    )
