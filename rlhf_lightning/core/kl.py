"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    estimator: KLEstimator = "k1",
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(policy || reference) where the tokens were sampled from the policy (nats).

        d  = logprobs - ref_logprobs
        k1 = d                  unbiased, high variance, may be negative; as a loss its gradient is 0 on average
        k2 = d^2 / 2            biased, low variance, never negative; as a loss its gradient is that of the KL
        k3 = exp(-d) - 1 + d    unbiased, low variance, never negative; as a loss it pulls towards the forward KL

    Use k1 inside a reward (it is what the KL-regularised objective asks for) and k2 or k3 inside a loss.

    References:
        Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2 or k3")
