"""Distillation on the student's own answers: the numbers of both models' logits, what is logged, what is refused."""

import json
import math
import warnings

import lightning as L
import pytest
import torch
from fits import fit
from one_step import CannedGKD, another, records
from torch.nn import functional as F

from rlhf_lightning.__main__ import main
from rlhf_lightning.callbacks import Health, SampleLogger, Throughput
from rlhf_lightning.core.batches import AnswerRollouts
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import Distillation
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GKDModule, SFTModule

SHORT = GenerationSpec(max_new_tokens=5, num_samples=2)


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


class Rollouts(L.Callback):
    """What was trained on."""

    def __init__(self):
        self.seen = []

    def on_rollout_end(self, trainer, module, rollouts):
        self.seen.append(rollouts)


@torch.no_grad()
def reverse_kl(student, teacher, tokens, attention_mask, mask):
    """Mean over the tokens that count, by transformers alone."""
    rows = {"input_ids": tokens, "attention_mask": attention_mask.long()}
    rows["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    p, q = (load_policy(spec).causal_lm(**rows).logits[:, :-1].log_softmax(-1) for spec in (student, teacher))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return kl[mask[:, 1:]].mean().item()


@pytest.mark.parametrize("on_policy_frac", [1.0, 0.25])
def test_the_loss_is_that_of_both_models_logits(on_policy_frac, tiny_model, write_jsonl, tmp_path):
    student, teacher = ModelSpec(path=str(tiny_model)), another(str(tiny_model), hidden_size=24)
    module = CannedGKD(student, teacher, on_policy_frac=on_policy_frac, generation=SHORT, optimizer=frozen)
    rollouts = Rollouts()
    prompts, beside = write_jsonl("prompts.jsonl", records("gkd")), write_jsonl("sft.jsonl", records("sft"))
    data = {"train": prompts, "val": prompts, "batch_size": 12}
    if on_policy_frac < 1:
        data |= {"pretraining": beside, "pretraining_batch_size": 4}
    trainer = fit(module, tmp_path, data=data, callbacks=[rollouts], accumulate_grad_batches=3)
    [answers] = rollouts.seen
    assert isinstance(answers, AnswerRollouts)
    own = reverse_kl(student, teacher, answers.tokens, answers.attention_mask, answers.mask)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["train/divergence"] == pytest.approx(own, rel=1e-5)
    assert metrics["val/divergence"] == pytest.approx(own, rel=1e-5), "canned answers are the same ones"
    assert metrics["val/length"] == metrics["rollout/length"] == answers.mask.sum().item() / 24
    loss = own
    if on_policy_frac < 1:
        whole = RLHFDataModule(beside, batch_size=12).setup_for("tokens", str(tiny_model)).train_dataloader()
        [batch] = list(whole)
        of_records = reverse_kl(student, teacher, batch.tokens, batch.attention_mask, batch.mask)
        assert metrics["train/records_divergence"] == pytest.approx(of_records, rel=1e-5)
        loss = on_policy_frac * own + (1 - on_policy_frac) * of_records
        assert abs(own - of_records) > 0.01
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5)


def test_the_likelihood_is_of_the_records_alone(tiny_model, write_jsonl, tmp_path):
    student, teacher = ModelSpec(path=str(tiny_model)), another(str(tiny_model))
    loss = Distillation("jsd", nll_coef=0.5)
    module = GKDModule(student, teacher, loss, on_policy_frac=0.5, generation=SHORT, optimizer=frozen, seed=1)
    data = {"train": write_jsonl("prompts.jsonl", records("gkd")), "batch_size": 12}
    data |= {"pretraining": write_jsonl("sft.jsonl", records("sft"))}
    metrics = fit(module, tmp_path, data=data).callback_metrics
    assert "train/nll" not in metrics
    expected = 0.5 * metrics["train/divergence"]
    expected += 0.5 * (metrics["train/records_divergence"] + 0.5 * metrics["train/records_nll"])
    assert metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "generation",
    [
        GenerationSpec(max_new_tokens=5, top_p=0.5),
        GenerationSpec(max_new_tokens=5, temperature=0.0),
        GenerationSpec(max_new_tokens=5, num_samples=4),
    ],
    ids=["a truncated sampler", "greedy", "prompts shared"],
)
def test_it_gets_nearer_to_its_teacher_however_it_samples(generation, tiny_model, write_jsonl, tmp_path):
    student = ModelSpec(path=str(tiny_model), lora=LoraSpec(r=4))
    module = GKDModule(student, another(str(tiny_model), hidden_size=24), generation=generation, seed=1)
    module.optimizer = lambda params: torch.optim.AdamW(params, lr=3e-2)
    prompts = write_jsonl("prompts.jsonl", records("gkd"))
    data = {"train": prompts, "val": prompts, "batch_size": 12}
    first = fit(module, tmp_path, data=data).callback_metrics["train/divergence"].item()
    assert fit(module, tmp_path, data=data, max_epochs=8).callback_metrics["val/divergence"].item() < 0.8 * first


@pytest.mark.parametrize("scored", [False, True])
def test_scores_are_logged_where_there_are_any(scored, tiny_model, write_jsonl, tmp_path):
    rewards = [WeightedReward(LengthReward(target=3), name="length")] if scored else None
    module = GKDModule(
        ModelSpec(path=str(tiny_model)), another(str(tiny_model)), rewards=rewards, generation=SHORT, seed=1
    )
    path = write_jsonl("prompts.jsonl", records("gkd"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        callbacks = [SampleLogger(num_prompts=1, show=False), Health(in_a_row=1), Throughput()]
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, default_root_dir=tmp_path, callbacks=callbacks, **quiet
        )
        trainer.fit(module, datamodule=RLHFDataModule(train=path, val=path, batch_size=12))
    names = set(trainer.callback_metrics)
    of_scores = {"rollout/score", "rollout/score_std", "reward/length", "val/score", "val/reward_length"}
    assert names & of_scores == (of_scores if scored else set())
    assert {"rollout/length", "rollout/finished_frac", "val/finished_frac"} <= names
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    drawn, asked = [row for row in rows if "rollout" in row], [row for row in rows if "rollout" not in row]
    assert len(drawn) == 48
    assert all((row["score"] is not None) == scored for row in drawn)
    assert [(row["score_before"] is not None, row["score_after"] is not None) for row in asked] == [(scored, scored)]
    assert not (tmp_path / "health.jsonl").exists(), "no sign of trouble is one of scores that nobody learns from"


def test_answers_may_come_from_the_student_of_a_rollout_before(tiny_model, write_jsonl, tmp_path):
    module = GKDModule(
        ModelSpec(path=str(tiny_model)),
        another(str(tiny_model)),
        generation=SHORT,
        updates=UpdateSpec(inner_epochs=1, async_rollouts=True),
        seed=1,
    )
    data = {"train": write_jsonl("prompts.jsonl", records("gkd")), "batch_size": 4}
    metrics = fit(module, tmp_path, data=data).callback_metrics
    assert metrics["rollout/staleness"].item() == 1
    assert math.isfinite(metrics["train/loss"].item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy_frac": 0.0}, r"on_policy_frac=0.0 is the weight of the student's own answers.*use SFTModule with"),
        ({"on_policy_frac": 1.5}, "on_policy_frac=1.5 is the weight of the student's own answers: give above 0, to 1"),
        ({"loss": Distillation(nll_coef=0.1)}, "on_policy_frac=1 leaves no records, whose likelihood the loss adds"),
    ],
)
def test_what_cannot_be_meant_is_said(options, message):
    with pytest.raises(UserError, match=message):
        GKDModule(ModelSpec(path="x"), ModelSpec(path="y"), **options)


def test_a_student_that_might_say_what_its_teacher_cannot_read_is_refused(tiny_model):
    student, teacher = another(str(tiny_model), vocab_size=32), ModelSpec(path=str(tiny_model))
    SFTModule(student, Distillation(), teacher=teacher).configure_model()  # of records every token is known
    with pytest.raises(
        UserError, match=r"head has 32 rows and the teacher .* knows 21 tokens: an answer might hold one"
    ):
        GKDModule(student, teacher).configure_model()


def test_answers_that_the_teacher_has_no_room_for_are_refused(tiny_model, write_jsonl, tmp_path):
    short = another(str(tiny_model), max_position_embeddings=32)
    module = GKDModule(ModelSpec(path=str(tiny_model)), short, generation=GenerationSpec(max_new_tokens=30))
    message = r"has 3 tokens; with generation.max_new_tokens=30 that exceeds the teacher's context of 32 tokens"
    with pytest.raises(UserError, match=message):
        fit(module, tmp_path, data={"train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}] * 2)})


def test_records_that_are_not_given_are_asked_for(tiny_model, write_jsonl, tmp_path):
    module = GKDModule(ModelSpec(path=str(tiny_model)), another(str(tiny_model)), on_policy_frac=0.5, generation=SHORT)
    with pytest.raises(UserError, match=r"data.pretraining is not set: give a file"):
        fit(module, tmp_path, data={"train": write_jsonl("prompts.jsonl", records("gkd"))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "GKDModule learns from a teacher, and none is named: set teacher: {path: ...}, a folder or hub id"),
        (["teacher.path=MODEL", "generation.keep_logprobs=true"], "generation.keep_logprobs does nothing: no ratio"),
        (["teacher.path=MODEL", "teacher.lora={r: 2}"], "teacher.lora does nothing: nothing of the teacher is trained"),
    ],
)
def test_what_is_missing_or_does_nothing_is_said(options, message, tiny_model, write_jsonl, tmp_path, capsys):
    given = [f"--model.{option.replace('MODEL', str(tiny_model))}" for option in options]
    command = ["fit", "--model=GKDModule", f"--model.policy.path={tiny_model}", *given]
    command += [f"--data.train={write_jsonl('prompts.jsonl', records('gkd'))}"]
    assert main([*command, f"--trainer.default_root_dir={tmp_path / 'run'}"]) != 0
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_second_source_that_nobody_reads_is_refused(tiny_model, write_jsonl, tmp_path, capsys):
    path = write_jsonl("prompts.jsonl", records("gkd"))
    models = [f"--model.policy.path={tiny_model}", f"--model.teacher.path={tiny_model}"]
    command = ["fit", "--model=GKDModule", *models, f"--data.train={path}", f"--data.pretraining={path}"]
    assert main([*command, f"--trainer.default_root_dir={tmp_path / 'run'}"]) != 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert (
        "GKDModule trains on no second source (with ptx_coef above 0, or on_policy_frac below 1, a stage does)" in said
    )
