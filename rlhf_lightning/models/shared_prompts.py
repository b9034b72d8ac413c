"""A prompt that several answers share, run through the decoder once: as keys and values that each answer attends to.

    rows        p p p a a a      the decoder runs over    p p p        and, behind its keys and values,    a a a
                p p p b b b                                                                                b b b

Every row has the hidden states and the gradients that it would have on its own. What each model allows is asked of its
cache, and where it allows nothing the rows are computed one by one.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.models.body import attention_of, dropout_rates
from rlhf_lightning.models.compiled import is_compiled
from rlhf_lightning.models.routing import end_pass, lay_out
from rlhf_lightning.models.sharded import is_sharded


@dataclass(frozen=True)
class Sharing:
    """What a batch is known to share, where its tokens cannot be looked at: they have a shape and no numbers."""

    end: int
    """The column where answers begin."""
    copies: int
    """Answers to each prompt, side by side."""


_known: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def sharing(known: Sharing) -> Iterator[None]:
    """Inside, batches share their prompts like this."""
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def why_no_cache(model: nn.Module) -> str | None:
    """What keeps rows of a transformers model from going on behind the cache of another row; None: nothing does."""
    missing = {"position_ids", "past_key_values", "attention_mask"} - set(
        inspect.signature(type(model).forward).parameters
    )
    if missing:
        return f"its forward pass takes no {min(missing)}"
    config: Any = model.config
    other = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return f"its cache is made of {other.pop().__name__}" if other else None


def group_states(
    body: nn.Module,
    tokens: Int[Tensor, "rows time"],
    attention_mask: Bool[Tensor, "rows time"],
    positions: Int[Tensor, "rows time"],
    answers: Bool[Tensor, "rows time"],
) -> Float[Tensor, "rows time hidden"] | None:
    """The hidden states of `body_states`; None where nothing is gained, or the model does not allow it.

    Args:
        positions: count from 0 at each row's first real token.
        answers: True on tokens of answers; no prompt reaches beyond the column where the first of them stands.
    """
    if len(tokens) < 2 or not _allows(body):
        return None
    end, prompts, prompt_of_row = _distinct(tokens, attention_mask, answers)
    if end == 0 or len(prompts) > len(tokens) // 2:
        return None
    return _behind(body, prompts[:, :end], prompts[:, end:].bool(), prompt_of_row, tokens, attention_mask, positions)


def pair_states(
    body: nn.Module,
    tokens: Int[Tensor, "rows time"],
    attention_mask: Bool[Tensor, "rows time"],
    completions: Bool[Tensor, "rows time"],
) -> Float[Tensor, "rows time hidden"] | None:
    """The hidden states of `body_states` for pairs of rows, i and i + rows/2, that answer one prompt; None as above.

    Rows may be padded on either side. They are moved until their completions begin in one column:

        p p a a a -        - p p a a a
        p p p b - -        p p p b - -

    Args:
        completions: True where a completion's tokens are; what stands before the first of them is the prompt.
    """
    if not _allows(body):
        return None
    pairs, time = len(tokens) // 2, tokens.shape[1]
    steps = torch.arange(time, device=tokens.device)
    begins, lengths = attention_mask.int().argmax(-1, keepdim=True), attention_mask.sum(-1, keepdim=True)
    asked = (attention_mask & (completions.cumsum(-1) == 0)).sum(-1, keepdim=True)
    ordered = tokens.gather(1, (begins + steps).clamp(max=time - 1))
    differ = (ordered[:pairs] != ordered[pairs:]) & (steps < asked[:pairs])
    alone = differ.any() | (asked[:pairs] != asked[pairs:]).any()
    # waits for the device once a batch: how much is shared decides what is computed
    end, rest, apart = torch.stack((asked.max(), (lengths - asked).max(), alone.long())).tolist()
    # a pair costs end + 2 rest tokens instead of 2 time; behind a prompt longer than they are, completions in one row
    # with it were measured to be faster and to keep less for the backward pass
    if apart or rest == 0 or end > rest or end + 2 * rest >= 2 * time:
        return None
    number = torch.arange(end + rest, device=tokens.device) - end + asked  # of the token in each column, from 0
    real = (number >= 0) & (number < lengths)
    number = number.clamp(0, time - 1)
    moved = ordered.gather(1, number)
    row = torch.arange(2 * pairs, device=tokens.device) % pairs
    states = _behind(body, moved[:pairs, :end], real[:pairs, :end], row, moved, real, number)
    back = (steps - begins + end - asked).clamp(0, end + rest - 1)
    return lay_out(lambda x: x.gather(1, back[..., None].expand(-1, -1, x.shape[-1])), states)


def _behind(
    body: nn.Module,
    prompts: Tensor,
    real: Tensor,
    prompt_of_row: Tensor,
    tokens: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """Hidden states of rows that begin with prompts, each of which runs once.

    Args:
        prompts: as wide as they stand in the rows, with `real` beside them.
        prompt_of_row: which of them each row begins with.
    """
    end = prompts.shape[1]
    cache: Any = DynamicCache(config=body.config)
    first = body(
        input_ids=prompts,
        attention_mask=real,
        position_ids=(real.long().cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    end_pass(prompts)
    cache.batch_select_indices(prompt_of_row)
    rest = body(
        input_ids=tokens[:, end:],
        attention_mask=attention_mask,
        position_ids=positions[:, end:].masked_fill(~attention_mask[:, end:], 0),
        past_key_values=cache,
        use_cache=True,
    )
    end_pass(tokens[:, end:])
    return lay_out(
        lambda prompt, answer: torch.cat((prompt[prompt_of_row], answer), dim=1),
        first.last_hidden_state,
        rest.last_hidden_state,
    )


def _distinct(tokens: Tensor, attention_mask: Tensor, answers: Tensor) -> tuple[int, Tensor, Tensor]:
    """The column where answers begin (0: nowhere), prompts with their masks beside them, and which each row has."""
    known = _known.get()
    if known is not None:
        rows = torch.arange(len(tokens), device=tokens.device)
        few = slice(None, None, known.copies)
        prompts = torch.cat((tokens[few, : known.end], attention_mask[few, : known.end].long()), dim=1)
        return known.end, prompts, rows // known.copies
    starts = answers.any(0)
    # waits for the device twice a batch: how much is shared decides what is computed
    end = int(starts.int().argmax()) if bool(starts.any()) else 0
    prompts = torch.cat((tokens[:, :end], attention_mask[:, :end].long()), dim=1)
    if end == 0:
        return 0, prompts, torch.arange(len(tokens), device=tokens.device)
    return end, *prompts.unique(dim=0, return_inverse=True)


def _allows(body: nn.Module) -> bool:
    if why_no_cache(body) is not None or attention_of(body) not in ("sdpa", "eager"):
        return False
    # sharded weights are gathered anew for each pass, and a compiled layer is compiled anew for a cache
    if is_sharded(body) or is_compiled(body):
        return False
    if not body.training:
        return True
    # a checkpointed layer fills no cache, and answers would share the dropout of their prompt
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in body.modules())
    return not checkpointed and all(getattr(part, name) == 0 for part, name in dropout_rates(body))
