"""Reward modelling: numbers by hand, normalisation, and a model that comes back from its export."""

import math

import pytest
import torch
from fits import fit
from one_step import records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.reward_model import BradleyTerry, PlackettLuce, Regression, StepCorrectness
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import RewardModule


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_validation_metrics_by_hand(tiny_model, write_jsonl, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in records("reward")]
    path = write_jsonl("pairs.jsonl", rows)
    module = RewardModule(ModelSpec(path=str(tiny_model)), optimizer=frozen, seed=1)
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 5})
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}

    margins, scores = [], []
    for batch in trainer.datamodule.val_dataloader():
        for side in (batch.chosen, batch.rejected):
            scores.append(module(side).detach())
        margins.append(scores[-2] - scores[-1])
    margin, score = torch.cat(margins), torch.cat(scores)
    assert metrics["val/margin"] == pytest.approx(margin.mean().item(), abs=1e-6)
    assert metrics["val/accuracy"] == pytest.approx((margin > 0).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), abs=1e-6)
    assert metrics["val/score_mean"] == pytest.approx(score.mean().item(), abs=1e-6)
    assert metrics["val/score_std"] == pytest.approx(score.std(correction=0).item(), abs=1e-5)
    # ten bins of the probability that the higher score wins; in each, how far belief and frequency are apart
    belief, right = torch.sigmoid(margin.abs()), (margin > 0).float()
    bins = (belief * 10).floor()
    gaps = [
        (bins == b).float().mean() * (belief[bins == b].mean() - right[bins == b].mean()).abs()
        for b in set(bins.tolist())
    ]
    assert len(gaps) > 1
    assert metrics["val/ece"] == pytest.approx(float(sum(gaps)), abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (PlackettLuce(), [{"prompt": "the", "completions": ["good", "bad film", "dull"], "ranks": [1, 3, 2]}] * 3),
        (Regression(), [{"prompt": "the", "completion": "good " * n, "rating": 0.1 * n} for n in range(1, 5)]),
    ],
)
def test_the_loss_decides_which_records_are_read(loss, rows, tiny_model, write_jsonl, tmp_path):
    module = RewardModule(ModelSpec(path=str(tiny_model)), loss=loss, optimizer=frozen)
    trainer = fit(module, tmp_path, data={"train": write_jsonl("rows.jsonl", rows), "batch_size": 4})
    assert math.isfinite(trainer.callback_metrics["train/loss"].item())
    assert "val/ece" not in trainer.callback_metrics


def test_normalised_scores_have_mean_0_and_deviation_1_and_survive_the_export(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("pairs.jsonl", records("reward"))
    module = RewardModule(
        ModelSpec(path=str(tiny_model)), normalise_on="val", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 4}, max_epochs=2)

    def scores_of(model):
        return torch.cat([model(side) for b in trainer.datamodule.val_dataloader() for side in (b.chosen, b.rejected)])

    scores = scores_of(module).detach()
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    again = load_scalar_model(ModelSpec(path=str(module.export(tmp_path / "hf")))).eval()
    torch.testing.assert_close(scores_of(again).detach(), scores, rtol=1e-5, atol=1e-5)


def test_normalising_on_validation_data_that_is_not_there_says_so(tiny_model, write_jsonl, tmp_path):
    module = RewardModule(ModelSpec(path=str(tiny_model)), normalise_on="val", optimizer=frozen)
    with pytest.raises(UserError, match=r"normalise_on: val, but there is no validation data"):
        fit(module, tmp_path, data={"train": write_jsonl("pairs.jsonl", records("reward"))})


def test_it_learns_to_tell_good_from_bad(tiny_model, write_jsonl, tmp_path):
    rows = [
        {"prompt": "the film was", "chosen": f"{extra} good", "rejected": f"{extra} bad"}
        for extra in ("very", "not dull but", "long and", "short and", "great and very")
    ]
    path = write_jsonl("pairs.jsonl", rows)
    module = RewardModule(
        ModelSpec(path=str(tiny_model)), loss=BradleyTerry(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 5}, max_epochs=15)
    assert trainer.callback_metrics["val/accuracy"].item() == 1.0


# --- steps

STEPS = [
    {"prompt": "the film was", "completions": [f"{extra} good", f"{extra} bad"], "labels": [True, False]}
    for extra in ("very", "not dull but", "long and", "short and")
]
STEPS += [{"prompt": "the plot", "completions": ["bad actors", "good end", "very good"], "labels": [0, None, 1]}]


def fit_steps(tiny_model, write_jsonl, tmp_path, optimizer, **trainer):
    path = write_jsonl("steps.jsonl", STEPS)
    module = RewardModule(ModelSpec(path=str(tiny_model)), StepCorrectness(), "steps", optimizer=optimizer, seed=1)
    return module, fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 2}, **trainer)


def test_metrics_of_steps_by_hand(tiny_model, write_jsonl, tmp_path):
    module, trainer = fit_steps(tiny_model, write_jsonl, tmp_path, frozen)
    scores, labels = [], []
    for batch in trainer.datamodule.val_dataloader():
        ends = batch.completions.mask
        scores += module(batch.completions)[ends].tolist()
        labels += batch.step_labels[ends].tolist()
    assert len(scores) == 10  # of eleven steps one is not labelled
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    losses = [math.log1p(math.exp(-s if y else s)) for s, y in zip(scores, labels, strict=True)]
    right = [(s > 0) == bool(y) for s, y in zip(scores, labels, strict=True)]
    assert metrics["val/loss"] == pytest.approx(sum(losses) / 10, abs=1e-6)
    assert metrics["val/accuracy"] == pytest.approx(sum(right) / 10)
    assert metrics["val/score_mean"] == pytest.approx(sum(scores) / 10, abs=1e-6)
    assert 0 <= metrics["val/ece"] <= 1


def test_it_learns_which_steps_are_right(tiny_model, write_jsonl, tmp_path):
    _, trainer = fit_steps(tiny_model, write_jsonl, tmp_path, lambda p: torch.optim.AdamW(p, lr=1e-2), max_epochs=15)
    assert trainer.callback_metrics["val/accuracy"].item() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": StepCorrectness()}, r"pooling='last': StepCorrectness judges each step: set pooling: steps"),
        ({"pooling": "steps"}, r"pooling='steps': BradleyTerry compares whole answers: use last or mean, or the loss "),
        (
            {"loss": StepCorrectness(), "pooling": "steps", "normalise_on": "val"},
            r"normalise_on='val': scores of StepCorrectness are log-odds, which a shift would change: leave it out",
        ),
    ],
)
def test_steps_and_whole_answers_do_not_mix(options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        RewardModule(ModelSpec(path=str(tiny_model)), **options)


def test_a_label_that_is_no_probability_is_named(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("steps.jsonl", [{"prompt": "the", "completions": ["film", "end"], "labels": [1, -1]}])
    module = RewardModule(ModelSpec(path=str(tiny_model)), StepCorrectness(), "steps", optimizer=frozen)
    with pytest.raises(UserError, match=r"steps.jsonl, line 1: labels\[1\] is -1, and a step is right with a prob"):
        fit(module, tmp_path, data={"train": path})
