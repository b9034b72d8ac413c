"""A student of few records: what a teacher who has seen many adds to them, on text that neither has seen."""

import json
import random

import lightning as L
import pytest
import torch
from fits import fit

from rlhf_lightning.losses import NLL, Distillation
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GKDModule, SFTModule

SENTENCE = "the film was good bad long short great dull and but very not a plot actors end"
WORDS = SENTENCE.split()


def walks(count, seed):
    """Texts of twelve words in which each is followed by one of three, at 3 : 2 : 1."""
    lots, texts = random.Random(seed), []
    for _ in range(count):
        word, text = lots.randrange(17), []
        for _ in range(12):
            text.append(WORDS[word])
            word = (3 * word + lots.choice((1, 1, 1, 2, 2, 5))) % 17
        texts.append(" ".join(text))
    return texts


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


class Validations(L.Callback):
    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, module):
        self.losses.append(trainer.callback_metrics["val/loss"].item())


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_config, tiny_tokenizer):
    """24 texts, others held out, and a teacher of twice the width that has read a thousand."""
    folder = tmp_path_factory.mktemp("distilled")
    paths = {}
    for seed, (name, count) in enumerate({"many": 1024, "few": 24, "held_out": 128}.items()):
        paths[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in walks(count, seed)))
    config = {**tiny_config, "hidden_size": 32, "intermediate_size": 64}
    teacher = SFTModule(ModelSpec(config=config, tokenizer=str(tiny_tokenizer), seed=1), optimizer=adamw, seed=1)
    data = {"train": paths["many"], "val": paths["held_out"], "batch_size": 64}
    trainer = fit(teacher, folder, data=data, max_epochs=6)
    export_policy(teacher.policy, teacher.tokenizer, folder / "teacher")
    return folder, paths, ModelSpec(path=str(folder / "teacher")), trainer.callback_metrics["val/loss"].item()


@pytest.fixture(scope="module")
def fine_tuned(world, tiny_config, tiny_tokenizer):
    """Two students after the same steps on the same 24 texts, without and with the teacher: held-out losses."""
    folder, paths, teacher, _ = world
    losses = {}
    for name, loss in (("alone", NLL()), ("taught", Distillation())):
        student = ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer), seed=2)
        module = SFTModule(student, loss, teacher=None if name == "alone" else teacher, optimizer=adamw, seed=1)
        seen = Validations()
        data = {"train": paths["few"], "val": paths["held_out"], "batch_size": 8, "eval_batch_size": 128}
        trainer = fit(module, folder, data=data, max_epochs=20, check_val_every_n_epoch=2, callbacks=[seen])
        export_policy(module.policy, module.tokenizer, folder / name)
        losses[name] = seen.losses
        if name == "taught":
            assert trainer.callback_metrics["val/teacher_loss"].item() == pytest.approx(world[3], rel=1e-5)
    return losses


@pytest.mark.slow
def test_most_of_what_fine_tuning_lacks_of_the_teacher_is_learnt_from_it(world, fine_tuned):
    of_teacher, alone, taught = world[3], fine_tuned["alone"], fine_tuned["taught"]
    assert taught[-1] == min(taught), "still learning where the other has long begun to learn by heart"
    assert alone[-1] > min(alone)
    # against the best of the other's epochs, not its last
    assert (min(alone) - taught[-1]) / (min(alone) - of_teacher) > 0.5


@pytest.mark.slow
def test_a_student_is_corrected_on_its_own_answers(world, fine_tuned, write_jsonl):
    """No text is read but the first words; held-out KL to the teacher by the same validation as before."""
    folder, paths, teacher, _ = world
    prompts = write_jsonl("prompts.jsonl", [{"prompt": text.split()[0]} for text in walks(24, 1)])
    start = ModelSpec(path=str(folder / "alone"))
    generation = GenerationSpec(max_new_tokens=11, min_new_tokens=11)
    module = GKDModule(start, teacher, Distillation(), generation=generation, optimizer=adamw, seed=1)
    fit(module, folder, data={"train": prompts, "batch_size": 24}, max_epochs=30)
    corrected = export_policy(module.policy, module.tokenizer, folder / "corrected")

    def kl(student):
        judge = SFTModule(ModelSpec(path=str(student)), Distillation(), teacher=teacher)
        judge.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
        data = {"train": paths["few"], "val": paths["held_out"], "batch_size": 24, "eval_batch_size": 128}
        return fit(judge, folder, data=data).callback_metrics["val/divergence"].item()

    assert kl(corrected) < 0.6 * kl(folder / "alone")
