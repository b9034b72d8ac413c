"""A padded batch run without its padding: all real tokens in one row, each record to itself.

    rows   a a a - - -        the decoder sees   a a a b b b b b c        positions  0 1 2 0 1 2 3 4 0
           b b b b b -
           c - - - - -

Every layer's work is then on real tokens alone. Attention is told where records begin: flash attention and
`torch.nn.attention.varlen` by the cumulated lengths; scaled_dot_product_attention by laying queries, keys and values
out in padded rows again, which attention alone then computes with; eager and flex attention by position ids.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.body import RECORDS, agree, attention_of, body_states, evaluating, run_body
from rlhf_lightning.models.routing import lay_out, unheard


def unpadded_states(
    body: nn.Module,
    tokens: Int[Tensor, "batch time"],
    attention_mask: Bool[Tensor, "batch time"],
    positions: Int[Tensor, "batch time"],
    segments: Int[Tensor, "batch time"] | None = None,
    *,
    sees: Bool[Tensor, "batch 1 time time"] | None = None,
) -> Float[Tensor, "batch time hidden"]:
    """What `body_states` gives, computed on the real tokens alone; 0 at padding.

    Args:
        positions: count from 0 at each record's first real token.
        segments: 1, 2, ... per packed record, 0 on padding; None: one record per row.
        sees: who sees whom within a row that begins with its first token, where that is not all that went before.
    Raises:
        UserError: the attention in use cannot be told `sees`.
    """
    kind = attention_of(body)
    if sees is not None and kind != "sdpa":
        raise UserError(f"share_prompts with padding_free needs attn_implementation sdpa, not {kind}: drop one of them")
    real = attention_mask if segments is None else segments > 0
    # waits for the device once a batch: how many tokens there are decides what is computed
    places = real.flatten().nonzero()[:, 0]
    row, where = tokens.flatten()[places][None], positions.flatten()[places][None]
    if kind in ("eager", "flex_attention"):
        hidden = run_body(body, row, where, None)
    else:
        hidden = _told_of_records(
            body, row, where, _starts(real, where[0], segments is not None), tokens.shape[1], sees
        )

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(tokens.numel(), x.shape[-1]).index_copy(0, places, x[0]).view(*tokens.shape, -1)

    return lay_out(padded, hidden)


def _starts(real: Tensor, positions: Tensor, packed: bool) -> Tensor:
    """Where each record begins in the row of real tokens, and where the last one ends [records + 1]."""
    if packed:
        first = (positions == 0).nonzero()[:, 0]
        return torch.cat((first, first.new_tensor([len(positions)])))
    return nn.functional.pad(real.sum(1).cumsum(0), (1, 0))


def _told_of_records(
    body: nn.Module, row: Tensor, positions: Tensor, starts: Tensor, longest: int, sees: Tensor | None
) -> Tensor:
    """Hidden states [1, tokens, hidden] of a row, under an attention that is told where its records begin."""
    lengths = starts.int()
    told: dict[str, Any] = {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if attention_of(body) != "sdpa":
        return run_body(body, row, positions, None, **told)
    token = torch.arange(row.shape[1], device=row.device)
    record = torch.bucketize(token, starts[1:], right=True)
    told["record_places"] = record * longest + token - starts[record]
    # transformers hands a mask of four dimensions on as it is, and would build one of all tokens by all tokens else
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.device) if sees is None else sees
    return run_body(body, row, positions, mask, **told)


def records_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    record_places: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa attention; of a row of records, within each of them.

    Args:
        query: [1, heads, tokens, width], as key and value, which may have fewer heads.
        attention_mask: who sees whom within a record [records, 1, longest, longest], or a single True.
        record_places: record x longest + place in it, of each token; None: the rows are no records in a row.
    """
    if record_places is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    starts, longest, window = kwargs["cu_seq_lens_q"], kwargs["max_length_q"], kwargs.get("sliding_window")
    sees = attention_mask if attention_mask is not None and attention_mask.shape[-1] > 1 else None
    on = query.device.type
    # rotated queries come in float32 under autocast, which would cast them for sdpa and does not for varlen
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else query.dtype
    if sees is None and dropout == 0 and has_varlen(on, dtype):
        told = (x.to(dtype) for x in (query, key, value))
        return _varlen(*told, starts, longest, scaling, window)[None], None
    records = starts.shape[0] - 1
    if sees is None and window is not None and window < longest:
        step = torch.arange(longest, device=query.device)
        sees = ((step[:, None] >= step) & (step[:, None] - step < window))[None, None]
    padded = (_laid_out(x, record_places, records, longest) for x in (query, key, value))
    # behind a record's end zeros see zeros
    out, _ = sdpa_attention_forward(module, *padded, sees, dropout=dropout, scaling=scaling)
    return out.flatten(0, 1)[record_places][None], None


def _laid_out(x: Tensor, places: Tensor, records: int, longest: int) -> Tensor:
    """[records, heads, longest, width] from [1, heads, tokens, width]; 0 where there is no token."""
    by_token = x[0].transpose(0, 1)
    blank = x.new_zeros(records * longest, *by_token.shape[1:])
    return blank.index_copy(0, places, by_token).unflatten(0, (records, longest)).transpose(1, 2)


def has_varlen(device: str, dtype: torch.dtype) -> bool:
    """Whether torch has an attention for records of any lengths, on this kind of device and in this dtype."""
    return device == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options = {"enable_gqa": True}
        else:  # torch 2.11 knows no heads that share keys and values
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    by_token = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    sizes = (-1 if window is None else window - 1, 0)
    out = varlen_attn(*by_token, starts, starts, longest, longest, scale=scaling, window_size=sizes, **options)
    assert isinstance(out, Tensor)
    return out


AttentionInterface.register(RECORDS, records_attention)
AttentionMaskInterface.register(RECORDS, sdpa_mask)


def know_records(model: Any) -> None:
    """Let the attention of a transformers model be told of records, where it is sdpa."""
    if attention_of(model) == "sdpa":
        model.set_attn_implementation(RECORDS)


def check_unpadded(body: nn.Module, vocab_size: int) -> None:
    """Raise if hidden states without padding are others: layers that look across records, or are not told of them."""
    device = next(body.parameters()).device
    tokens = torch.arange(10, device=device).view(2, 5) % vocab_size
    real = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]], device=device)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    with evaluating(body), torch.no_grad(), unheard():
        padded = body_states(body, tokens, real, positions)
        unpadded = unpadded_states(body, tokens, real, positions)
    if not agree(padded[real], unpadded[real], 1e-3 if padded.dtype == torch.float32 else 5e-2):
        raise UserError(
            f"models of type {body.config.model_type!r} with {attention_of(body)} attention are others without padding"
            ": use padding_free: false"
        )
