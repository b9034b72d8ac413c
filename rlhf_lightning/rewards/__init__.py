"""Reward functions: samples in, one number per sample or per token out."""

from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward, score_samples
from rlhf_lightning.rewards.ensemble import Ensemble
from rlhf_lightning.rewards.python_function import PythonFunction
from rlhf_lightning.rewards.reward_model import RewardModelScore
from rlhf_lightning.rewards.sentiment import VaderSentiment
from rlhf_lightning.rewards.text_rules import Keyword, LengthReward, Repetition

# imported here so that YAML may name them without their module
__all__ = [
    "Ensemble",
    "Keyword",
    "LengthReward",
    "PythonFunction",
    "Repetition",
    "RewardModelScore",
    "ScoredSamples",
    "VaderSentiment",
    "WeightedReward",
    "score_samples",
]
