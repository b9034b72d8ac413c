"""Prompts to answers by whatever policy a stage holds; the sample table and `generate` ask here."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import PromptBatch
from rlhf_lightning.core.interfaces import Sample
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.data.encode import encode_prompt
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], batch_size: int
) -> Iterator[PromptBatch]:
    """Prompts as the model reads them, a batch at a time.

    Args:
        tokenizer: of the model that answers.
        prompts: strings, or lists of messages.
        batch_size: prompts in a batch.
    """
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        ids = [encode_prompt(tokenizer, prompt) for prompt in chunk]
        texts = [tokenizer.decode(row) for row in ids]
        records = [{"prompt": prompt} for prompt in chunk]
        yield collate_prompts(ids, texts, records, range(first, first + len(chunk)), tokenizer.pad_token_id)


def answer_prompts(
    module: Any, prompts: PromptBatch, spec: GenerationSpec, *, purpose: str, index: int = 0
) -> list[Sample]:
    """Answers of `module.policy`, `spec.num_samples` of each prompt; the same seed and weights give the same ones.

    Args:
        module: a stage with a policy and a tokenizer.
        prompts: what to answer.
        spec: how to sample.
        purpose: names the seed.
        index: of the batch; names the seed too.
    """
    tokenizer = module.tokenizer
    seed = counter_seed(module.seed, purpose, index, module.data_rank)
    answers = HFGenerate(spec, tokenizer).generate(module.policy, prompts.to(module.device), seed=seed)
    tokens, mask = answers.tokens.cpu(), answers.mask.cpu()
    texts = tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)], skip_special_tokens=True
    )
    read = [row[keep].tolist() for row, keep in zip(prompts.tokens.cpu(), prompts.attention_mask.cpu(), strict=True)]
    asked = tokenizer.batch_decode(read, skip_special_tokens=True)
    return [
        Sample(
            prompt=asked[i // spec.num_samples],
            completion=text,
            record=prompts.records[i // spec.num_samples],
            tokens=tuple(tokens[i][mask[i]].tolist()),
            finished=bool(answers.finished[i]),
        )
        for i, text in enumerate(texts)
    ]
