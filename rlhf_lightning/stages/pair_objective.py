"""A preference loss over the pairs of an optimiser step: denominators, means that it reads, metrics."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.core.batches import PairBatch
from rlhf_lightning.core.interfaces import CompletionScores, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.stages.step_means import StepMeans

_PAIRS, _TOKENS = "loss per pair", "loss per chosen token"


class PairObjective:
    """What every stage that trains on pairs does with its loss; remembers the loss's running means.

    Args:
        loss: the preference loss.
    """

    def __init__(self, loss: PreferenceLoss) -> None:
        self.loss = loss
        self.running: dict[str, float | Tensor] = dict.fromkeys(loss.running_means, 0.0)
        self._statistics = StepMeans()

    def __copy__(self) -> "PairObjective":
        same = PairObjective(self.loss)
        same.running, same._statistics = dict(self.running), copy.copy(self._statistics)
        return same

    @property
    def inseparable(self) -> str | None:
        """Why a micro-batch must not be cut, in words."""
        if "whole_batch" not in self.loss.needs:
            return None
        return f"{type(self.loss).__name__} compares the pairs of a micro-batch"

    def warn_of_cuts(self, cut: int) -> None:
        """Say what it means that a step is cut into so many micro-batches and ranks, if it means anything."""
        if cut > 1 and "whole_batch" in self.loss.needs:
            rank_zero_warn(
                f"{type(self.loss).__name__} compares the pairs of one micro-batch of one rank: cut into {cut}, a step "
                "has another loss than as a whole. Use accumulate_grad_batches: 1 and one device for the whole"
            )

    # ---- the loss --------------------------------------------------------------------------------------------------

    def sums(self, pairs: PairScores, counts: Tensor | None = None) -> dict[str, float]:
        """Sums of what the loss wants the mean of over the step, to join its totals.

        Args:
            counts: True for pairs that count [pairs]; None: all.
        """
        statistics = self.loss(pairs).statistics
        sums = {}
        for name in self.loss.step_means:
            values = statistics[name] if counts is None else statistics[name][counts]
            sums[f"sum of {name}"] = float(values.double().sum())
        return sums

    def no_sums(self) -> dict[str, float]:
        """The names of `sums`, with nothing to add."""
        return {f"sum of {name}": 0.0 for name in self.loss.step_means}

    def __call__(self, pairs: PairScores, batch: PairBatch) -> PreferenceLossOutput:
        """The loss of scored pairs; the means over the step that it reads come with the batch, else from the batch."""
        names = self.loss.step_means
        if not names:
            return self.loss(pairs)
        if batch.totals is None:
            statistics = self.loss(pairs).statistics
            means: dict[str, float | Tensor] = {name: statistics[name].mean() for name in names}
        else:
            means = {name: batch.totals[f"sum of {name}"] / batch.total("pairs") for name in names}
        return self.loss(replace(pairs, step=means))

    def share(self, output: PreferenceLossOutput, batch: PairBatch, counts: Tensor | None = None) -> Tensor:
        """This micro-batch's share of the step's loss.

        Args:
            counts: True for pairs that count [pairs]; None: all.
        """
        per_pair, per_token = output.per_pair, output.per_chosen_token
        if counts is not None:
            per_pair = torch.where(counts, per_pair, 0.0)
            per_token = None if per_token is None else torch.where(counts[:, None], per_token, 0.0)
        loss = per_pair.sum() / batch.total("pairs")
        return loss if per_token is None else loss + per_token.sum() / batch.total("chosen_tokens")

    # ---- means -----------------------------------------------------------------------------------------------------

    def count(
        self, means: StepMeans, pairs: PairScores, output: PreferenceLossOutput, counts: Tensor | None = None
    ) -> None:
        """Add a batch's metrics: each pair, and each chosen token, with equal weight."""
        margins = output.chosen_rewards - output.rejected_rewards
        counts = torch.ones_like(margins, dtype=torch.bool) if counts is None else counts
        per_pair = {
            _PAIRS: output.per_pair,
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": 0.5 * (margins.sign() + 1),
            "logps/chosen": pairs.chosen.total,
            "logps/rejected": pairs.rejected.total,
            **_displacement(pairs.chosen, pairs.rejected),
        }
        means.add(per_pair, counts)
        per_token = {"logps/chosen_nll": token_nll(pairs.chosen.logprobs)}
        if output.per_chosen_token is not None:
            per_token[_TOKENS] = output.per_chosen_token
        means.add(per_token, pairs.chosen.mask & counts[:, None])

    def count_statistics(self, output: PreferenceLossOutput, counts: Tensor | None = None) -> None:
        """Remember what the loss keeps running means of."""
        for name, values in output.statistics.items():
            self._statistics.add(
                {name: values}, torch.ones_like(values, dtype=torch.bool) if counts is None else counts
            )

    def end_step(self, add_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """The optimiser step is over: running means take up what was counted in it."""
        decays = self.loss.running_means
        for name, mean in self._statistics.take(add_over_ranks).items():
            self.running[name] = decays[name] * self.running[name] + (1 - decays[name]) * mean

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.running.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        known = {name: torch.tensor(value) for name, value in state.items()}
        self.running = {name: known.get(name, value) for name, value in self.running.items()}


def loss_per_pair(values: Tensor) -> dict[str, Tensor]:
    """A loss by the name under which `summed_loss` finds it."""
    return {_PAIRS: values}


def summed_loss(metrics: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Both terms of the loss as one."""
    if not metrics:
        return {}
    per_pair, per_token = metrics.pop(_PAIRS), metrics.pop(_TOKENS, 0.0)
    return {name: per_pair + per_token, **metrics}


def _displacement(chosen: CompletionScores, rejected: CompletionScores) -> dict[str, Tensor]:
    """How far answers have moved from the reference; nothing without one."""
    if chosen.ref_logprobs is None:
        return {}
    moved = chosen.log_ratio.detach()
    return {
        "displacement/chosen": moved,
        "displacement/rejected": rejected.log_ratio,
        "displacement/fell_frac": (moved < 0).float(),
    }
