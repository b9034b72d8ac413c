"""Preference pairs out of scored answers: which of a prompt's answers is chosen, which rejected."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers to the same prompt, by their rows."""

    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    margins: Float[Tensor, " pairs"]
    """By how much the chosen one scored more; never 0."""


@dataclass(frozen=True)
class PairRule:
    """At most one pair for each prompt; a prompt whose two answers score the same gives none.

        max_min     the best, the worst
        max_max     the best, the second best
        max_random  the best, any other
        random      any two
        max_min_p   the best, the worst, by score - length_penalty * length; margins too

    Of equal scores the earlier answer is taken. RLHFlow's max_random takes the first answer that is not the best, its
    random the first two, and its length counts characters.

    Args:
        rule: see above.
        length_penalty: what a unit of length costs, with max_min_p.
    References:
        Dong et al., RLHF Workflow: From Reward Modeling to Online RLHF, 2024. arXiv:2405.07863
    """

    rule: Literal["max_min", "max_max", "max_random", "random", "max_min_p"] = "max_min"
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.rule == "max_min_p" and not self.length_penalty > 0:
            raise UserError(
                f"length_penalty={self.length_penalty} makes max_min_p max_min: give a positive number, or use max_min"
            )
        if self.rule != "max_min_p" and self.length_penalty != 0:
            raise UserError(
                f"length_penalty={self.length_penalty} has no effect with rule {self.rule!r}: use max_min_p, "
                "or leave it out"
            )

    def __call__(
        self,
        scores: Float[Tensor, " batch"],
        groups: Int[Tensor, " batch"],
        *,
        lengths: Int[Tensor, " batch"],
        lots: Float[Tensor, " batch"],
    ) -> Pairs:
        """The pairs, in the order of the groups' numbers.

        Args:
            scores: of each answer.
            groups: names the prompt that each answers.
            lengths: of each answer, for max_min_p.
            lots: a random number for each answer, for the rules that draw.
        """
        if self.rule == "max_min_p":
            scores = scores - self.length_penalty * lengths.to(scores)
        group = torch.unique(groups, return_inverse=True)[1]
        every = torch.ones_like(group, dtype=torch.bool)
        first = _first_largest(lots if self.rule == "random" else scores, group, every)
        others = every.scatter(0, first, False)
        match self.rule:
            case "max_min" | "max_min_p":
                second = _first_largest(-scores, group, others)
            case "max_max":
                second = _first_largest(scores, group, others)
            case "max_random" | "random":
                second = _first_largest(lots, group, others)
        first, second = first[second < len(group)], second[second < len(group)]
        swapped = scores[second] > scores[first]
        chosen, rejected = torch.where(swapped, second, first), torch.where(swapped, first, second)
        margins = scores[chosen] - scores[rejected]
        told_apart = margins > 0
        return Pairs(chosen=chosen[told_apart], rejected=rejected[told_apart], margins=margins[told_apart])


def _first_largest(
    key: Float[Tensor, " batch"], group: Int[Tensor, " batch"], allowed: Bool[Tensor, " batch"]
) -> Int[Tensor, " groups"]:
    """Row of each group's largest allowed key, the earliest of equal ones; the number of rows if none is allowed."""
    rows = torch.arange(len(group), device=group.device)
    num_groups = int(group.max()) + 1 if len(group) else 0
    key = torch.where(allowed, key, -torch.inf)
    largest = key.new_full((num_groups,), -torch.inf).scatter_reduce(0, group, key, "amax")
    hits = torch.where(allowed & (key == largest[group]), rows, len(group))
    return rows.new_full((num_groups,), len(group)).scatter_reduce(0, group, hits, "amin")
