"""Log-probability of one chosen token per row of logits; entropy, logsumexp and arg-max match from the same pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.checks import check_row_temperature, check_rows, check_token_range, check_transform
from rlhf_kernels.rows import RowStats, Transform, coefficients, row_grads, row_stats, work_dtype
from rlhf_kernels.scaling import refuse_second_derivative


class TokenLogprobs(NamedTuple):
    """About each token; 0 (and False) where `mask` was False. Float32, or float64 where the logits are."""

    logprobs: Tensor
    """Log-probability of the token (nats)."""
    entropy: Tensor | None
    """Entropy of the distribution it was drawn from (nats), if asked for."""
    logsumexp: Tensor
    """Of the logits after scale, cap and temperature."""
    is_argmax: Tensor
    """Whether no token was more probable; no gradient."""


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """Log softmax of the logits at the tokens, in float32, without storing a softmax.

        x = softcap tanh(logit_scale logits / softcap) / temperature        logprobs = x[token] - logsumexp(x)

    Gradients flow from logprobs, entropy and logsumexp to the logits.

    Args:
        logits: [..., V]; strided views are read in place.
        tokens: [...] integer ids; ignored where `mask` is False.
        mask: [...] True = wanted; rows with False are not read, and get gradient 0.
        temperature: positive; of all rows, or one per row [...]; no gradient.
        softcap: bound on the logits (Gemma 2), or None.
        logit_scale: factor on the logits before the cap.
        with_entropy: also the entropy.
        inplace_backward: the backward pass writes the gradient over the logits: no second [..., V] tensor, but nothing
            else may need the logits after it. Without effect under torch.compile, which plans memory itself.
    """
    check_rows(logits, tokens, mask)
    check_transform(temperature, tokens.shape, softcap, logit_scale)
    number, per_row = split_temperature(temperature, tokens)
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logprobs, entropy, logsumexp, is_argmax, *_ = _op(
        logits, tokens, mask, per_row, number, softcap or 0.0, logit_scale, with_entropy, inplace
    )
    return TokenLogprobs(logprobs, entropy if with_entropy else None, logsumexp, is_argmax)


def split_temperature(temperature: float | Tensor, tokens: Tensor) -> tuple[float, Tensor | None]:
    """A number for all rows, or a tensor with one per row."""
    if not isinstance(temperature, Tensor):
        return float(temperature), None
    temperature = temperature.detach().to(tokens.device, torch.float32)
    return 1.0, temperature if temperature.shape == tokens.shape else temperature.reshape(()).expand(tokens.shape)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


@torch.library.custom_op("rlhf_kernels::token_logprobs", mutates_args=())
def _op(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    with_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_token_range(tokens, mask, logits.shape[-1])
    check_row_temperature(row_temperature, mask)
    transform = Transform(temperature, _flat(row_temperature), softcap, logit_scale)
    ids = tokens.reshape(-1).long()
    stats = row_stats("token_logprobs", logits, ids, transform, with_entropy=with_entropy, mask=_flat(mask))
    logprobs, entropy, maximum, log_sum, miss, is_argmax = (
        field.view(tokens.shape) if field.numel() == tokens.numel() else field for field in stats
    )
    return logprobs, entropy, maximum + log_sum, is_argmax, maximum, log_sum, miss


@_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, mask: Any, row_temperature: Any, temperature: Any, softcap: Any, logit_scale: Any,
    with_entropy: bool, inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_token = torch.empty(tokens.shape, dtype=work_dtype(logits), device=logits.device)
    entropy = torch.empty_like(per_token) if with_entropy else per_token.new_empty(0)
    logsumexp, maximum, log_sum, miss = (torch.empty_like(per_token) for _ in range(4))
    return per_token, entropy, logsumexp, torch.empty_like(per_token, dtype=torch.bool), maximum, log_sum, miss


def _grad_into(
    out: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    stats: list[Tensor],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    numbers: list[float],
) -> None:
    logprobs, entropy, maximum, log_sum, miss = (field.reshape(-1) for field in stats)
    flat = RowStats(logprobs, entropy, maximum, log_sum, miss, miss.new_empty(0))
    a, b, c = coefficients(flat, _flat(d_logprob), _flat(d_entropy), _flat(d_logsumexp))
    transform = Transform(numbers[0], _flat(row_temperature), numbers[1], numbers[2])
    ids = tokens.reshape(-1).long()
    row_grads("token_logprobs", logits, ids, flat, a, b, c, transform, out=out, mask=_flat(mask))


@torch.library.custom_op("rlhf_kernels::token_logprobs_grad", mutates_args=())
def _grad(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    stats: list[Tensor],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    numbers: list[float],
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _grad_into(out, logits, tokens, mask, row_temperature, stats, d_logprob, d_entropy, d_logsumexp, numbers)
    return out


@_grad.register_fake
def _(logits: Tensor, *_others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("rlhf_kernels::token_logprobs_grad_", mutates_args={"logits"})
def _grad_inplace(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    stats: list[Tensor],
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    numbers: list[float],
) -> None:
    _grad_into(logits, logits, tokens, mask, row_temperature, stats, d_logprob, d_entropy, d_logsumexp, numbers)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, row_temperature, temperature, softcap, logit_scale, ctx.with_entropy, ctx.inplace = inputs
    ctx.numbers = [temperature, softcap, logit_scale]
    logprobs, entropy, _, is_argmax, maximum, log_sum, miss = output
    ctx.save_for_backward(logits, tokens, mask, row_temperature, logprobs, entropy, maximum, log_sum, miss)
    ctx.mark_non_differentiable(is_argmax, maximum, log_sum, miss)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, tokens, mask, row_temperature, *stats = ctx.saved_tensors
    d_logprob, d_entropy, d_logsumexp = grads[:3]
    d_entropy = d_entropy if ctx.with_entropy else None
    arguments = (tokens, mask, row_temperature, stats, d_logprob, d_entropy, d_logsumexp, ctx.numbers)
    if ctx.inplace:
        refuse_second_derivative("token_logprobs(inplace_backward=True)")
        _grad_inplace(logits, *arguments)
        return logits, *(None,) * 8
    return _grad(logits, *arguments), *(None,) * 8


_op.register_autograd(_backward, setup_context=_setup)
