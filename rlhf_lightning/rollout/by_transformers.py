"""Answers by transformers' own `generate`, and what of it our loop uses too."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kept import pack_kept
from rlhf_lightning.rollout.answers import end_ids
from rlhf_lightning.rollout.decode import Drawn
from rlhf_lightning.rollout.mixture import GeometricMixture, MixtureSpec
from rlhf_lightning.rollout.penalty import RepetitionPenalty
from rlhf_lightning.rollout.spec import GenerationSpec


def draw_by_transformers(
    policy: Any,
    tokens: Int[Tensor, "rows time"],
    attention_mask: Bool[Tensor, "rows time"],
    spec: GenerationSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    suppressed: list[int],
    mixture: MixtureSpec | None,
) -> Drawn:
    """Answers to left-padded prompts, drawn from the process's generators.

    Args:
        suppressed: ids that are never drawn.
        mixture: another model that has a say in every token.
    """
    eos = end_ids(policy, tokenizer)
    criteria: list[StoppingCriteria] = [EosTokenCriteria(eos_token_id=eos)]
    if spec.stop_strings:
        criteria.append(stop_criterion(tokenizer, spec.stop_strings))
    recorder = _FinishedLengths(criteria)
    record = None
    if spec.truncates or (spec.keep_logprobs and spec.temperature > 0):
        record = _SamplingRecord(spec, keep_sets=spec.truncates)
    processors: list[LogitsProcessor] = [] if record is None else [record]
    if spec.repetition_penalty != 1:
        processors.insert(0, RepetitionPenalty(spec.repetition_penalty, attention_mask))
    if mixture is not None:
        processors.insert(0, GeometricMixture(mixture, attention_mask))
    config = generation_config(spec, tokenizer, eos, suppressed)
    # transformers fills whatever `config` leaves open from the model's own generation config (top_k 50, a
    # repetition penalty): swap it out, or the sampling distribution is not the one that is trained
    own, policy.model.generation_config = policy.model.generation_config, config
    try:
        output = policy.generate(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([recorder]),
            logits_processor=LogitsProcessorList(processors),
        )
    finally:
        policy.model.generation_config = own
    assert recorder.lengths is not None
    return Drawn(output, recorder.lengths, {} if record is None else record.finish(output))


def generation_config(
    spec: GenerationSpec, tokenizer: PreTrainedTokenizerBase, eos: list[int], suppressed: list[int]
) -> GenerationConfig:
    sampling = (
        {"do_sample": False}
        if spec.temperature == 0
        else {
            "do_sample": True,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "top_k": spec.top_k,
            "min_p": spec.min_p or None,
        }
    )
    return GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        min_new_tokens=spec.min_new_tokens or None,
        suppress_tokens=suppressed or None,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        cache_implementation="static" if spec.cache == "static" else None,
        **sampling,
    )


class _FinishedLengths(StoppingCriteria):
    """Stops rows at an end token or stop string and remembers how long each then was.

    The ids alone cannot tell: where pad equals eos, a padded row ended by a stop string looks as if it had sampled eos.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria]) -> None:
        self.criteria = criteria
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done |= criterion(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.full((input_ids.shape[0],), -1, device=input_ids.device)
        self.lengths = torch.where(done & (self.lengths < 0), input_ids.shape[1], self.lengths)
        return done


class _SamplingRecord(LogitsProcessor):
    """Remembers, of every step, which tokens could be drawn and what the drawn one's log-probability was.

    Stands behind the rules that forbid tokens (a minimum length) or penalise them, and in front of temperature and
    truncation, whose own classes it calls: what it records is what transformers samples from.

    Args:
        spec: how to sample.
        keep_sets: remember the sets.
    """

    def __init__(self, spec: GenerationSpec, *, keep_sets: bool) -> None:
        self.warpers = warpers_of(spec)
        self.keep_sets = keep_sets
        self.keep_logprobs = spec.keep_logprobs
        self.sets: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self._distribution: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._note_drawn(input_ids)
        warped = self.warpers(input_ids, scores.float())
        if self.keep_sets:
            self.sets.append(pack_kept(warped > -torch.inf))
        if self.keep_logprobs:
            self._distribution = warped.log_softmax(-1)
            # 0 log 0 is 0, not NaN, for what was cut off
            self.entropies.append(torch.special.entr(self._distribution.exp()).sum(-1))
        return scores

    def _note_drawn(self, tokens: Tensor) -> None:
        """The last of `tokens` is what was drawn from the distribution of the step before."""
        if self._distribution is not None:
            self.logprobs.append(self._distribution.gather(-1, tokens[:, -1:])[:, 0])
            self._distribution = None

    def finish(self, tokens: Tensor) -> dict[str, Tensor]:
        """Sets [rows, time, bytes], log-probabilities and entropies [rows, time] about `tokens`; 0 over the prompt."""
        self._note_drawn(tokens)
        steps = {"kept": self.sets, "sampler_logprobs": self.logprobs, "sampler_entropy": self.entropies}
        return {name: _about(tokens, noted) for name, noted in steps.items() if noted}


def warpers_of(spec: GenerationSpec) -> LogitsProcessorList:
    """Temperature and truncation, in the order in which transformers applies them."""
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(spec.temperature)]
    if spec.top_k > 0:
        warpers.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1:
        warpers.append(TopPLogitsWarper(spec.top_p))
    if spec.min_p > 0:
        warpers.append(MinPLogitsWarper(spec.min_p))
    return LogitsProcessorList(warpers)


def _about(tokens: Tensor, steps: list[Tensor]) -> Tensor:
    """What was noted of each sampled token, behind zeros for the prompt: [rows, time, ...]."""
    noted = torch.stack(steps, dim=1)
    prompt = noted.new_zeros((len(noted), tokens.shape[1] - noted.shape[1], *noted.shape[2:]))
    return torch.cat((prompt, noted), dim=1)


def stop_criterion(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StoppingCriteria:
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        # transformers works out each token's text behind a probe word, which word-level vocabularies do not have
        raise UserError(
            f"generation.stop_strings={list(strings)} cannot be used with this tokenizer, whose tokens have no text of "
            "their own: leave them out and train the end token instead"
        ) from error
