"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal, get_args

from jaxtyping import Float
from rlhf_kernels.arithmetic import torch_kl_term
from torch import Tensor

from rlhf_lightning.core.ratio import MAX_LOG_RATIO, bounded_exp

KLEstimator = Literal["k1", "k2", "k3", "abs"]
KLLossEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]

_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}


def kl_estimate(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    estimator: KLLossEstimator = "k1",
    *,
    bound: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(policy || reference) where the tokens were sampled from the policy (nats).

        d   = logprobs - ref_logprobs
        k1  = d                  unbiased, high variance, may be negative; as a loss its gradient is 0 on average
        k2  = d^2 / 2            biased, low variance, never negative; as a loss its gradient is that of the KL
        k3  = exp(-d) - 1 + d    unbiased, low variance, never negative; as a loss it pulls towards the forward KL
        abs = |d|                no estimate of the KL: it also grows where the policy is the less sure of the two
        k1+, k3+, abs+ = their value, the gradient of k2 (straight-through); k1+ and k3+ are unbiased in both

    Use k1 inside a reward (it is what the KL-regularised objective asks for) and another inside a loss; `kl_penalty`
    also corrects for tokens that an older policy sampled. verl calls k1 `kl`, k2 `mse` and k3 `low_var_kl`.

    Args:
        bound: hold the estimate within +-bound, without gradient beyond (but for that of k2 with a +); None: it is not
            held. OpenRLHF holds k1, k2 and k3, verl k3, within +-10.
    References:
        Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    if estimator not in get_args(KLLossEstimator):
        raise ValueError(f"unknown KL estimator {estimator!r}: use {', '.join(get_args(KLLossEstimator))}")
    difference = logprobs - ref_logprobs
    base = estimator.removesuffix("+")
    if bound is not None and base == "k3":
        difference = difference.clamp(min=-MAX_LOG_RATIO)  # exp must not overflow: a slope of 0 times infinity is NaN
    value: Tensor = difference.abs() if base == "abs" else torch_kl_term(difference, _ESTIMATORS[base])[0]
    if bound is not None:
        value = value.clamp(-bound, bound)
    if base == estimator:
        return value
    straight = 0.5 * (logprobs - ref_logprobs).square()
    return straight - straight.detach() + value.detach()


def kl_penalty(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    *,
    estimator: KLLossEstimator = "k3",
    importance_weighted: bool = False,
    bound: float | None = None,
    max_weight: float | None = None,
) -> Float[Tensor, "*shape"]:
    """The KL term of a policy loss, per token: what all on-policy stages add for holding the policy near its reference.

        kl_t = w_t estimate_t,     w_t = exp(logprobs_t - old_logprobs_t) if importance_weighted else 1

    Tokens were sampled by the old policy, so after the first optimiser step on a rollout the plain estimate is biased;
    the weight takes the bias out. With k1, k3 and abs the gradient also flows through the weight, which makes the
    expected gradient that of the KL (of the mean of |d|) even on-policy (DeepSeek-V3.2); with k2 and those with a +,
    whose own gradient is right already, it does not. With the weight, k1, k3, k1+ and k3+ are unbiased in value, and
    all but abs in gradient.

    TRL's `use_bias_correction_kl` is k3 with the weight; where its ratio is the sequence's, it weighs by that one.
    The gradient of weighted k2, k3 and k3+ is w_t d_t at every token. OpenRLHF's `unbiased_gradient` has that of the
    weighted k3+ with `max_weight` 10, and an unweighted value.

    Args:
        logprobs: under the policy being trained.
        ref_logprobs: under the reference; no gradient.
        old_logprobs: under the policy that sampled; no gradient.
        estimator: see `kl_estimate`.
        importance_weighted: whether to weigh each token by its ratio.
        bound: see `kl_estimate`; of the estimate before it is weighted.
        max_weight: largest weight, which bounds the variance and lets the bias in beyond; None: no bound.
    References:
        DeepSeek-AI, DeepSeek-V3.2 (unbiased KL estimate), 2025. arXiv:2512.02556
    """
    estimate = kl_estimate(logprobs, ref_logprobs, estimator, bound=bound)
    if not importance_weighted:
        return estimate
    ratio = bounded_exp(logprobs - old_logprobs)
    if max_weight is not None:
        ratio = ratio.clamp(max=max_weight)
    return estimate * (ratio if estimator in ("k1", "k3", "abs") else ratio.detach())
