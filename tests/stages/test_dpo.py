"""DPO: numbers by hand, references of every kind, and what is refused."""

import json
import math
import warnings

import pytest
import torch
from fits import fit
from lightning.pytorch.callbacks import LambdaCallback
from one_step import another, records

from rlhf_lightning.__main__ import main
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_batch import AOT, BetaDPO
from rlhf_lightning.losses.preference_free import ORPO, SimPO
from rlhf_lightning.losses.preference_guarded import TDPO
from rlhf_lightning.losses.preference_mixed import RPO, TPO
from rlhf_lightning.losses.preference_pointwise import BCOPair
from rlhf_lightning.losses.preference_ranked import ListwiseDPO
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import MeasuredReference, ReferenceSync
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.stages import DPOModule


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def moving(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def module(model, loss=DPO(), lora=None, **more):
    return DPOModule(ModelSpec(path=str(model), lora=lora), loss, **{"optimizer": frozen, **more})


@pytest.fixture
def path(write_jsonl):
    return write_jsonl("pairs.jsonl", records("dpo"))


@pytest.fixture
def batch(path, tiny_model):
    [batch] = RLHFDataModule(path, batch_size=12).setup_for("pairs", str(tiny_model)).train_dataloader()
    return batch


def by_hand(spec, side):
    """log-probabilities of the whole vocabulary, and of the completions' tokens, from the logits [rows, time - 1]."""
    logits = load_policy(spec).causal_lm(input_ids=side.tokens, attention_mask=side.attention_mask).logits
    everything = logits[:, :-1].log_softmax(-1).detach()
    return everything, torch.where(side.mask[:, 1:], everything.gather(-1, side.tokens[:, 1:, None])[..., 0], 0.0)


@pytest.mark.parametrize("cached", [False, True])
def test_metrics_by_hand(tiny_model, path, batch, tmp_path, cached):
    dpo = module(
        tiny_model,
        RPO(DPO(beta=0.5), nll_coef=0.3, average="token_mean"),
        reference=another(str(tiny_model)),
        reference_cache=str(tmp_path / "cache") if cached else None,
    )
    data = {"train": path, "val": path, "batch_size": 5, "eval_batch_size": 7}
    trainer = fit(dpo, tmp_path, data=data, accumulate_grad_batches=3)

    spec, other = ModelSpec(path=str(tiny_model)), another(str(tiny_model))
    totals, ref, tokens, kls = [], [], [], []
    for side in (batch.chosen, batch.rejected):
        (p, logprobs), (q, ref_logprobs) = by_hand(spec, side), by_hand(other, side)
        totals.append(logprobs.sum(-1))
        ref.append(ref_logprobs.sum(-1))
        tokens.append(logprobs[side.mask[:, 1:]])
        kls.append((p.exp() * (p - q)).sum(-1)[side.mask[:, 1:]])
    moved = [total - before for total, before in zip(totals, ref, strict=True)]
    h = moved[0] - moved[1]
    nll = -tokens[0].mean()
    expected = {
        "loss": torch.log1p(torch.exp(-0.5 * h)).mean() + 0.3 * nll,
        "rewards/chosen": 0.5 * moved[0].mean(),
        "rewards/rejected": 0.5 * moved[1].mean(),
        "rewards/margins": 0.5 * h.mean(),
        "rewards/accuracies": (h > 0).float().mean(),
        "logps/chosen": totals[0].mean(),
        "logps/rejected": totals[1].mean(),
        "logps/chosen_nll": nll,
        "displacement/chosen": moved[0].mean(),
        "displacement/rejected": moved[1].mean(),
        "displacement/fell_frac": (moved[0] < 0).float().mean(),
    }
    assert 0 < expected["rewards/accuracies"] < 1
    assert 0 < expected["displacement/fell_frac"] < 1
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    for name, value in expected.items():
        trained = "train/loss" if name == "loss" else name
        assert metrics[trained] == pytest.approx(value.item(), rel=1e-4), trained
        evaluated = f"val/{name.replace('/', '_')}"
        assert metrics[evaluated] == pytest.approx(value.item(), rel=1e-4), evaluated
    assert ("val/kl" in metrics) != cached  # what was measured beforehand is not the whole distribution
    if not cached:
        assert metrics["val/kl"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_at_the_start_the_loss_is_log_2_and_nothing_has_moved(tiny_model, path, tmp_path, lora):
    trainer = fit(module(tiny_model, lora=lora), tmp_path, data={"train": path, "val": path, "batch_size": 12})
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/margins", "displacement/chosen", "val/kl"):
        assert metrics[name] == pytest.approx(0, abs=1e-5)
    assert metrics["val/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_it_learns_to_prefer_what_was_preferred(tiny_model, write_jsonl, tmp_path):
    rows = [
        {"prompt": "the film was", "chosen": f"{extra} good", "rejected": f"{extra} bad"}
        for extra in ("very", "not dull but", "long and", "short and", "great and very")
    ]
    path = write_jsonl("pairs.jsonl", rows)
    dpo = module(tiny_model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer = fit(dpo, tmp_path, data={"train": path, "val": path, "batch_size": 5}, max_epochs=15)
    assert trainer.callback_metrics["val/rewards_accuracies"].item() == 1.0
    assert trainer.callback_metrics["val/loss"].item() < 0.5
    again = load_policy(ModelSpec(path=str(dpo.export(tmp_path / "hf"))))
    for mine, theirs in zip(again.parameters(), dpo.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_a_loss_of_rankings_refuses_is_said(tiny_model, write_jsonl, tmp_path, capsys):
    options = [f"--model.policy.path={tiny_model}", "--model.loss=ListwiseDPO", "--model.loss.beta=-1"]
    command = ["fit", "--model=DPOModule", *options, f"--data.train={write_jsonl('r.jsonl', records('dpo, ranked'))}"]
    assert main([*command, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 2
    assert "error: command line: beta=-1.0 would not prefer" in capsys.readouterr().err


def test_rankings_by_hand(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("ranked.jsonl", records("dpo, ranked"))
    dpo = module(tiny_model, ListwiseDPO(beta=0.5), reference=another(str(tiny_model)))
    trainer = fit(dpo, tmp_path, data={"train": path, "val": path, "batch_size": 5}, accumulate_grad_batches=3)
    data = RLHFDataModule(path, batch_size=12).setup_for("ranked", str(tiny_model))
    [batch] = data.train_dataloader()
    logprobs, ref = (
        by_hand(spec, batch.completions)[1].sum(-1)
        for spec in (ModelSpec(path=str(tiny_model)), another(str(tiny_model)))
    )
    rewards = 0.5 * (logprobs - ref)
    losses, right = [], []
    for prompt in range(12):
        own = [i for i in range(len(rewards)) if batch.groups[i] == prompt]
        behind = {i: [j for j in own if batch.ranks[j] > batch.ranks[i]] for i in own}
        losses.append(sum(torch.logsumexp(rewards[[i, *behind[i]]], 0) - rewards[i] for i in own))
        right.append(torch.tensor([float(rewards[i] > rewards[j]) for i in own for j in behind[i]]).mean())
    metrics = trainer.callback_metrics
    for name in ("train/loss", "val/loss"):
        assert metrics[name].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert metrics["rewards/accuracies"].item() == pytest.approx(torch.stack(right).mean().item())
    assert dpo.predict_step(batch, 0).tolist() == pytest.approx(rewards.tolist(), rel=1e-4)


def test_a_gold_answer_by_hand(tiny_model, write_jsonl, tmp_path):
    """TPO: the mean over all gold tokens of the step, whatever the micro-batches."""
    path = write_jsonl("triples.jsonl", records("dpo, triples"))
    dpo = module(tiny_model, TPO(DPO(beta=0.5), nll_coef=0.3), reference=another(str(tiny_model)))
    trainer = fit(dpo, tmp_path, data={"train": path, "val": path, "batch_size": 5}, accumulate_grad_batches=3)
    [batch] = RLHFDataModule(path, batch_size=12).setup_for("triples", str(tiny_model)).train_dataloader()
    policy, reference = ModelSpec(path=str(tiny_model)), another(str(tiny_model))
    chosen, rejected = (
        by_hand(policy, side)[1].sum(-1) - by_hand(reference, side)[1].sum(-1)
        for side in (batch.chosen, batch.rejected)
    )
    nll = -by_hand(policy, batch.gold)[1].sum().item() / batch.gold.mask.sum().item()
    loss = torch.log1p(torch.exp(-0.5 * (chosen - rejected))).mean().item() + 0.3 * nll
    metrics = trainer.callback_metrics
    for name, value in (("loss", loss), ("logps_gold_nll", nll)):
        in_training = "train/loss" if name == "loss" else "logps/gold_nll"
        assert metrics[in_training].item() == pytest.approx(value, rel=1e-4), name
        assert metrics[f"val/{name}"].item() == pytest.approx(value, rel=1e-4), name


# --- references


@pytest.mark.parametrize("loss", [SimPO(gamma=0.5), ORPO()])
def test_losses_that_need_no_reference_build_none(tiny_model, path, tmp_path, loss):
    dpo = module(tiny_model, loss)
    trainer = fit(dpo, tmp_path, data={"train": path, "val": path, "batch_size": 12})
    assert dpo.reference is None
    assert not any(name.startswith(("displacement", "val/displacement", "val/kl")) for name in trainer.callback_metrics)
    assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_an_adapter_that_is_off_is_the_reference(tiny_model, path, tmp_path):
    dpo = module(tiny_model, lora=LoraSpec(r=2), optimizer=moving)
    fit(dpo, tmp_path, data={"train": path, "batch_size": 4})
    assert dpo.reference.shared
    assert dpo.reference.policy is dpo.policy


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_reference_follows_after_every_second_step(tiny_model, path, tmp_path, share):
    dpo = module(tiny_model, optimizer=moving, reference_sync=ReferenceSync(every=2, share=share))
    seen = []

    def remember(trainer, module, *_):
        seen.append([[p.detach().clone() for p in m.parameters()] for m in (module.policy, module.reference.policy)])

    fit(
        dpo,
        tmp_path,
        data={"train": path, "batch_size": 4},
        callbacks=[LambdaCallback(on_train_batch_end=remember, on_train_start=lambda t, m: remember(t, m))],
    )
    start, first, second, third = seen
    for i in range(len(start[1])):
        assert torch.equal(start[1][i], first[1][i])
        torch.testing.assert_close(second[1][i], share * second[0][i] + (1 - share) * start[1][i])
        assert torch.equal(third[1][i], second[1][i])
    assert not all(torch.equal(a, b) for a, b in zip(third[0], third[1], strict=True))


def test_a_cached_reference_is_no_second_model(tiny_model, path, tmp_path):
    dpo = module(tiny_model, reference_cache=str(tmp_path / "cache"))
    trainer = fit(dpo, tmp_path, data={"train": path, "batch_size": 12})
    assert isinstance(dpo.reference, MeasuredReference)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    rows = records("dpo")
    rows[0]["chosen"] = "dull"
    with open(path, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"was measured with something else: the records of its sources have changed"):
        fit(module(tiny_model, reference_cache=str(tmp_path / "cache")), tmp_path, data={"train": path})


# --- losses that look beyond their pair


def test_beta_dpo_reads_the_mean_of_the_whole_step_before_it_is_trained_on(tiny_model, path, batch, tmp_path):
    loss = BetaDPO(beta=0.5, alpha=0.6, decay=0.9)
    dpo = module(tiny_model, loss, reference=another(str(tiny_model)))
    data = {"train": path, "batch_size": 5}
    trainer = fit(dpo, tmp_path, data=data, accumulate_grad_batches=3, max_epochs=2)
    h = dpo(batch).log_ratio.detach()
    margin = 0.5 * h.mean()
    beta = 0.5 * (1 + 0.6 * (margin - 0.1 * margin))  # the second step: M_0 holds a tenth of the first
    assert beta.item() > 1e-3
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
        torch.log1p(torch.exp(-beta * h)).mean().item(), rel=1e-4
    )
    assert float(dpo.objective.running["margin"]) == pytest.approx((0.9 * 0.1 + 0.1) * margin.item(), rel=1e-4)


def test_the_shift_of_bco_moves_after_the_step(tiny_model, path, batch, tmp_path):
    dpo = module(tiny_model, BCOPair(beta=0.5, shift_decay=0.5), reference=another(str(tiny_model)))
    data = {"train": path, "val": path, "batch_size": 4}
    trainer = fit(dpo, tmp_path, data=data, accumulate_grad_batches=3, max_epochs=2)
    scored = dpo(batch)
    chosen, rejected = 0.5 * scored.chosen.log_ratio.detach(), 0.5 * scored.rejected.log_ratio.detach()
    shift = 0.5 * (chosen + rejected).mean() / 2
    expected = torch.log1p(torch.exp(-(chosen - shift))) + torch.log1p(torch.exp(rejected - shift))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_loss_that_sorts_says_that_the_cut_matters(tiny_model, path, tmp_path):
    dpo = module(tiny_model, AOT())
    dpo._trainer = type("Cut", (), {"accumulate_grad_batches": 2, "world_size": 1})()
    dpo.configure_model()
    with pytest.warns(UserWarning, match=r"AOT compares the pairs of one micro-batch of one rank: cut into 2"):
        dpo.on_fit_start()
    dpo._trainer.accumulate_grad_batches = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dpo.on_fit_start()


# --- what is refused


def test_references_that_exclude_one_another(tiny_model):
    with pytest.raises(UserError, match=r"reference_cache='x' keeps what it said at the start: give one of them"):
        module(tiny_model, reference_sync=ReferenceSync(), reference_cache="x")
    with pytest.raises(UserError, match=r"TDPO reads the KL over the whole vocabulary, and reference_cache='x' keeps"):
        module(tiny_model, TDPO(), reference_cache="x")


def test_a_reference_that_the_loss_does_not_read_does_nothing(tiny_model):
    free = module(tiny_model, ORPO(), reference=ModelSpec(path="other"), reference_sync=ReferenceSync(every=3))
    assert dict(free.inert_options()).keys() == {"reference", "reference_sync"}
    assert "the loss ORPO needs no reference" in dict(free.inert_options()).values()
    assert dict(module(tiny_model, ORPO(), reference_cache="x").inert_options()).keys() == {"reference_cache"}
    assert dict(module(tiny_model, reference_cache="x").inert_options()) == {}
    assert dict(module(tiny_model, ListwiseDPO(), share_prompts=True).inert_options()).keys() == {"share_prompts"}


def test_a_margin_that_no_record_has(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("pairs.jsonl", [{k: v for k, v in row.items() if k != "margin"} for row in records("dpo")])
    with pytest.raises(UserError, match=r"the loss reads the column `margin`, which no record here has"):
        fit(module(tiny_model, DPO(margin="offset")), tmp_path, data={"train": path})
