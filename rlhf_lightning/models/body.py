"""Running a decoder without its head: padded on either side, or packed with no attention across records."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.routing import end_pass, lay_out, unheard

RECORDS = "records"
"""Name of the attention that is sdpa and knows records in a row: `models.unpadded`."""


def body_states(
    body: nn.Module,
    tokens: Int[Tensor, "batch time"],
    attention_mask: Bool[Tensor, "batch time"],
    positions: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time hidden"]:
    """The last hidden states of a transformers decoder, after its final norm.

    Packed rows go in without an attention mask: transformers then reads the records off the position ids, which fall
    back to 0 where one begins, and lets no token look into another record.

    Args:
        positions: count from 0 at each record's first real token; those of padding are ignored.
        segments: 1, 2, ... per packed record, 0 on padding; None: one record per row.
    """
    # 0 on padding: a learned position table has no row for what a collator may count on with, and each padding token
    # of a packed row becomes a record of its own
    if segments is None:
        positions = positions.masked_fill(~attention_mask, 0)
        return run_body(body, tokens, positions, attention_mask)

    positions = positions.masked_fill(segments == 0, 0)
    if attention_of(body).startswith("flash"):
        # flash attention in transformers finds packed records in a single row only
        row = run_body(body, tokens.view(1, -1), positions.view(1, -1), None)
        return lay_out(lambda x: x.view(*tokens.shape, -1), row)
    return run_body(body, tokens, positions, None)


def agree(first: Tensor, second: Tensor, tolerance: float, *, scale: float | None = None) -> bool:
    """Whether two ways to compute one thing give the same, within a share of `scale` (None: of its largest entry).

    Weights that are NaN or infinite give nothing to compare: `check_finite` refuses them, or was told not to.
    """
    if not bool(first.isfinite().all()):
        return not bool(second.isfinite().all())
    return torch.allclose(first, second, atol=tolerance * (float(first.abs().max()) if scale is None else scale))


def attention_of(body: nn.Module) -> str:
    """The attention implementation in use: sdpa, eager, flash_attention_2, ..."""
    name = str(getattr(body.config, "_attn_implementation", None) or "eager")
    return "sdpa" if name == RECORDS else name


def check_packing(body: nn.Module, vocab_size: int) -> None:
    """Raise if a packed record can see the one before it: recurrent layers, or attention that ignores position ids.

    Two rows that differ in their first record alone must agree on the second.
    """
    device = next(body.parameters()).device
    first = torch.arange(8, device=device).view(2, 4) % vocab_size
    tokens = torch.cat((first, torch.arange(4, device=device).expand(2, 4) % vocab_size), dim=1)
    positions = torch.arange(4, device=device).repeat(2).expand(2, 8)
    segments = torch.arange(1, 3, device=device).repeat_interleave(4).expand(2, 8)
    with evaluating(body), torch.no_grad(), unheard():
        second = body_states(body, tokens, torch.ones_like(tokens, dtype=torch.bool), positions, segments)[:, 4:]
    if not agree(second[0], second[1], 1e-3):
        raise UserError(
            f"models of type {body.config.model_type!r} with {attention_of(body)} attention look across packed "
            "records: use packing: false"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of before outside."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a module's dropout rate stands: the module and the name of its attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                yield module, name


def run_body(body: nn.Module, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None, **told: Any) -> Tensor:
    """The decoder as it stands; `attention_mask` in any form that transformers takes, `told` to its attention."""
    output = body(input_ids=tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False, **told)
    end_pass(tokens)
    return output.last_hidden_state
