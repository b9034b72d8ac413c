"""Scored pairs from plain numbers, for tests of preference losses."""

from collections.abc import Mapping, Sequence

import torch

from rlhf_lightning.core.interfaces import CompletionScores, PairScores


def completions(
    logprobs: Sequence[Sequence[float]],
    ref: Sequence[Sequence[float]] | None = None,
    dtype: torch.dtype = torch.float32,
    **more: Sequence[Sequence[float]],
) -> CompletionScores:
    """Completions of uneven lengths, padded on the right, with a gradient to the policy's log-probabilities."""
    width = max(len(row) for row in logprobs)

    def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)

    return CompletionScores(
        logprobs=padded(logprobs).requires_grad_(),
        mask=torch.tensor([[i < len(row) for i in range(width)] for row in logprobs]),
        ref_logprobs=None if ref is None else padded(ref),
        **{name: padded(rows) for name, rows in more.items()},
    )


def pairs(
    chosen: Sequence[float],
    rejected: Sequence[float],
    ref_chosen: Sequence[float] | None = None,
    ref_rejected: Sequence[float] | None = None,
    *,
    lengths: tuple[int, int] = (2, 4),
    margins: Sequence[float] | None = None,
    running: Mapping[str, float] | None = None,
    step: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PairScores:
    """Pairs with these summed log-probabilities, spread evenly over so many tokens."""

    def side(totals: Sequence[float], ref: Sequence[float] | None, length: int) -> CompletionScores:
        spread = [[total / length] * length for total in totals]
        return completions(spread, None if ref is None else [[total / length] * length for total in ref], dtype)

    return PairScores(
        side(chosen, ref_chosen, lengths[0]),
        side(rejected, ref_rejected, lengths[1]),
        None if margins is None else torch.tensor(margins),
        running or {},
        step or {},
    )


def gradients(per_pair: torch.Tensor, scored: PairScores) -> tuple[list[float], list[float]]:
    """d loss_i / d log pi(y_i), for chosen and rejected: what every token of the row gets."""
    grads = torch.autograd.grad(
        per_pair.sum(), (scored.chosen.logprobs, scored.rejected.logprobs), allow_unused=True, materialize_grads=True
    )
    return grads[0][:, 0].tolist(), grads[1][:, 0].tolist()
