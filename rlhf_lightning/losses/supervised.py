"""The losses of supervised fine-tuning."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


def token_nll(logprobs: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """Negative log-likelihood, per token.

        loss_t = -log pi(tokens_t | tokens_<t)

    Args:
        logprobs: of the record's own tokens, under the model being trained (nats).
    Returns:
        Loss per token. Masking and averaging are the caller's: see `core.masked.reduce_tokens`.
    """
    return -logprobs


def dynamic_nll(logprobs: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """Negative log-likelihood, weighted by the probability that the token has already, per token.

        loss_t = -stop_gradient(p_t) log p_t,     p_t = pi(tokens_t | tokens_<t)

    The gradient is -p_t' in place of -p_t' / p_t: a token that the model finds improbable does not pull harder for it.

    Args:
        logprobs: as for `token_nll`.
    References:
        Wu et al., On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification (DFT),
        2025. arXiv:2508.05629
    """
    return logprobs.detach().exp() * token_nll(logprobs)


class TokenLoss(ABC):
    """What the trained tokens of records are learnt by: a `SupervisedLoss`, or a `TeacherLoss`."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


class SupervisedLoss(TokenLoss):
    """The loss of supervised fine-tuning, per token, from log-probabilities."""

    @abstractmethod
    def __call__(self, logprobs: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]: ...


@dataclass(frozen=True)
class NLL(SupervisedLoss):
    """The negative log-likelihood: `token_nll`."""

    def __call__(self, logprobs: Tensor) -> Tensor:
        return token_nll(logprobs)


@dataclass(frozen=True)
class DFT(SupervisedLoss):
    """Dynamic fine-tuning, Wu et al., 2025: `dynamic_nll`. TRL: `loss_type="dft"`, the same."""

    def __call__(self, logprobs: Tensor) -> Tensor:
        return dynamic_nll(logprobs)
