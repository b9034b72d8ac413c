"""TPO against TRL's TPOTrainer, on the same tiny weights and records: loss, gradient, twenty steps."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl_peers import assert_same_loss_and_gradients, options, our_loss, twenty_steps

from rlhf_lightning.core.batches import concatenate_rows
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import CPO, TPO, SimPO
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import DPOModule

TRIPLES = [
    {"prompt": "the film was", "chosen": " very good", "rejected": " bad", "reference": " great and not long"},
    {"prompt": "a", "chosen": " great plot and actors", "rejected": " dull but not long", "reference": " plot"},
    {"prompt": "the actors", "chosen": " good", "rejected": " was not very very good", "reference": " was very great"},
    {"prompt": "the end was", "chosen": " short and great but not dull", "rejected": " long", "reference": " good"},
]
"""The gold answer in TRL's column."""


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def their_trainer(model: Any, folder: Any, optimizer: Any = None, **more: Any) -> TPOTrainer:
    policy = AutoModelForCausalLM.from_pretrained(model)
    return TPOTrainer(
        model=policy,
        args=options(TPOConfig, folder, rows=4, max_length=64, **more),
        train_dataset=Dataset.from_list(TRIPLES),
        processing_class=AutoTokenizer.from_pretrained(model),
        optimizers=(None, None) if optimizer is None else (optimizer(policy.parameters()), None),
    )


@pytest.fixture(scope="module")
def beside(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """TRL's trainer, its batch, our stage and our batch, of the same weights and records; built once."""
    folder = tmp_path_factory.mktemp("beside")
    path = folder / "triples.jsonl"
    Dataset.from_list(TRIPLES).to_json(path)
    source: Any = {"path": str(path), "columns": {"gold": "reference"}}
    data = RLHFDataModule(source, batch_size=4, max_length=64, shuffle=False)
    [batch] = list(data.setup_for("triples", str(tiny_model)).train_dataloader())
    ours = DPOModule(ModelSpec(path=str(tiny_model)), TPO())
    ours.configure_model()
    theirs = their_trainer(tiny_model, folder)
    [inputs] = list(theirs.get_eval_dataloader(theirs.train_dataset))
    return SimpleNamespace(theirs=theirs, inputs=dict(inputs), ours=ours, batch=batch, source=source)


def test_both_read_the_same_tokens(beside):
    rows = concatenate_rows((beside.batch.chosen, beside.batch.rejected, beside.batch.gold), pad_id=0)
    for name, ours in (("input_ids", rows.tokens), ("attention_mask", rows.attention_mask)):
        assert torch.equal(beside.inputs[name], ours.long()), name
    assert torch.equal(beside.inputs["completion_mask"], rows.mask.long())


SAME = {
    "sigmoid": (CPO(beta=0.1, nll_coef=0.0), {"loss_type": "sigmoid"}),
    "sigmoid, smoothed": (
        CPO(beta=0.1, label_smoothing=0.2, nll_coef=0.0),
        {"loss_type": "sigmoid", "label_smoothing": 0.2},
    ),
    "hinge": (CPO(beta=0.1, form="hinge", nll_coef=0.0), {"loss_type": "hinge"}),
    "ipo": (CPO(beta=0.1, form="ipo", nll_coef=0.0), {"loss_type": "ipo"}),
    "tpo-l": (SimPO(beta=2.0, gamma=0.7), {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 0.7}),
}


@pytest.mark.parametrize("coef", [1.0, 0.3])
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient(beside, name, coef):
    loss, settings = SAME[name]
    for key, value in ({"beta": 0.1, "label_smoothing": 0.0, "tpo_alpha": coef} | settings).items():
        setattr(beside.theirs, key, value)
    theirs = beside.theirs.compute_loss(beside.theirs.model, beside.inputs)
    ours = our_loss(beside.ours, TPO(loss, nll_coef=coef), beside.batch)
    assert_same_loss_and_gradients(ours, theirs, beside.ours.policy, beside.theirs.model)


def test_twenty_steps(tiny_model, tmp_path, beside):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    schedule = {"max_steps": 20, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    theirs = their_trainer(tiny_model, tmp_path, adamw, loss_type="sigmoid", beta=0.1, tpo_alpha=0.5, **schedule)
    ours = DPOModule(ModelSpec(path=str(tiny_model)), TPO(CPO(beta=0.1, nll_coef=0.0), nll_coef=0.5), optimizer=adamw)
    twenty_steps(ours, theirs, tmp_path, beside.source)


def test_their_gold_likelihood_averages_micro_batches_and_ours_tokens(beside):
    for key, value in {"beta": 0.1, "label_smoothing": 0.0, "tpo_alpha": 1.0, "loss_type": "sigmoid"}.items():
        setattr(beside.theirs, key, value)
    halves = [
        {
            name: torch.cat([rows[i : i + 2] for i in (start, start + 4, start + 8)])
            for name, rows in beside.inputs.items()
        }
        for start in (0, 2)
    ]
    theirs = sum(beside.theirs.compute_loss(beside.theirs.model, half).item() for half in halves) / 2
    pairs = beside.ours(beside.batch)
    nll, mask = -pairs.gold.logprobs.detach(), pairs.gold.mask
    of_halves = sum(nll[half][mask[half]].mean().item() for half in (slice(0, 2), slice(2, 4))) / 2
    ours = our_loss(beside.ours, TPO(CPO(beta=0.1, nll_coef=0.0)), beside.batch).item()
    assert theirs - ours == pytest.approx(of_halves - nll[mask].mean().item(), abs=1e-5)
    assert abs(theirs - ours) > 5e-3
