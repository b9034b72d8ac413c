"""A prompt that two completions share, run through the decoder once.

A pair becomes one row, prompt + first completion + second completion, in which the second completion does not see the
first and its positions go on where the prompt ended:

    row        p p p a a a b b        positions  0 1 2 3 4 5 3 4
    a sees     p p p a a a            b sees     p p p b b

Both completions have the hidden states that each would have behind the prompt alone, for the price of one prompt.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.body import agree, attention_of, body_states, evaluating, run_body
from rlhf_lightning.models.routing import lay_out, unheard
from rlhf_lightning.models.unpadded import unpadded_states


def branch_states(
    body: nn.Module,
    tokens: Int[Tensor, "rows time"],
    attention_mask: Bool[Tensor, "rows time"],
    positions: Int[Tensor, "rows time"],
    completions: Bool[Tensor, "rows time"],
    *,
    padding_free: bool = False,
) -> Float[Tensor, "rows time hidden"]:
    """The hidden states of `body_states` for pairs of rows, i and i + rows/2, that begin with the same prompt.

    What is shared is the equal beginning of the two rows before a completion starts; it may be nothing.

    Args:
        completions: True where a completion's tokens are.
        padding_free: compute the pairs' rows without their padding.
    Raises:
        UserError: the attention in use cannot be told who sees whom.
    """
    kind = attention_of(body)
    if kind not in ("sdpa", "eager"):
        raise UserError(
            f"share_prompts needs attn_implementation sdpa or eager, not {kind}: set it, or share_prompts: false"
        )
    window = getattr(body.config.get_text_config(), "sliding_window", None)
    if window is not None and tokens.shape[1] > window:
        raise UserError(
            f"share_prompts: rows of {tokens.shape[1]} tokens are longer than the attention window of {window} that "
            f"models of type {body.config.model_type!r} have: use share_prompts: false"
        )
    num_pairs, time = tokens.shape[0] // 2, tokens.shape[1]
    steps = torch.arange(time, device=tokens.device)
    lengths = attention_mask.sum(-1)
    begins = attention_mask.int().argmax(-1)
    # column p of `places` is where the row's p-th real token stands, whatever the padding side
    places = (begins[:, None] + steps).clamp(max=time - 1)
    real = steps < lengths[:, None]
    ordered = tokens.gather(1, places)
    prompt = real & (completions.gather(1, places).cumsum(1) == 0)
    same = (ordered[:num_pairs] == ordered[num_pairs:]) & prompt[:num_pairs] & prompt[num_pairs:]
    shared = same.cumprod(1).sum(1)

    # where each token stands in its pair's row: the second completion moves behind the first
    behind = (lengths[:num_pairs] - shared)[:, None] * (steps >= shared[:, None])
    slots = torch.cat((steps.expand(num_pairs, time), steps + behind))
    # waits for the device once a batch: how wide the rows are decides what is computed
    width = int((lengths[:num_pairs] + lengths[num_pairs:] - shared).max())
    branch = torch.cat(((steps >= shared[:, None]).long(), 2 * (steps >= shared[:, None]).long()))

    def packed(values: Tensor, fill: int) -> Tensor:
        """[pairs, width] from [rows, time]; padding goes to a column that is cut off."""
        out = values.new_full((num_pairs, width + 1), fill)
        target = torch.where(real, slots, width)
        for half in (slice(0, num_pairs), slice(num_pairs, None)):
            out.scatter_(1, target[half], values[half])
        return out[:, :width]

    branches = packed(branch, -1)
    rows, where = packed(ordered, 0), packed(steps.expand_as(tokens), 0)
    sees = _who_sees_whom(branches, kind, body)
    hidden = (
        unpadded_states(body, rows, branches >= 0, where, sees=sees)
        if padding_free
        else run_body(body, rows, where, sees)
    )
    # back to rows: place -> real token number -> slot
    number = (steps - begins[:, None]).clamp(min=0)
    back = slots.gather(1, number).clamp(max=width - 1)

    def apart(x: Tensor) -> Tensor:
        return torch.cat((x, x)).gather(1, back[..., None].expand(-1, -1, x.shape[-1]))

    return lay_out(apart, hidden)


def _who_sees_whom(branches: Int[Tensor, "pairs time"], kind: str, body: nn.Module) -> Tensor:
    """[pairs, 1, time, time]: a token sees those before it in the prompt and in its own completion."""
    time = branches.shape[1]
    earlier = torch.ones(time, time, dtype=torch.bool, device=branches.device).tril()
    theirs, mine = branches[:, None, :], branches[:, :, None]
    # padding sees itself: a row of the softmax with nothing in it is NaN
    itself = torch.eye(time, dtype=torch.bool, device=branches.device)
    sees = (earlier & ((theirs == 0) | (theirs == mine)) & (theirs >= 0)) | itself
    if kind == "sdpa":
        return sees[:, None]
    dtype = next(body.parameters()).dtype
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def check_branches(body: nn.Module, vocab_size: int, *, padding_free: bool = False) -> None:
    """Raise if a shared prompt changes what a completion's hidden states are, as it does in recurrent layers."""
    device = next(body.parameters()).device
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]], device=device) % vocab_size
    real, positions = torch.ones_like(tokens, dtype=torch.bool), torch.arange(5, device=device).expand(2, 5)
    with evaluating(body), torch.no_grad(), unheard():
        apart = body_states(body, tokens, real, positions)
        together = branch_states(body, tokens, real, positions, positions >= 3, padding_free=padding_free)
    if not agree(apart, together, 1e-3):
        raise UserError(
            f"models of type {body.config.model_type!r} with {attention_of(body)} attention cannot compute a prompt "
            "once for two answers: use share_prompts: false"
        )
