"""Generalised Jensen-Shannon divergence per token from the hidden states of two models, over the full vocabulary.

Plain torch on every device: there is no Triton kernel for it yet. Chunks, matrix products and memory are those of
`linear_exact_kl`.
"""

from torch import Tensor

from rlhf_kernels.checks import check_number
from rlhf_kernels.linear_exact_kl import of_two_heads


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    chunk_rows: int | None = None,
) -> Tensor:
    """How far policy p and reference q are from their mixture m, a chunk of rows at a time.

        beta KL(q || m) + (1 - beta) KL(p || m),     m = beta q + (1 - beta) p

    with p = softmax((hidden @ weight.T + bias) / temperature), q of the reference likewise. At beta = 1/2 it is the
    Jensen-Shannon divergence, at most log 2. Towards 0 and 1 it goes to 0, as beta KL(q || p) and
    (1 - beta) KL(p || q): the KL divergences themselves are `linear_exact_kl`.

    Gradients to hidden, weight and bias; the logits are computed again for them.

    Args:
        beta: weight of the reference in the mixture, above 0 and below 1.
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, temperature, chunk_rows: as of `linear_exact_kl`.
    Returns:
        [...] in float32 (float64 where the hidden states are).
    References:
        Agarwal et al., On-Policy Distillation of Language Models, 2023. arXiv:2306.13649
    """
    check_number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must be above 0 and below 1; the KL divergences are linear_exact_kl")
    policy, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    return of_two_heads(*policy, *reference, mask, temperature, float(beta), chunk_rows)
