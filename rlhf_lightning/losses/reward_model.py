"""Losses of a reward model: from the scores of completions to one number per pair, ranking, rating or step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.batches import Batch, PairBatch, RankedBatch, RatedBatch, StepBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import BatchFormat, RewardLoss, RewardLossOutput

Comparisons = Literal["pairs", "listwise"]


def bradley_terry(
    chosen_scores: Float[Tensor, "*pairs"],
    rejected_scores: Float[Tensor, "*pairs"],
    *,
    margins: Float[Tensor, "*pairs"] | None = None,
    label_smoothing: float = 0.0,
    centring_coef: float = 0.0,
) -> Float[Tensor, "*pairs"]:
    """Negative log-likelihood that chosen beats rejected, per pair.

        d    = chosen - rejected - margin
        loss = -(1 - e) log sigma(d) - e log sigma(-d) + c (chosen + rejected)^2

    Args:
        margins: by how much chosen should win.
        label_smoothing: e, the share of labels believed to be wrong.
        centring_coef: c, the pull of the scores towards mean 0, which preferences alone leave open.
    References:
        Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952.
        Touvron et al., Llama 2 (margin), 2023. arXiv:2307.09288
        Eisenstein et al., Helping or Herding? (centring), 2023. arXiv:2312.09244
    """
    difference = chosen_scores - rejected_scores
    if margins is not None:
        difference = difference - margins
    loss = -F.logsigmoid(difference)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-difference)
    if centring_coef:
        loss = loss + centring_coef * (chosen_scores + rejected_scores).square()
    return loss


def plackett_luce(
    scores: Float[Tensor, " completions"],
    groups: Int[Tensor, " completions"],
    ranks: Float[Tensor, " completions"],
    *,
    comparisons: Comparisons = "pairs",
    label_smoothing: float = 0.0,
    centring_coef: float = 0.0,
) -> Float[Tensor, " prompts"]:
    """Negative log-likelihood of the ranking of each prompt's K completions, per prompt.

        pairs     mean over the pairs (w, l) with rank_w < rank_l of bradley_terry(s_w, s_l)
        listwise  -sum_i log(exp s_i / (exp s_i + sum_{j: rank_j > rank_i} exp s_j))

    `pairs` is InstructGPT's loss: the K(K - 1)/2 pairs of a prompt are one element, so that a prompt with many answers
    does not weigh more. `listwise` is the Plackett-Luce likelihood: best of all, then best of the rest, and so on. For
    K = 2 both are `bradley_terry`. Equal ranks are not compared; a prompt whose ranks are all equal has loss 0.

    Args:
        groups: index of the prompt that each completion answers.
        ranks: rank within the prompt, 1 = best.
        label_smoothing: share of pairs believed to be the wrong way round; `pairs` only.
        centring_coef: pull of the scores towards mean 0: c times the mean of (s_w + s_l)^2 over the pairs.
    References:
        Ouyang et al., Training language models to follow instructions with human feedback, 2022. arXiv:2203.02155
        Plackett, The Analysis of Permutations, 1975.
    """
    ranked = _by_prompt(scores, groups, ranks)
    winners, losers = ranked.scores.unsqueeze(2), ranked.scores.unsqueeze(1)  # [prompts, K, 1], [prompts, 1, K]
    if comparisons == "pairs":
        winners, losers = winners.expand_as(ranked.beats), losers.expand_as(ranked.beats)
        per_pair = bradley_terry(winners, losers, label_smoothing=label_smoothing, centring_coef=centring_coef)
        return _mean_over_pairs(per_pair, ranked.beats)
    itself = torch.eye(ranked.beats.shape[-1], dtype=torch.bool, device=scores.device)
    beaten = torch.where(ranked.beats | itself, losers, -torch.inf).logsumexp(-1)  # [prompts, K]
    loss = (beaten - ranked.scores).sum(-1)
    if centring_coef:
        loss = loss + centring_coef * _mean_over_pairs((winners + losers).square(), ranked.beats)
    return loss


def regression(
    scores: Float[Tensor, " completions"],
    ratings: Float[Tensor, " completions"],
    *,
    huber_delta: float | None = None,
) -> Float[Tensor, " completions"]:
    """Squared error of the score, per completion; linear beyond `huber_delta` if given.

        e    = score - rating
        loss = e^2 where |e| <= delta, else delta (2 |e| - delta)

    References:
        Huber, Robust Estimation of a Location Parameter, 1964.
    """
    if huber_delta is None:
        return (scores - ratings).square()
    # torch's Huber loss is half of ours: ours must not change inside the bound when the bound is set
    return 2 * F.huber_loss(scores, ratings, reduction="none", delta=huber_delta)


def step_correctness(
    scores: Float[Tensor, "*steps"], labels: Float[Tensor, "*steps"], *, wrong_weight: float = 1.0
) -> Float[Tensor, "*steps"]:
    """Negative log-likelihood of a step's label, the score being the log-odds that the step is right.

        loss = -y log sigma(score) - w (1 - y) log sigma(-score)

    With w = 1 and labels 0 and 1 it is the cross-entropy of two classes whose logits are `score` apart, which is how
    TRL and Qwen's process reward models write it.

    Args:
        labels: y, from 0 (wrong) to 1 (right); in between: the share of continuations from here that came out right.
        wrong_weight: w, what a wrong step weighs where most are right.
    References:
        Lightman et al., Let's Verify Step by Step, 2023. arXiv:2305.20050
        Wang et al., Math-Shepherd (labels from continuations), 2023. arXiv:2312.08935
    """
    return -labels * F.logsigmoid(scores) - wrong_weight * (1 - labels) * F.logsigmoid(-scores)


@dataclass(frozen=True)
class BradleyTerry(RewardLoss):
    """Reward-model loss on pairs: the log-likelihood that the chosen answer wins.

    Args:
        label_smoothing: share of labels believed to be wrong, from 0 to below 0.5.
        centring_coef: weight of (chosen + rejected)^2, which keeps scores near mean 0 (0.01 is usual).
        margin_coef: factor on the records' `margin` column, where there is one; 0 ignores it.
    """

    batch_format: ClassVar[BatchFormat] = "pairs"
    denominator: ClassVar[str] = "pairs"

    label_smoothing: float = 0.0
    centring_coef: float = 0.0
    margin_coef: float = 1.0

    def __post_init__(self) -> None:
        _check_coefficients(self.label_smoothing, self.centring_coef)
        if not self.margin_coef >= 0:
            raise UserError(f"margin_coef={self.margin_coef} would ask the rejected answer to win: give 0 or more")

    def __call__(self, scores: Float[Tensor, " completions"], batch: Batch) -> RewardLossOutput:
        assert isinstance(batch, PairBatch)
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry(
            chosen,
            rejected,
            margins=None if batch.margins is None else self.margin_coef * batch.margins,
            label_smoothing=self.label_smoothing,
            centring_coef=self.centring_coef,
        )
        margin = (chosen - rejected).detach()
        return RewardLossOutput(per_element=loss, accuracy=_right(margin), margin=margin)


@dataclass(frozen=True)
class PlackettLuce(RewardLoss):
    """Reward-model loss on rankings of K >= 2 answers to the same prompt; K may differ between prompts.

    Args:
        comparisons: `pairs` (InstructGPT: all pairs of a prompt, averaged) or `listwise` (the Plackett-Luce likelihood
            of the whole order: best of all, best of the rest, ...).
        label_smoothing: share of pairs believed to be the wrong way round, from 0 to below 0.5; for `pairs`.
        centring_coef: weight of the mean of (better + worse)^2, which keeps scores near mean 0 (0.01 is usual).
    """

    batch_format: ClassVar[BatchFormat] = "ranked"
    denominator: ClassVar[str] = "prompts"

    comparisons: Comparisons = "pairs"
    label_smoothing: float = 0.0
    centring_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_coefficients(self.label_smoothing, self.centring_coef)
        if self.comparisons not in ("pairs", "listwise"):
            raise UserError(f"comparisons={self.comparisons!r} is unknown: use pairs or listwise")
        if self.comparisons == "listwise" and self.label_smoothing:
            raise UserError(
                f"label_smoothing={self.label_smoothing} does nothing with comparisons=listwise: "
                "set it to 0, or use comparisons=pairs"
            )

    def __call__(self, scores: Float[Tensor, " completions"], batch: Batch) -> RewardLossOutput:
        assert isinstance(batch, RankedBatch)
        loss = plackett_luce(
            scores,
            batch.groups,
            batch.ranks,
            comparisons=self.comparisons,
            label_smoothing=self.label_smoothing,
            centring_coef=self.centring_coef,
        )
        accuracy, margin = compare(scores.detach(), batch.groups, batch.ranks)
        return RewardLossOutput(per_element=loss, accuracy=accuracy, margin=margin)


@dataclass(frozen=True)
class Regression(RewardLoss):
    """Reward-model loss on absolute ratings: squared error.

    Its accuracy and margin compare each answer to the others of the batch.

    Args:
        huber_delta: error beyond which the loss grows linearly, so that outliers pull less; null = squared everywhere.
    """

    batch_format: ClassVar[BatchFormat] = "rated"
    denominator: ClassVar[str] = "sequences"

    huber_delta: float | None = None

    def __post_init__(self) -> None:
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise UserError(f"huber_delta={self.huber_delta} is no distance: give a positive number, or null")

    def __call__(self, scores: Float[Tensor, " completions"], batch: Batch) -> RewardLossOutput:
        assert isinstance(batch, RatedBatch)
        order = (batch.ratings.unsqueeze(1) - batch.ratings.unsqueeze(0)).sign()  # [completions, completions]
        margin = (scores.unsqueeze(1) - scores.unsqueeze(0)).detach() * order
        compared = (order != 0).unsqueeze(1)
        return RewardLossOutput(
            per_element=regression(scores, batch.ratings, huber_delta=self.huber_delta),
            accuracy=_mean_over_pairs(_right(margin).unsqueeze(1), compared, otherwise=0.5),
            margin=_mean_over_pairs(margin.unsqueeze(1), compared),
        )


@dataclass(frozen=True)
class StepCorrectness(RewardLoss):
    """Process reward model's loss: each step of a solution is right or wrong, and its score is the log-odds that it is.

    Read with `pooling: steps`. Steps whose label is null are read and not judged.

    Args:
        wrong_weight: what a wrong step weighs beside a right one.
    """

    batch_format: ClassVar[BatchFormat] = "steps"
    denominator: ClassVar[str] = "steps"

    wrong_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.wrong_weight < torch.inf:
            raise UserError(f"wrong_weight={self.wrong_weight} would not teach what is wrong: give a positive number")

    def __call__(self, scores: Float[Tensor, "batch time"], batch: Batch) -> RewardLossOutput:
        assert isinstance(batch, StepBatch)
        loss = step_correctness(scores, batch.step_labels, wrong_weight=self.wrong_weight)
        # a label of 1/2 takes neither side
        margin = scores.detach() * (2 * batch.step_labels - 1)
        ends = batch.completions.mask
        return RewardLossOutput(*(torch.where(ends, x, 0.0) for x in (loss, _right(margin), margin)))


def compare(
    scores: Float[Tensor, " completions"],
    groups: Int[Tensor, " completions"],
    ranks: Float[Tensor, " completions"],
) -> tuple[Float[Tensor, " prompts"], Float[Tensor, " prompts"]]:
    """How well scores order each prompt's completions.

    Returns:
        Share of the prompt's comparisons that the scores get right, ties counting half (1/2 where nothing is compared),
        and the mean difference of score between better and worse.
    """
    ranked = _by_prompt(scores, groups, ranks)
    margin = ranked.scores.unsqueeze(2) - ranked.scores.unsqueeze(1)
    return (
        _mean_over_pairs(_right(margin), ranked.beats, otherwise=0.5),
        _mean_over_pairs(margin, ranked.beats),
    )


@dataclass(frozen=True)
class _Ranked:
    """Completions regrouped into one row per prompt, padded to the longest."""

    scores: Float[Tensor, "prompts K"]
    """0 on padding."""
    beats: Bool[Tensor, "prompts K K"]
    """[p, i, j]: completion i of prompt p is ranked better than j. Never true of padding or of ties."""


def _by_prompt(
    scores: Float[Tensor, " completions"],
    groups: Int[Tensor, " completions"],
    ranks: Float[Tensor, " completions"],
) -> _Ranked:
    order = torch.argsort(groups, stable=True)
    row = groups[order]
    sizes = torch.bincount(row)
    column = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    shape = (len(sizes), int(sizes.max()))
    padded_scores = scores.new_zeros(shape).index_put((row, column), scores[order])
    # NaN compares as false with everything: padding beats nobody and nobody beats it
    padded_ranks = ranks.new_full(shape, torch.nan).index_put((row, column), ranks[order])
    return _Ranked(scores=padded_scores, beats=padded_ranks.unsqueeze(2) < padded_ranks.unsqueeze(1))


def _mean_over_pairs(
    x: Float[Tensor, "rows K1 K2"], compared: Bool[Tensor, "rows K1 K2"], otherwise: float = 0.0
) -> Float[Tensor, " rows"]:
    """Mean of each row's entries that are compared; `otherwise` where none is."""
    count = compared.sum((1, 2))
    mean = torch.where(compared, x, 0.0).sum((1, 2)) / count.clamp(min=1)
    return torch.where(count > 0, mean, otherwise)


def _right(margin: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where the better answer scores higher, 1/2 where the scores tie, else 0."""
    return 0.5 * (margin.sign() + 1)


def _check_coefficients(label_smoothing: float, centring_coef: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing={label_smoothing} says that at least half of the labels are wrong: give 0 to below 0.5"
        )
    if not centring_coef >= 0:
        raise UserError(f"centring_coef={centring_coef} would push scores away from 0: give 0 or more")
