"""Prompts before they are answered and answers after they were drawn, whatever draws them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout.spec import GenerationSpec


def check_context(spec: GenerationSpec, policy: Any, prompts: PromptBatch, *, whose: str = "the model") -> None:
    """Refuse prompts behind which the model has no room for an answer.

    Args:
        whose: what a message calls the model.
    """
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    lengths = prompts.attention_mask.sum(-1)
    row = int(lengths.argmax())
    length, room = int(lengths[row]), spec.max_new_tokens
    if context is not None and length + room > context:
        if context - room < 2:  # no prompt is as short as that
            raise UserError(
                f"generation.max_new_tokens={room} leaves no room for a prompt in {whose}'s context of {context} "
                "tokens: lower it"
            )
        raise UserError(
            f"prompt {int(prompts.indices[row])} ({prompts.texts[row][:60]!r}...) has {length} tokens; with "
            f"generation.max_new_tokens={room} that exceeds {whose}'s context of {context} tokens: lower "
            f"max_new_tokens, or cut prompts with data.max_prompt_length={context - room}"
        )


def assemble(tokens: Tensor, prompt_mask: Tensor, lengths: Tensor, *, pad_id: int) -> Generated:
    """Masks and positions of answers, from how wide each row was when it finished.

    Args:
        tokens: prompt + answer ids [batch, time]; whatever follows a finished answer is replaced by `pad_id`.
        prompt_mask: real tokens of the left-padded prompts [batch, prompt time].
        lengths: columns up to and including the last token of each finished row [batch]; -1 = cut off at the limit.
    """
    finished = lengths >= 0
    width = torch.where(finished, lengths, tokens.shape[1])
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    response = (columns >= prompt_mask.shape[1]) & (columns < width[:, None])  # [batch, time]
    real = response.clone()
    real[:, : prompt_mask.shape[1]] = prompt_mask
    return Generated(
        tokens=torch.where(real, tokens, pad_id),
        attention_mask=real,
        mask=response,
        positions=(real.long().cumsum(-1) - 1).clamp(min=0),
        finished=finished,
    )


def end_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's generation config may name several (an end of turn and an end of text)."""
    named = getattr(policy.model.generation_config, "eos_token_id", None)
    ids = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids
