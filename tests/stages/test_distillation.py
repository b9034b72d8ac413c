"""Distillation on records: its numbers against both models' logits, what is kept of the teacher, what is refused."""

import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from fits import fit
from one_step import another, records
from torch.nn import functional as F
from transformers import AutoTokenizer

from rlhf_lightning.__main__ import main
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import NLL, Distillation
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.models.tokenizer import say_once
from rlhf_lightning.stages import SFTModule


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def teacher(model, **config):
    """Another model with the same tokenizer, wider than the student."""
    return another(str(model), **{"hidden_size": 24, "intermediate_size": 48, **config})


@torch.no_grad()
def logits_of_answers(spec, rows, tokenizer, temperature):
    """Of every token of each answer, [tokens, vocab], and the tokens, by transformers alone."""
    model, found, answers = load_policy(spec).causal_lm, [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)])
        answers += answer
    return torch.cat(found) / temperature, torch.tensor(answers)


def by_definition(name, p, q, beta=0.5):
    """Mean over tokens; p, q are log-probabilities of student and teacher."""

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="batchmean")

    if name != "jsd":
        return kl(q, p) if name == "forward_kl" else kl(p, q)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


LOSSES = [
    Distillation(temperature=2.0, nll_coef=0.5),
    Distillation("reverse_kl"),
    Distillation("jsd", beta=0.2),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.divergence)
def test_the_numbers_are_those_of_both_models_logits(loss, tiny_model, write_jsonl, tmp_path):
    rows, student = records("sft"), ModelSpec(path=str(tiny_model))
    # a vocabulary padded beyond the tokenizer's 21 tokens, as families do with their larger models
    taught_by = teacher(tiny_model, vocab_size=21 if loss.divergence == "jsd" else 32)
    path = write_jsonl("sft.jsonl", rows)
    module = SFTModule(student, loss, teacher=taught_by, optimizer=frozen)
    data = {"train": path, "val": path, "batch_size": 5}
    metrics = fit(module, tmp_path, data=data, accumulate_grad_batches=3).callback_metrics

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (p, answers), (q, _) = (logits_of_answers(spec, rows, tokenizer, loss.temperature) for spec in (student, taught_by))
    apart = by_definition(loss.divergence, p.log_softmax(-1), q.log_softmax(-1), loss.mixture)
    nll = F.cross_entropy(p * loss.temperature, answers)
    total = apart + loss.nll_coef * nll
    assert metrics["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)
    for name in ("train/divergence", "val/divergence"):
        assert metrics[name].item() == pytest.approx(apart.item(), rel=1e-5)
    assert metrics["val/loss"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert ("train/nll" in metrics) == (loss.nll_coef > 0)


def test_the_teachers_likelihood_is_its_own(tiny_model, write_jsonl, tmp_path):
    rows, path = records("sft"), write_jsonl("sft.jsonl", records("sft"))
    module = SFTModule(ModelSpec(path=str(tiny_model)), Distillation(), teacher=teacher(tiny_model), optimizer=frozen)
    metrics = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 5}).callback_metrics
    logits, answers = logits_of_answers(teacher(tiny_model), rows, AutoTokenizer.from_pretrained(tiny_model), 1.0)
    assert metrics["val/teacher_loss"].item() == pytest.approx(F.cross_entropy(logits, answers).item(), rel=1e-5)


class Kept(L.Callback):
    def __init__(self):
        self.names = []

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.names = list(checkpoint["state_dict"])


def test_the_teacher_is_neither_trained_nor_saved(tiny_model, write_jsonl, tmp_path):
    path, kept = write_jsonl("sft.jsonl", records("sft")), Kept()
    module = SFTModule(ModelSpec(path=str(tiny_model)), Distillation(), teacher=teacher(tiny_model))
    module.optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=[kept], **quiet)
        trainer.fit(module, datamodule=RLHFDataModule(train=path, batch_size=4))
    assert kept.names
    assert set(kept.names) == {f"policy.{name}" for name in module.policy.state_dict()}
    before = load_policy(teacher(tiny_model)).state_dict()
    assert all(torch.equal(before[name], value) for name, value in module.teacher.policy.state_dict().items())
    start = load_policy(ModelSpec(path=str(tiny_model))).state_dict()
    assert not any(torch.equal(start[name], value) for name, value in module.policy.state_dict().items())


def test_adapters_learn_from_a_teacher(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("sft.jsonl", records("sft"))
    student = ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2))
    module = SFTModule(student, Distillation(), teacher=teacher(tiny_model))
    module.optimizer = lambda params: torch.optim.AdamW(params, lr=3e-2)
    data = {"train": path, "val": path, "batch_size": 12}
    first = fit(module, tmp_path, data=data).callback_metrics["train/divergence"].item()
    after = fit(module, tmp_path, data=data, max_epochs=10).callback_metrics["val/divergence"].item()
    assert after < 0.8 * first


def test_a_head_with_more_rows_is_said_once_and_which_are_compared(tiny_model, caplog):
    say_once.cache_clear()
    for _ in range(2):
        module = SFTModule(ModelSpec(path=str(tiny_model)), Distillation(), teacher=teacher(tiny_model, vocab_size=32))
        module.configure_model()
    assert caplog.messages == [
        "the student's output head has 21 rows and the teacher's 32, of which the tokenizer uses 21: divergences are "
        "over the first 21"
    ]


@pytest.fixture
def reordered(tiny_tokenizer, tmp_path):
    """The tiny tokenizer with two words swapped."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    text = made.backend_tokenizer.to_str().replace('"film":5', '"film":99').replace('"was":6', '"was":5')
    from tokenizers import Tokenizer

    swapped = Tokenizer.from_str(text.replace('"film":99', '"film":6'))
    names = {name: getattr(made, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=swapped, **names).save_pretrained(tmp_path / "reordered")
    return str(tmp_path / "reordered")


def test_a_teacher_that_numbers_tokens_otherwise_is_refused(tiny_model, reordered):
    module = SFTModule(
        ModelSpec(path=str(tiny_model)), Distillation(), teacher=replace(teacher(tiny_model), tokenizer=reordered)
    )
    message = r"the teacher .* numbers tokens otherwise than the student: 'film' is token 5 .*token 6 of the teacher's"
    with pytest.raises(UserError, match=message):
        module.configure_model()


def test_a_head_that_lacks_rows_for_tokens_is_refused(tiny_model, tmp_path):
    """As of a teacher whose folder holds a tokenizer that was added to after its head was made."""
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(tiny_model)
    small.resize_token_embeddings(18)
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "small")
    module = SFTModule(ModelSpec(path=str(tiny_model)), Distillation(), teacher=ModelSpec(path=str(tmp_path / "small")))
    with pytest.raises(
        UserError, match=r"the tokenizer has 21 tokens, and the output head of the teacher .* only 18 rows"
    ):
        module.configure_model()


def test_records_are_cut_to_the_shorter_context_of_the_two(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("text.jsonl", [{"text": "the film was good " * 40}])
    short = teacher(tiny_model, max_position_embeddings=32)
    module = SFTModule(ModelSpec(path=str(tiny_model)), Distillation(), teacher=short, optimizer=frozen)
    trainer = fit(module, tmp_path, data={"train": path, "val": path})
    (batch,) = trainer.datamodule.val_dataloader()
    assert batch.tokens.shape[1] == 32


@pytest.mark.parametrize("nobody", [None, ModelSpec(dtype="bfloat16")])
def test_a_loss_without_a_teacher_is_refused(nobody):
    with pytest.raises(UserError, match=r"Distillation learns from a teacher, and none is named: set teacher: \{path:"):
        SFTModule(ModelSpec(path="x"), Distillation(), teacher=nobody)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss=NLL"], "teacher does nothing: the loss NLL reads no teacher"),
        (["teacher.lora={r: 2}"], "teacher.lora does nothing: nothing of the teacher is trained"),
        (["teacher.gradient_checkpointing=true"], "teacher.gradient_checkpointing does nothing"),
        (["loss.divergence=jsd", "loss.beta=1"], "error: command line: beta=1.0 is the teacher's share in a mixture"),
        (["loss.temprature=2"], "loss.temprature is not an option of Distillation; did you mean temperature?"),
        (["loss=Distilation"], "Distilation is not a known class; did you mean Distillation?"),
        (
            ["teacher.chat_template={{ messages }}"],
            "teacher.chat_template does nothing: records are written by the student's",
        ),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(options, message, tiny_model, write_jsonl, tmp_path, capsys):
    path = write_jsonl("sft.jsonl", records("sft"))
    given = [f"--model.{option}" for option in ("loss=Distillation", f"teacher.path={tiny_model}", *options)]
    command = ["fit", "--model=SFTModule", f"--model.policy.path={tiny_model}", *given, f"--data.train={path}"]
    assert main([*command, f"--trainer.default_root_dir={tmp_path / 'run'}"]) != 0
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_teacher_of_another_loss_is_never_built(tiny_model):
    module = SFTModule(ModelSpec(path=str(tiny_model)), NLL(), teacher=ModelSpec(path="nowhere"))
    module.configure_model()
    assert module.teacher is None
    assert module.frozen_models() == []
