"""Scores to rewards per token: end-token penalties, scaling, clipping, KL and its controller."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.advantages.kl_control import FixedKL, KLControl
from rlhf_lightning.advantages.shaping import (
    Limit,
    RunningMoments,
    clip_scores,
    ends_of,
    kl_shaped_rewards,
    missing_eos_penalty,
    scale_scores,
    soft_overlong_punishment,
)
from rlhf_lightning.core.batches import Generated
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kl import KLEstimator, KLLossEstimator
from rlhf_lightning.core.masked import masked_moments, masked_whiten
from rlhf_lightning.rewards.combine import ScoredSamples


@dataclass(frozen=True)
class RewardShaping:
    """What happens to scores before they become rewards, in this order.

    Args:
        overlong_cache: tokens before the length limit over which an answer loses more and more of a whole point (Yu et
            al., 2025: 4096 of 20480).
        overlong_factor: how many points that is.
        missing_eos_factor: what the score of answers that hit the length limit is multiplied by (Liu et al., 2025:
            ProRL).
        missing_eos_penalty: subtracted from such answers (Huang et al., 2024).
        missing_eos_score: the score of such answers, whatever the reward functions said (Ziegler et al., 2019: -1).
        scale_by_running_std: divide by the standard deviation of all scores so far (Engstrom et al., 2020).
        clip: clip scores to [-clip, clip] (Engstrom et al., 2020: 10), or to both ends given.
        whiten_rewards: scale rewards per token, KL included, to standard deviation 1, keeping their mean (Ziegler et
            al., 2019).
    """

    overlong_cache: int | None = None
    overlong_factor: float = 1.0
    missing_eos_factor: float = 1.0
    missing_eos_penalty: float = 0.0
    missing_eos_score: float | None = None
    scale_by_running_std: bool = False
    clip: Limit | None = None
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        if self.clip is not None:
            ends_of(self.clip, "shaping.clip")
        for name in ("overlong_factor", "missing_eos_penalty"):
            if not getattr(self, name) >= 0:
                raise UserError(f"shaping.{name}={getattr(self, name)} would pay for not ending: give 0 or more")
        if not 0 <= self.missing_eos_factor <= 1:
            raise UserError(
                f"shaping.missing_eos_factor={self.missing_eos_factor} would pay for not ending: give 0 (no score) to "
                "1 (all of it)"
            )


@dataclass(frozen=True)
class KLSpec:
    """How the policy is held near its reference.

    Args:
        control: coefficient of the KL inside the reward: FixedKL, or AdaptiveKL with a target (Ziegler et al., 2019).
        estimator: of the KL inside the reward; k1 is what the objective asks for.
        credited: with_score: the KL of an answer is part of its score, and of what a credit per answer compares (TRL's
            RLOO). to_come: answers are compared by their scores alone, and each token pays for its own KL and that of
            the tokens after it (OpenRLHF). Credits of what is to come (Gae, ReMax, ...) have the second by nature.
        bound: hold the KL of a token within +-bound in reward and loss, without gradient beyond (OpenRLHF: 10, verl: 10
            of k3); null: not held.
        loss_coef: weight of a KL term inside the loss, in addition.
        loss_estimator: of that term: k2 has the gradient of the KL, k3 is GRPO's, k1+, k3+ and abs+ have the value of
            k1, k3 and |log-ratio|, and the gradient of k2.
        loss_importance_weighted: weigh that term by the ratio to the policy that sampled: its gradient is then that of
            the KL, whatever the estimator and the step on a rollout (DeepSeek-AI, 2025: DeepSeek-V3.2). false: the
            term of Shao et al., 2024 (GRPO).
        loss_max_weight: largest such ratio (OpenRLHF's unbiased_gradient: 10); null: no bound.
    """

    control: KLControl = FixedKL(0.05)
    estimator: KLEstimator = "k1"
    credited: Literal["with_score", "to_come"] = "with_score"
    bound: float | None = None
    loss_coef: float = 0.0
    loss_estimator: KLLossEstimator = "k3"
    loss_importance_weighted: bool = True
    loss_max_weight: float | None = None

    def __post_init__(self) -> None:
        if self.bound is not None and not self.bound > 0:
            raise UserError(f"kl.bound={self.bound} would erase every KL: give a positive number, such as 10, or null")
        if self.loss_max_weight is not None and not self.loss_max_weight >= 1:
            raise UserError(
                f"kl.loss_max_weight={self.loss_max_weight} would shrink the KL of exact tokens: give 1 or more, such "
                "as 10, or null"
            )


@dataclass(frozen=True)
class Shaped:
    """Rewards of a rollout after everything that is done to scores."""

    rewards: Tensor
    """[batch, time]; 0 where nothing counts."""
    metrics: Mapping[str, float]
    """What the shaping did, to be logged with the rollout."""
    kl_rewards: Tensor | None = None
    """What each token pays for its KL, where that is not in `rewards` (`kl.credited: to_come`) [batch, time]."""


class RewardShaper:
    """Turns scores into rewards, rollout after rollout; remembers the scale of scores and the price of KL.

    Args:
        shaping: what happens to scores.
        kl: the KL penalty.
        add_over_ranks: adds a vector over all ranks.
        max_length: tokens at which an answer is cut off.
    """

    def __init__(
        self,
        shaping: RewardShaping,
        kl: KLSpec,
        add_over_ranks: Callable[[Tensor], Tensor],
        *,
        max_length: int,
    ) -> None:
        if shaping.overlong_cache is not None and not 0 < shaping.overlong_cache <= max_length:
            raise UserError(
                f"shaping.overlong_cache={shaping.overlong_cache} is no stretch before generation.max_new_tokens="
                f"{max_length}: give 1 to {max_length}"
            )
        if shaping.whiten_rewards and kl.credited == "to_come":
            raise UserError(
                "shaping.whiten_rewards scales rewards with their KL, and kl.credited='to_come' keeps it out of them: "
                "drop one"
            )
        self.shaping = shaping
        self.kl = kl
        self.max_length = max_length
        self.kl_coef = kl.control.initial_coef
        """The price of a nat in the next rollout."""
        self.score_moments = RunningMoments()
        self._add_over_ranks = add_over_ranks

    def __call__(self, answers: Generated, scored: ScoredSamples, old: Tensor, ref: Tensor) -> Shaped:
        """Score at the last answer token, KL at every one.

        Args:
            old: log-probabilities under the policy [batch, time], 0 where nothing counts.
            ref: the same under the reference.
        """
        shaping = self.shaping
        counts = answers.mask.any(-1)  # not an answer that was dropped
        scores = scored.at_end.to(old)
        if shaping.overlong_cache is not None:
            punishment = soft_overlong_punishment(
                answers.mask.sum(-1), max_length=self.max_length, cache=shaping.overlong_cache
            )
            scores = scores + shaping.overlong_factor * punishment
        scores = missing_eos_penalty(
            scores,
            answers.finished,
            subtract=shaping.missing_eos_penalty,
            factor=shaping.missing_eos_factor,
            replace_by=shaping.missing_eos_score,
        )
        if shaping.scale_by_running_std:
            self.score_moments = self.score_moments.merge(self._moments(scores, counts))
            scores = scale_scores(scores, self.score_moments)
        if shaping.clip is not None:
            scores = clip_scores(scores, shaping.clip)
        apart = self.kl.credited == "to_come"
        rewards, kl = kl_shaped_rewards(
            scores,
            old,
            ref,
            answers.mask,
            kl_coef=0.0 if apart else self.kl_coef,
            estimator=self.kl.estimator,
            bound=self.kl.bound,
            token_rewards=_token_rewards(answers, scored),
        )
        kl_rewards = -self.kl_coef * kl if apart else None
        if shaping.whiten_rewards:
            moments = self._add_over_ranks(masked_moments(rewards, answers.mask))
            rewards = masked_whiten(rewards, answers.mask, shift_mean=False, moments=moments)
        metrics = {"kl/coef": self.kl_coef, "rollout/shaped_score": self._mean(scores, counts)[0]}
        observed = kl.sum(-1)
        if self.kl.control.observes == "token":
            observed = observed / answers.mask.sum(-1).clamp(min=1)
        self._steer(observed, counts)
        return Shaped(rewards=rewards, metrics=metrics, kl_rewards=kl_rewards)

    def _moments(self, scores: Tensor, counts: Tensor) -> RunningMoments:
        count, total, squares = self._add_over_ranks(masked_moments(scores, counts)).tolist()
        mean = total / max(count, 1)
        return RunningMoments(count=count, mean=mean, squares=max(squares - count * mean**2, 0.0))

    def _steer(self, observed: Tensor, counts: Tensor) -> None:
        """Choose the coefficient of the next rollout."""
        mean, count = self._mean(observed, counts)
        if count:
            self.kl_coef = self.kl.control.next_coef(self.kl_coef, mean, count)

    def _mean(self, x: Tensor, counts: Tensor) -> tuple[float, int]:
        """Mean over the sequences of all ranks that count, 0 where none does, and how many they are."""
        count, total, _ = self._add_over_ranks(masked_moments(x, counts)).tolist()
        return total / max(count, 1), int(count)

    def state_dict(self) -> dict[str, Any]:
        initial = self.kl.control.initial_coef
        return {"kl_coef": self.kl_coef, "initial_kl_coef": initial, "score_moments": self.score_moments.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["initial_kl_coef"] == self.kl.control.initial_coef:  # else the user has set another: it wins
            self.kl_coef = state["kl_coef"]
        self.score_moments = RunningMoments.from_dict(state["score_moments"])


def _token_rewards(answers: Generated, scored: ScoredSamples) -> Tensor | None:
    """Rewards given per token, spread over the answers' own positions [batch, time]."""
    if scored.per_token is None:
        return None
    rewards = torch.zeros(answers.tokens.shape, device=answers.tokens.device)
    rewards[answers.mask] = torch.cat(list(scored.per_token)).to(rewards)
    return rewards
