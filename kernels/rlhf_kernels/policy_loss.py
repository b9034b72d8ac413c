"""The policy loss from logits: loss and gradient in one pass over them."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import (
    check_per_token,
    check_row_temperature,
    check_rows,
    check_tensor,
    check_token_range,
    check_transform,
)
from rlhf_kernels.rows import Transform, coefficients, row_grads, row_stats, work_dtype
from rlhf_kernels.scaling import scaled
from rlhf_kernels.spec import PolicyLossOutput, PolicyLossSpec, policy_terms
from rlhf_kernels.token_logprobs import split_temperature

_DEFAULT = PolicyLossSpec()


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    denominator: float | Tensor,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    loss: PolicyLossSpec = _DEFAULT,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
) -> PolicyLossOutput:
    """Policy-gradient loss of sampled tokens, and its gradient in the logits, in one pass.

        loss = sum over tokens with mask of weight_t * L_t / denominator

    with L_t from `PolicyLossSpec`. The gradient is computed with the loss and stored, so backward runs once.

    Args:
        logits: [..., V], as in `token_logprobs`; the gradient goes here and nowhere else.
        tokens: [...] sampled ids.
        old_logprobs: [...] of the tokens under the policy that sampled them.
        advantages: [...] credit of each token.
        mask: [...] True = counts.
        denominator: what the sum is divided by; the tokens or sequences of the whole optimiser step.
        ref_logprobs: [...] of the tokens under the reference, for the KL term.
        weights: [...] weight of each token (1 / length of its sequence, an importance weight); None = 1.
        loss: which loss.
        temperature: the one the tokens were sampled at; one number, or one per row.
        softcap: bound on the logits (Gemma 2), or None.
        logit_scale: factor on the logits before the cap.
        with_entropy: return the entropy even if the loss has none.
    """
    check_rows(logits, tokens, mask)
    check_transform(temperature, tokens.shape, softcap, logit_scale)
    per_token = check_policy(tokens, mask, old_logprobs, advantages, ref_logprobs, weights, loss)
    number, per_row = split_temperature(temperature, tokens)
    numbers = [number, softcap or 0.0, logit_scale, *loss.numbers()]
    learns = logits.requires_grad and torch.is_grad_enabled()
    scalar, logprobs, entropy, ratio, clipped, kl, _ = _op(
        logits, tokens, *per_token, mask, per_row, as_divisor(denominator, logits), numbers, *encode(loss),
        with_entropy or loss.entropy_coef != 0, learns,
    )  # fmt: skip
    return output(scalar, logprobs, entropy, ratio, clipped, kl)


def check_policy(
    tokens: Tensor,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    spec: PolicyLossSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The per-token inputs, checked and without gradient."""
    check_tensor("mask", mask)
    if not isinstance(spec, PolicyLossSpec):
        raise ValueError(f"loss is a {type(spec).__name__}: give a PolicyLossSpec")
    if spec.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={spec.kl_coef} needs ref_logprobs: log-probabilities of the tokens, reference model")
    if spec.ratio == "sequence" and tokens.ndim < 2:
        raise ValueError(f"ratio 'sequence' needs tokens [sequences, time], not {tuple(tokens.shape)}")
    named = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"ref_logprobs": ref_logprobs, "weights": weights}
    for name, x in (*named.items(), *optional.items()):
        if x is not None:
            check_per_token(name, x, "tokens", tokens, tokens.shape)
    ref_logprobs = ref_logprobs if spec.kl_coef else None
    return (
        old_logprobs.detach(),
        advantages.detach(),
        None if ref_logprobs is None else ref_logprobs.detach(),
        None if weights is None else weights.detach(),
    )


def as_divisor(denominator: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}: give one number for the whole step")
        return denominator.detach().reshape(()).to(like.device, work_dtype(like))
    if not denominator > 0:
        raise ValueError(f"denominator={denominator} must be positive: the number of tokens (or sequences) of the step")
    # filled there: a copy from here would make the host wait, and cannot be a part of a CUDA graph
    return torch.full((), denominator, dtype=work_dtype(like), device=like.device)


def check_divisor(denominator: Tensor) -> None:
    """Reads it, so only on the CPU."""
    if denominator.device.type == "cpu" and not bool(denominator > 0):
        raise ValueError(f"denominator={float(denominator)} must be positive: no token of the step counts, skip it")


def encode(spec: PolicyLossSpec) -> tuple[str, str, str, bool]:
    """The options that are not numbers, as an op's schema takes them."""
    return spec.form, spec.kl_estimator, spec.ratio, spec.dual_clip is not None


def decode(numbers: list[float], form: str, estimator: str, ratio: str, dual: bool) -> tuple[Transform, PolicyLossSpec]:
    temperature, softcap, logit_scale, clip_low, clip_high, dual_clip, tau_up, tau_down, kl_coef, entropy_coef = numbers
    options: dict[str, Any] = {
        "form": form, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip if dual else None,
        "kl_coef": kl_coef, "kl_estimator": estimator, "entropy_coef": entropy_coef, "ratio": ratio,
        "sapo_tau_up": tau_up, "sapo_tau_down": tau_down,
    }  # fmt: skip
    spec = PolicyLossSpec(**options)
    return Transform(temperature, None, softcap, logit_scale), spec


def output(
    scalar: Tensor, logprobs: Tensor, entropy: Tensor, ratio: Tensor, clipped: Tensor, kl: Tensor
) -> PolicyLossOutput:
    """Empty tensors stand for what was not asked for."""
    some_entropy = entropy if entropy.shape == logprobs.shape else None
    return PolicyLossOutput(scalar, logprobs, some_entropy, ratio, clipped, kl if kl.shape == logprobs.shape else None)


@torch.library.custom_op("rlhf_kernels::policy_loss", mutates_args=())
def _op(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    mask: Tensor,
    row_temperature: Tensor | None,
    denominator: Tensor,
    numbers: list[float],
    form: str,
    estimator: str,
    ratio: str,
    dual: bool,
    with_entropy: bool,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_token_range(tokens, mask, logits.shape[-1])
    check_row_temperature(row_temperature, mask)
    check_divisor(denominator)
    transform, spec = decode(numbers, form, estimator, ratio, dual)
    row_temperature = None if row_temperature is None else row_temperature.reshape(-1)
    transform = transform._replace(row_temperature=row_temperature)
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if learns else logits.new_empty(0)
    if spec.ratio == "token" and use_triton("policy_loss", logits):
        from rlhf_kernels.triton_policy import policy_loss_triton

        per_token = (tokens, old_logprobs, advantages, ref_logprobs, weights, mask)
        return policy_loss_triton(logits, *per_token, transform, denominator, spec, with_entropy, grads)
    ids = tokens.reshape(-1).long()
    flat_mask = mask.reshape(-1)
    stats = row_stats("policy_loss", logits, ids, transform, with_entropy=with_entropy, mask=flat_mask)
    logprobs = stats.logprobs.view(tokens.shape)
    entropy = stats.entropy.view(tokens.shape) if with_entropy else stats.entropy
    terms = policy_terms(logprobs, old_logprobs, advantages, mask, spec, ref_logprobs=ref_logprobs, entropy=entropy)
    loss, d_logprob, d_entropy = weighted(terms.loss, terms.logprob_slope, mask, weights, denominator, spec)
    if learns:
        a, b, c = coefficients(stats, d_logprob.reshape(-1), None if d_entropy is None else d_entropy.reshape(-1), None)
        row_grads("policy_loss", logits, ids, stats, a, b, c, transform, out=grads, mask=flat_mask)
    kl = logprobs.new_empty(0) if terms.kl is None else terms.kl
    return loss, logprobs, entropy, terms.ratio, terms.clipped, kl, grads


def weighted(
    token_loss: Tensor,
    slope: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    denominator: Tensor,
    spec: PolicyLossSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scalar loss, and its gradient in each token's log-probability and entropy (None = zero)."""
    share = mask.to(token_loss.dtype) / denominator.to(token_loss.dtype)
    if weights is not None:
        share = torch.where(mask, share * weights.to(share.dtype), 0.0)
    loss = (token_loss * share).sum(dtype=torch.float64).to(token_loss.dtype)
    return loss, slope * share, -spec.entropy_coef * share if spec.entropy_coef else None


@_op.register_fake
def _(logits: Tensor, tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ref_logprobs, with_entropy, learns = others[2], others[-2], others[-1]
    per_token = fake_outputs(tokens, work_dtype(logits), ref_logprobs is not None, with_entropy)
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if learns else logits.new_empty(0)
    return *per_token, grads


def fake_outputs(
    tokens: Tensor, dtype: torch.dtype, with_kl: bool, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, ratio = (torch.empty(tokens.shape, dtype=dtype, device=tokens.device) for _ in range(2))
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    kl = torch.empty_like(logprobs) if with_kl else logprobs.new_empty(0)
    clipped = torch.empty_like(logprobs, dtype=torch.bool)
    return logprobs.new_empty(()), logprobs, entropy, ratio, clipped, kl


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 16
    return scaled("policy_loss", ctx.saved_tensors[0], grads[0]), *(None,) * 15


_op.register_autograd(_backward, setup_context=_setup)
