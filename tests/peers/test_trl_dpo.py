"""Our preference losses against TRL's DPOTrainer, CPOTrainer and ORPOTrainer, on the same tiny weights and records:
loss and gradient, twenty optimiser steps, and where the two differ on purpose."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from fits import fit
from one_step import another
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_peers import assert_same_loss_and_gradients, options, our_loss, twenty_steps

from rlhf_lightning.core.batches import PairBatch, concatenate_rows
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.divergence import AlphaDivergence, ForwardKL, JensenShannon
from rlhf_lightning.losses.preference import (
    DPO,
    IPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    LengthNormalisedDPO,
    RobustDPO,
)
from rlhf_lightning.losses.preference_batch import AOT, AOTUnpaired
from rlhf_lightning.losses.preference_free import CPO, ORPO, AlphaPO, ChosenNLL, SimPO
from rlhf_lightning.losses.preference_length import LDDPO
from rlhf_lightning.losses.preference_mixed import RPO, WPO, WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_pointwise import APODown, APOZero, BCOPair, NCAPair, SPPOHard
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import BEMA, ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import DPOModule

PAIRS = [
    {"prompt": "the film was", "chosen": " very good", "rejected": " bad"},
    {"prompt": "a", "chosen": " great plot and actors", "rejected": " dull but not long"},
    {"prompt": "the actors", "chosen": " good", "rejected": " was not very very good"},
    {"prompt": "the end was", "chosen": " short and great but not dull", "rejected": " long"},
]
PLAIN = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None}
PLAIN |= {"use_weighting": False, "loss_weights": [1.0], "f_alpha_divergence_coef": 0.5}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def beside(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """TRL's trainer, its batch, our stage and our batch, of the same weights, reference and records; built once."""
    folder = tmp_path_factory.mktemp("beside")
    ours = DPOModule(ModelSpec(path=str(tiny_model)), reference=another(str(tiny_model)))
    ours.configure_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = their_trainer(tiny_model, folder, use_weighting=True)
    path = folder / "pairs.jsonl"
    Dataset.from_list(PAIRS).to_json(path)
    return SimpleNamespace(
        theirs=theirs, inputs=their_inputs(our_pairs(tiny_model, path)), ours=ours, batch=our_pairs(tiny_model, path)
    )


def their_trainer(model: Any, folder: Any, optimizer: Any = None, **more: Any) -> DPOTrainer:
    policy = AutoModelForCausalLM.from_pretrained(model)
    return DPOTrainer(
        model=policy,
        ref_model=load_policy(another(str(model))).causal_lm.eval(),
        args=options(DPOConfig, folder, rows=4, max_length=64, **more),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(model),
        optimizers=(None, None) if optimizer is None else (optimizer(policy.parameters()), None),
    )


def our_pairs(model: Any, path: Any) -> PairBatch:
    data = RLHFDataModule(str(path), batch_size=4, max_length=64, shuffle=False)
    [batch] = list(data.setup_for("pairs", str(model)).train_dataloader())
    return batch


def their_inputs(batch: PairBatch) -> dict[str, Tensor]:
    """Our batch as their collator would make it."""
    rows = concatenate_rows((batch.chosen, batch.rejected), pad_id=0)
    names = {"input_ids": rows.tokens, "attention_mask": rows.attention_mask, "completion_mask": rows.mask}
    return {name: value.long() for name, value in names.items()}


def set_up(theirs: DPOTrainer, loss_type: str | list[str], **more: Any) -> None:
    theirs.loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    theirs.args.discopop_tau = more.pop("discopop_tau", 0.05)
    for name, value in (PLAIN | {"loss_weights": [1.0] * len(theirs.loss_types)} | more).items():
        setattr(theirs, name, value)


def test_both_read_the_same_tokens(beside):
    [theirs] = list(beside.theirs.get_eval_dataloader(beside.theirs.train_dataset))
    for name, value in beside.inputs.items():
        assert torch.equal(theirs[name], value), name


# --- DPOTrainer: all fifteen loss types, four divergences, the options that go with any of them

SAME = {
    "sigmoid": (DPO(), {"loss_type": "sigmoid"}),
    "hinge": (Hinge(beta=0.7), {"loss_type": "hinge", "beta": 0.7}),
    "ipo": (IPO(beta=0.3, log_ratio="token_mean"), {"loss_type": "ipo", "beta": 0.3}),
    "exo_pair": (EXOPair(label_smoothing=1e-3), {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    "nca_pair": (NCAPair(), {"loss_type": "nca_pair"}),
    "robust": (RobustDPO(label_smoothing=0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
    "bco_pair": (BCOPair(), {"loss_type": "bco_pair"}),
    "sppo_hard": (SPPOHard(), {"loss_type": "sppo_hard"}),
    "aot": (AOT(), {"loss_type": "aot"}),
    "aot, label_smoothing": (AOT(label_smoothing=0.2), {"loss_type": "aot", "label_smoothing": 0.2}),
    "aot_unpaired": (AOTUnpaired(label_smoothing=0.1), {"loss_type": "aot_unpaired", "label_smoothing": 0.1}),
    "apo_zero": (APOZero(), {"loss_type": "apo_zero"}),
    "apo_down": (APODown(), {"loss_type": "apo_down"}),
    "discopop": (DiscoPOP(), {"loss_type": "discopop"}),
    "discopop, tau": (DiscoPOP(temperature=0.5), {"loss_type": "discopop", "discopop_tau": 0.5}),
    "sft": (ChosenNLL(), {"loss_type": "sft"}),
    "sigmoid_norm": (LengthNormalisedDPO(beta=5.0), {"loss_type": "sigmoid_norm", "beta": 5.0}),
    "sigmoid + sft": (
        RPO(DPO(), nll_coef=0.3, average="token_mean"),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ),
    "mpo": (
        WeightedLosses([WeightedLoss(DPO(), 0.8), WeightedLoss(BCOPair(), 0.2), WeightedLoss(ChosenNLL(), 1.0)]),
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}
DIVERGENCES = {
    "forward_kl": (ForwardKL(), {}),
    "js_divergence": (JensenShannon(), {}),
    "alpha_divergence": (AlphaDivergence(0.3), {"f_alpha_divergence_coef": 0.3}),
}
WITH_DIVERGENCE = {
    "sigmoid": DPO(),
    "hinge": Hinge(),
    "ipo": IPO(),
    "exo_pair": EXOPair(),
    "robust": RobustDPO(),
    "discopop": DiscoPOP(),
    "sigmoid_norm": LengthNormalisedDPO(beta=0.1),
}
for kind, loss in WITH_DIVERGENCE.items():
    for divergence, (ours, coef) in DIVERGENCES.items():
        smoothing = {"label_smoothing": loss.label_smoothing} if kind in ("exo_pair", "robust") else {}
        theirs = {"loss_type": kind, "f_divergence_type": divergence, **coef, **smoothing}
        SAME[f"{kind}, {divergence}"] = (replace(loss, divergence=ours), theirs)
for kind, loss in {"sigmoid": DPO(), "ipo": IPO(), "hinge": Hinge(), "apo_zero": APOZero()}.items():
    SAME[f"{kind}, ld_alpha"] = (LDDPO(alpha=0.4, loss=loss), {"loss_type": kind, "ld_alpha": 0.4})
    if kind != "hinge":  # theirs has no gradient, see below
        SAME[f"{kind}, use_weighting"] = (WPO(loss), {"loss_type": kind, "use_weighting": True})


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient(beside, name):
    loss, settings = SAME[name]
    set_up(beside.theirs, **settings)
    theirs = beside.theirs.compute_loss(beside.theirs.model, beside.inputs)
    ours = our_loss(beside.ours, loss, beside.batch)
    assert_same_loss_and_gradients(ours, theirs, beside.ours.policy, beside.theirs.model)


def test_every_loss_type_is_among_them():
    kinds = {kind for _, settings in SAME.values() for kind in [settings["loss_type"]] if isinstance(kind, str)}
    assert len(kinds) == 15


# --- trajectories


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (DPO(beta=0.5), {"loss_type": ["sigmoid"], "beta": 0.5}),
        (IPO(beta=0.5), {"loss_type": ["ipo"], "beta": 0.5}),
        (
            RPO(DPO(), nll_coef=0.5, average="token_mean"),
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        ),
    ],
    ids=["sigmoid", "ipo", "sigmoid + sft"],
)
def test_twenty_steps(tiny_model, tmp_path, write_jsonl, loss, settings):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    theirs = their_trainer(
        tiny_model, tmp_path, optimizer=adamw, max_steps=20, lr_scheduler_type="constant", max_grad_norm=1.0, **settings
    )
    ours = DPOModule(ModelSpec(path=str(tiny_model)), loss, reference=another(str(tiny_model)), optimizer=adamw)
    twenty_steps(ours, theirs, tmp_path, write_jsonl("pairs.jsonl", PAIRS))


def test_twenty_steps_with_a_reference_that_follows_a_corrected_average(tiny_model, tmp_path, write_jsonl):
    """TRL's experimental DPOTrainer with its BEMACallback: losses, weights, and the reference's weights."""
    from trl.experimental.bema_for_ref_model import BEMACallback
    from trl.experimental.bema_for_ref_model import DPOTrainer as WithFollowing

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    average = {"ema_power": 0.6, "bias_power": 0.3, "lag": 3, "multiplier": 2.0, "min_ema_multiplier": 0.25}
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    schedule = {"max_steps": 20, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    theirs = WithFollowing(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        args=options(DPOConfig, tmp_path, rows=4, max_length=64, beta=0.5, **schedule),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        optimizers=(adamw(policy.parameters()), None),
    )
    follow = {"update_ref_model": True, "ref_model_update_freq": 6, "ref_model_update_after": 1}
    theirs.add_callback(BEMACallback(update_freq=3, update_after=1, **average, **follow))

    average["min_share"] = average.pop("min_ema_multiplier")
    sync = ReferenceSync(every=6, bema=BEMA(every=3, after=1, **average))
    ours = DPOModule(ModelSpec(path=str(tiny_model)), DPO(beta=0.5), reference_sync=sync, optimizer=adamw)
    twenty_steps(ours, theirs, tmp_path, write_jsonl("pairs.jsonl", PAIRS))
    moved, start = 0.0, AutoModelForCausalLM.from_pretrained(tiny_model)
    for (name, mine), other, before in zip(
        ours.reference.policy.causal_lm.named_parameters(),
        theirs.ref_model.parameters(),
        start.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, float((mine - before).abs().max()))
    assert moved > 5e-3


# --- CPOTrainer and ORPOTrainer


@pytest.fixture(scope="module")
def without_reference(tiny_model, tmp_path_factory, beside) -> SimpleNamespace:
    """TRL's trainers that know no reference, and our batch under their names."""
    folder = tmp_path_factory.mktemp("without")

    def trainer(cls: type, config: type, **more: Any) -> Any:
        return cls(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=options(config, folder, rows=4, max_length=64, **more),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpo = trainer(CPOTrainer, CPOConfig, loss_type="simpo", max_completion_length=64)
        orpo = trainer(ORPOTrainer, ORPOConfig, max_completion_length=64)
    inputs = {}
    for side in ("chosen", "rejected"):
        rows = getattr(beside.batch, side)
        inputs |= {
            f"{side}_input_ids": rows.tokens,
            f"{side}_attention_mask": rows.attention_mask.long(),
            f"{side}_labels": torch.where(rows.mask, rows.tokens, -100),
        }
    return SimpleNamespace(cpo=cpo, orpo=orpo, inputs=inputs)


WITHOUT_REFERENCE = {
    "simpo": (SimPO(beta=2.0, gamma=0.5), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
    "simpo, smoothed": (
        SimPO(beta=2.0, gamma_over_beta=0.25, label_smoothing=0.1),
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
    ),
    "alphapo": (
        AlphaPO(beta=2.5, alpha=0.25, gamma=0.1),
        {"loss_type": "simpo", "beta": 2.5, "alpha": 0.25, "simpo_gamma": 0.1},
    ),
    "alphapo, below 0": (
        AlphaPO(beta=2.5, alpha=-0.25, gamma=0.1),
        {"loss_type": "simpo", "beta": 2.5, "alpha": -0.25, "simpo_gamma": 0.1},
    ),
    "cpo": (CPO(nll_coef=1.0), {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "cpo, smoothed": (
        CPO(beta=0.3, label_smoothing=0.2, nll_coef=0.5),
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2, "cpo_alpha": 0.5},
    ),
    "cpo, hinge": (CPO(form="hinge", nll_coef=0.0), {"loss_type": "hinge"}),
    "cpo, ipo": (CPO(form="ipo", nll_coef=0.0), {"loss_type": "ipo"}),
    "cpo-simpo": (
        RPO(SimPO(beta=2.0, gamma=0.5), nll_coef=0.3, average="token_mean"),
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.3},
    ),
    "cpo-alphapo": (
        RPO(AlphaPO(beta=2.5, alpha=0.25, gamma=0.1), nll_coef=0.3, average="token_mean"),
        {"loss_type": "simpo", "beta": 2.5, "alpha": 0.25, "simpo_gamma": 0.1, "cpo_alpha": 0.3},
    ),
}
for form in ("sigmoid", "hinge", "ipo"):  # TRL's alpha bends the rewards of them all
    bent = CPO(beta=0.02, form=form, nll_coef=0.5, alpha=0.1)
    WITHOUT_REFERENCE[f"cpo, {form}, alpha"] = (
        bent,
        {"loss_type": form, "beta": 0.02, "alpha": 0.1, "cpo_alpha": 0.5},
    )


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_loss_and_gradient_without_a_reference(beside, without_reference, name):
    loss, settings = WITHOUT_REFERENCE[name]
    theirs = cpo_loss(without_reference, **settings)
    ours = our_loss(beside.ours, loss, beside.batch)
    assert_same_loss_and_gradients(ours, theirs, beside.ours.policy, without_reference.cpo.model)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (CPO(beta=0.3, nll_coef=0.5), {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.5}),
        (
            RPO(SimPO(beta=2.0, gamma=0.5), nll_coef=0.3, average="token_mean"),
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.3},
        ),
        (AlphaPO(beta=2.5, alpha=0.25, gamma=0.5), {"loss_type": "alphapo", "beta": 2.5, "alpha": 0.25}),
    ],
    ids=["cpo", "cpo-simpo", "alphapo"],
)
def test_twenty_steps_without_a_reference(tiny_model, tmp_path, write_jsonl, loss, settings):
    """From the same records: tokens, batches, loss, clipping and AdamW are each side's own."""

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    schedule = {"max_steps": 20, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    theirs = CPOTrainer(
        model=policy,
        args=options(CPOConfig, tmp_path, rows=4, max_length=64, **schedule, **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        optimizers=(adamw(policy.parameters()), None),
    )
    ours = DPOModule(ModelSpec(path=str(tiny_model)), loss, optimizer=adamw)
    twenty_steps(ours, theirs, tmp_path, write_jsonl("pairs.jsonl", PAIRS))


def cpo_loss(without_reference: SimpleNamespace, **settings: Any) -> Tensor:
    trainer = without_reference.cpo
    for name, value in ({"beta": 0.1, "alpha": 0.0, "label_smoothing": 0.0, "cpo_alpha": 0.0} | settings).items():
        setattr(trainer, name, value)
    return trainer.get_batch_loss_metrics(trainer.model, without_reference.inputs)[0]


# --- where we differ, and by how much


def log_ratios(beside) -> Tensor:
    return beside.ours(beside.batch).log_ratio.detach()


def test_their_sigmoid_ignores_label_smoothing_and_ours_is_conservative_dpo(beside):
    set_up(beside.theirs, "sigmoid", label_smoothing=0.3)
    theirs = beside.theirs.compute_loss(beside.theirs.model, beside.inputs).item()
    d = 0.1 * log_ratios(beside)
    plain = torch.log1p(torch.exp(-d)).mean().item()
    conservative = (0.7 * torch.log1p(torch.exp(-d)) + 0.3 * torch.log1p(torch.exp(d))).mean().item()
    assert theirs == pytest.approx(plain, rel=1e-5)
    assert our_loss(beside.ours, DPO(label_smoothing=0.3), beside.batch).item() == pytest.approx(conservative, rel=1e-5)
    assert abs(plain - conservative) > 1e-3


def test_their_ipo_is_per_token_and_ours_can_also_sum(beside):
    set_up(beside.theirs, "ipo", beta=0.3)
    theirs = beside.theirs.compute_loss(beside.theirs.model, beside.inputs).item()
    scored = beside.ours(beside.batch)
    h = scored.log_ratio.detach()
    per_token = scored.chosen.log_ratio / scored.chosen.lengths - scored.rejected.log_ratio / scored.rejected.lengths
    target = 1 / (2 * 0.3)
    assert theirs == pytest.approx((per_token - target).square().mean().item(), rel=1e-5)
    summed = our_loss(beside.ours, IPO(beta=0.3, log_ratio="sum"), beside.batch).item()
    assert summed == pytest.approx((h - target).square().mean().item(), rel=1e-5)
    assert summed > 2 * theirs


def test_their_sft_loss_averages_micro_batches_and_ours_tokens(beside):
    set_up(beside.theirs, "sft")
    halves = [slice(0, 2), slice(2, 4)]
    theirs = sum(
        beside.theirs.compute_loss(
            beside.theirs.model,
            {name: torch.cat([rows[:4][half], rows[4:][half]]) for name, rows in beside.inputs.items()},
        ).item()
        for half in halves
    )
    logprobs, mask = beside.ours(beside.batch).chosen.logprobs.detach(), beside.batch.chosen.mask
    logprobs = logprobs[:, : mask.shape[1]]
    of_halves = [-logprobs[half][mask[half]].mean().item() for half in halves]
    assert theirs / 2 == pytest.approx(sum(of_halves) / 2, rel=1e-5)
    ours = our_loss(beside.ours, ChosenNLL(), beside.batch).item()
    assert ours == pytest.approx(-logprobs[mask].mean().item(), rel=1e-5)
    assert abs(theirs / 2 - ours) > 1e-2


def test_their_orpo_also_trains_the_prompt(beside, without_reference):
    orpo = without_reference.orpo
    orpo.beta = 0.1
    theirs = orpo.get_batch_loss_metrics(orpo.model, without_reference.inputs)[0]
    ours = our_loss(beside.ours, ORPO(odds_coef=0.1), beside.batch)
    rows = beside.batch.chosen
    everything = replace(rows, mask=rows.attention_mask & (rows.positions > 0))
    logprobs = beside.ours.policy(everything).logprobs
    nll_of_all, nll_of_answers = (-logprobs[mask].mean() for mask in (everything.mask, rows.mask))
    assert abs(nll_of_all - nll_of_answers) > 1e-3
    assert theirs.item() == pytest.approx((ours - nll_of_answers + nll_of_all).item(), rel=1e-5)
    # with their likelihood in place of ours, all is the same
    assert_same_loss_and_gradients(ours - nll_of_answers + nll_of_all, theirs, beside.ours.policy, orpo.model)


def test_their_discopop_and_alphapo_overflow_where_ours_hold(beside, without_reference):
    set_up(beside.theirs, "discopop", beta=100.0)
    assert math.isnan(beside.theirs.compute_loss(beside.theirs.model, beside.inputs).item())
    assert our_loss(beside.ours, DiscoPOP(beta=100.0), beside.batch).isfinite()
    assert math.isnan(cpo_loss(without_reference, loss_type="simpo", beta=2.0, alpha=60.0, simpo_gamma=0.1).item())
    assert our_loss(beside.ours, AlphaPO(beta=2.0, alpha=60.0, gamma=0.1), beside.batch).isfinite()


def test_their_ties_are_errors_and_ours_count_half(tiny_model, write_jsonl, tmp_path, beside):
    set_up(beside.theirs, "sigmoid")
    kept, beside.theirs.ref_model = beside.theirs.ref_model, beside.theirs.model
    try:
        beside.theirs._metrics["eval"].clear()
        beside.theirs.compute_loss(beside.theirs.model.eval(), beside.inputs)
        assert beside.theirs._metrics["eval"]["rewards/accuracies"] == [0.0]
    finally:
        beside.theirs.ref_model = kept
    path = write_jsonl("pairs.jsonl", PAIRS)
    ours = DPOModule(ModelSpec(path=str(tiny_model)), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = fit(ours, tmp_path, data={"train": path, "batch_size": 4})
    assert trainer.callback_metrics["rewards/accuracies"].item() == 0.5


def test_their_weighted_hinge_has_no_gradient_and_ours_has(beside):
    set_up(beside.theirs, "hinge", use_weighting=True)
    theirs = beside.theirs.compute_loss(beside.theirs.model, beside.inputs)
    ours = our_loss(beside.ours, WPO(Hinge()), beside.batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # weights multiplied into relu's output
        theirs.backward()
    assert torch.autograd.grad(ours, list(beside.ours.policy.parameters()))[0].isfinite().all()
