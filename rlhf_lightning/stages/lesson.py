"""What a student and its teacher expect at the same tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.core.logprobs import TokenScores, token_divergence
from rlhf_lightning.losses.distillation import TeacherLoss
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.models.policy import HasTokens, Policy
from rlhf_lightning.models.reference import Reference


@dataclass(frozen=True)
class Lesson:
    """A batch as both see it; every number is 0 where nothing counts."""

    divergence: Tensor
    """Of their distributions, as the loss measures it [batch, time] (nats); gradient to the student."""
    scores: TokenScores | None
    """What the student says of the tokens themselves; None: not asked for."""
    teacher_logprobs: Tensor | None
    """What the teacher says of them; None: not asked for."""

    def loss(self, of: TeacherLoss) -> Tensor:
        """The loss per token [batch, time]."""
        return of(self.divergence, None if self.scores is None else self.scores.logprobs)

    def metrics(self) -> dict[str, Tensor]:
        """What is known of each token [batch, time], by name."""
        known = {"divergence": self.divergence}
        if self.scores is not None:
            known |= {"nll": token_nll(self.scores.logprobs), "token_accuracy": self.scores.is_argmax.float()}
        return known


def teach(
    student: Policy,
    teacher: Reference,
    batch: HasTokens,
    loss: TeacherLoss,
    *,
    answers: Tensor | None = None,
    with_scores: bool = False,
    with_teacher: bool = False,
) -> Lesson:
    """Ask both about the tokens of a batch that count; hidden states are computed once, and logits never stored.

    Args:
        answers: where a prompt that several rows begin with is computed once; see `Policy.hidden_states`.
        with_scores: also what the student says of the tokens themselves.
        with_teacher: also what the teacher says of them.
    """
    rows = batch.tokens, batch.attention_mask, batch.positions, getattr(batch, "segments", None)
    hidden = student.hidden_states(*rows, answers=answers)
    theirs = teacher.hidden_states(batch, answers=answers)
    scores = student.scores(hidden, batch.tokens, batch.mask) if with_scores else None
    teacher_logprobs = None
    if with_teacher:
        with torch.no_grad():
            teacher_logprobs = teacher.policy.scores(theirs, batch.tokens, batch.mask).logprobs
    heads = student.head(), teacher.policy.head()
    divergence = token_divergence(
        hidden, theirs, batch.mask, *heads, mixture=loss.mixture, temperature=loss.temperature
    )
    return Lesson(divergence, scores, teacher_logprobs)
