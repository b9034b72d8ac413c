"""Answers drawn from two models at once: the geometric mixture of their distributions, token by token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rlhf_lightning.models.reference import Reference


@dataclass(frozen=True)
class MixtureSpec:
    """The other model, and how much it has to say."""

    reference: Reference
    share: float
    """Its exponent, between 0 (nothing) and 1 (everything)."""


def mixed_logits(scores: Tensor, others: Tensor, share: float) -> Tensor:
    """Logits of the geometric mixture; what is forbidden in `scores` stays forbidden.

    Args:
        scores, others: logits of the two models [rows, vocab].
        share: the other one's exponent.
    """
    mixed = (1 - share) * scores.float() + share * others.float()
    return torch.where(scores > -torch.inf, mixed, -torch.inf)


class GeometricMixture(LogitsProcessor):
    """Turns the logits of the model that generates into those of a mixture with another one.

        q(y_t | x, y_<t)  ~  pi(y_t | x, y_<t)^(1 - share) ref(y_t | x, y_<t)^share

    Stands behind the rules that forbid tokens and in front of temperature and truncation, which then apply to the
    mixture. The other model keeps a cache of its own: a step costs it one token.

    Args:
        spec: the other model and its share.
        attention_mask: real tokens of the left-padded prompts [rows, time].

    References:
        Munos et al., Nash Learning from Human Feedback, 2023, section 6. arXiv:2312.00886
    """

    def __init__(self, spec: MixtureSpec, attention_mask: Tensor) -> None:
        self.spec = spec
        self.attention_mask = attention_mask
        self._cache: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return mixed_logits(scores, self._other_logits(input_ids), self.spec.share)

    def _other_logits(self, tokens: Tensor) -> Tensor:
        """The other model's logits of the next token [rows, vocab]."""
        drawn = tokens.shape[1] - self.attention_mask.shape[1]
        real = torch.nn.functional.pad(self.attention_mask, (0, drawn), value=True)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        reference = self.spec.reference
        with reference.as_it_was():
            logits, self._cache = reference.policy.next_logits(
                input_ids=tokens[:, self._seen :],
                attention_mask=real.long(),
                position_ids=positions[:, self._seen :],
                past_key_values=self._cache,
            )
        self._seen = tokens.shape[1]
        return logits
