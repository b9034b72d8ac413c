"""Generalised advantage estimation over rows with holes, with the KL-shaped rewards it is fed with.

The recursion runs from the last token to the first and is linear, so it is a scan: log2(T) steps of whole rows, no
loop over tokens.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.arithmetic import torch_kl_term
from rlhf_kernels.backend import use_triton
from rlhf_kernels.checks import check_device, check_float, check_mask, check_number, check_per_token, check_some
from rlhf_kernels.spec import ESTIMATORS


class ShapedGae(NamedTuple):
    """Rewards, credit and targets of each token; float32 (float64 where the values are), 0 where `mask` is False."""

    rewards: Tensor
    """-kl_coef * kl, plus the score at the last token that counts."""
    advantages: Tensor
    """Credit of each token, for the policy."""
    returns: Tensor
    """Advantage (at critic_lam) + value: the critic's target."""
    kl: Tensor
    """KL estimate per token."""
    moments: Tensor
    """[3] float64: count, sum and sum of squares of the advantages; add over ranks, then `masked_whiten`."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token that counts; the others are skipped, as if they were not there.

        delta_t = rewards_t + gamma values_t' - values_t        advantages_t = delta_t + gamma lam advantages_t'
        returns_t = advantages_t + values_t

    where t' is the next token with mask True; past the last, value and advantage are 0. Targets: no gradient.

    Args:
        rewards: [B, T].
        values: [B, T]; of the state before token t.
        mask: [B, T] True = counts.
        gamma: discount, in [0, 1].
        lam: trade of bias (0) against variance (1), in [0, 1].
    Returns:
        Two [B, T], 0 where `mask` is False.
    References:
        Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2016.
        arXiv:1506.02438
    """
    _check(values, mask, {"rewards": rewards}, gamma=gamma, lam=lam)
    _, advantages, returns, *_ = _op(rewards.detach(), None, None, None, values.detach(), mask, 0.0, 1, gamma, lam, lam)
    return advantages, returns


def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    gamma: float,
    lam: float,
    critic_lam: float | None = None,
) -> ShapedGae:
    """`gae` of the rewards of RLHF: a KL penalty at every token, and the score at the last.

        rewards_t = -kl_coef * kl(logprobs_t, ref_logprobs_t) + [t is the row's last token that counts] * score

    Args:
        scores: [B], or [B, T] for scores per token (then all of them are added).
        logprobs: [B, T] of the tokens under the policy that sampled them.
        ref_logprobs: [B, T] of the tokens under the reference.
        values: [B, T].
        mask: [B, T] True = counts.
        kl_coef: weight of the penalty.
        kl_estimator: k1 (what the objective asks for in a reward), k2 or k3.
        gamma: discount, in [0, 1].
        lam: of the advantages.
        critic_lam: of the returns (1 for a critic without bias); None = lam.
    References:
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019. arXiv:1909.08593
        Yue et al., VAPO (another lambda for the critic), 2025. arXiv:2504.05118
    """
    critic_lam = lam if critic_lam is None else critic_lam
    named = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    _check(values, mask, named, gamma=gamma, lam=lam, critic_lam=critic_lam)
    check_float("scores", scores)
    check_device("scores", scores, "values", values)
    if scores.shape not in (values.shape, values.shape[:1]):
        raise ValueError(f"scores has shape {tuple(scores.shape)}: give one per row {tuple(values.shape[:1])}, or "
                         f"one per token {tuple(values.shape)}")  # fmt: skip
    check_number("kl_coef", kl_coef)
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator={kl_estimator!r}: use {', '.join(ESTIMATORS)}")
    per_row = scores.ndim == 1
    return ShapedGae(*_op(
        None if per_row else scores.detach(), scores.detach() if per_row else None, logprobs.detach(),
        ref_logprobs.detach(), values.detach(), mask, float(kl_coef), ESTIMATORS[kl_estimator], gamma, lam, critic_lam,
    ))  # fmt: skip


def _check(values: Tensor, mask: Tensor, others: dict[str, Tensor], **fractions: float) -> None:
    check_float("values", values)
    if values.ndim != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}: give [batch, time]")
    check_some("values", values, "token")
    check_mask(mask, "values", values, values.shape)
    for name, x in others.items():
        check_per_token(name, x, "values", values, values.shape)
    for name, number in fractions.items():
        check_number(name, number)
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number} must be in [0, 1]")


@torch.library.custom_op("rlhf_kernels::kl_shaped_gae", mutates_args=())
def _op(
    rewards: Tensor | None,
    scores: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: int,
    gamma: float,
    lam: float,
    critic_lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (rewards, scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, gamma, lam, critic_lam)
    if use_triton("gae" if logprobs is None else "kl_shaped_gae", values):
        from rlhf_kernels.triton_gae import gae_triton

        return gae_triton(*arguments)
    return gae_reference(*arguments)


@_op.register_fake
def _(rewards: Any, scores: Any, logprobs: Any, ref_logprobs: Any, values: Tensor, *_others: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    shaped, advantages, returns, kl = (torch.empty(values.shape, dtype=dtype, device=values.device) for _ in range(4))
    return shaped, advantages, returns, kl, torch.empty(3, dtype=torch.float64, device=values.device)


def gae_reference(
    rewards: Tensor | None,
    scores: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: int,
    gamma: float,
    lam: float,
    critic_lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition, in float64."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    shaped = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
    kl = torch.zeros_like(shaped)
    if logprobs is not None and ref_logprobs is not None:
        kl = torch_kl_term(torch.where(mask, logprobs.double() - ref_logprobs.double(), 0.0), estimator)[0]
        shaped = -kl_coef * kl
    if rewards is not None:
        shaped = shaped + torch.where(mask, rewards, 0.0)
    if scores is not None:
        remaining = mask.flip(-1).cumsum(-1).flip(-1)  # [B, T] tokens that count from t on
        shaped = shaped + torch.where(mask & (remaining == 1), scores[:, None], 0.0)
    kept = torch.where(mask, values, 0.0).double()
    delta = torch.where(mask, shaped + gamma * _next_values(kept, mask) - kept, 0.0)
    advantages = _suffix_scan(delta, _decay(kept, mask, gamma * lam))
    for_critic = advantages
    if critic_lam != lam:
        for_critic = _suffix_scan(delta, _decay(kept, mask, gamma * critic_lam))
    advantages = torch.where(mask, advantages, 0.0)
    returns = torch.where(mask, for_critic + kept, 0.0)
    moments = torch.stack((mask.sum().double(), advantages.sum(), advantages.square().sum()))
    return shaped.to(dtype), advantages.to(dtype), returns.to(dtype), kl.to(dtype), moments


def _next_values(values: Tensor, mask: Tensor) -> Tensor:
    """Value of the next token that counts after each; 0 where there is none."""
    length = values.shape[-1]
    here = torch.where(mask, torch.arange(length, device=values.device), length)
    following = here.flip(-1).cummin(-1).values.flip(-1)  # first that counts at t or after
    index = torch.nn.functional.pad(following[:, 1:], (0, 1), value=length)
    return torch.nn.functional.pad(values, (0, 1)).gather(-1, index)


def _decay(like: Tensor, mask: Tensor, factor: float) -> Tensor:
    """`factor` in the dtype of `like` where a token counts, 1 elsewhere; `where` of two numbers would be float32."""
    return torch.where(mask, torch.full_like(like, factor), 1.0)


def _suffix_scan(b: Tensor, a: Tensor) -> Tensor:
    """x_t = b_t + a_t x_{t+1} with x_T = 0, in log2(T) steps: after k, each x_t reaches 2^k tokens ahead."""
    reach = 1
    while reach < b.shape[-1]:
        new_b, new_a = b.clone(), a.clone()
        torch.addcmul(b[:, :-reach], a[:, :-reach], b[:, reach:], out=new_b[:, :-reach])
        torch.mul(a[:, :-reach], a[:, reach:], out=new_a[:, :-reach])
        b, a, reach = new_b, new_a, 2 * reach
    return b
