"""Pure credit assignment: from scores to rewards, from rewards to advantages and returns."""

from rlhf_lightning.advantages.gae import Gae
from rlhf_lightning.advantages.kl_control import AdaptiveKL, FixedKL, KLControl
from rlhf_lightning.advantages.shaping import (
    RunningMoments,
    clip_scores,
    kl_shaped_rewards,
    missing_eos_penalty,
    scale_scores,
)

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "Gae",
    "KLControl",
    "RunningMoments",
    "clip_scores",
    "kl_shaped_rewards",
    "missing_eos_penalty",
    "scale_scores",
]
