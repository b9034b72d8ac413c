"""What engines share that sample from weights of their own: what they cannot do, how they are asked, what they say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kept import pack_kept
from rlhf_lightning.rollout.answers import assemble
from rlhf_lightning.rollout.spec import GenerationSpec


@dataclass(frozen=True)
class Answer:
    """One answer, as an engine gives it."""

    tokens: Sequence[int]
    """Its end token included."""
    logprobs: Sequence[float]
    """What the engine gave each token (nats), over what it drew it from."""
    finished: bool
    """Whether it ended by itself, with an end token or a stop string."""


def truncating_options(spec: GenerationSpec) -> list[str]:
    """Options that keep tokens from being drawn for their probability, as they are set."""
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    given = {name: getattr(spec, name) for name in neutral}
    return [f"generation.{name}={value}" for name, value in given.items() if value != neutral[name]]


def refuse_options_of_batches(spec: GenerationSpec, engine: str) -> None:
    """Raise for options that an engine without padded batches would leave without effect.

    Args:
        engine: its name.
    """
    if spec.rows_at_once is not None:
        raise UserError(
            f"generation.rows_at_once={spec.rows_at_once} does nothing with {engine}, which decides itself how many "
            "answers are in flight: leave it out"
        )
    if spec.cache != "dynamic":
        raise UserError(
            f"generation.cache={spec.cache!r} does nothing with {engine}, whose cache is paged: leave it out"
        )


def prompt_ids(prompts: PromptBatch) -> list[list[int]]:
    """The prompts' tokens without padding."""
    rows = zip(prompts.tokens.cpu(), prompts.attention_mask.cpu(), strict=True)
    return [tokens[real].tolist() for tokens, real in rows]


def vllm_sampling(spec: GenerationSpec, ends: Sequence[int]) -> dict[str, Any]:
    """How to sample, in vLLM's words; what the OpenAI-compatible API calls the same is called the same.

    Args:
        ends: ids that end an answer.
    """
    if spec.suppress_tokens:
        raise UserError(
            f"generation.suppress_tokens={list(spec.suppress_tokens)} is not known to vLLM's engines here: leave it "
            "out, or use HFGenerate"
        )
    if spec.stop_strings and spec.min_new_tokens:
        raise UserError(
            f"generation.min_new_tokens={spec.min_new_tokens} keeps vLLM from seeing "
            f"stop_strings={list(spec.stop_strings)} before it: leave one of them out"
        )
    return {
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "min_p": spec.min_p,
        "repetition_penalty": spec.repetition_penalty,
        "max_tokens": spec.max_new_tokens,
        "min_tokens": spec.min_new_tokens,
        "stop": list(spec.stop_strings),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(ends),
        "skip_special_tokens": False,
    }


def assemble_answers(
    spec: GenerationSpec,
    prompts: PromptBatch,
    answers: Sequence[Answer],
    *,
    pad_id: int,
    ends: Sequence[int],
    vocab: int,
) -> Generated:
    """Answers behind their prompts, those to one prompt side by side.

    Args:
        answers: `num_samples` of the first prompt, then of the next.
        ends: ids that end an answer.
        vocab: entries that the policy's output head has.
    """
    device = prompts.tokens.device
    mask = prompts.attention_mask.repeat_interleave(spec.num_samples, 0)
    before = prompts.tokens.shape[1]
    drawn = pad_sequence([torch.tensor(a.tokens) for a in answers], batch_first=True, padding_value=pad_id)
    logprobs = pad_sequence([torch.tensor(a.logprobs, dtype=torch.float32) for a in answers], batch_first=True)
    tokens = torch.cat((prompts.tokens.repeat_interleave(spec.num_samples, 0), drawn.to(device)), dim=1)
    lengths = torch.tensor([before + len(a.tokens) if a.finished else -1 for a in answers], device=device)
    made = assemble(tokens, mask, lengths, pad_id=pad_id)
    said = torch.nn.functional.pad(logprobs, (before, 0)).to(device)
    kept = None if truncating_options(spec) else _kept_by_minimum(spec, made, before, ends, vocab)
    return Generated(
        tokens=made.tokens,
        attention_mask=made.attention_mask,
        mask=made.mask,
        positions=made.positions,
        finished=made.finished,
        kept=kept,
        # greedy answers are drawn from nothing
        sampler_logprobs=torch.where(made.mask, said, 0.0) if spec.temperature > 0 else None,
    )


def _kept_by_minimum(
    spec: GenerationSpec, answers: Generated, before: int, ends: Sequence[int], vocab: int
) -> Tensor | None:
    """What tokens were drawn from where only a minimum length cut something off: all but the end tokens, at first."""
    if not spec.min_new_tokens or spec.temperature == 0:
        return None
    everything = torch.ones(vocab, dtype=torch.bool)
    without_ends = everything.clone()
    without_ends[list(ends)] = False
    # [time, bytes]; of the prompt nothing is asked
    kinds = pack_kept(torch.stack((everything, without_ends))).to(answers.tokens.device)
    column = torch.arange(answers.tokens.shape[1], device=answers.tokens.device)
    early = (column >= before) & (column < before + spec.min_new_tokens)
    return kinds[early.long()].expand(len(answers.tokens), -1, -1).contiguous()
