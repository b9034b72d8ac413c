"""The only place that shifts by one: from hidden states to numbers about each token.

A causal model's hidden state at t - 1 predicts tokens[t]. Everything above this file speaks of index t as *about
tokens[t]*, so nothing else ever shifts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from rlhf_kernels import VocabShard, linear_exact_kl, linear_jsd, linear_token_logprobs
from rlhf_kernels.linear_rows import plain
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.kept import kept_logprobs


@dataclass(frozen=True)
class LMHead:
    """The last linear map of a language model, with what the family does to its logits."""

    weight: Float[Tensor, "vocab hidden"]
    """Rows are tokens; may be the (tied) input embedding."""
    bias: Float[Tensor, " vocab"] | None = None
    """Added to the logits before scale and cap, or None."""
    logit_scale: float = 1.0
    """Factor on the logits (Cohere: logit_scale; Granite: 1 / logits_scaling)."""
    softcap: float | None = None
    """Gemma 2: logits = softcap * tanh(logits / softcap)."""
    method: Literal["auto", "chunked", "fused"] = "auto"
    """How log-probabilities of tokens are taken; see `rlhf_kernels.linear_token_logprobs`."""
    shard: VocabShard | None = None
    """Weight and bias are this process's rows, others have the rest; None: they are whole."""


@dataclass(frozen=True)
class TokenScores:
    """What a language model says about each token of a batch; 0 where `mask` was False."""

    logprobs: Float[Tensor, "batch time"]
    """Log-probability of tokens[t] given the tokens before it (nats)."""
    entropy: Float[Tensor, "batch time"] | None
    """Entropy of the distribution that tokens[t] was drawn from (nats), if asked for."""
    is_argmax: Bool[Tensor, "batch time"]
    """Whether tokens[t] was the most probable token."""
    kept_mass: Float[Tensor, "batch time"] | None = None
    """Probability of the set that tokens[t] was drawn from, before renormalising; None = the whole vocabulary."""


def log_collision(
    logprobs: Float[Tensor, "batch time"], sharper: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """log sum_v p(v)^2 where a token was predicted, from what is said of the token alone.

        2 log p(y) - log p_{1/2}(y) = log sum_v exp(2 x_v) - 2 log sum_v exp(x_v)

    where p_{1/2} is p at half the temperature: the token's own logit falls out.

    Args:
        logprobs: of any token under p.
        sharper: of the same token at half the temperature.
    """
    return 2 * logprobs - sharper


def about_tokens(per_position: Float[Tensor, "batch time *rest"]) -> Float[Tensor, "batch time *rest"]:
    """Move what is said *at* position t - 1 to index t, the token it is about; nothing is about index 0: it is 0."""
    return torch.cat((torch.zeros_like(per_position[:, :1]), per_position[:, :-1]), dim=1)


def token_scores(
    hidden: Float[Tensor, "batch time hidden"],
    tokens: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    head: LMHead,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    kept: UInt8[Tensor, "batch time bytes"] | None = None,
) -> TokenScores:
    """Log-probability (and entropy) of every token that counts, without storing logits.

        logprobs[t] = log softmax(head(hidden[t - 1]) / temperature)[tokens[t]]

    Args:
        mask: True = wanted. Index 0 has no predictor: it is never scored, whatever the mask says.
        temperature: the one the tokens were sampled at, so that ratios of the two are exact.
        kept: the part of the vocabulary that each token was drawn from (see `core.kept`): the softmax is over it alone.
            None: over everything.
    """
    if tokens.shape[1] < 2:  # one token a row: nothing has a predictor, but the graph stays whole
        zero = 0.0 * hidden.sum(-1).float()
        if head.shard is not None:  # copies wait for each other's gradient in the head
            zero = zero + sum(0.0 * part.sum() for part in (head.weight, head.bias) if part is not None)
        return TokenScores(zero, zero if with_entropy else None, torch.zeros_like(mask))
    scored = mask.clone()
    scored[:, 0] = False
    if kept is not None:
        return _kept_scores(hidden, tokens, scored, head, kept, temperature, with_entropy)
    result = linear_token_logprobs(
        hidden[:, :-1],
        head.weight,
        tokens[:, 1:],
        bias=head.bias,
        mask=scored[:, 1:],
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        with_entropy=with_entropy,
        method=head.method,
        shard=head.shard,
    )
    first = torch.zeros_like(result.logprobs[:, :1])
    return TokenScores(
        logprobs=torch.cat((first, result.logprobs), dim=1),
        entropy=None if result.entropy is None else torch.cat((first, result.entropy), dim=1),
        is_argmax=torch.cat((first.bool(), result.is_argmax), dim=1) & scored,
    )


def _kept_scores(
    hidden: Tensor,
    tokens: Tensor,
    scored: Tensor,
    head: LMHead,
    kept: Tensor,
    temperature: float,
    with_entropy: bool,
) -> TokenScores:
    if head.shard is not None:
        raise UserError(
            "tokens that were drawn from a part of the vocabulary (generation.top_p, top_k, min_p) need all of it on "
            "every process: set renormalise_truncated: false, generate without them, or use tensor_parallel_size: 1"
        )
    predictors = scored.roll(-1, dims=1)  # index 0 is never scored, so nothing wraps around
    logprobs, entropy, mass, is_argmax = kept_logprobs(
        hidden[predictors],
        head.weight,
        tokens[scored],
        kept[scored],
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )
    blank = torch.zeros(tokens.shape, dtype=torch.float32, device=hidden.device)
    return TokenScores(
        logprobs=blank.masked_scatter(scored, logprobs),
        entropy=blank.masked_scatter(scored, entropy) if with_entropy else None,
        is_argmax=torch.zeros_like(scored).masked_scatter(scored, is_argmax),
        kept_mass=blank.masked_scatter(scored, mass),
    )


def token_kl(
    hidden: Float[Tensor, "batch time hidden"],
    ref_hidden: Float[Tensor, "batch time ref_hidden"],
    mask: Bool[Tensor, "batch time"],
    head: LMHead,
    ref_head: LMHead,
    *,
    direction: Literal["reverse", "forward"] = "reverse",
) -> Float[Tensor, "batch time"]:
    """KL divergence, over the whole vocabulary, between what policy and reference expected at each token; exact.

        reverse  KL(policy || reference)        forward  KL(reference || policy)

    Args:
        mask: True = wanted. Index 0 has no predictor: it is 0, whatever the mask says.
        direction: see above. The gradient goes to the policy alone.
    Raises:
        UserError: as `token_divergence`.
    """
    return token_divergence(hidden, ref_hidden, mask, head, ref_head, mixture=1.0 if direction == "reverse" else 0.0)


def token_divergence(
    hidden: Float[Tensor, "batch time hidden"],
    ref_hidden: Float[Tensor, "batch time ref_hidden"],
    mask: Bool[Tensor, "batch time"],
    head: LMHead,
    ref_head: LMHead,
    *,
    mixture: float,
    temperature: float = 1.0,
) -> Float[Tensor, "batch time"]:
    """How far apart what policy p and reference q expected at each token is, over the vocabulary; exact.

        mixture 0          KL(q || p), the forward KL
        mixture 1          KL(p || q), the reverse KL
        0 < mixture < 1    mixture KL(q || m) + (1 - mixture) KL(p || m),   m = mixture q + (1 - mixture) p

    Of heads with different numbers of rows both distributions are taken over the rows that both have.

    Args:
        mask: True = wanted. Index 0 has no predictor: it is 0, whatever the mask says.
        mixture: the reference's share. The gradient goes to the policy alone.
        temperature: divides both logits.
    Raises:
        UserError: a head caps its logits, which the operations do not know, or is cut over processes.
    """
    if head.softcap is not None or ref_head.softcap is not None:
        raise UserError(
            "an exact KL over the vocabulary is not available for models that cap their logits "
            f"(final_logit_softcapping={head.softcap or ref_head.softcap}): use another loss than TDPO or Distillation"
        )
    if head.shard is not None or ref_head.shard is not None:
        raise UserError(
            "an exact KL over the vocabulary needs all of it on every process: use another loss than TDPO or "
            "Distillation, or tensor_parallel_size: 1"
        )
    if mask.shape[1] < 2:  # one token a row: nothing has a predictor, but the graph stays whole
        return 0.0 * hidden.sum(-1).float()
    scored = mask.clone()
    scored[:, 0] = False
    shared = min(head.weight.shape[0], ref_head.weight.shape[0])
    weight, bias = _rows_of(head, shared)
    ref_weight, ref_bias = _rows_of(ref_head, shared)
    states = hidden[:, :-1] * head.logit_scale, weight, ref_hidden[:, :-1] * ref_head.logit_scale, ref_weight
    wanted = scored[:, 1:].contiguous()
    if 0 < mixture < 1:
        apart = linear_jsd(*states, bias=bias, ref_bias=ref_bias, mask=wanted, temperature=temperature, beta=mixture)
    else:
        apart = linear_exact_kl(
            *states,
            bias=bias,
            ref_bias=ref_bias,
            mask=wanted,
            temperature=temperature,
            direction="reverse" if mixture else "forward",
        )
    return torch.cat((torch.zeros_like(apart[:, :1]), apart), dim=1)


def _rows_of(head: LMHead, rows: int) -> tuple[Tensor, Tensor | None]:
    """The first so many rows of a head, and its bias with the scale of the logits."""
    bias = None if head.bias is None else head.bias * head.logit_scale
    if rows == head.weight.shape[0]:
        return head.weight, bias
    return plain(head.weight)[:rows], None if bias is None else plain(bias)[:rows]
