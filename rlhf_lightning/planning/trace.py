"""Counts the bytes of every tensor that lives while code runs, without numbers in any of them.

Under `FakeTensorMode` an operation gives a tensor of the right shape and computes nothing. Every storage is seen when
an operation returns it and again when nothing refers to it any more, the autograd graph included: the sum in between is
what an allocator would have to hold. What operations hold inside is not seen, except for those that say so here.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rlhf_kernels.linear_rows import LARGE_WEIGHT, chunk_rows_for, tile_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORWARD, BACKWARD = "rlhf_kernels::linear_token_logprobs", "rlhf_kernels::linear_token_logprobs_grad"
APART, APART_BACKWARD = "rlhf_kernels::linear_exact_kl", "rlhf_kernels::linear_exact_kl_grad"
OTHER, LOGITS, SCRATCH = "activations", "logits", "scratch"


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is held."""

    total: int
    """Bytes."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What they are held by, as labelled; "activations" is everything without a label."""


class MemoryTrace(TorchDispatchMode):
    """Entered inside `FakeTensorMode`, keeps an account of all storages.

    Args:
        device: cpu or cuda: whose budgets for logits apply.
        autocast: whether that is on in forward passes: on cuda the output head then casts its operands to 16 bits.
    """

    def __init__(self, device: str = "cpu", *, autocast: bool = False) -> None:
        super().__init__()
        self.device, self.autocast = torch.device(device), autocast
        self.kernel_calls = 0
        """How often logits were computed so far."""
        self._events: list[tuple[int, int]] = []
        """Storage number, and bytes that came (or went: negative)."""
        self._labels: dict[int, str] = {}
        self._alive: dict[int, tuple[int, int]] = {}
        """Address of a storage -> its number, its bytes."""
        self._next = 0

    # ---- accounting ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        name = func._schema.name
        if name in SCRATCHES:
            self.kernel_calls += name == FORWARD
            if name == FORWARD:
                self.label(out[-1], LOGITS)
            self.hold(SCRATCHES[name](self, *args), SCRATCH)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        number, size = self._next, storage.nbytes()
        self._next += 1
        self._alive[address] = number, size
        self._events.append((number, size))
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        number, size = self._alive.pop(address)
        self._events.append((number, -size))

    def hold(self, size: int, name: str) -> None:
        """Count memory that something unseen held for a moment."""
        number = self._next
        self._next += 1
        self._labels[number] = name
        self._events += [(number, size), (number, -size)]

    # ---- questions -------------------------------------------------------------------------------------------------

    def label(self, tensors: Iterable[Tensor | None], name: str) -> None:
        """Call what these tensors are held in `name`."""
        for tensor in tensors:
            if tensor is None:
                continue
            found = self._alive.get(tensor.untyped_storage()._cdata)
            if found is not None:
                self._labels[found[0]] = name

    def adopt(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count tensors that were there before, as `name`."""
        for tensor in tensors:
            self._see(tensor)
            self.label([tensor], name)

    def now(self) -> int:
        """A moment, for `peak`."""
        return len(self._events)

    def size(self, name: str) -> int:
        """Bytes of what is called `name` and alive."""
        return sum(size for number, size in self._alive.values() if self._labels.get(number, OTHER) == name)

    def peak(self, start: int, stop: int, share: Callable[[str], float] = lambda name: 1.0) -> Peak:
        """The most that was held between two moments.

        Args:
            share: what part of everything called so lies on this device.
        """
        held: dict[str, float] = {}
        most, parts = -1.0, {}
        total = 0.0
        for index, (number, size) in enumerate(self._events[:stop]):
            name = self._labels.get(number, OTHER)
            change = size * share(name)
            held[name] = held.get(name, 0.0) + change
            total += change
            # a rise that another follows is no peak, and `held` need not be copied for it
            rises = index + 1 < stop and self._events[index + 1][1] > 0
            if index + 1 >= start and total > most and not rises:
                most, parts = total, dict(held)
        return Peak(int(max(most, 0)), {name: int(size) for name, size in parts.items() if size >= 1})


# ---- what operations hold inside -------------------------------------------------------------------------------------


def _tile(device: torch.device, hidden: Tensor, weight: Tensor, tokens: Tensor, chunk_rows: int | None) -> int:
    """Bytes of the logits that are alive at a time and not kept."""
    rows, vocab, size = tokens.numel(), weight.shape[0], 8 if hidden.dtype == torch.float64 else 4
    if device.type == "cuda":
        tile = min(rows, chunk_rows_for(vocab, device, chunk_rows, size)), vocab
    else:
        tile = tile_for(rows, vocab, device, chunk_rows, size, whole_rows=False)
    return min(rows, tile[0]) * min(vocab, tile[1]) * size


def _casts(trace: MemoryTrace, hidden: Tensor, weight: Tensor) -> int:
    """Bytes of the head's operands in 16 bits, from its forward pass to its backward pass."""
    if trace.device.type != "cuda" or not trace.autocast:
        return 0
    return sum(2 * x.numel() for x in (hidden, weight) if x.dtype == torch.float32)


def _forward_scratch(trace: MemoryTrace, hidden: Tensor, weight: Tensor, bias: Any, tokens: Tensor, *rest: Any) -> int:
    chunk_rows, keep = rest[6], rest[7]
    tile = _tile(trace.device, hidden, weight, tokens, chunk_rows)
    kept = sum(keep) * (8 if hidden.dtype == torch.float64 else 4)
    scratch = 0 if kept >= tokens.numel() * weight.shape[0] * 4 else tile
    return scratch + _casts(trace, hidden, weight)


def _backward_scratch(trace: MemoryTrace, hidden: Tensor, weight: Tensor, bias: Any, tokens: Tensor, *rest: Any) -> int:
    kept, needs_weight = sum(block.numel() for block in rest[3]), rest[9][1]
    rows, width = min(tokens.numel(), 2048), hidden.shape[-1]
    tile = _tile(trace.device, hidden, weight, tokens, None)
    all_kept = kept >= tokens.numel() * weight.shape[0]
    casts = _casts(trace, hidden, weight)
    scratch = rows * width * 4 + casts
    in_16_bits = casts > 0 or hidden.dtype in (torch.bfloat16, torch.float16)
    if not in_16_bits:
        return scratch + (0 if all_kept else tile)
    if trace.device.type == "cuda":  # the block of kept logits is gone before there is a tile that is not in it
        scratch += 0 if all_kept else max(0, tile - kept * 4)
    else:
        scratch += 0 if all_kept else tile
    # the tile once more in 16 bits, the weight's gradient in 32, unless one product makes all of it
    one_product = trace.device.type == "cuda" and all_kept and weight.numel() >= LARGE_WEIGHT
    summed = needs_weight and not one_product
    return scratch + tile // 2 + (weight.numel() * 4 if summed else 0)


def _divergence_scratch(
    trace: MemoryTrace, hidden: Tensor, weight: Tensor, bias: Any, ref_hidden: Tensor, *rest: Any
) -> int:
    """Logits of two models, a chunk of rows at a time: the same, whichever divergence it is."""
    rows, vocab, size = hidden[..., 0].numel(), weight.shape[0], 8 if hidden.dtype == torch.float64 else 4
    chunk = chunk_rows_for(vocab, trace.device, None, 2 * size)
    return 2 * min(rows, chunk) * vocab * size + _casts(trace, hidden, weight) + _casts(trace, ref_hidden, rest[0])


def _divergence_backward_scratch(trace: MemoryTrace, hidden: Tensor, weight: Tensor, *rest: Any) -> int:
    scratch = _divergence_scratch(trace, hidden, weight, *rest)
    in_16_bits = _casts(trace, hidden, weight) > 0 or hidden.dtype in (torch.bfloat16, torch.float16)
    needs_weight = rest[-1][1]
    return scratch + (weight.numel() * 4 if in_16_bits and needs_weight else 0)


SCRATCHES: dict[str, Callable[..., int]] = {
    FORWARD: _forward_scratch,
    BACKWARD: _backward_scratch,
    APART: _divergence_scratch,
    APART_BACKWARD: _divergence_backward_scratch,
}
