"""Losses that draw which pairs of a step they are averaged over: beta-DPO's filter."""

import math
from collections import Counter

import pytest
import torch
from fits import fit
from one_step import another, records
from pairs import pairs

from rlhf_lightning.core.batches import PairBatch, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import RPO, XPO, BetaDPO, WeightedLoss, WeightedLosses
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards import WeightedReward
from rlhf_lightning.stages import DPOModule, OnlineDPOModule
from rlhf_lightning.stages.online_dpo import Opponent
from rlhf_lightning.stages.pair_objective import PairObjective


def scored(margins, first=0):
    """Pairs of a beta of 1 whose margins are these, each with tokens of its own."""
    count = len(margins)
    tokens = torch.arange(first, first + count)[:, None] + 100 * torch.arange(1, 3)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    side = TokenBatch(tokens, everything, everything, torch.arange(2).expand(count, 2))
    zeros = [0.0] * count
    return PairBatch(side, side), pairs(chosen=margins, rejected=zeros, ref_chosen=zeros, ref_rejected=zeros)


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def alone(value):
    return [value]


def drawn(margins, seed, **options):
    """Which of the pairs are kept, and the totals of the step."""
    objective = PairObjective(BetaDPO(beta=1.0, **options))
    batch, scores = scored(margins)
    totals = objective.draw([(batch, scores)], seed, alone)
    return objective.kept(batch.with_totals(totals)).tolist(), totals


def test_so_many_are_kept_and_the_totals_are_theirs():
    margins = [0.5, -1.0, 3.0, 0.25, 2.0]
    kept, totals = drawn(margins, seed=1, keep_frac=0.7)
    assert sum(kept) == 3, "3.5 rounded down, as in the authors' code"
    assert totals["pairs"] == 3
    assert totals["chosen_tokens"] == 3, "the first token of a row has no predictor"
    assert totals["sum of margin"] == pytest.approx(sum(m for m, k in zip(margins, kept, strict=True) if k))
    spread = torch.tensor(margins).std(correction=0).item()
    assert totals["sum of margin_std"] == pytest.approx(3 * spread), "of all pairs: the mean over those kept is it"
    assert sum(drawn(margins, seed=1, keep_frac=0.01)[0]) == 1, "never none"


def test_each_pair_is_drawn_as_often_as_its_weight_says():
    margins = [0.0, 1.0, 2.5, 4.0]
    runs = 2000
    seen = Counter(drawn(margins, seed, keep_frac=0.25, decay=0.0)[0].index(True) for seed in range(runs))
    mean, std = 1.875, torch.tensor(margins).std(correction=0).item()
    weights = [math.exp(-0.5 * ((m - mean) / std) ** 2) for m in margins]
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        # four standard deviations of a share
        assert seen[index] / runs == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / runs))


def test_neither_the_cut_nor_ranks_nor_the_order_change_who_is_kept():
    margins = [0.5, -1.0, 3.0, 0.25, 2.0, -0.5]
    whole, totals = drawn(margins, seed=7, keep_frac=0.5)
    parts = [scored(margins[:2]), scored(margins[2:], first=2)]

    objective = PairObjective(BetaDPO(beta=1.0, keep_frac=0.5))
    assert objective.draw(parts[::-1], 7, alone) == pytest.approx(totals)
    cut = [objective.kept(batch.with_totals(totals)).tolist() for batch, _ in parts]
    assert cut[0] + cut[1] == whole

    given = []
    for part in parts:  # what each rank has to say
        with pytest.raises(StopIteration):
            objective.draw([part], 7, lambda mine: given.append(mine) or next(iter(())))
    ranks = [PairObjective(BetaDPO(beta=1.0, keep_frac=0.5)) for _ in parts]
    of_ranks = [rank.draw([part], 7, lambda mine: given) for rank, part in zip(ranks, parts, strict=True)]
    assert {name: sum(each[name] for each in of_ranks) for name in totals} == pytest.approx(totals)
    on_ranks = [rank.kept(batch.with_totals(totals)).tolist() for rank, (batch, _) in zip(ranks, parts, strict=True)]
    assert on_ranks == cut


def test_outside_training_all_pairs_count():
    assert PairObjective(BetaDPO(keep_frac=0.5)).kept(scored([1.0, 2.0])[0]) is None
    assert PairObjective(BetaDPO()).kept(scored([1.0])[0].with_totals({})) is None


def test_the_loss_of_a_step_is_the_mean_over_those_kept(tiny_model, write_jsonl, tmp_path):
    """How a step is cut does not matter to it: `tests/invariance`."""
    path = write_jsonl("pairs.jsonl", records("dpo"))
    loss = BetaDPO(beta=0.5, keep_frac=0.5)
    dpo = DPOModule(ModelSpec(path=str(tiny_model)), loss, reference=another(str(tiny_model)), optimizer=frozen)
    trainer = fit(dpo, tmp_path, data={"train": path, "batch_size": 5}, accumulate_grad_batches=3)
    [batch] = RLHFDataModule(path, batch_size=12).setup_for("pairs", str(tiny_model)).train_dataloader()
    kept = dpo.objective.kept(batch.with_totals({}))
    assert kept.sum() == 6
    h = dpo(batch).log_ratio.detach()
    beta = 0.5 * (1 + 0.6 * 0.5 * h[kept].mean())
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(torch.log1p(torch.exp(-beta * h[kept])).mean().item(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((h[kept] > 0).float().mean().item())
    assert float(dpo.objective.running["margin"]) == pytest.approx(0.1 * 0.5 * h.mean().item(), rel=1e-4)
    assert float(dpo.objective.running["margin_std"]) == pytest.approx(0.1 * 0.5 * h.std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("loss", [WeightedLosses([WeightedLoss(BetaDPO(keep_frac=0.5))]), RPO(BetaDPO(keep_frac=0.5))])
def test_within_another_loss_it_is_refused(loss, tiny_model):
    with pytest.raises(UserError, match=rf"keep_frac below 1 of a loss within {type(loss).__name__} would leave pairs"):
        DPOModule(another(str(tiny_model)), loss)


def test_it_draws_among_records(tiny_model):
    reward = [WeightedReward(lambda samples: [0.0 for _ in samples])]
    with pytest.raises(UserError, match=r"keep_frac below 1 of BetaDPO draws among records: .* or use DPOModule"):
        OnlineDPOModule(another(str(tiny_model)), reward, BetaDPO(keep_frac=0.5))
    with pytest.raises(UserError, match=r"keep_frac below 1 of XPO draws among records"):
        OnlineDPOModule(
            another(str(tiny_model)), reward, XPO(loss=BetaDPO(keep_frac=0.5)), opponent=Opponent(reference_share=1.0)
        )
