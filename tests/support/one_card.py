"""Two processes that share one device, which exchange by gloo (NCCL takes one process a card): cases by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp1_cases import OnCPU
from lightning.pytorch.strategies import DDPStrategy
from on_gpu import ACCELERATOR, ON_GPU
from one_step import module_for
from parallel_fits import Case, fit, outcome

from rlhf_lightning.parallel import FSDP1Strategy, FSDP2Strategy

RANK = os.environ.get("LOCAL_RANK", "0")
"""Of this process, before a case takes it for a machine."""
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: FSDP2Strategy(process_group_backend="gloo"),
    "fsdp": lambda: (FSDP1Strategy if ON_GPU else OnCPU)(process_group_backend="gloo"),
}


def on_one_card(stage: str, strategy: str) -> Case:
    """Five steps of a stage. To Lightning each process is a machine with one device: it would want two of one."""

    def case(model: str, folder: Path, world: int) -> dict[str, Any]:
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = RANK, "0"
        module = module_for(stage, model)
        together = 12 if stage in ("ppo", "grpo") else 4
        options = {"num_nodes": world, "accelerator": ACCELERATOR, "batch_size": together // world}
        return outcome(module, fit(module, stage, folder, strategy=STRATEGIES[strategy](), **options))

    return case


ON_ONE_CARD: dict[str, Case] = {
    f"{stage}, {strategy}, one card": on_one_card(stage, strategy)
    for stage in ("sft", "ppo")
    for strategy in STRATEGIES
}
