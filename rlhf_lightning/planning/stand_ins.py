"""What stands, on tensors without numbers, for the parts of a stage that ask for numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from rlhf_lightning.core.batches import Batch
from rlhf_lightning.core.interfaces import (
    CompletionScores,
    Need,
    RankedPreferenceLoss,
    RankedPreferenceLossOutput,
    RewardLoss,
    RewardLossOutput,
)

NOT_COUNTED: dict[str, tuple[Any, str]] = {
    "padding_free": (False, "rows are taken to be full; shorter ones will need less"),
    "activation_offload": (False, "activations that wait in host memory are counted here; less will be needed"),
    "compile": (None, "layers are taken as they are written; compiled ones need less as a rule"),
    "logprobs": ("auto", "the logits that another method keeps are counted"),
}
"""Options of a model that a run on tensors without numbers cannot follow: what stands for them, and what that means."""


def stand_in(module: Any) -> list[str]:
    """Put something of the same size in the place of whatever of a stage asks for numbers; what is to be said of it."""
    notes = []
    if module.batch_format == "ranked":
        module.loss = AnyRanking(module.loss) if hasattr(module, "policy") else AnyRankedScores()
    if getattr(module, "share_prompts", False):
        module.share_prompts = False
        notes.append("share_prompts is not counted: how much pairs share is in the data; less will be needed")
    for name, (usual, why) in NOT_COUNTED.items():
        if getattr(module.model_spec, name) != usual:
            module.model_spec = replace(module.model_spec, **{name: usual})
            notes.append(f"{name} is not counted: {why}")
    return notes


class AnyRanking(RankedPreferenceLoss):
    """What a loss on rankings keeps in memory, whatever it computes.

    Args:
        loss: the one that it stands for.
    """

    def __init__(self, loss: RankedPreferenceLoss) -> None:
        self._needs = loss.needs

    @property
    def needs(self) -> frozenset[Need]:
        return self._needs

    def __call__(self, completions: CompletionScores, groups: Tensor, ranks: Tensor) -> RankedPreferenceLossOutput:
        ratios = completions.log_ratio if completions.ref_logprobs is not None else completions.total
        return RankedPreferenceLossOutput(ratios, ratios.detach(), ratios.detach(), ratios.detach())


class AnyRankedScores(RewardLoss):
    """The same for a reward model's loss."""

    batch_format = "ranked"
    denominator = "prompts"

    def __call__(self, scores: Tensor, batch: Batch) -> RewardLossOutput:
        return RewardLossOutput(scores, scores.detach(), scores.detach())


def without_numbers(model: nn.Module, known: dict[int, Tensor], dtype: torch.dtype | None) -> None:
    """Every weight and buffer as a new tensor of its shape; what was one stays one."""

    def new(x: Tensor) -> Tensor:
        if id(x) not in known:
            kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
            made = torch.empty(x.shape, dtype=kind)
            known[id(x)] = nn.Parameter(made, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else made
            known[-id(x)] = x  # kept, so that no other gets its id
        return known[id(x)]

    for part in model.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = new(x)


@contextmanager
def experts_without_numbers() -> Iterator[None]:
    """Inside, the experts of a mixture are multiplied by an operation of transformers that is the same on shapes.

    torch's own gives no shape but in bfloat16.
    """
    name = "_can_use_grouped_mm"
    own = getattr(moe, name, None)
    try:
        if own is not None:
            setattr(moe, name, lambda *args, **kwargs: False)
        yield
    finally:
        if own is not None:
            setattr(moe, name, own)
