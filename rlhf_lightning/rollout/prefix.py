"""Answers that begin with words put into the policy's mouth: the prefix is read, but carries no loss."""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.data.collate import collate_prompts

_PREFILLED = "prefilled"
"""Key under which a prompt's record says what its answers began with."""


@dataclass(frozen=True)
class PrefixSpec:
    """Lets a share of the prompts be answered from a given beginning, such as a flawed chain of thought.

    The policy learns to go on well from there (and out of it): only what it says itself carries loss.

    Args:
        column: column of the prompt data that holds the beginning, as text; prompts where it is empty are left alone.
        share: which part of the prompts is given its beginning, drawn anew for every batch.
        in_completion: reward functions see the beginning as part of the answer; false: as part of the prompt.
    References:
        Peng et al., Large Reasoning Models Learn Better Alignment from Flawed Thinking (RECAP), 2025. arXiv:2510.00938
    """

    column: str = "prefix"
    share: float = 0.5
    in_completion: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"prefix.share={self.share}: give a share of the prompts, above 0 and up to 1")


def with_prefixes(
    prompts: PromptBatch, spec: PrefixSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PromptBatch:
    """The prompts, a share of them followed by the beginning of their answer.

    Args:
        seed: names the draw of which prompts.
    """
    ids, texts, records = [], [], []
    for row, (tokens, real) in enumerate(zip(prompts.tokens, prompts.attention_mask, strict=True)):
        record = prompts.records[row]
        if spec.column not in record:
            raise UserError(
                f"prefix.column={spec.column!r} is not in the prompt data, whose columns are "
                f"{', '.join(map(repr, record)) or 'none'}: name one of them"
            )
        prompt, beginning = tokens[real].tolist(), record[spec.column] or ""
        draw = counter_seed(seed, "prefix", row) / 2**63
        if not beginning or draw >= spec.share:
            beginning = ""
        ids.append(prompt + (tokenizer.encode(beginning, add_special_tokens=False) if beginning else []))
        texts.append(prompts.texts[row] + beginning)
        records.append({**record, _PREFILLED: beginning})
    batch = collate_prompts(ids, texts, records, prompts.indices.tolist(), tokenizer.pad_token_id)
    return replace(batch, totals=prompts.totals).to(prompts.tokens.device)


def without_prefixes(prompts: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """The prompts as they were asked: what `with_prefixes` put behind them no longer counts as theirs.

    By tokens, not by text: a tokenizer may read a beginning back with other spaces than it was given with.
    """
    real = prompts.attention_mask.clone()
    for row, record in enumerate(prompts.records):
        if beginning := record.get(_PREFILLED):
            real[row, -len(tokenizer.encode(beginning, add_special_tokens=False)) :] = False
    return replace(prompts, attention_mask=real)
