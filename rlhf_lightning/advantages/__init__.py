"""Pure credit assignment: from scores to rewards, from rewards to advantages and returns."""

from rlhf_lightning.advantages.answers import Answers, OutcomeCredit, informative_answers, mean_is_within
from rlhf_lightning.advantages.gae import Gae
from rlhf_lightning.advantages.group import (
    BatchCentred,
    BestOfGroup,
    Centred,
    Gdpo,
    Gpg,
    GroupNormalised,
    LeaveOneOut,
    MaxRl,
    Opo,
    PassAtK,
)
from rlhf_lightning.advantages.kl_control import AdaptiveKL, FixedKL, KLControl
from rlhf_lightning.advantages.pairs import PairRule, Pairs
from rlhf_lightning.advantages.per_token import BatchNormalised, CentredBatchNormalised, ReMax, RewardsToCome
from rlhf_lightning.advantages.shaping import (
    RunningMoments,
    clip_scores,
    kl_shaped_rewards,
    missing_eos_penalty,
    overlong_mask,
    scale_scores,
    soft_overlong_punishment,
)
from rlhf_lightning.advantages.token_baseline import OptimalTokenBaseline

__all__ = [
    "AdaptiveKL",
    "Answers",
    "BatchCentred",
    "BatchNormalised",
    "BestOfGroup",
    "Centred",
    "CentredBatchNormalised",
    "FixedKL",
    "Gae",
    "Gdpo",
    "Gpg",
    "GroupNormalised",
    "KLControl",
    "LeaveOneOut",
    "MaxRl",
    "Opo",
    "OptimalTokenBaseline",
    "OutcomeCredit",
    "PairRule",
    "Pairs",
    "PassAtK",
    "ReMax",
    "RewardsToCome",
    "RunningMoments",
    "clip_scores",
    "informative_answers",
    "kl_shaped_rewards",
    "mean_is_within",
    "missing_eos_penalty",
    "overlong_mask",
    "scale_scores",
    "soft_overlong_punishment",
]
