"""DPO on rankings of K answers."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, RankedPreferenceLoss, RankedPreferenceLossOutput
from rlhf_lightning.losses.preference import check_beta
from rlhf_lightning.losses.reward_model import Comparisons, compare, plackett_luce


@dataclass(frozen=True)
class ListwiseDPO(RankedPreferenceLoss):
    """DPO on a ranking of K >= 2 answers to each prompt; K may differ between prompts.

        r_i = beta log pi(y_i|x)/pi_ref(y_i|x)
        listwise   -sum_i log(exp r_i / (exp r_i + sum_{j: rank_j > rank_i} exp r_j))     Plackett-Luce
        pairs      the mean over the pairs with rank_w < rank_l of -log sigma(r_w - r_l)

    For K = 2 both are DPO. Equal ranks are not compared.

    Args:
        beta: strength of the pull to the reference.
        comparisons: `listwise`, the likelihood of the whole order, or `pairs`.

    References:
        Rafailov et al., Direct Preference Optimization, 2023, eq. 20. arXiv:2305.18290
        Liu et al., LiPO: Listwise Preference Optimization through Learning-to-Rank, 2024. arXiv:2402.01878
    """

    beta: float = 0.1
    comparisons: Comparisons = "listwise"

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.comparisons not in ("pairs", "listwise"):
            raise UserError(f"comparisons={self.comparisons!r} is unknown: use pairs or listwise")

    def __call__(
        self,
        completions: CompletionScores,
        groups: Int[Tensor, " completions"],
        ranks: Float[Tensor, " completions"],
    ) -> RankedPreferenceLossOutput:
        rewards = self.beta * completions.log_ratio
        accuracy, margin = compare(rewards.detach(), groups, ranks)
        return RankedPreferenceLossOutput(
            plackett_luce(rewards, groups, ranks, comparisons=self.comparisons), rewards.detach(), accuracy, margin
        )
