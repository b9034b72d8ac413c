"""Sampling: prompts to answers, and the loader that turns rollouts into minibatches."""

from rlhf_lightning.rollout.continuous import HFContinuousBatching
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_engine import VLLMEngine
from rlhf_lightning.rollout.vllm_server import VLLMServer

__all__ = ["GenerationSpec", "HFContinuousBatching", "HFGenerate", "VLLMEngine", "VLLMServer"]
