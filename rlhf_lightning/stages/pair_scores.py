"""From batches to what a preference loss reads: completions scored by policy and reference, pairs in one pass."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.core.batches import PairBatch, TokenBatch, concatenate_rows
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores
from rlhf_lightning.core.logprobs import token_kl
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.reference import MeasuredReference, Reference

AnyReference = Reference | MeasuredReference


@dataclass(frozen=True)
class Measured:
    """Completions as both models see them."""

    scores: CompletionScores
    hidden: Tensor
    """The policy's hidden states [rows, time, hidden]."""
    ref_hidden: Tensor | None
    """The reference's, where they were computed."""


def measure(
    policy: Policy, reference: AnyReference | None, rows: TokenBatch, needs: Set[Need], *, ref_hidden: bool = False
) -> Measured:
    """Scores of completions under policy (with gradient, where it is on) and reference (without).

    Args:
        reference: None: there is none, and nothing is said of it.
        rows: `mask` is True on the completions.
        needs: what the loss reads.
        ref_hidden: also the reference's hidden states, if it is a model.
    """
    mask = rows.mask.clone()
    mask[:, 0] = False  # nothing predicts the first token
    hidden = policy.hidden_states(rows.tokens, rows.attention_mask, rows.positions)
    scores = CompletionScores(policy.scores(hidden, rows.tokens, mask).logprobs, mask)
    if "log_collision" in needs:
        scores = replace(scores, log_collision=_log_collision(policy, hidden.detach(), rows, scores))
    if reference is None:
        return Measured(scores, hidden, None)
    if not (isinstance(reference, Reference) and (ref_hidden or "ref_kl" in needs)):
        if "ref_kl" in needs:
            raise UserError(
                "this loss reads the KL over the whole vocabulary, and reference_cache keeps the log-probabilities of "
                "the records' own tokens alone: leave reference_cache out"
            )
        return Measured(replace(scores, ref_logprobs=reference(rows).logprobs), hidden, None)
    ref_states = reference.hidden_states(rows)
    ref_head = reference.policy.head()
    with torch.no_grad():
        ref_logprobs = reference.policy.scores(ref_states, rows.tokens, mask).logprobs
    scores = replace(scores, ref_logprobs=ref_logprobs)
    if "ref_kl" in needs:
        kl = token_kl(hidden, ref_states, mask, policy.head(), ref_head, direction="forward")
        scores = replace(scores, ref_kl=kl)
    return Measured(scores, hidden, ref_states)


@torch.no_grad()
def _log_collision(policy: Policy, hidden: Tensor, rows: TokenBatch, scores: CompletionScores) -> Tensor:
    """log sum_v pi(v)^2 at every token that counts, without logits.

        2 log pi(y) - log pi_{1/2}(y) = log sum_v exp(2 x_v) - 2 log sum_v exp(x_v)

    where pi_{1/2} is the policy at temperature 1/2: the token's own logit falls out.
    """
    sharper = policy.scores(hidden, rows.tokens, scores.mask, temperature=0.5).logprobs
    return 2 * scores.logprobs.detach() - sharper


def measure_pairs(
    policy: Policy,
    reference: AnyReference | None,
    batch: PairBatch,
    needs: Set[Need],
    *,
    pad_id: int,
    running: Mapping[str, float | Tensor] | None = None,
    ref_hidden: bool = False,
) -> tuple[PairScores, Measured]:
    """Chosen and rejected completions scored in one forward pass of each model.

    Args:
        reference, needs, ref_hidden: see `measure`.
        pad_id: written where one side is shorter than the other.
        running: the loss's running means.
    Returns:
        The pairs, and all their completions as they were measured: chosen ones first.
    """
    measured = measure(
        policy, reference, concatenate_rows((batch.chosen, batch.rejected), pad_id=pad_id), needs, ref_hidden=ref_hidden
    )
    chosen, rejected = halves(measured.scores)
    return PairScores(chosen, rejected, batch.margins, running or {}), measured


def halves(scores: CompletionScores) -> tuple[CompletionScores, CompletionScores]:
    """The first and the second half of the rows."""
    parts: dict[str, Any] = {f.name: getattr(scores, f.name) for f in fields(scores)}
    first, second = ({k: None if x is None else x.chunk(2)[i] for k, x in parts.items()} for i in (0, 1))
    return CompletionScores(**first), CompletionScores(**second)
