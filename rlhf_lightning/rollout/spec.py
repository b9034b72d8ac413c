"""How answers are sampled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine


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
