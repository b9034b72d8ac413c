"""RLHF as PyTorch Lightning modules. Names are imported on first use, so that `--help` is quick."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "SFTModule": "rlhf_lightning.stages.sft",
    "DPOModule": "rlhf_lightning.stages.dpo",
    "KTOModule": "rlhf_lightning.stages.kto",
    "RewardModule": "rlhf_lightning.stages.reward",
    "PPOModule": "rlhf_lightning.stages.ppo",
    "GKDModule": "rlhf_lightning.stages.gkd",
    "GRPOModule": "rlhf_lightning.stages.grpo",
    "OnlineDPOModule": "rlhf_lightning.stages.online_dpo",
    "RLHFModule": "rlhf_lightning.stages.base",
    "RLHFDataModule": "rlhf_lightning.data.datamodule",
    "ModelSpec": "rlhf_lightning.models.spec",
    "LoraSpec": "rlhf_lightning.models.spec",
    "load_policy": "rlhf_lightning.models.loading",
    "load_scalar_model": "rlhf_lightning.models.loading",
    "load_tokenizer": "rlhf_lightning.models.loading",
    "Credit": "rlhf_lightning.core.interfaces",
    "PairScores": "rlhf_lightning.core.interfaces",
    "PolicyLoss": "rlhf_lightning.core.interfaces",
    "PolicyLossOutput": "rlhf_lightning.core.interfaces",
    "PreferenceLoss": "rlhf_lightning.core.interfaces",
    "PreferenceLossOutput": "rlhf_lightning.core.interfaces",
    "RewardFn": "rlhf_lightning.core.interfaces",
    "Sample": "rlhf_lightning.core.interfaces",
    "UserError": "rlhf_lightning.core.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlhf_lightning' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
