"""From batches to what a preference loss reads: completions scored by policy and reference, pairs in one pass."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.core.batches import PairBatch, TokenBatch, concatenate_rows
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, Need, PairScores
from rlhf_lightning.core.logprobs import log_collision, token_kl
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
    """The reference's, if it is a model."""


def measure(
    policy: Policy, reference: AnyReference | None, rows: TokenBatch, needs: Set[Need], *, share_prompts: bool = False
) -> Measured:
    """Scores of completions under policy (with gradient, where it is on) and reference (without).

    Args:
        reference: None: there is none, and nothing is said of it.
        rows: `mask` is True on the completions.
        needs: what the loss reads.
        share_prompts: rows i and i + rows/2 begin with the same prompt, which is computed once.
    """
    mask = rows.mask.clone()
    mask[:, 0] = False  # nothing predicts the first token
    hidden = (
        policy.shared_prompt_states(rows.tokens, rows.attention_mask, rows.positions, rows.mask)
        if share_prompts
        else policy.hidden_states(rows.tokens, rows.attention_mask, rows.positions)
    )
    scores = CompletionScores(policy.scores(hidden, rows.tokens, mask).logprobs, mask)
    if "log_collision" in needs:
        scores = replace(scores, log_collision=_log_collision(policy, hidden.detach(), rows, scores))
    if reference is None:
        return Measured(scores, hidden, None)
    if isinstance(reference, MeasuredReference):
        if "ref_kl" in needs:
            raise UserError(
                "this loss reads the KL over the whole vocabulary, and reference_cache keeps the log-probabilities of "
                "the records' own tokens alone: leave reference_cache out"
            )
        return Measured(replace(scores, ref_logprobs=reference(rows).logprobs), hidden, None)
    ref_hidden = reference.shared_prompt_states(rows) if share_prompts else reference.hidden_states(rows)
    with torch.no_grad():
        ref_logprobs = reference.policy.scores(ref_hidden, rows.tokens, mask).logprobs
    scores = replace(scores, ref_logprobs=ref_logprobs)
    if "ref_kl" in needs:
        heads = policy.head(), reference.policy.head()
        scores = replace(scores, ref_kl=token_kl(hidden, ref_hidden, mask, *heads, direction="forward"))
    return Measured(scores, hidden, ref_hidden)


@torch.no_grad()
def _log_collision(policy: Policy, hidden: Tensor, rows: TokenBatch, scores: CompletionScores) -> Tensor:
    """log sum_v pi(v)^2 at every token that counts, without logits."""
    sharper = policy.scores(hidden, rows.tokens, scores.mask, temperature=0.5).logprobs
    return log_collision(scores.logprobs.detach(), sharper)


def measure_pairs(
    policy: Policy,
    reference: AnyReference | None,
    batch: PairBatch,
    needs: Set[Need],
    *,
    pad_id: int,
    running: Mapping[str, float | Tensor] | None = None,
    share_prompts: bool = False,
) -> tuple[PairScores, Measured]:
    """Chosen and rejected completions scored in one forward pass of each model; gold ones in another of the policy.

    Args:
        reference, needs, share_prompts: see `measure`.
        pad_id: written where one side is shorter than the other.
        running: the loss's running means.
    Returns:
        The pairs, and their two completions as they were measured: chosen ones first.
    """
    rows = concatenate_rows((batch.chosen, batch.rejected), pad_id=pad_id)
    measured = measure(policy, reference, rows, needs, share_prompts=share_prompts)
    chosen, rejected = halves(measured.scores)
    pairs = PairScores(chosen, rejected, batch.margins, running or {})
    if "gold" in needs:
        assert batch.gold is not None, "read for losses that need it"
        pairs = replace(pairs, gold=measure(policy, None, batch.gold, frozenset()).scores)
    return pairs, measured


def halves(scores: CompletionScores) -> tuple[CompletionScores, CompletionScores]:
    """The first and the second half of the rows."""
    parts: dict[str, Any] = {f.name: getattr(scores, f.name) for f in fields(scores)}
    first, second = ({k: None if x is None else x.chunk(2)[i] for k, x in parts.items()} for i in (0, 1))
    return CompletionScores(**first), CompletionScores(**second)
