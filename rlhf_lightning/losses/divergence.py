"""Divergences that hold a policy to its reference, as the reward that each of them implies for a completion.

Maximising E[r(x, y)] - beta D_f(pi || pi_ref) is solved by r(x, y) = beta f'(pi(y|x) / pi_ref(y|x)) + const(x): the
constant falls out of the difference of two completions of one prompt. Constants of f' are chosen so that f'(1) = 0.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError

MAX_EXPONENT = 80.0
"""exp(80) = 5.5e34 is a float32; beyond it the score stops growing, and so does its gradient."""


class Divergence(ABC):
    """f'(u) from log u, for a divergence D_f(pi || pi_ref) = E_ref[f(u)], u = pi / pi_ref.

    References:
        Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
        Constraints, 2023. arXiv:2309.16240
    """

    @abstractmethod
    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """f(u) = u log u: the KL of DPO and of RLHF.

    f'(u) = log u  (+ 1)
    """

    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return log_ratio


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """f(u) = -log u.

    f'(u) = 1 - 1/u
    """

    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -torch.expm1((-log_ratio).clamp(max=MAX_EXPONENT))


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """f(u) = u log u - (u + 1) log((u + 1) / 2).

    f'(u) = log(2 u / (u + 1)) = log 2 + log sigma(log u)
    """

    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return math.log(2) + F.logsigmoid(log_ratio)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """Between forward KL (alpha = 0) and reverse KL (alpha = 1).

        f'(u) = (u^(alpha - 1) - 1) / (alpha - 1),   log u at alpha = 1

    Args:
        alpha: 0.5 is the squared Hellinger distance. Wang et al. write alpha for what is 1 - alpha here; this is TRL's.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise UserError(f"alpha={self.alpha} is not a number: give one from 0 (forward KL) to 1 (reverse KL)")

    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        power = self.alpha - 1
        if power == 0:
            return log_ratio
        return torch.expm1((power * log_ratio).clamp(max=MAX_EXPONENT)) / power


@dataclass(frozen=True)
class ChiSquaredKL(Divergence):
    """f(u) = u^2/2 - u + u log u: chi-squared and KL together.

        f'(u) = u - 1 + log u  (+ 1)

    References:
        Huang et al., Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via
        Chi-Squared Preference Optimization, 2024. arXiv:2407.13399
    """

    def __call__(self, log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.expm1(log_ratio.clamp(max=MAX_EXPONENT)) + log_ratio
