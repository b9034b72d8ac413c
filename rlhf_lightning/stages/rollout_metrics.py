"""What the answers of a rollout looked like, in numbers."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from rlhf_lightning.core.batches import Generated, Rollouts
from rlhf_lightning.rewards.combine import ScoredSamples

NOTHING_MORE: Mapping[str, Tensor] = MappingProxyType({})


def answer_metrics(
    answers: Generated | Rollouts,
    scored: ScoredSamples,
    add_over_ranks: Callable[[Tensor], Tensor],
    per_sequence: Mapping[str, Tensor] = NOTHING_MORE,
    per_token: Mapping[str, Tensor] = NOTHING_MORE,
) -> dict[str, float]:
    """What the answers of a rollout looked like, over sequences and tokens of all ranks; padding counts nowhere.

    Where nothing was scored, nothing is said of scores.

    Args:
        add_over_ranks: the sum of a vector over all that sample.
        per_sequence: further numbers [batch], by the names of their metrics.
        per_token: the same [batch, time].
    """
    mask, valid = answers.mask, scored.counts.to(answers.mask.device)
    lengths = mask.sum(-1)
    scores = scored.total
    of_scores = {"rollout/score": scores, "rollout/score_square": scores.square()} if scored.breakdown else {}
    per_sequence = {
        **of_scores,
        "rollout/length": lengths,
        "rollout/finished_frac": answers.finished,
        **{f"reward/{name}": values for name, values in (scored.breakdown | scored.parts).items()},
        **per_sequence,
    }
    sums = [float(torch.where(valid, v.to(valid.device), 0).sum()) for v in per_sequence.values()]
    sums += [float(torch.where(mask, v, 0.0).sum()) for v in per_token.values()]
    vector = torch.tensor([*sums, len(valid), int(valid.sum()), int(lengths.sum())], dtype=torch.float64)
    *totals, sampled, sequences, tokens = add_over_ranks(vector).tolist()
    means = {name: total / max(sequences, 1) for name, total in zip(per_sequence, totals, strict=False)}
    for name, total in zip(per_token, totals[len(per_sequence) :], strict=True):
        means[name] = total / max(tokens, 1)
    if of_scores:
        variance = means.pop("rollout/score_square") - means["rollout/score"] ** 2
        means["rollout/score_std"] = max(variance, 0.0) ** 0.5
    return means | {
        "rollout/sequences": sequences,
        "rollout/tokens": tokens,
        "rollout/valid_frac": sequences / max(sampled, 1),
    }
