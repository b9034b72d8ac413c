"""The loss of supervised fine-tuning."""

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
