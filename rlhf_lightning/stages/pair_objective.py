"""A preference loss over the pairs of an optimiser step: denominators, means that it reads, metrics."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlhf_lightning.core.batches import PairBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, PairScores, PreferenceLoss, PreferenceLossOutput
from rlhf_lightning.core.seeding import pair_names, row_names, uniforms
from rlhf_lightning.losses.supervised import token_nll
from rlhf_lightning.stages.step_means import StepMeans

_PAIRS, _TOKENS, _GOLD = "loss per pair", "loss per chosen token", "loss per gold token"


class PairObjective:
    """What every stage that trains on pairs does with its loss; remembers the loss's running means.

    Args:
        loss: the preference loss.
    Raises:
        UserError: the loss holds another that draws among pairs, which it does not know of.
    """

    def __init__(self, loss: PreferenceLoss) -> None:
        if "drawn_pairs" in loss.needs and loss.keep_frac == 1:
            raise UserError(
                f"keep_frac below 1 of a loss within {type(loss).__name__} would leave pairs out of that loss alone: "
                "set keep_frac: 1, or use the loss by itself"
            )
        self.loss = loss
        self._kept: Tensor | None = None
        """Names of the pairs that the present optimiser step is trained on; None: all."""
        self.running: dict[str, float | Tensor] = dict.fromkeys(loss.running_means, 0.0)
        self._statistics = StepMeans()

    def __copy__(self) -> "PairObjective":
        same = PairObjective(self.loss)
        same.running, same._statistics = dict(self.running), copy.copy(self._statistics)
        same._kept = self._kept
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

    def draw(
        self,
        parts: Sequence[tuple[PairBatch, PairScores]],
        seed: int,
        of_all_ranks: Callable[[Any], list[Any]],
    ) -> dict[str, float]:
        """Decide which pairs of the optimiser step that begins are trained on; what this rank adds to its totals.

        The k = `keep_frac` n pairs whose log_weight + g is largest, with g of a Gumbel distribution, are k pairs drawn
        one after the other without replacement, each with the chance that its weight has among those that are left
        (Efraimidis and Spirakis, 2006, in the form of Vieira, 2014). A pair's g is a function of `seed` and its own
        tokens: no order, cut or rank changes it.

        Args:
            parts: this rank's pairs of the step, as the policy scores them before it.
            seed: of this step.
            of_all_ranks: what each rank gives, on all of them.
        """
        names = torch.cat([names_of(batch) for batch, _ in parts])
        margins = torch.cat([self.loss(pairs).statistics["margin"] for _, pairs in parts]).double().cpu()
        tokens = torch.cat([batch.chosen.mask[:, 1:].sum(-1) for batch, _ in parts]).cpu()
        everywhere = of_all_ranks(list(zip(names.tolist(), margins.tolist(), strict=True)))
        # in one order on all ranks, whatever the order of the records: sums then have the same bits
        known = sorted(pair for of_rank in everywhere for pair in of_rank)
        all_names, all_margins = torch.tensor([n for n, _ in known]), torch.tensor([m for _, m in known]).double()
        noise = -torch.log(-torch.log(uniforms(all_names, seed)))
        keys = self.loss.log_weights(all_margins, self.running) + noise
        count = max(1, math.floor(self.loss.keep_frac * len(keys) + 1e-9))
        self._kept = all_names[keys.topk(count).indices].to(names.device)
        here = torch.isin(names, self._kept).cpu()
        spread = float(all_margins.std(correction=0))
        return {
            "pairs": float(here.sum()),
            "chosen_tokens": float(tokens[here].sum()),
            "sum of margin": float(margins[here].sum()),
            "sum of margin_std": spread * float(here.sum()),
        }

    def kept(self, batch: PairBatch) -> Tensor | None:
        """True for pairs that the optimiser step is trained on [pairs]; None: all, as outside of a step."""
        return None if batch.totals is None or self._kept is None else torch.isin(names_of(batch), self._kept)

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
        per_pair = output.per_pair if counts is None else torch.where(counts, output.per_pair, 0.0)
        loss = per_pair.sum() / batch.total("pairs")
        for name, per_token in (("chosen_tokens", output.per_chosen_token), ("gold_tokens", output.per_gold_token)):
            if per_token is not None:
                kept = per_token if counts is None else torch.where(counts[:, None], per_token, 0.0)
                loss = loss + kept.sum() / batch.total(name)
        return loss

    # ---- means -----------------------------------------------------------------------------------------------------

    def count(
        self, means: StepMeans, pairs: PairScores, output: PreferenceLossOutput, counts: Tensor | None = None
    ) -> None:
        """Add a batch's metrics: each pair, each chosen and each gold token, with equal weight."""
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
        if pairs.gold is not None and output.per_gold_token is not None:
            per_token = {"logps/gold_nll": token_nll(pairs.gold.logprobs), _GOLD: output.per_gold_token}
            means.add(per_token, pairs.gold.mask & counts[:, None])

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


def names_of(batch: PairBatch) -> Tensor:
    """A number for each pair, of its own tokens alone [pairs]."""
    return pair_names(*(row_names(side.tokens, side.attention_mask) for side in (batch.chosen, batch.rejected)))


def loss_per_pair(values: Tensor) -> dict[str, Tensor]:
    """A loss by the name under which `summed_loss` finds it."""
    return {_PAIRS: values}


def summed_loss(metrics: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """All terms of the loss as one."""
    if not metrics:
        return {}
    loss = metrics.pop(_PAIRS) + metrics.pop(_TOKENS, 0.0) + metrics.pop(_GOLD, 0.0)
    return {name: loss, **metrics}


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
