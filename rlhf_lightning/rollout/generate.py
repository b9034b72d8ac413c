"""Answers by a model's own forward pass: left-padded batches, a KV cache, rows that leave when they are done."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
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

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.core.kept import pack_kept
from rlhf_lightning.models.sharded import gathered_once
from rlhf_lightning.rollout.decode import Drawn, Rule, concatenate, decode, why_not
from rlhf_lightning.rollout.mixture import GeometricMixture, MixtureSpec
from rlhf_lightning.rollout.penalty import RepetitionPenalty

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSpec:
    """How answers are sampled.

    Args:
        max_new_tokens: length at which an answer is cut off, end token included.
        min_new_tokens: no end token before this many tokens.
        temperature: logits are divided by it, here and wherever log-probabilities are recomputed. 0 = greedy.
        top_p: sample from the smallest set of tokens with this much mass; 1 = all.
        top_k: sample from the k most probable tokens; 0 = all.
        min_p: drop tokens less probable than this times the most probable one; 0 = none.
        repetition_penalty: logits of tokens that the prompt or the answer holds already are divided by it where they
            are positive, multiplied where they are not; 1 = none. Log-probabilities that are recomputed are the
            policy's, without it.
        suppress_tokens: tokens, as the vocabulary writes them, that are never drawn.
        num_samples: answers per prompt.
        stop_strings: an answer also ends, finished, when its text holds one of these; the string stays in the answer.
        rows_at_once: sequences generated in one batch, those to prompts of like length together; None: all of them. It
            bounds memory, and the answers are the same.
        cache: KV cache: grows with the answers and is computed once for all answers to a prompt, or allocated once by
            transformers' `generate`, which draws other answers from the same seed.
        keep_logprobs: remember what the engine itself gave each token, to compare with the policy's own numbers or to
            use in their place.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress_tokens: list[str] = field(default_factory=list)
    num_samples: int = 1
    stop_strings: list[str] = field(default_factory=list)
    rows_at_once: int | None = None
    cache: Literal["dynamic", "static"] = "dynamic"
    keep_logprobs: bool = False

    @property
    def truncates(self) -> bool:
        """Whether some tokens could not be drawn, however probable the policy found them."""
        by_probability = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.temperature > 0 and (by_probability or self.min_new_tokens > 0 or bool(self.suppress_tokens))

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"generation.max_new_tokens={self.max_new_tokens}: an answer needs at least 1 token")
        if self.min_new_tokens < 0:
            raise UserError(f"generation.min_new_tokens={self.min_new_tokens}: give 0 (no minimum) or more")
        if "" in self.stop_strings:
            raise UserError("generation.stop_strings holds an empty string, which every answer begins with: remove it")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"generation.min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}"
            )
        if self.temperature < 0:
            raise UserError(f"generation.temperature={self.temperature}: use 0 for greedy, or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generation.top_p={self.top_p}: use a share of the probability mass, 0 < top_p <= 1")
        if not 0 <= self.min_p < 1 or self.top_k < 0:
            raise UserError(f"generation.min_p={self.min_p}, top_k={self.top_k}: 0 <= min_p < 1 and top_k >= 0")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"generation.repetition_penalty={self.repetition_penalty}: use a positive number, above 1 to make "
                "repeating less likely; 1 = none"
            )
        if self.rows_at_once is not None and self.rows_at_once < 1:
            raise UserError(
                f"generation.rows_at_once={self.rows_at_once}: give at least 1, or leave it out for all rows"
            )
        if self.num_samples < 1:
            raise UserError(f"generation.num_samples={self.num_samples}: sample at least 1 answer per prompt")


EngineFactory = Callable[[GenerationSpec, PreTrainedTokenizerBase], RolloutEngine]
"""An engine by `class_path`, its own options given: what is left to say is how to sample, and with what tokenizer."""


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
        self.warpers = _warpers(spec)
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


def _warpers(spec: GenerationSpec) -> LogitsProcessorList:
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
                        drawn = self._transformers(policy, tokens[prompt_of_row], mask[prompt_of_row])
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
            criterion = _stop_strings(self.tokenizer, spec.stop_strings)
            stops = lambda ids: criterion(ids, None)  # noqa: E731
        rule = Rule(
            forbid=forbid,
            repetition_penalty=spec.repetition_penalty,
            warp=_warpers(spec) if spec.temperature > 0 else None,
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

    def _transformers(self, policy: Any, tokens: Tensor, attention_mask: Tensor) -> Drawn:
        """By transformers' `generate`."""
        eos = end_ids(policy, self.tokenizer)
        criteria: list[StoppingCriteria] = [EosTokenCriteria(eos_token_id=eos)]
        if self.spec.stop_strings:
            criteria.append(_stop_strings(self.tokenizer, self.spec.stop_strings))
        recorder = _FinishedLengths(criteria)
        record = None
        if self.spec.truncates or (self.spec.keep_logprobs and self.spec.temperature > 0):
            record = _SamplingRecord(self.spec, keep_sets=self.spec.truncates)
        processors: list[LogitsProcessor] = [] if record is None else [record]
        if self.spec.repetition_penalty != 1:
            processors.insert(0, RepetitionPenalty(self.spec.repetition_penalty, attention_mask))
        if self.mixture is not None:
            processors.insert(0, GeometricMixture(self.mixture, attention_mask))
        config = self._config(eos)
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

    def _config(self, eos: list[int]) -> GenerationConfig:
        spec = self.spec
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
            suppress_tokens=self._suppressed or None,
            eos_token_id=eos,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            use_cache=True,
            cache_implementation="static" if spec.cache == "static" else None,
            **sampling,
        )


@contextmanager
def _generators_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the process's generators are seeded; outside they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_context(spec: GenerationSpec, policy: Any, prompts: PromptBatch) -> None:
    """Refuse prompts behind which the model has no room for an answer."""
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    lengths = prompts.attention_mask.sum(-1)
    row = int(lengths.argmax())
    length, room = int(lengths[row]), spec.max_new_tokens
    if context is not None and length + room > context:
        if context - room < 2:  # no prompt is as short as that
            raise UserError(
                f"generation.max_new_tokens={room} leaves no room for a prompt in the model's context of {context} "
                "tokens: lower it"
            )
        raise UserError(
            f"prompt {int(prompts.indices[row])} ({prompts.texts[row][:60]!r}...) has {length} tokens; with "
            f"generation.max_new_tokens={room} that exceeds the model's context of {context} tokens: lower "
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


def _where(mask: Tensor, x: Tensor) -> Tensor:
    """x [batch, time, ...], 0 where `mask` [batch, time] is False."""
    return torch.where(mask.view(*mask.shape, *(1,) * (x.dim() - 2)), x, 0)


def _stop_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StoppingCriteria:
    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        # transformers works out each token's text behind a probe word, which word-level vocabularies do not have
        raise UserError(
            f"generation.stop_strings={list(strings)} cannot be used with this tokenizer, whose tokens have no text of "
            "their own: leave them out and train the end token instead"
        ) from error


@cache
def _say_once(model_type: str, reason: str) -> None:
    logger.warning(
        "models of type %r are sampled from by transformers' own generate, which reads a prompt once per answer: %s",
        model_type,
        reason,
    )


def suppressed_ids(spec: GenerationSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that are never drawn.

    Raises:
        UserError: the vocabulary has no such token, or it is the end token.
    """
    if not spec.suppress_tokens:
        return []
    vocabulary = tokenizer.get_vocab()
    for token in spec.suppress_tokens:
        if token not in vocabulary:
            near = get_close_matches(token, vocabulary, n=1)
            raise UserError(
                f"generation.suppress_tokens: the vocabulary has no token {token!r}"
                + (f", the nearest is {near[0]!r}" if near else "")
                + "; a token is written as in tokenizer.json, where a space may be another sign"
            )
        if vocabulary[token] == tokenizer.eos_token_id:
            raise UserError(
                f"generation.suppress_tokens={token!r} is the end token, and no answer would end: leave it out, or set "
                "min_new_tokens to have longer ones"
            )
    return [vocabulary[token] for token in spec.suppress_tokens]


def end_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's generation config may name several (an end of turn and an end of text)."""
    named = getattr(policy.model.generation_config, "eos_token_id", None)
    ids = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids
