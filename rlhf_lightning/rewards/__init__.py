"""Reward functions: samples in, one number per sample or per token out."""

from rlhf_lightning.rewards.code_tests import CodeTests
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward, score_samples
from rlhf_lightning.rewards.countdown import Countdown
from rlhf_lightning.rewards.ensemble import Ensemble
from rlhf_lightning.rewards.exact_match import ExactMatch
from rlhf_lightning.rewards.fact_table import FactTable
from rlhf_lightning.rewards.math_answer import MathAnswer
from rlhf_lightning.rewards.process_reward import ProcessRewardScore
from rlhf_lightning.rewards.python_function import PythonFunction
from rlhf_lightning.rewards.reasoning_gym import ReasoningGym
from rlhf_lightning.rewards.regex_format import RegexFormat
from rlhf_lightning.rewards.reward_model import RewardModelScore
from rlhf_lightning.rewards.rouge import Rouge
from rlhf_lightning.rewards.sentiment import VaderSentiment
from rlhf_lightning.rewards.text_rules import Keyword, LengthReward, Repetition

# imported here so that YAML may name them without their module
__all__ = [
    "CodeTests",
    "Countdown",
    "Ensemble",
    "ExactMatch",
    "FactTable",
    "Keyword",
    "LengthReward",
    "MathAnswer",
    "ProcessRewardScore",
    "PythonFunction",
    "ReasoningGym",
    "RegexFormat",
    "Repetition",
    "RewardModelScore",
    "Rouge",
    "ScoredSamples",
    "VaderSentiment",
    "WeightedReward",
    "score_samples",
]
