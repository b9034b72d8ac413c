"""Sharded training: `strategy: fsdp2`, and `fsdp` for those who have to use it."""

from rlhf_lightning.parallel.fsdp1 import FSDP1Strategy
from rlhf_lightning.parallel.strategy import FSDP2Strategy

__all__ = ["FSDP1Strategy", "FSDP2Strategy"]
