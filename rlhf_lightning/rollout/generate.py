"""Answers by a model's own forward pass: left-padded batches, a KV cache, rows that leave when they are done."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.models.sharded import gathered_once
from rlhf_lightning.rollout.answers import assemble, check_context, end_ids
from rlhf_lightning.rollout.by_transformers import draw_by_transformers, stop_criterion, warpers_of
from rlhf_lightning.rollout.decode import Drawn, Rule, concatenate, decode, why_not
from rlhf_lightning.rollout.mixture import MixtureSpec
from rlhf_lightning.rollout.spec import GenerationSpec, suppressed_ids

logger = logging.getLogger(__name__)


class HFGenerate(RolloutEngine):
    """Answers from the model as it is being trained; the same seed gives the same answers.

    A prompt is read once for all of its answers, and an answer that is done leaves the batch (`rollout.decode`). A
    model whose cache does not allow it, and a static cache, go through transformers' own `generate`.

    Logits are not kept: log-probabilities are recomputed by the policy, so that training and sampling agree exactly. Of
    a sampler that truncates, the sets that tokens were drawn from are: a bit per entry of the vocabulary and token.

    Args:
        spec: how to sample.
        tokenizer: for its pad and end ids and for stop strings.
    """

    says_kept = True
    says_entropy = True
    heeds_rows_at_once = True

    def __init__(self, spec: GenerationSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self._suppressed = suppressed_ids(spec, tokenizer)
        self.mixture: MixtureSpec | None = None

    def with_spec(self, spec: GenerationSpec) -> "HFGenerate":
        made = HFGenerate(spec, self.tokenizer)
        made.mixture = self.mixture
        return made

    def with_mixture(self, mixture: MixtureSpec) -> "HFGenerate":
        """The same engine, with another model that has a say in every token."""
        made = self.with_spec(self.spec)
        made.mixture = mixture
        return made

    def ahead(self) -> RolloutEngine:
        from rlhf_lightning.rollout.frozen_copy import FrozenCopy  # which is made of this class

        if self.spec.cache == "static":
            raise UserError(
                "updates.async_rollouts=true with generation.cache='static', which is transformers' own generate and "
                "draws from the generator that training draws from: set cache: dynamic, or leave async_rollouts out"
            )
        return FrozenCopy(self)

    @torch.no_grad()
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        check_context(self.spec, policy, prompts)
        device, width = prompts.tokens.device, prompts.tokens.shape[1]
        copies = torch.arange(len(prompts.tokens), device=device).repeat_interleave(self.spec.num_samples)
        uniforms = self._uniforms(len(copies), seed, device)
        pad_id = self.tokenizer.pad_token_id
        decodes = self._decodes(policy)
        was_training = policy.training
        policy.eval()
        order = torch.arange(len(copies), device=device)
        if self.spec.rows_at_once is not None:
            order = prompts.attention_mask.sum(-1)[copies].argsort(descending=True, stable=True)
        parts = []
        try:
            # our own loop draws from `uniforms` alone, and leaves the process's generators to whoever trains meanwhile
            with nullcontext() if decodes else _generators_seeded(seed, device), self._gathered(policy):
                for rows in order.split(self.spec.rows_at_once or len(order)):
                    asked, prompt_of_row = copies[rows].unique(return_inverse=True)
                    tokens, mask = prompts.tokens[asked], prompts.attention_mask[asked]
                    spare = width - int(mask.sum(-1).max())  # columns of padding in all of these prompts
                    tokens, mask = tokens[:, spare:], mask[:, spare:]
                    if decodes:
                        drawn = self._decode(policy, tokens, mask, prompt_of_row, uniforms[rows])
                    else:
                        drawn = draw_by_transformers(
                            policy,
                            tokens[prompt_of_row],
                            mask[prompt_of_row],
                            self.spec,
                            self.tokenizer,
                            suppressed=self._suppressed,
                            mixture=self.mixture,
                        )
                    parts.append(drawn.behind(spare, pad_id=pad_id))
        finally:
            policy.train(was_training)
        drawn = concatenate(parts, pad_id=pad_id).select(order.argsort())
        answers = assemble(drawn.tokens, prompts.attention_mask[copies], drawn.lengths, pad_id=pad_id)
        # behind the end of a finished answer padding was drawn, for as long as its row stayed in the batch
        real = {name: _where(answers.mask, x) for name, x in drawn.noted.items()}
        return replace(answers, **real)

    def _uniforms(self, num_rows: int, seed: int, device: torch.device) -> Tensor:
        """A number of [0, 1) for every row and step, whatever batch the row is in and on whatever device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(num_rows, self.spec.max_new_tokens, dtype=torch.float64, generator=generator)
        return drawn.to(device, torch.float64 if device.type != "mps" else torch.float32)

    def _decodes(self, policy: Any) -> bool:
        if self.spec.cache == "static":
            return False
        for model in (policy, *self._others()):
            reason = why_not(model)
            if reason is not None:
                _say_once(model.config.model_type, reason)
                return False
        return True

    def _others(self) -> list[Any]:
        """Models beside the policy that are asked for every token."""
        return [] if self.mixture is None else [self.mixture.reference.policy]

    @contextmanager
    def _gathered(self, policy: Any) -> Iterator[None]:
        """Sharded weights are exchanged once, and not for every token."""
        with ExitStack() as stack:
            for model in (policy, *self._others()):
                stack.enter_context(gathered_once(model))
            yield

    def _decode(
        self, policy: Any, tokens: Tensor, attention_mask: Tensor, prompt_of_row: Tensor, uniforms: Tensor
    ) -> Drawn:
        """By our own loop."""
        spec, eos = self.spec, end_ids(policy, self.tokenizer)
        forbid = LogitsProcessorList()
        if spec.min_new_tokens:
            forbid.append(
                MinNewTokensLengthLogitsProcessor(tokens.shape[1], spec.min_new_tokens, eos, device=str(tokens.device))
            )
        if self._suppressed:
            forbid.append(SuppressTokensLogitsProcessor(self._suppressed, device=str(tokens.device)))
        stops = None
        if spec.stop_strings:
            criterion = stop_criterion(self.tokenizer, spec.stop_strings)
            stops = lambda ids: criterion(ids, None)  # noqa: E731
        rule = Rule(
            forbid=forbid,
            repetition_penalty=spec.repetition_penalty,
            warp=warpers_of(spec) if spec.temperature > 0 else None,
            keep_sets=spec.truncates,
            keep_logprobs=spec.keep_logprobs,
            ends=torch.tensor(eos, device=tokens.device),
            stops=stops,
        )
        return decode(
            policy,
            tokens,
            attention_mask,
            prompt_of_row,
            uniforms,
            rule,
            pad_id=self.tokenizer.pad_token_id,
            mixture=self.mixture,
        )


@contextmanager
def _generators_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the process's generators are seeded; outside they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """x [batch, time, ...], 0 where `mask` [batch, time] is False."""
    return torch.where(mask.view(*mask.shape, *(1,) * (x.dim() - 2)), x, 0)


@cache
def _say_once(model_type: str, reason: str) -> None:
    logger.warning(
        "models of type %r are sampled from by transformers' own generate, which reads a prompt once per answer: %s",
        model_type,
        reason,
    )
