"""From hidden states to logits, a chunk of rows at a time: exact in float32, and never more than a budget of logits.

The chunk loop, the matrix products and the memory budget of every op that starts from hidden states.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_kernels.rows import work_dtype

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 1 << 30}
"""Logits alive at a time, per device type. Few, large chunks: each adds once to the [V, H] gradient of the weight."""
KEEP_BYTES = {"cpu": 384 << 20, "cuda": 1 << 30}
"""Logits kept from forward to backward; the rest are computed twice."""
_VOCAB_SLICE = 8192
"""Rows of the weight per product where slices save memory."""


def chunk_rows_for(vocab: int, device: torch.device, chunk_rows: int | None, element_size: int = 4) -> int:
    """Rows of logits that fit in the budget, at least 1."""
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows} must be at least 1; None chooses by a memory budget")
        return chunk_rows
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (vocab * element_size))


def keep_rows_for(num_rows: int, vocab: int, device: torch.device, element_size: int = 4) -> int:
    """Rows whose logits are kept for the backward pass."""
    return min(num_rows, KEEP_BYTES.get(device.type, KEEP_BYTES["cpu"]) // (vocab * element_size))


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast inside: it would round the logits to 16 bits."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


class Head:
    """The last linear map, prepared for many chunks: z = h W^T + b in float32 (float64 for float64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        promoted = torch.promote_types(hidden.dtype, weight.dtype)
        self.dtype = work_dtype(hidden.new_empty(0, dtype=promoted))
        self.vocab = weight.shape[0]
        # Tensor cores multiply 16-bit operands exactly and add in float32: only the output type must not be 16-bit.
        self.mixed = weight.is_cuda and hidden.dtype == weight.dtype and promoted in (torch.bfloat16, torch.float16)
        self.slice = _VOCAB_SLICE if weight.device.type == "cpu" or weight.dtype != self.dtype else self.vocab
        self.weight = weight
        self.bias = None if bias is None else bias.to(self.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[rows, H] -> out [rows, V]."""
        if self.mixed:
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=out)
        else:
            x = hidden.to(self.dtype)
            for columns, part in self._slices():
                torch.mm(x, part.t(), out=out[:, columns])
        return out if self.bias is None else out.add_(self.bias)

    def hidden_grad(self, grads: Tensor) -> Tensor:
        """[rows, V] -> [rows, H]: grads @ W."""
        if self.mixed:
            return torch.mm(grads.to(self.weight.dtype), self.weight, out_dtype=self.dtype)
        total = grads.new_zeros((len(grads), self.weight.shape[1]))
        for columns, part in self._slices():
            total.addmm_(grads[:, columns], part)
        return total

    def add_weight_grad(self, total: Tensor | None, grads: Tensor, hidden: Tensor) -> Tensor:
        """total [V, H] + grads^T @ hidden, accumulated in float32 whatever the operands are."""
        if self.mixed:
            product = (grads.to(self.weight.dtype).t(), hidden)
            if total is None:
                return torch.mm(*product, out_dtype=self.dtype)
            return torch.addmm(total, *product, out_dtype=self.dtype, out=total)
        first = total is None
        if total is None:
            total = grads.new_empty((self.vocab, hidden.shape[1]))
        x = hidden.to(self.dtype)
        for start in range(0, self.vocab, self.slice):
            columns = slice(start, start + self.slice)
            total[columns].addmm_(grads[:, columns].t(), x, beta=0 if first else 1)
        return total

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, a slice at a time: neither a copy nor the packed operand of a product is whole."""
        for start in range(0, self.vocab, self.slice):
            columns = slice(start, start + self.slice)
            yield columns, self.weight[columns].to(self.dtype)


class HeadGrads:
    """Sums of the gradients in hidden states, weight and bias over chunks."""

    def __init__(self, head: Head, hidden: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.needs = head, needs
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=head.dtype) if bias is not None and needs[2] else None

    def add(self, rows: Tensor | slice, hidden: Tensor, grads: Tensor) -> None:
        """The share of one chunk: its row numbers, hidden states [rows, H], gradients in its logits [rows, V]."""
        if self.hidden is not None:
            self.hidden[rows] = self.head.hidden_grad(grads).to(self.hidden.dtype)
        if self.needs[1]:
            self.weight = self.head.add_weight_grad(self.weight, grads, hidden)
        if self.bias is not None:
            self.bias += grads.sum(0)

    def results(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the dtypes of the inputs; an empty tensor for one that was not asked for."""
        weight = self.head.weight
        hidden = weight.new_empty(0) if self.hidden is None else self.hidden
        if not self.needs[1]:
            d_weight = weight.new_empty(0)
        else:
            d_weight = torch.zeros_like(weight) if self.weight is None else self.weight.to(weight.dtype)
        d_bias = weight.new_empty(0) if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return hidden, d_weight, d_bias


def plain(weight: Tensor) -> Tensor:
    """A sharded parameter (DTensor) gathered into a plain tensor; its gradient is sharded again by autograd."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()
