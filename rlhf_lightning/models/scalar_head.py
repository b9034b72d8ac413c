"""One number from a decoder: reward models and critics."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.models.activations import on_host
from rlhf_lightning.models.body import body_states, check_packing
from rlhf_lightning.models.lora import unwrapped
from rlhf_lightning.models.unpadded import check_unpadded, unpadded_states

Pooling = Literal["last", "mean", "steps"]
HeadInit = Literal["normal", "zero"]


class ScalarModel(nn.Module):
    """A decoder and a linear map to one number: a reward model, or a critic.

        score = (pool_t head . hidden_t - score_mean) / score_std

    Args:
        backbone: a transformers decoder without output head, or a PeftModel around one.
        pooling: last = the value at the last real token of a record; mean = the mean over the tokens that count;
            steps = the value at every token: a process reward model judges a step at its last one.
        padding_free: score batches without computing their padding; see `models.unpadded`.
        activation_offload: keep what the backward pass needs in host memory; see `models.activations`.
    """

    score_mean: Tensor
    score_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: Pooling = "last",
        bias: bool = False,
        padding_free: bool = False,
        activation_offload: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.padding_free = padding_free
        self.activation_offload = activation_offload
        self.pooling = pooling
        # no bias unless a file brings one: transformers' classification heads have none, and a constant added to all
        # scores lives in score_mean
        width = self.config.get_text_config().hidden_size
        # skip_init: torch would draw from the global generator. On the CPU in float32 whatever the caller's defaults
        self.head = skip_init(nn.Linear, width, 1, bias=bias, device="cpu", dtype=torch.float32)
        init_head(self.head, "zero", 0)
        self.register_buffer("score_mean", torch.zeros((), device="cpu", dtype=torch.float32))
        self.register_buffer("score_std", torch.ones((), device="cpu", dtype=torch.float32))
        self._packing_checked = False
        self._unpadded_checked = False

    @property
    def decoder(self) -> PreTrainedModel:
        """The transformers model, without the adapter's wrapper."""
        return unwrapped(self.backbone)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.decoder.config

    def token_values(
        self,
        tokens: Int[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"],
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time"]:
        """The head at every position, not normalised: the number at t has read tokens[<= t]."""
        if segments is not None and not self._packing_checked:
            check_packing(self.decoder, self.config.get_text_config().vocab_size)
            self._packing_checked = True
        if self.padding_free and not self._unpadded_checked:
            check_unpadded(self.decoder, self.config.get_text_config().vocab_size)
            self._unpadded_checked = True
        run = unpadded_states if self.padding_free else body_states
        with on_host(self.backbone, self.activation_offload):
            hidden = run(self.decoder, tokens, attention_mask, positions, segments)
        return linear_to_number(hidden, self.head)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "*scores"]:
        """Normalised scores: one per record, those of packed rows in reading order; pooling steps: [batch time]."""
        values = self.token_values(batch.tokens, batch.attention_mask, batch.positions, batch.segments)
        return (POOLINGS[self.pooling](values, batch) - self.score_mean) / self.score_std

    def set_normalisation(self, mean: float, std: float) -> None:
        """From now on scores are (x - mean) / std of what they were before any normalisation."""
        self.score_mean.fill_(mean)
        self.score_std.fill_(std)


class ValueHead(nn.Module):
    """A critic that shares the policy's decoder: reads its hidden states, says 0 until trained."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = skip_init(nn.Linear, hidden_size, 1)
        init_head(self.linear, "zero", 0)

    def forward(self, hidden: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time"]:
        """The number at t has read tokens[<= t]."""
        return linear_to_number(hidden, self.linear)


def linear_to_number(hidden: Float[Tensor, "batch time hidden"], linear: nn.Linear) -> Float[Tensor, "batch time"]:
    """head . hidden in float32: scores of near-equal answers differ by less than a bfloat16 can hold."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if linear.bias is None else linear.bias.float()
        return nn.functional.linear(hidden.float(), linear.weight.float(), bias).squeeze(-1)


def init_head(head: nn.Linear, how: HeadInit, seed: int) -> None:
    """Start a head: normal = N(0, 1 / (hidden_size + 1)) as reward models do, zero = critics.

    References:
        Stiennon et al., Learning to summarize from human feedback, 2020, appendix B. arXiv:2009.01325
    """
    if how == "zero":
        nn.init.zeros_(head.weight)
    else:
        generator = torch.Generator(device=head.weight.device).manual_seed(seed)
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5, generator=generator)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def pool_last(values: Float[Tensor, "batch time"], batch: TokenBatch) -> Float[Tensor, " records"]:
    """The value at each record's last real token, found by mask and never by token id: padding may be the end token."""
    if batch.segments is None:
        index = torch.arange(values.shape[1], device=values.device)
        last = torch.where(batch.attention_mask, index, 0).amax(1)
        return values.gather(1, last.unsqueeze(1)).squeeze(1)
    following = nn.functional.pad(batch.segments[:, 1:], (0, 1))
    return values[(batch.segments > 0) & (batch.segments != following)]


def pool_mean(values: Float[Tensor, "batch time"], batch: TokenBatch) -> Float[Tensor, " records"]:
    """The mean over each record's tokens that count; 0 for a record without any."""
    kept = torch.where(batch.mask, values, 0.0)
    if batch.segments is None:
        return kept.sum(1) / batch.mask.sum(1).clamp(min=1)
    per_row = batch.segments.amax(1)
    first = per_row.cumsum(0) - per_row
    # padding points at some record, and adds nothing to it: the mask is False there
    record = (first.unsqueeze(1) + batch.segments - 1).clamp(min=0).flatten()
    count = int(per_row.sum())
    totals = kept.new_zeros(count).index_add(0, record, kept.flatten())
    return totals / kept.new_zeros(count).index_add(0, record, batch.mask.flatten().to(kept.dtype)).clamp(min=1)


def pool_steps(values: Float[Tensor, "batch time"], batch: TokenBatch) -> Float[Tensor, "batch time"]:
    """Nothing is pooled: which tokens end a step is the batch's to say."""
    return values


POOLINGS = {"last": pool_last, "mean": pool_mean, "steps": pool_steps}
