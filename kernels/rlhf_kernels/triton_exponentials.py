# The body of a kernel is not Python: its arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, operator"
"""From hidden states to exp(x - offset) of all logits x, 16 bits each, and the statistics of each row.

The gradient of a policy loss in the logits of a row is a (1[i = y] - p_i), where a is known only after the whole row.
But p_i = exp(x_i - offset) exp(offset - logsumexp) for any offset that is known before: so the product of hidden states
and weight writes E = exp(x - offset) while it makes its sums, and no logit is ever in memory. The factor of the row,
-a exp(offset - logsumexp), comes after (`linear_rows.HeadGrads.add`); at y, E is -miss exp(logsumexp - offset).

bfloat16 has the exponents of float32, so E has 2^-9 relative error whether offset is the logsumexp or 40 nats above or
60 below. The estimate is offset = x_y - old_logprob: x_y is one scalar product, old_logprob that of the policy that
sampled. So it is off by the log-ratio of the two; as old_logprob is held above -40, it is never too high. A row whose
offset is more than 60 nats low is written again, with the logsumexp as offset, by a second launch that ends at once if
there is no such row: the host is not asked.

References:
    Dao-AILab, QuACK, linear_cross_entropy: the same with a power of two per row and tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.backend import on_device
from rlhf_kernels.rows import RowStats, Transform
from rlhf_kernels.triton_linear import Product, Tile
from rlhf_kernels.triton_rows import PER_ROW, flags, num_programs, numbers, transformed

HIGH = tl.constexpr(40.0)
"""Nats that an offset may be above the token's logit."""
_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "stride_hidden", "stride_weight"], do_not_specialize_on_alignment=PER_ROW)
def token_offsets_kernel(
    hidden_ptr, weight_ptr, bias_ptr, tokens_ptr, temperature_ptr, scalars_ptr, old_ptr, offset_ptr,
    num_rows, stride_hidden: tl.int64, stride_weight: tl.int64, V, H,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, ROW_TEMPERATURE: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """x of the token minus its old log-probability."""
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        token = tl.load(tokens_ptr + row)
        known = (token >= 0) & (token < V)
        h_row = row * stride_hidden
        w_row = tl.where(known, token, 0).to(tl.int64) * stride_weight
        if ALIGNED:
            h_row = tl.multiple_of(h_row, 16)
            w_row = tl.multiple_of(w_row, 16)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            h = tl.load(hidden_ptr + h_row + columns, mask=columns < H, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + w_row + columns, mask=columns < H, other=0.0).to(tl.float32)
            products += h * w
        z = tl.sum(products, 0)
        if BIAS:
            z += tl.load(bias_ptr + token, mask=known, other=0.0)
        inverse_temperature = tl.load(scalars_ptr)
        if ROW_TEMPERATURE:
            inverse_temperature = 1.0 / tl.load(temperature_ptr + row)
        x = transformed(z, scalars_ptr, inverse_temperature, SCALED, CAPPED)
        old = tl.load(old_ptr + row).to(tl.float32)
        old = tl.where(old == old, tl.maximum(old, -HIGH), 0.0)
        tl.store(offset_ptr + row, x - old)


def room_for_exponentials(num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_rows, V], rows at multiples of 128 bytes: the copy engine writes there."""
    width = -(-vocab // 64) * 64
    return torch.empty((num_rows, width), dtype=dtype, device=device)[:, :vocab]


@on_device
def linear_exponentials_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    old_logprobs: Tensor,
    transform: Transform,
    *,
    with_entropy: bool,
    out: Tensor,
    rounded: bool = False,
    tile: Tile | None = None,
) -> tuple[RowStats, Tensor]:
    """`triton_linear.linear_stats_triton`, and in `out` exp(x - offset) of every column but the token's, which is 0.

    Args:
        hidden: [N, H], weight: [V, H], as `triton_linear.can_describe` asks for.
        old_logprobs: [N], an estimate of the log-probabilities; any number, and NaN, will do.
        out: [N, V], of `room_for_exponentials`.
    Returns:
        The statistics, and offset [N].
    """
    product = Product(hidden, weight, bias, tokens, transform, with_entropy, tile, True, rounded)
    device, num_rows = hidden.device, len(hidden)
    offset = torch.empty(num_rows, dtype=torch.float32, device=device)
    temperatures = transform.row_temperature
    token_offsets_kernel[(min(num_rows, 16 * num_programs(device)),)](
        product.hidden, product.weight, product.bias, product.tokens,
        product.tokens if temperatures is None else temperatures.contiguous(), numbers(transform, device),
        old_logprobs.contiguous(), offset, num_rows, product.hidden.stride(0), product.weight.stride(0), product.vocab,
        product.size, BLOCK=min(_BLOCK, triton.next_power_of_2(product.size)), ALIGNED=product.aligned,
        BIAS=bias is not None, num_warps=4, **flags(transform),
    )  # fmt: skip
    blocks = 1 + triton.cdiv(num_rows, product.tile.rows)
    product.launch(out, offset, torch.ones(blocks, dtype=torch.int32, device=device))
    again = torch.zeros(blocks, dtype=torch.int32, device=device)
    stats = product.merge(offset, again)
    product.launch(out, offset, again)
    return stats, offset


KERNELS: dict[str, Any] = {"token_offsets": token_offsets_kernel}
