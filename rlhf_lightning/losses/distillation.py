"""The loss of a student that learns from what a teacher expects at each token."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.supervised import TokenLoss, token_nll


class TeacherLoss(TokenLoss):
    """A loss per token from how far apart the distributions of student and teacher are."""

    temperature: float
    """Divides both logits."""

    @property
    @abstractmethod
    def mixture(self) -> float:
        """Which divergence is measured: the teacher's share in what both are compared with, as in
        `core.logprobs.token_divergence`."""

    @property
    def reads_logprobs(self) -> bool:
        """Whether it also reads the student's log-probabilities of records' own tokens, which cost one more pass over
        the vocabulary."""
        return False

    @abstractmethod
    def __call__(
        self, divergence: Float[Tensor, "batch time"], logprobs: Float[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time"]:
        """Loss per token.

        Args:
            divergence: of student and teacher over the vocabulary (nats).
            logprobs: of the tokens, under the student; None: not asked for, or the student wrote them itself.
        """


@dataclass(frozen=True)
class Distillation(TeacherLoss):
    """The divergence between teacher q and student p at each token, over the whole vocabulary.

        loss_t = D_t + nll_coef (-log p(token_t)),     p, q = softmax(logits / temperature) in D_t

        forward_kl   D = KL(q || p)      covers all that the teacher would say (Hinton et al., 2015)
        reverse_kl   D = KL(p || q)      keeps to what the teacher would say (Gu et al., 2023: MiniLLM)
        jsd          D = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p    (Agarwal et al., 2023)

    Args:
        divergence: see above. TRL's beta 0 is forward_kl, its beta 1 reverse_kl, and those between are jsd.
        beta: of jsd: the teacher's share in the mixture, above 0 and below 1; null: 0.5. Towards either end jsd goes to
            0, not to a KL: learning rates do not carry over.
        temperature: divides the logits of both. The gradient falls as 1 / temperature^2 or so; nothing makes up for it.
        nll_coef: weight of the likelihood of the tokens themselves, at temperature 1; of records, not of the student's
            own answers.
    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. arXiv:1503.02531
        Agarwal et al., On-Policy Distillation of Language Models (GKD), 2023. arXiv:2306.13649
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023. arXiv:2306.08543
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise UserError(f"divergence={self.divergence!r}: use forward_kl, reverse_kl or jsd")
        if self.beta is not None and self.divergence != "jsd":
            raise UserError(
                f"beta={self.beta} is of divergence jsd and has no effect with {self.divergence}: leave it out"
            )
        if self.beta is not None and not 0 < self.beta < 1:
            raise UserError(
                f"beta={self.beta} is the teacher's share in a mixture: give above 0 and below 1. TRL's beta 0 is "
                "divergence: forward_kl, its beta 1 reverse_kl"
            )
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature} divides logits: give a positive number, such as 1")
        if not self.nll_coef >= 0:
            raise UserError(f"nll_coef={self.nll_coef} would train towards the opposite: give 0 or more")

    @property
    def mixture(self) -> float:
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, 0.5 if self.beta is None else self.beta)

    @property
    def reads_logprobs(self) -> bool:
        return self.nll_coef > 0

    def __call__(self, divergence: Tensor, logprobs: Tensor | None) -> Tensor:
        return divergence if logprobs is None else divergence + self.nll_coef * token_nll(logprobs)
