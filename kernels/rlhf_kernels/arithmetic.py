"""The arithmetic of the policy losses, written once.

The functions below use operators and `tl.where`, `tl.exp` and nothing else. `bind` gives them a meaning: with torch's
functions they work on tensors (the eager path and the references), with `triton.language` they are inlined in the
kernels. Each returns its own derivative beside its value, so that no second copy of a loss exists as a gradient; the
tests hold the derivative against autograd of the value.

Capital arguments are compile-time constants of a kernel.
"""

import types
from collections.abc import Callable
from typing import Any

import torch

CLIPPED, REINFORCE, CISPO, SAPO = 0, 1, 2, 3

tl: Any = None
"""Given a meaning by `bind`: a namespace with `where` and `exp`."""


class TorchNamespace:
    where = staticmethod(torch.where)
    exp = staticmethod(torch.exp)


def bind(function: Callable[..., Any], namespace: Any, **others: Any) -> Any:
    """`function` with `tl` meaning `namespace`: the same code object, so the same source."""
    bound = {"tl": namespace, "__builtins__": __builtins__, **others}
    result = types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__)
    result.__module__ = function.__module__
    result.__doc__ = function.__doc__
    result.__qualname__ = function.__qualname__
    return result


def kl_term(difference, ESTIMATOR):  # type: ignore[no-untyped-def]
    """An estimate of KL(policy || reference) from d = log policy - log reference of a sampled token; its slope in d.

        k1 = d      k2 = d^2 / 2      k3 = exp(-d) - 1 + d

    Near 0 the series of k3 is used: exp(-d) - 1 + d loses every digit there.
    """
    value = difference
    slope = difference * 0.0 + 1.0
    if ESTIMATOR == 2:
        value = 0.5 * difference * difference
        slope = difference
    if ESTIMATOR == 3:
        d = difference
        small = (d < 0.1) & (d > -0.1)
        grown = tl.exp(-d)
        series = d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24 - d * (1.0 / 120 - d * (1.0 / 720 - d / 5040)))))
        value = tl.where(small, series, grown - 1.0 + d)
        series = d * (1.0 - d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24 - d * (1.0 / 120 - d / 720)))))
        slope = tl.where(small, series, 1.0 - grown)
    return value, slope


def policy_term(logprob, log_ratio, advantage, clip_low, clip_high, dual_clip, tau_up, tau_down, FORM, DUAL):  # type: ignore[no-untyped-def]
    """Loss of one token, its slope in the token's log-probability, the ratio, and whether a bound stopped the gradient.

    r         = exp(log_ratio), log_ratio held within +-20 (exp(20) = 5e8 teaches nothing, and exp cannot overflow)
    clipped   : -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and not above -dual_clip A where A < 0 if DUAL
    reinforce : -A logprob
    cispo     : -clip(r, 1 - clip_low, 1 + clip_high) A logprob, no gradient through r
    sapo      : -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_up where A > 0 and tau_down elsewhere
    """
    beyond = (log_ratio <= -20.0) | (log_ratio >= 20.0)  # and NaN is not: what it makes of a row is to be seen
    held = tl.where(log_ratio < -20.0, -20.0, tl.where(log_ratio > 20.0, 20.0, log_ratio))
    ratio = tl.exp(held)
    ratio_slope = tl.where(beyond, 0.0, ratio)
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    stopped = ratio != ratio
    loss = -advantage * logprob
    slope = -advantage
    if FORM == 0:
        stopped = bounded * advantage < ratio * advantage
        loss = -tl.where(stopped, bounded, ratio) * advantage
        slope = -tl.where(stopped, 0.0, ratio_slope) * advantage
        if DUAL:
            over = (advantage < 0.0) & (loss > -dual_clip * advantage)
            loss = tl.where(over, -dual_clip * advantage, loss)
            slope = tl.where(over, 0.0, slope)
            stopped = stopped | over
    if FORM == 2:
        stopped = bounded != ratio
        loss = -bounded * advantage * logprob
        slope = -bounded * advantage
    if FORM == 3:
        tau = tl.where(advantage > 0.0, advantage * 0.0 + tau_up, tau_down)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -advantage * gate * 4.0 / tau
        slope = -advantage * gate * (1.0 - gate) * 4.0 * ratio_slope
    return loss, slope, ratio, stopped


torch_kl_term = bind(kl_term, TorchNamespace)
torch_policy_term = bind(policy_term, TorchNamespace)
