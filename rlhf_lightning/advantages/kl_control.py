"""How hard the KL penalty pulls, from one rollout to the next."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.core.errors import UserError


class KLControl(ABC):
    """Chooses the coefficient of the KL penalty. Pure: whoever trains keeps the coefficient, and saves it."""

    @property
    def observes(self) -> Literal["sequence", "token"]:
        """What `observed_kl` is of: the KL of an answer, summed over its tokens, or its mean per token."""
        return "sequence"

    @property
    @abstractmethod
    def initial_coef(self) -> float:
        """The coefficient of the first rollout."""

    @abstractmethod
    def next_coef(self, coef: float, observed_kl: float, num_samples: int) -> float:
        """The coefficient after a rollout.

        Args:
            coef: the one that the rollout used.
            observed_kl: mean over its sequences of what `observes` names (nats), all ranks together, by the estimator
                that the reward has.
            num_samples: how many sequences it had, all ranks together.
        """


@dataclass(frozen=True)
class FixedKL(KLControl):
    """The same KL coefficient throughout.

    Args:
        coef: nats of KL are subtracted from the reward times this; 0 = no penalty.
    """

    coef: float = 0.05

    def __post_init__(self) -> None:
        if not self.coef >= 0:
            raise UserError(f"coef={self.coef} would pay the policy for leaving the reference: give 0 or more")

    @property
    def initial_coef(self) -> float:
        return self.coef

    def next_coef(self, coef: float, observed_kl: float, num_samples: int) -> float:
        return coef


@dataclass(frozen=True)
class AdaptiveKL(KLControl):
    """Steers the KL coefficient so that the KL per sequence approaches a target.

        error = clip(observed_kl / target - 1, -0.2, 0.2)
        coef  = coef (1 + error num_samples / horizon)

    Args:
        init_coef: the coefficient of the first rollout.
        target: KL per sequence to settle at (nats, summed over tokens), or per token.
        horizon: in sequences; the larger, the slower. A rollout may not exceed 5 times as many.
        per: what the target is of: a sequence (Ziegler et al.), or a token, the mean of each sequence counting once
            (OpenRLHF, verl).
    References:
        Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, sec. 2.2. arXiv:1909.08593
    """

    init_coef: float = 0.15
    target: float = 6.0
    horizon: float = 10_000.0
    per: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        for name, value in (("init_coef", self.init_coef), ("target", self.target), ("horizon", self.horizon)):
            if not value > 0:
                raise UserError(f"{name}={value} cannot steer the KL: give a positive number, or use FixedKL")

    @property
    def initial_coef(self) -> float:
        return self.init_coef

    @property
    def observes(self) -> Literal["sequence", "token"]:
        return self.per

    def next_coef(self, coef: float, observed_kl: float, num_samples: int) -> float:
        if num_samples >= 5 * self.horizon:
            raise UserError(
                f"horizon={self.horizon:g} is too short for rollouts of {num_samples} sequences: the coefficient could "
                f"turn negative; give more than {num_samples / 5:g}, such as {10 * num_samples}"
            )
        error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
        return coef * (1 + error * num_samples / self.horizon)
