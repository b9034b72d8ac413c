"""Preference losses and reward models: OpenRLHF's trainers beside our stages, on the same tiny weights and records."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_step import another
from openrlhf_peer import TOLERANCE, openrlhf_arguments, openrlhf_parser, their_actor
from peer_packages import peer_module
from transformers import AutoConfig
from transformers.models.llama import LlamaModel, LlamaPreTrainedModel
from trl_peers import assert_same_loss_and_gradients, our_loss

from rlhf_lightning.core.batches import PairBatch
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses.preference import DPO, IPO
from rlhf_lightning.losses.preference_mixed import RPO
from rlhf_lightning.losses.reward_model import BradleyTerry, bradley_terry
from rlhf_lightning.models.export import export_scalar_model
from rlhf_lightning.models.loading import load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.scalar_head import init_head
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import DPOModule

losses = peer_module("openrlhf.models.loss")
models = peer_module("openrlhf.models.model")
dpo_trainer = peer_module("openrlhf.trainer.dpo_trainer")
rm_trainer = peer_module("openrlhf.trainer.rm_trainer")

PAIRS = [
    {"prompt": "the film was", "chosen": " very good", "rejected": " bad", "margin": 0.5},
    {"prompt": "a", "chosen": " great plot and actors", "rejected": " dull but not long", "margin": 0.0},
    {"prompt": "the actors", "chosen": " good", "rejected": " was not very very good", "margin": 1.5},
    {"prompt": "the end was", "chosen": " short and great but not dull", "rejected": " long", "margin": -0.25},
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def batch(tiny_model, tmp_path_factory) -> PairBatch:
    from datasets import Dataset

    path = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    Dataset.from_list(PAIRS).to_json(path)
    data = RLHFDataModule(str(path), batch_size=4, max_length=64, shuffle=False)
    [made] = list(data.setup_for("pairs", str(tiny_model)).train_dataloader())
    return made


@pytest.fixture(scope="module")
def ours(tiny_model) -> DPOModule:
    module = DPOModule(ModelSpec(path=str(tiny_model)), reference=another(str(tiny_model)))
    module.configure_model()
    return module


def their_dpo(model: Any, batch: PairBatch, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Loss, both rewards, and the model that has the gradient: what `DPOTrainer.fit` does with a batch."""
    args = openrlhf_arguments("train_dpo", **options)
    trainer = dpo_trainer.DPOTrainer.__new__(dpo_trainer.DPOTrainer)
    trainer.tokenizer, trainer.strategy = SimpleNamespace(pad_token_id=0), SimpleNamespace(ring_attn_group=None)
    loss = losses.DPOLoss(args.model.beta, args.model.label_smoothing, args.model.ipo_enable)
    policy, reference = their_actor(model), their_actor(load_policy(another(str(model))).causal_lm)
    prompts = batch.chosen.mask.int().argmax(-1).tolist()
    inputs = [batch.chosen.tokens, batch.chosen.attention_mask, batch.rejected.tokens, batch.rejected.attention_mask]
    chosen, rejected, _, nll = trainer.concatenated_forward(policy, *inputs, prompts)
    with torch.no_grad():
        ref_chosen, ref_rejected, *_ = trainer.concatenated_forward(reference, *inputs, prompts)
    preference, *rewards = loss(chosen, rejected, ref_chosen, ref_rejected)
    return preference + args.model.nll_loss_coef * nll, *rewards, policy.model


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"model__beta": 0.3}, DPO(beta=0.3)),
        ({"model__beta": 0.3, "model__label_smoothing": 0.2}, DPO(beta=0.3, label_smoothing=0.2)),
        ({"model__beta": 0.3, "model__ipo_enable": True}, IPO(beta=0.3, log_ratio="sum")),
        (
            {"model__beta": 0.3, "model__nll_loss_coef": 0.5},
            RPO(loss=DPO(beta=0.3), nll_coef=0.5, average="sequence_mean"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dpo(options, loss, tiny_model, batch, ours):
    theirs, chosen, rejected, model = their_dpo(tiny_model, batch, **options)
    assert_same_loss_and_gradients(our_loss(ours, loss, batch), theirs, ours.policy, model)
    output = ours.pair_loss(batch, ours(batch))
    torch.testing.assert_close(output.chosen_rewards, chosen, **TOLERANCE)
    torch.testing.assert_close(output.rejected_rewards, rejected, **TOLERANCE)


def test_every_option_of_their_dpo_is_compared():
    offered = {action.dest for action in openrlhf_parser("train_dpo")._actions if action.dest.startswith("model.")}
    compared = {f"model.{name}" for name in ("beta", "label_smoothing", "ipo_enable", "nll_loss_coef")}
    elsewhere = {"model.model_name_or_path", "model.aux_loss_coef"}
    assert offered - compared - elsewhere == {
        "model.gradient_checkpointing_enable",
        "model.gradient_checkpointing_reentrant",
    }


# --- reward models


def scores_of_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen, rejected, margin = 2 * torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    return chosen.requires_grad_(), rejected.requires_grad_(), margin


def test_the_pairwise_loss_and_its_margin():
    chosen, rejected, margin = scores_of_pairs()
    for margins in (None, margin):
        theirs = losses.PairWiseLoss()(chosen, rejected, margins)
        ours = bradley_terry(chosen, rejected, margins=margins).mean()
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        for a, b in zip(*(torch.autograd.grad(x, (chosen, rejected)) for x in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


def test_the_log_exp_loss_is_the_same_without_margin():
    chosen, rejected, margin = scores_of_pairs()
    theirs = losses.LogExpLoss()(chosen, rejected, margin)
    torch.testing.assert_close(bradley_terry(chosen, rejected).mean(), theirs, **TOLERANCE)
    ours, other = (torch.autograd.grad(x, chosen)[0] for x in (bradley_terry(chosen, rejected).mean(), theirs))
    torch.testing.assert_close(ours, other, **TOLERANCE)


def test_differs_log_exp_of_a_pair_that_is_far_the_wrong_way():
    """The exponential overflows: theirs is infinite, and its gradient NaN; ours is the difference, and -1."""
    chosen, rejected = torch.tensor([-50.0], requires_grad=True), torch.tensor([50.0])
    theirs, ours = losses.LogExpLoss()(chosen, rejected), bradley_terry(chosen, rejected).mean()
    assert theirs.isinf()
    assert torch.autograd.grad(theirs, chosen)[0].isnan()
    assert (ours.item(), torch.autograd.grad(ours, chosen)[0].item()) == (100, -1)


@pytest.fixture(scope="module")
def reward_models(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """A reward model of ours, exported, and the same read by their class."""
    ours = load_scalar_model(ModelSpec(path=str(tiny_model)))
    init_head(ours.head, "normal", 0)
    with torch.no_grad():
        ours.head.weight.mul_(20)  # so that scores differ
    folder = export_scalar_model(
        ours, load_tokenizer(ModelSpec(path=str(tiny_model))), tmp_path_factory.mktemp("rm") / "hf"
    )
    config = AutoConfig.from_pretrained(folder)
    config.normalize_reward = False
    theirs = models._get_reward_model(LlamaPreTrainedModel, LlamaModel, "score")
    return SimpleNamespace(ours=ours, theirs=theirs.from_pretrained(folder, config=config))


@pytest.mark.parametrize("margin", [True, False])
def test_a_reward_model_and_its_loss(margin, reward_models, batch):
    """They read a model that we export: the same scores at the last real token, loss and gradients."""
    trainer = rm_trainer.RewardModelTrainer.__new__(rm_trainer.RewardModelTrainer)
    trainer.tokenizer, trainer.strategy = SimpleNamespace(pad_token_id=0), SimpleNamespace(ring_attn_group=None)
    inputs = [batch.chosen.tokens, batch.chosen.attention_mask, batch.rejected.tokens, batch.rejected.attention_mask]
    chosen, rejected, _ = trainer.concatenated_forward(reward_models.theirs, *inputs)
    theirs = losses.PairWiseLoss()(chosen, rejected, batch.margins if margin else None)
    scores = torch.cat([reward_models.ours(side) for side in (batch.chosen, batch.rejected)])
    torch.testing.assert_close(scores, torch.cat((chosen, rejected)), rtol=1e-4, atol=1e-5)
    assert scores.std() > 1e-2
    ours = BradleyTerry(margin_coef=float(margin))(scores, batch).per_element.mean()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    mine = torch.autograd.grad(ours, reward_models.ours.head.weight)[0]
    other = torch.autograd.grad(theirs, reward_models.theirs.score.weight)[0]
    assert other.abs().max() > 1e-4
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
