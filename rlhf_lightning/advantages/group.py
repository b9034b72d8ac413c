"""Credit without a critic: one number per answer, judged against the other answers to the same prompt.

An answer that is alone in its group has nothing to be compared with and gets 0, and so does a group of equal scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_lightning.advantages.answers import Answers, OutcomeCredit, check_ddof

# configs that runs have saved name these here
from rlhf_lightning.advantages.per_token import BatchNormalised, CentredBatchNormalised, ReMax  # noqa: F401
from rlhf_lightning.core.errors import UserError


@dataclass(frozen=True)
class GroupNormalised(OutcomeCredit):
    """GRPO: how many standard deviations an answer is better than its group.

        A_i = (r_i - mean_group(r)) / (std(r) + floor),     std over the group, or over all answers of all ranks

    A group of equal scores gets exactly 0. Dropping such groups changes no other advantage with `std_over` group; the
    loss then has fewer tokens to be divided by.

    verl: floor 1e-6, and a group of one keeps its raw score as advantage; here it gets 0. TRL: floor 1e-4;
    `scale_rewards` group, batch, none = `std_over` group, batch, and `Centred`.

    Args:
        ddof: 1 divides the squares by n - 1 (the sample standard deviation, as verl and TRL do), 0 by n (the paper's
            formula read literally).
        floor: added to the standard deviation, outside of the root.
        std_over: group, or batch: one scale for all prompts, so that nearly unanimous groups are not blown up.
    References:
        Shao et al., DeepSeekMath, 2024, sec. 4.1.2. arXiv:2402.03300
        Liu et al., Part I: Tricks or Traps? (std over the batch), 2025. arXiv:2508.08221
    """

    needs_groups: ClassVar[bool] = True

    ddof: int = 1
    floor: float = 1e-6
    std_over: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        _check_normaliser(self.ddof, self.floor)

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        centred = answers.scores - answers.group_mean(answers.scores)
        if self.std_over == "batch":
            return centred / (answers.batch_mean_std(answers.scores, self.ddof)[1] + self.floor)
        return centred / (answers.group_std(answers.scores, self.ddof) + self.floor)


@dataclass(frozen=True)
class Centred(OutcomeCredit):
    """Dr.GRPO: how much better an answer is than the mean of its group.

        A_i = r_i - mean_group(r)

    Not divided by the standard deviation, which would weigh very easy and very hard prompts more. Dr.GRPO pairs it with
    the reduction `fixed_length`. Up to the factor (G - 1) / G this is `LeaveOneOut`.

    References:
        Liu et al., Understanding R1-Zero-Like Training, 2025, eq. 3. arXiv:2503.20783
    """

    needs_groups: ClassVar[bool] = True

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        return answers.scores - answers.group_mean(answers.scores)


@dataclass(frozen=True)
class BatchCentred(OutcomeCredit):
    """FlashREINFORCE: how much better an answer is than the mean of all answers of the rollout, all ranks together.

        A_i = r_i - mean_batch(r)

    Needs no groups: one answer per prompt will do. The mean holds the answer itself, so that the gradient is that of an
    independent baseline times (n - 1) / n, n the answers of the rollout. Easy prompts are pushed up as a whole.

    References:
        Williams, 1992 (reinforcement comparison). OpenRLHF, FlashREINFORCE, 2026.
    """

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        return answers.scores - answers.batch_mean_std(answers.scores, 0)[0]


@dataclass(frozen=True)
class LeaveOneOut(OutcomeCredit):
    """RLOO: how much better an answer is than the mean of the others in its group.

        A_i = r_i - mean_{j != i}(r_j) = G / (G - 1) (r_i - mean_group(r))

    The baseline does not depend on the answer, so the gradient is unbiased. A group of one gets 0 (verl: its raw score,
    or 0 in its vectorised form).

    References:
        Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization, 2024, eq. 8. arXiv:2402.14740
        Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019.
    """

    needs_groups: ClassVar[bool] = True

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        sizes = answers.sizes
        return (answers.scores - answers.group_mean(answers.scores)) * sizes / (sizes - 1).clamp(min=1)


@dataclass(frozen=True)
class Opo(OutcomeCredit):
    """OPO: how much better an answer is than the length-weighted mean of its group.

        A_i = r_i - sum_group(length r) / sum_group(length)

    The baseline of least variance when the squared gradient of an answer grows with its length.

    References:
        Hao et al., On-Policy RL with Optimal Reward Baseline, 2025, eq. 8. arXiv:2505.23585
    """

    needs_groups: ClassVar[bool] = True

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        lengths = answers.lengths.to(answers.scores)
        weight = answers.group_sum(lengths)
        return answers.scores - answers.group_sum(lengths * answers.scores) / weight.clamp(min=1)


@dataclass(frozen=True)
class Gpg(OutcomeCredit):
    """GPG: the centred score, scaled up to make good for groups that give no gradient.

        A_i = alpha (r_i - mean_group(r)) [/ std_group(r)],     alpha = answers / answers that give a gradient

    Both counts over all ranks. Goes with the loss `Reinforce`.

    Args:
        divide_by_std: the paper's F_norm: 1, or the group's standard deviation (divided by n - 1).
        informative: which answers alpha divides by: those of groups whose scores differ, as in the paper, or those
            whose own score is not 0, as verl has it: with scores of 0 and 1 that leaves out the wrong answers of mixed
            groups, and counts groups that are right throughout.
    References:
        Chu et al., GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning, 2025.
        arXiv:2504.02546
    """

    needs_groups: ClassVar[bool] = True

    divide_by_std: bool = False
    informative: Literal["group_differs", "score_not_zero"] = "group_differs"

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        counted = answers.informative if self.informative == "group_differs" else answers.scores != 0
        informative = counted.to(answers.scores)
        counts = torch.stack((torch.ones_like(informative).sum(), informative.sum()))
        total, useful = answers.add_over_ranks(counts).unbind()
        centred = answers.scores - answers.group_mean(answers.scores)
        if self.divide_by_std:
            std = answers.group_std(answers.scores, 1)
            centred = torch.where(std > 0, centred / torch.where(std > 0, std, 1.0), 0.0)
        return centred * total / useful.clamp(min=1)


@dataclass(frozen=True)
class MaxRl(OutcomeCredit):
    """MaxRL: the centred score in units of the group's mean, which approaches maximum likelihood of success.

        A_i = (r_i - mean_group(r)) / mean_group(r),     0 where the mean is not positive

    For scores of 0 and 1 the gradient is that of the likelihood's expansion up to order G: a prompt solved with
    probability p weighs about 1 / p.

    References:
        Maximum Likelihood Reinforcement Learning, 2026. arXiv:2602.02710
    """

    needs_groups: ClassVar[bool] = True

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        mean = answers.group_mean(answers.scores)
        positive = mean > 0
        return torch.where(positive, (answers.scores - mean) / torch.where(positive, mean, 1.0), 0.0)


@dataclass(frozen=True)
class PassAtK(OutcomeCredit):
    """Pass@k training: credit for being in a subset of k answers of which at least one succeeds, in closed form.

        p      = 1 - C(G - c, k) / C(G, k)                   pass@k of a group with c successes
        A_good = (1 - p) / sqrt(p (1 - p))
        A_bad  = (1 - p - C(G - c - 1, k - 1) / C(G - 1, k - 1)) / sqrt(p (1 - p))

    This is the mean advantage of an answer over all subsets that hold it. Groups with p = 0 or 1 get 0; k = 1 is
    `GroupNormalised` with ddof 0. Groups that have become smaller than k are treated as pass@G. Keep KL in the loss:
    in the reward it would count as part of the score. `BestOfGroup` is another way to the same end.

    Args:
        k: size of the subsets.
        success_above: an answer succeeds if its score is greater.
    References:
        Chen et al., Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models,
        2025, sec. 2.4. arXiv:2508.10751
    """

    needs_groups: ClassVar[bool] = True

    k: int = 4
    success_above: float = 0.5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k={self.k}: pass@k needs at least 1 answer; give 2 or more, up to the group's size")

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        sizes = answers.sizes
        if sizes.numel() and int(sizes.max()) < self.k:
            raise UserError(
                f"k={self.k} of PassAtK, but the largest group has {int(sizes.max())} answers: raise "
                f"generation.num_samples to {self.k} or more, or lower k"
            )
        k = sizes.clamp(max=self.k)
        good = (answers.scores > self.success_above).to(sizes)
        bad_in_group = sizes - answers.group_sum(good)
        passes = 1 - _ratio_of_choices(bad_in_group, sizes, k)
        others_fail = _ratio_of_choices(bad_in_group - 1, sizes - 1, k - 1)
        spread = (passes * (1 - passes)).sqrt()
        credit = (1 - passes) - torch.where(good > 0, 0.0, others_fail)
        return torch.where(spread > 0, credit / torch.where(spread > 0, spread, 1.0), 0.0)


@dataclass(frozen=True)
class BestOfGroup(OutcomeCredit):
    """Credit for the best of a group being better than it would have been without this answer.

        A_i = max_group(r) - max_{j != i} r_j [/ (std_group(r) + floor)]

    So the best answer gets its lead over the second best, and every other 0; where two are best, all get 0. Undivided
    it gives the gradient of the expected best of G answers, with a leave-one-out baseline. verl's `grpo_passk`.

    Args:
        divide_by_std: whether to divide by the standard deviation of the group (by n - 1), as GRPO does.
        floor: added to it, outside of the root.
    References:
        Tang et al., Optimizing Language Models for Inference Time Objectives using Reinforcement Learning, 2025.
        arXiv:2503.19595
    """

    needs_groups: ClassVar[bool] = True

    divide_by_std: bool = True
    floor: float = 1e-6

    def __post_init__(self) -> None:
        _check_normaliser(1, self.floor)

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        scores, group = answers.scores, answers.group
        best = torch.zeros_like(scores).scatter_reduce(0, group, scores, "amax", include_self=False)[group]
        is_best = scores == best
        # -inf where nobody is below the best: the group is alone, or unanimous
        below = scores.masked_fill(is_best, -torch.inf)
        second = torch.full_like(scores, -torch.inf).scatter_reduce(0, group, below, "amax")[group]
        leads = is_best & (answers.group_sum(is_best.to(scores)) == 1) & (second > -torch.inf)
        lead = torch.where(leads, best - second, 0.0)
        return lead / (answers.group_std(scores, 1) + self.floor) if self.divide_by_std else lead


@dataclass(frozen=True)
class Gdpo(OutcomeCredit):
    """GDPO: each reward function normalised within the group by itself, then added, then normalised over the batch.

        a_i = sum_f weight_f (r_fi - mean_group(r_f)) / (std_group(r_f) + floor)
        A_i = (a_i - mean_batch(a)) / (std_batch(a) + floor)       over: answers
            = (a_i - mean_tokens(a)) / sqrt(var_tokens(a) + 1e-8)  over: tokens, an answer counting by its length

    A function with large scores cannot drown the others, and combinations that add up to equal sums are told apart.
    Normalising takes the size of the weights in `rewards` out again and leaves their sign: give the sizes here. KL in
    the reward has no effect on it: put KL in the loss.

    TRL (`multi_objective_aggregation: normalize_then_sum`): floor 1e-4, over answers; verl: floor 1e-6, over tokens.

    Args:
        weights: of the reward functions, by the name that the metrics give them; 1 for those that are not named.
        ddof: 1 divides squares by n - 1, 0 by n.
        floor: added to the standard deviations, of the weighted scores the first time.
        over: what the second mean and standard deviation are over.
    References:
        GDPO: Group reward-Decoupled Normalization Policy Optimization, 2026. arXiv:2601.05242
    """

    needs_groups: ClassVar[bool] = True

    weights: Mapping[str, float] = field(default_factory=dict)
    ddof: int = 1
    floor: float = 1e-4
    over: Literal["answers", "tokens"] = "answers"

    def __post_init__(self) -> None:
        _check_normaliser(self.ddof, self.floor)
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise UserError(f"weights.{name}={weight}: the sign belongs to the reward's own weight; give 0 or more")

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        if not answers.breakdown:
            raise UserError("Gdpo normalises each reward function by itself, but was told of none: no breakdown came")
        unknown = sorted(set(self.weights) - set(answers.breakdown))
        if unknown:
            raise UserError(
                f"credit.weights names {unknown[0]!r}, but the reward functions are "
                f"{', '.join(answers.breakdown)}: use one of these"
            )
        total = torch.zeros_like(answers.scores)
        for name, scores in answers.breakdown.items():
            centred = scores - answers.group_mean(scores)
            normalised = centred / (answers.group_std(scores, self.ddof) + self.floor)
            total = total + self.weights.get(name, 1.0) * normalised
        if self.over == "answers":
            mean, std = answers.batch_mean_std(total, self.ddof)
            return (total - mean) / (std + self.floor)
        mean, std = answers.batch_mean_std(total, self.ddof, weights=answers.lengths.to(total))
        return (total - mean) / (std.square() + 1e-8).sqrt()


# ---- helpers -------------------------------------------------------------------------------------------------------


def _ratio_of_choices(
    n: Float[Tensor, " batch"], m: Float[Tensor, " batch"], k: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """C(n, k) / C(m, k) for n <= m: the chance that k of m, drawn without repeats, all lie among n of them."""
    enough = n >= k
    n = torch.where(enough, n, k)
    # in this order n = m gives exactly 1
    logs = (torch.lgamma(n + 1) - torch.lgamma(m + 1)) + (torch.lgamma(m - k + 1) - torch.lgamma(n - k + 1))
    return torch.where(enough, logs.exp(), 0.0)


def _check_normaliser(ddof: int, floor: float) -> None:
    check_ddof(ddof)
    if not floor > 0:
        raise UserError(f"floor={floor} lets a group of equal scores divide by 0: give a small number, such as 1e-6")
