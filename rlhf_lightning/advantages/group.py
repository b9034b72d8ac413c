"""Credit without a critic: answers judged against the other answers to the same prompt, or against the whole batch.

An answer's score is the sum of its rewards. Most of these credits give one number per answer, the same at each of its
tokens. Groups may differ in size; an answer that is alone in its group has nothing to be compared with and gets 0.
Sums are taken in float64, so that a group of equal scores gives exactly 0.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from rlhf_kernels import gae
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import NO_BREAKDOWN, Credit, CreditBaseline, on_one_rank
from rlhf_lightning.core.masked import masked_moments, masked_whiten


@dataclass(frozen=True)
class Answers:
    """The answers of a rollout as a credit per answer sees them: this rank's, every group whole."""

    scores: Float[Tensor, " batch"]
    """Sum of the rewards over the tokens that count, float64."""
    lengths: Int[Tensor, " batch"]
    """How many tokens count."""
    group: Int[Tensor, " batch"]
    """Which group each belongs to, below the number of answers."""
    breakdown: Mapping[str, Float[Tensor, " batch"]]
    """Weighted score from each reward function."""
    add_over_ranks: Callable[[Tensor], Tensor]

    def group_sum(self, x: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The sum of `x` over each answer's group, at each answer."""
        return torch.zeros_like(x).index_add(0, self.group, x)[self.group]

    def group_mean(self, x: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return self.group_sum(x) / self.sizes

    def group_std(self, x: Float[Tensor, " batch"], ddof: int) -> Float[Tensor, " batch"]:
        """Standard deviation of `x` in each answer's group; 0 in a group of no more than `ddof`."""
        squares = self.group_sum((x - self.group_mean(x)).square())
        return (squares / (self.sizes - ddof).clamp(min=1)).sqrt()

    def batch_mean_std(self, x: Float[Tensor, " batch"], ddof: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean and standard deviation of `x` over the answers of all ranks."""
        count, total = self.add_over_ranks(torch.stack((torch.ones_like(x).sum(), x.sum()))).unbind()
        mean = total / count.clamp(min=1)
        squares = self.add_over_ranks((x - mean).square().sum())
        return mean, (squares / (count - ddof).clamp(min=1)).sqrt()

    @property
    def sizes(self) -> Float[Tensor, " batch"]:
        """How many answers each one's group has."""
        return self.group_sum(torch.ones_like(self.scores))

    @property
    def informative(self) -> Bool[Tensor, " batch"]:
        """True in groups whose scores are not all equal."""
        return _varies(self.scores, self.group)


class OutcomeCredit(Credit):
    """One advantage per answer, at each of its tokens; returns are the answer's score at each of its tokens."""

    @abstractmethod
    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        """The advantage of each answer."""

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        counted = mask.any(-1)  # of an answer that was dropped nothing counts: it must not enter a mean or a deviation
        # reward functions give their scores on the CPU
        kept = {name: scores.to(counted.device)[counted] for name, scores in breakdown.items()}
        answers = answers_of(rewards[counted], mask[counted], groups[counted], kept, add_over_ranks)
        both = torch.zeros(2, len(counted), dtype=torch.float64, device=rewards.device)
        both[:, counted] = torch.stack((self.of_answers(answers).double(), answers.scores))
        return _spread(both[0], mask, rewards), _spread(both[1], mask, rewards)


def answers_of(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    groups: Int[Tensor, " batch"],
    breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
    add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
) -> Answers:
    """The answers whose rewards these are; `groups` may hold any numbers, in any order."""
    return Answers(
        scores=torch.where(mask, rewards, 0.0).sum(-1, dtype=torch.float64),
        lengths=mask.sum(-1),
        group=_numbered(groups),
        breakdown={name: scores.detach().double() for name, scores in breakdown.items()},
        add_over_ranks=add_over_ranks,
    )


def informative_answers(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], *, at_least: float = 0.0
) -> Bool[Tensor, " batch"]:
    """True for the answers that a group credit can learn from: the scores of their group differ.

    With scores of 0 and 1 this is DAPO's condition for keeping a prompt, 0 < number correct < group size. A group of
    one is never informative.

    Args:
        scores: of each answer: what is to differ. DAPO looks at correctness alone, without length penalties.
        groups: names the prompt that each answers.
        at_least: by how much the best and the worst of a group must differ, at least; 0 = at all.
    References:
        Yu et al., DAPO, 2025, eq. 11. arXiv:2503.14476
    """
    return _varies(scores, _numbered(groups), at_least)


# ---- one advantage per answer --------------------------------------------------------------------------------------


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

        A_i = alpha (r_i - mean_group(r)) [/ std_group(r)],     alpha = answers / answers in groups whose scores differ

    Both counts over all ranks. verl's alpha divides by the number of answers whose score is not 0 instead, which for
    scores of 0 and 1 also counts unanimous groups as informative. Goes with the loss `Reinforce`.

    Args:
        divide_by_std: the paper's F_norm: 1, or the group's standard deviation (divided by n - 1).
    References:
        Chu et al., GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning, 2025.
        arXiv:2504.02546
    """

    needs_groups: ClassVar[bool] = True

    divide_by_std: bool = False

    def of_answers(self, answers: Answers) -> Float[Tensor, " batch"]:
        informative = answers.informative.to(answers.scores)
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
    in the reward it would count as part of the score. verl's `grpo_passk` is another method: it credits the best answer
    alone, with its lead over the second best (arXiv:2503.19595).

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
class Gdpo(OutcomeCredit):
    """GDPO: each reward function normalised within the group by itself, then added, then normalised over the batch.

        a_i = sum_f weight_f (r_fi - mean_group(r_f)) / (std_group(r_f) + floor)
        A_i = (a_i - mean_batch(a)) / (std_batch(a) + floor)

    A function with large scores cannot drown the others, and combinations that add up to equal sums are told apart.
    Normalising takes the size of the weights in `rewards` out again and leaves their sign: give the sizes here. KL in
    the reward has no effect on it: put KL in the loss.

    TRL (`multi_objective_aggregation: normalize_then_sum`): floor 1e-4. verl normalises the second time over tokens,
    longer answers counting more, with 1e-8 inside of the root.

    Args:
        weights: of the reward functions, by the name that the metrics give them; 1 for those that are not named.
        ddof: 1 divides squares by n - 1, 0 by n.
        floor: added to the standard deviations, of the weighted scores the first time.
    References:
        GDPO: Group reward-Decoupled Normalization Policy Optimization, 2026. arXiv:2601.05242
    """

    needs_groups: ClassVar[bool] = True

    weights: Mapping[str, float] = field(default_factory=dict)
    ddof: int = 1
    floor: float = 1e-4

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
        mean, std = answers.batch_mean_std(total, self.ddof)
        return (total - mean) / (std + self.floor)


# ---- credit per token ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNormalised(Credit):
    """REINFORCE++: discounted reward to come, normalised over all answer tokens of all ranks. Needs no groups.

        R_t = sum_{s >= t} gamma^(s - t) r_s
        A_t = (R_t - mean_batch(R)) / sqrt(var_batch(R) + 1e-8)

    The variance is divided by n (verl: by n - 1). Returns are R.

    Args:
        gamma: discount per token that counts.
    References:
        Hu et al., REINFORCE++, 2025. arXiv:2501.03262
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma={self.gamma} is outside of 0 to 1: give a fraction, such as 1")

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        to_come = rewards_to_come(rewards, mask, gamma=self.gamma)
        return _whitened(to_come, mask, add_over_ranks), to_come


@dataclass(frozen=True)
class CentredBatchNormalised(Credit):
    """REINFORCE++-baseline: the score minus its group's mean, normalised over all answer tokens of all ranks.

        a_i = r_i - mean_group(r),     A_i = (a_i - mean_batch(a)) / sqrt(var_batch(a) + 1e-8)

    Mean and variance are over tokens: an answer counts as often as it is long, so the mean is not 0 in general and a
    group of equal scores gets a small advantage. The variance is divided by n (verl: by n - 1). Returns are scores.

    References:
        Hu et al., REINFORCE++, 2025. arXiv:2501.03262
    """

    needs_groups: ClassVar[bool] = True

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        answers = answers_of(rewards, mask, groups)
        centred = _spread(answers.scores - answers.group_mean(answers.scores), mask, rewards)
        return _whitened(centred, mask, add_over_ranks), _spread(answers.scores, mask, rewards)


@dataclass(frozen=True)
class ReMax(Credit):
    """ReMax: reward to come, minus what the greedy answer to the same prompt scores.

        A_t = sum_{s >= t} r_s - r(greedy answer)

    Needs one more answer per prompt, without sampling, and no groups. Returns are the rewards to come.

    References:
        Li et al., ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method, 2023, alg. 2.
        arXiv:2310.10505
    """

    baseline: ClassVar[CreditBaseline] = "greedy"

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        values: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        groups: Int[Tensor, " batch"],
        *,
        breakdown: Mapping[str, Float[Tensor, " batch"]] = NO_BREAKDOWN,
        add_over_ranks: Callable[[Tensor], Tensor] = on_one_rank,
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        to_come = rewards_to_come(rewards, mask)
        greedy = torch.where(mask, values, 0.0).sum(-1, keepdim=True)
        return torch.where(mask, to_come - greedy, 0.0), to_come


def rewards_to_come(
    rewards: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], *, gamma: float = 1.0
) -> Float[Tensor, "batch time"]:
    """Discounted sum of the rewards from each counted token on; 0 elsewhere.

    This is generalised advantage estimation with lam 1 and a critic that says 0: the same scan.
    """
    to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return torch.where(mask, to_come, 0.0)


# ---- helpers -------------------------------------------------------------------------------------------------------


def _whitened(
    x: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], add_over_ranks: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch time"]:
    return masked_whiten(x, mask, moments=add_over_ranks(masked_moments(x, mask)))


def _spread(
    per_answer: Float[Tensor, " batch"], mask: Bool[Tensor, "batch time"], like: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """One number per answer, at each of its tokens; 0 elsewhere."""
    return torch.where(mask, per_answer.to(like.dtype).unsqueeze(-1), 0.0)


def _numbered(groups: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The same groups, numbered from 0 without gaps."""
    numbered: Tensor = torch.unique(groups, return_inverse=True)[1]
    return numbered


def _varies(
    scores: Float[Tensor, " batch"], group: Int[Tensor, " batch"], at_least: float = 0.0
) -> Bool[Tensor, " batch"]:
    """True where the scores of the answer's group differ."""
    best = torch.zeros_like(scores).scatter_reduce(0, group, scores, "amax", include_self=False)
    worst = torch.zeros_like(scores).scatter_reduce(0, group, scores, "amin", include_self=False)
    spread = (best - worst)[group]
    return (spread > 0) & (spread >= at_least)


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
    if ddof not in (0, 1):
        raise UserError(f"ddof={ddof}: 0 divides squares by n, 1 by n - 1; give one of these")
    if not floor > 0:
        raise UserError(f"floor={floor} lets a group of equal scores divide by 0: give a small number, such as 1e-6")
