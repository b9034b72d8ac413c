"""Sharded training: `strategy: fsdp2`."""

from rlhf_lightning.parallel.strategy import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
