"""Stages of training: one LightningModule per file."""

from rlhf_lightning.stages.dpo import DPOModule
from rlhf_lightning.stages.gkd import GKDModule
from rlhf_lightning.stages.grpo import GRPOModule
from rlhf_lightning.stages.kto import KTOModule
from rlhf_lightning.stages.online_dpo import OnlineDPOModule
from rlhf_lightning.stages.ppo import PPOModule
from rlhf_lightning.stages.reward import RewardModule
from rlhf_lightning.stages.sft import SFTModule

__all__ = [
    "DPOModule",
    "GKDModule",
    "GRPOModule",
    "KTOModule",
    "OnlineDPOModule",
    "PPOModule",
    "RewardModule",
    "SFTModule",
]
