import logging

import pytest
import torch
from fits import fit
from one_step import another, records, step

from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.unpaired import BCO, KTO, APOZeroUnpaired
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.stages import KTOModule
from rlhf_lightning.stages.kto import RewardMean

GOOD = {"prompt": "the film was", "completion": "very good", "label": True}
BAD = {"prompt": "a plot", "completion": "was dull", "label": False}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def module(model, loss=KTO(), **more):
    return KTOModule(ModelSpec(path=str(model)), loss, **{"optimizer": sgd, **more})


def log_ratios_by_hand(model, batch):
    """log pi - log pi_ref of every row from the logits of both models."""
    totals = []
    for spec in (ModelSpec(path=str(model)), another(str(model))):
        logits = load_policy(spec).causal_lm(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
        totals.append(torch.where(batch.mask[:, 1:], logprobs, 0.0).sum(-1).detach())
    return totals[0], totals[0] - totals[1]


@pytest.fixture
def unpaired(write_jsonl):
    return write_jsonl("kto.jsonl", records("kto"))


@pytest.fixture
def batch(unpaired, tiny_model):
    [batch] = RLHFDataModule(unpaired, batch_size=12).setup_for("mismatched", str(tiny_model)).train_dataloader()
    return batch


def test_metrics_by_hand(tiny_model, unpaired, batch, tmp_path):
    loss = KTO(beta=0.2, undesirable_weight=1.5)
    kto = module(tiny_model, loss, reference=another(str(tiny_model)))
    data = {"train": unpaired, "val": unpaired, "batch_size": 5, "eval_batch_size": 7}
    trainer = fit(kto, tmp_path, data=data, accumulate_grad_batches=3)
    logps, ratios = log_ratios_by_hand(tiny_model, batch.completions)
    _, mismatched = log_ratios_by_hand(tiny_model, batch.mismatched)
    kl, good = mismatched.mean(), batch.labels
    assert kl > 0.1
    value = torch.where(good, 1 - torch.sigmoid(0.2 * (ratios - kl)), 1.5 * (1 - torch.sigmoid(0.2 * (kl - ratios))))
    chosen, rejected = 0.2 * ratios[good].mean(), 0.2 * ratios[~good].mean()
    expected = {
        "train/loss": value.mean(),
        "train/sequences": 12,
        "train/desirable_frac": 8 / 12,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[good].mean(),
        "logps/rejected": logps[~good].mean(),
        "kl/mismatched": kl,
        "val/loss": value.mean(),
        "val/rewards_chosen": chosen,
        "val/rewards_rejected": rejected,
        "val/rewards_margins": chosen - rejected,
        "val/kl": kl,
    }
    assert trainer.callback_metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(value), rel=1e-4), name


def test_the_kl_is_never_negative(tiny_model, unpaired, batch, tmp_path):
    """Policy and reference the other way round, a bit: the estimate of a KL from few samples may be below 0."""
    kto = KTOModule(another(str(tiny_model)), reference=ModelSpec(path=str(tiny_model)), optimizer=sgd)
    metrics = fit(kto, tmp_path, data={"train": unpaired, "batch_size": 12}).callback_metrics
    _, mismatched = log_ratios_by_hand(tiny_model, batch.mismatched)
    assert float(metrics["kl/mismatched"]) == max(0.0, -float(mismatched.mean())) == 0.0


def test_a_step_without_one_kind_logs_no_mean_of_it(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("kto.jsonl", [GOOD, BAD])
    data = {"train": path, "batch_size": 1, "shuffle": False}
    metrics = fit(module(tiny_model), tmp_path, data=data, max_steps=1).callback_metrics
    assert metrics["train/desirable_frac"] == 1
    assert "rewards/chosen" in metrics
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & set(metrics)


def test_a_batch_of_one_has_a_kl_of_its_own(tiny_model, write_jsonl, tmp_path):
    """The mismatched completion comes from the data set, not from the batch."""
    path = write_jsonl("kto.jsonl", [GOOD, BAD])
    kto = module(tiny_model, reference=another(str(tiny_model)))
    metrics = fit(kto, tmp_path, data={"train": path, "batch_size": 1}, max_steps=1).callback_metrics
    assert "kl/mismatched" in metrics


@pytest.mark.parametrize("balanced", [True, False])
def test_the_shift_of_bco_is_the_mean_reward_of_the_steps_before(tiny_model, unpaired, batch, tmp_path, balanced):
    bco = module(tiny_model, BCO(beta=0.2, balanced_shift=balanced), reference=another(str(tiny_model)))
    trainer = fit(bco, tmp_path, data={"train": unpaired, "batch_size": 5}, accumulate_grad_batches=3, max_epochs=2)
    _, ratios = log_ratios_by_hand(tiny_model, batch.completions)
    rewards, good = 0.2 * ratios, batch.labels
    expected = (rewards[good].mean() + rewards[~good].mean()) / 2 if balanced else rewards.mean()
    assert float(trainer.callback_metrics["rewards/shift"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_mean_reward_counts_every_rank_and_nothing_before_its_step_is_over():
    rewards, labels = torch.tensor([4.0, 2.0, -1.0]), torch.tensor([True, True, False])
    mean = RewardMean()
    mean.add(rewards[:1], labels[:1])
    mean.add(rewards[1:], labels[1:])
    assert mean.mean(balanced=True) == mean.mean(balanced=False) == 0.0
    mean.take(lambda sums: sums + torch.tensor([0.0, 0.0, -5.0, 2.0]))  # the other rank's undesirable completions
    assert mean.sums == [6.0, 2.0, -6.0, 3.0]
    assert mean.mean(balanced=True) == (3.0 - 2.0) / 2
    assert mean.mean(balanced=False) == 0.0
    mean.add(torch.tensor([5.0]), torch.tensor([True]))
    mean.take(lambda sums: sums)
    assert mean.mean(balanced=False) == pytest.approx(5 / 6)


def test_predictions_are_rewards(tiny_model, batch):
    kto = module(tiny_model, KTO(beta=0.2), reference=another(str(tiny_model)))
    kto.configure_model()
    _, ratios = log_ratios_by_hand(tiny_model, batch.completions)
    torch.testing.assert_close(kto.predict_step(batch, 0).detach(), 0.2 * ratios, rtol=1e-4, atol=1e-5)


def test_apo_zero_measures_no_kl(tiny_model, unpaired, tmp_path):
    apo = module(tiny_model, APOZeroUnpaired())
    metrics = fit(apo, tmp_path, data={"train": unpaired, "val": unpaired, "batch_size": 12}).callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(0.5)
    assert not [name for name in metrics if "kl" in name or "shift" in name]


def test_a_lora_policy_is_its_own_reference(tiny_model, write_jsonl):
    path = write_jsonl("kto.jsonl", records("kto"))
    metrics, gradients = step(
        "kto", str(tiny_model), path, spec={"lora": LoraSpec(r=2)}, attributes={"reference_spec": None}
    )
    assert float(metrics["train/loss"]) == pytest.approx((8 + 1.5 * 4) / 12 / 2)
    assert all("lora" in name for name in gradients)


def test_it_learns_to_tell_good_from_bad(tiny_model, write_jsonl, tmp_path):
    made = [
        {"prompt": f"the {noun}", "completion": f"was {word}", "label": word in ("good", "great")}
        for noun in ("film", "plot", "end", "actors")
        for word in ("good", "great", "bad", "dull")
    ]
    kto = module(tiny_model, KTO(beta=0.5), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    path = write_jsonl("kto.jsonl", made)
    metrics = fit(kto, tmp_path, data={"train": path, "val": path, "batch_size": 8}, max_epochs=10).callback_metrics
    assert metrics["val/rewards_chosen"] > 0 > metrics["val/rewards_rejected"]
    assert metrics["val/loss"] < 0.35


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (True, r"data.train: all its 2 records are desirable \(label\).*or use SFTModule"),
        (False, r"data.train: all its 2 records are undesirable \(label\).*give records of both kinds"),
    ],
)
def test_records_of_one_kind_are_refused(tiny_model, write_jsonl, tmp_path, label, message):
    path = write_jsonl("kto.jsonl", [GOOD | {"label": label}, BAD | {"label": label}])
    with pytest.raises(ValueError, match=message):
        fit(module(tiny_model), tmp_path, data={"train": path})


def test_weights_far_from_what_the_paper_asks_for_are_spoken_of(tiny_model, unpaired, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fit(module(tiny_model), tmp_path, data={"train": unpaired}, max_steps=1)
    assert "8 desirable and 4 undesirable records with weights 1 and 1" in caplog.text
    assert "desirable_weight from 0.5 to 0.667" in caplog.text
    caplog.clear()
    fit(module(tiny_model, KTO(desirable_weight=0.6)), tmp_path, data={"train": unpaired}, max_steps=1)
    assert "desirable_weight" not in caplog.text
