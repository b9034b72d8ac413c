"""Gradients of a policy loss from E = exp(x - offset) in place of the logits x: half the memory, and no pass over them.

See `triton_exponentials` for the formula.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import choose
from rlhf_kernels.linear_rows import HeadGrads, chunk_rows_for, is_mixed
from rlhf_kernels.rows import RowStats, Transform, count_of
from rlhf_kernels.spec import PolicyLossSpec


def why_not_exponentials(
    hidden: Tensor, weight: Tensor, spec: PolicyLossSpec, softcap: float | None, *, shards: bool
) -> str | None:
    """What E cannot do of what is asked for, or None."""
    choice = choose(hidden)
    if choice.backend != "triton":
        return f"its kernel does not run here ({choice.reason})"
    if hidden.dtype != weight.dtype or (hidden.is_cuda and hidden.dtype != torch.bfloat16):
        return f"it needs bfloat16, whose exponents are those of float32, not {hidden.dtype} and {weight.dtype}"
    if spec.entropy_coef:
        return f"the gradient of an entropy (entropy_coef={spec.entropy_coef}) needs the logits"
    if softcap is not None:
        return f"the gradient through a cap (softcap={softcap}) needs the logits"
    if shards:
        return "it reads the whole vocabulary, and this process has a shard of it"
    if hidden.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(hidden.device)[0] != 9):
        return "its product is made for Hopper (compute capability 9), where its registers suffice"
    if weight.shape[1] * weight.element_size() % 16:
        return f"its operands are loaded in pieces of 16 bytes, which {weight.shape[1]} hidden units do not fill"
    return None


def chunk_rows_for_exponentials(
    num_rows: int, hidden: Tensor, weight: Tensor, chunk_rows: int | None, logits_rows: int
) -> int:
    """Rows of E alive at a time: as many as fit where `logits_rows` rows of logits with their gradients do.

    All, if that takes no more than those and the float32 sum of the weight's gradient, which one chunk does without.
    """
    if chunk_rows is not None:
        return chunk_rows
    vocab, size = weight.shape
    bytes_per_row = vocab * hidden.element_size()
    budget = logits_rows * vocab * (4 + hidden.element_size())
    spared = 4 * vocab * size if is_mixed(hidden, weight) else 0
    if num_rows * bytes_per_row <= budget + spared:
        return num_rows
    return chunk_rows_for(vocab, hidden.device, budget // bytes_per_row)


class Exponentials:
    """E of one chunk of rows at a time."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        old_logprobs: Tensor,
        transform: Transform,
        chunk_rows: int,
        *,
        with_entropy: bool,
        dtype: torch.dtype,
        rounded: bool,
    ) -> None:
        from rlhf_kernels.triton_exponentials import room_for_exponentials

        self.hidden, self.weight, self.bias, self.ids = hidden, weight, bias, ids
        self.old_logprobs, self.transform = old_logprobs, transform
        self.how: dict[str, Any] = {"with_entropy": with_entropy, "rounded": rounded}
        self.room = room_for_exponentials(chunk_rows, weight.shape[0], dtype, hidden.device)
        self.offset = hidden.new_empty(0)

    def stats(self, rows: Tensor | slice, *, keep: bool) -> RowStats:
        """Statistics of some rows; with `keep`, `add` of the same rows comes next."""
        if keep:
            return self._write(rows, self.old_logprobs[rows])
        from rlhf_kernels.triton_linear import linear_stats_triton

        inputs = (self.hidden[rows], self.weight, self.bias, self.ids[rows], self.transform.take(rows))
        return linear_stats_triton(*inputs, **self.how)

    def _write(self, rows: Tensor | slice, logprobs: Tensor) -> RowStats:
        from rlhf_kernels.triton_exponentials import linear_exponentials_triton

        inputs = (self.hidden[rows], self.weight, self.bias, self.ids[rows], logprobs, self.transform.take(rows))
        out = self.room[: count_of(rows)]
        stats, self.offset = linear_exponentials_triton(*inputs, out=out, **self.how)
        return stats

    def add(
        self,
        sums: HeadGrads,
        rows: Tensor | slice,
        stats: RowStats,
        d_logprob: Tensor,
        d_entropy: Tensor | None,
        *,
        kept: bool,
    ) -> None:
        """Adds the gradients of some rows, from those in their log-probabilities."""
        assert d_entropy is None
        if not kept:
            self._write(rows, stats.logprobs)
        transform, exponentials = self.transform.take(rows), self.room[: count_of(rows)]
        distance = stats.maximum - self.offset + stats.log_sum  # of the logsumexp from the offset
        temperature: float | Tensor = transform.temperature
        if transform.row_temperature is not None:
            temperature = transform.row_temperature
        factor = d_logprob * torch.exp(-distance) * (-transform.logit_scale / temperature)
        # an id that is none of the vocabulary, which no GPU refuses: its row is NaN wherever this is written
        token = self.ids[rows].clamp(0, exponentials.shape[1] - 1)
        at_token = -stats.miss * torch.exp(distance)
        stored = at_token.to(exponentials.dtype)
        exponentials.scatter_(1, token[:, None], stored[:, None])
        factor = factor * _undone(at_token, stored)
        sums.add(rows, self.hidden[rows], exponentials, factor=factor)


def _undone(exact: Tensor, rounded: Tensor) -> Tensor:
    """Factor [rows] of a row that undoes three quarters of what rounding did to its token's exponential.

    In the token's column the gradient is as large as in all others together, so its error weighs most; but the factor
    is that of the others too. With q, the squares of theirs over the square of its, the sum of squared errors is that
    of the token times (1 - share)^2 + share^2 q: least at share = 1 / (1 + q), and q, between 0 and 1, is not known.
    1 where it was no rounding: of 0, and of what bfloat16 cannot hold.
    """
    error = exact / rounded.to(exact.dtype) - 1
    return 1 + torch.where(error.abs() <= 2**-8, 0.75 * error, 0.0)
