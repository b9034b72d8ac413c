"""Answers as text, the way reward functions see them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.interfaces import Sample


def decode_samples(tokenizer: PreTrainedTokenizerBase, prompts: PromptBatch, answers: Generated) -> list[Sample]:
    """Prompt and answer of every row, special tokens left out.

    The answer is what the whole text has beyond the prompt's, so that `prompt + completion` reads right with
    tokenizers that drop the space in front of a text's first word.

    Args:
        tokenizer: of the model that answered.
        prompts: what was asked.
        answers: rows of prompt and answer; `answers / prompts` rows per prompt, side by side.
    """
    copies = answers.tokens.shape[0] // prompts.tokens.shape[0]
    prompt_texts = tokenizer.batch_decode(_kept(prompts.tokens, prompts.attention_mask), skip_special_tokens=True)
    whole_texts = tokenizer.batch_decode(_kept(answers.tokens, answers.attention_mask), skip_special_tokens=True)
    answer_ids = _kept(answers.tokens, answers.mask)
    answer_texts = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    records: Sequence[Mapping[str, Any]] = prompts.records
    samples = []
    for row, (whole, alone) in enumerate(zip(whole_texts, answer_texts, strict=True)):
        prompt = prompt_texts[row // copies]
        samples.append(
            Sample(
                prompt=prompt,
                completion=whole[len(prompt) :] if whole.startswith(prompt) else alone,
                record=records[row // copies],
                tokens=tuple(answer_ids[row]),
                finished=bool(answers.finished[row]),
            )
        )
    return samples


def _kept(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
