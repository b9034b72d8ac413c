"""Distillation against TRL: the loss of its GKDTrainer, and the chunked one of its DistillationTrainer."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from one_step import another, records
from trl_peers import assert_same_loss_and_gradients

from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import Distillation
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import SFTModule

BETAS = {0.0: Distillation("forward_kl"), 0.3: Distillation("jsd", beta=0.3), 1.0: Distillation("reverse_kl")}
"""Our loss beside each of TRL's beta."""


@pytest.fixture
def taught(tiny_model, write_jsonl):
    """A student that is set a loss, its batch, that as TRL has it, and TRL's two models."""
    student, teacher = ModelSpec(path=str(tiny_model)), another(str(tiny_model), hidden_size=24)
    data = RLHFDataModule(write_jsonl("sft.jsonl", records("sft")), batch_size=12, shuffle=False)
    [batch] = list(data.setup_for("tokens", str(tiny_model)).train_dataloader())
    theirs = {
        "input_ids": batch.tokens,
        "attention_mask": batch.attention_mask.long(),
        "labels": batch.tokens.masked_fill(~batch.mask, -100),
    }

    def with_loss(loss):
        module = SFTModule(student, loss, teacher=teacher)
        module.configure_model()
        return module

    return with_loss, batch, theirs, load_policy(student).causal_lm, load_policy(teacher).causal_lm


def our_loss(module, batch):
    per_token = module.lesson(batch, module.loss).loss(module.loss)
    return reduce_tokens(per_token, batch.mask, "token_mean", batch.total("tokens"))


def gkd(teacher, beta, **options):
    """As much of TRL's trainer as its `compute_loss` reads."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss
    made = SimpleNamespace(teacher_model=teacher, beta=beta, generalized_jsd_loss=loss, **options)
    return lambda model, inputs: GKDTrainer.compute_loss(made, model, inputs)


@pytest.mark.parametrize("beta", BETAS)
def test_gkds_loss_and_gradient(taught, beta):
    with_loss, batch, inputs, student, teacher = taught
    module = with_loss(BETAS[beta])
    theirs = gkd(teacher, beta)(student, inputs)
    assert_same_loss_and_gradients(our_loss(module, batch), theirs, module.policy, student)


def test_gkds_temperature_is_of_its_sampling_alone(taught):
    """TRL's GKDTrainer passes no temperature on to its loss, whose function has one; ours is the loss's."""
    from trl.experimental.gkd import GKDTrainer

    with_loss, batch, inputs, student, teacher = taught
    theirs = gkd(teacher, 0.3, temperature=2.0)(student, inputs)
    at_one, at_two = (our_loss(with_loss(Distillation("jsd", beta=0.3, temperature=t)), batch) for t in (1.0, 2.0))
    torch.testing.assert_close(at_one, theirs, rtol=1e-5, atol=1e-6)
    logits = [model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1] for model in (student, teacher)]
    asked = GKDTrainer.generalized_jsd_loss(*logits, inputs["labels"][:, 1:], beta=0.3, temperature=2.0)
    torch.testing.assert_close(at_two, asked, rtol=1e-5, atol=1e-6)
    assert (at_one - at_two).abs().item() > 0.01


@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_loss_of_trls_distillation_trainer(taught, beta):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    with_loss, batch, inputs, student, teacher = taught
    loss = Distillation(BETAS[beta].divergence, beta=BETAS[beta].beta, temperature=0.8)
    module = with_loss(loss)
    rows = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    states = [model.model(**rows).last_hidden_state[:, :-1] for model in (student, teacher)]
    heads = [model.lm_head.weight for model in (student, teacher)]
    theirs, _, tokens = _chunked_divergence_loss(
        states[0], states[1].detach(), heads[0], heads[1].detach(), batch.mask[:, 1:], beta, temperature=0.8
    )
    assert int(tokens) == batch.total("tokens")
    assert_same_loss_and_gradients(our_loss(module, batch), theirs, module.policy, student)
