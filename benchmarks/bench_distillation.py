"""A small student of a pretrained storyteller: what it learns from texts alone, and what from their author as well.

    python benchmarks/bench_distillation.py --teacher PATH/stories260k [--seeds 1 2]

The teacher writes stories. Students of less than a sixth of its size, built anew, are trained on them by likelihood,
by either KL, and by GKD with half of the weight on their own continuations of the stories' first words: the same number
of optimiser steps each. Every other epoch each is measured on stories that none has seen. Results: distillation.json
under benchmarks/results/.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from bench_common import HERE, about

from rlhf_lightning import GKDModule, ModelSpec, RLHFDataModule, SFTModule, load_policy, load_tokenizer
from rlhf_lightning.losses import NLL, Distillation
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.pipelines.files import read_jsonl, write_json, write_jsonl
from rlhf_lightning.pipelines.sampling import SamplePrompts
from rlhf_lightning.rollout import GenerationSpec
from rlhf_lightning.stages.lesson import teach

WAYS = {
    "likelihood": NLL(),
    "forward KL": Distillation(),
    "reverse KL": Distillation("reverse_kl"),
    "GKD, forward KL": Distillation(),
}
STORIES, HELD_OUT, LENGTH, OPENING = 256, 512, 47, 8
"""Stories to train on and to measure by; their tokens, and how many of them GKD's students are given."""
BATCH, EPOCHS, EVERY, LEARNING_RATE = 32, 40, 2, 3e-3


def student(teacher: str, seed: int) -> ModelSpec:
    """A Llama of two layers and half the teacher's width, with its tokenizer."""
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 86, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return ModelSpec(config={**config, "tie_word_embeddings": True}, tokenizer=teacher, seed=seed)


def stories(teacher: str, folder: Path, seed: int) -> dict[str, str]:
    """Files of what the teacher wrote: to train on, their openings, and held out."""
    drawn = {name: str(folder / f"{name}.drawn") for name in ("train", "held_out")}
    given = {"num_prompts": STORIES, "num_val": HELD_OUT, "num_tokens": LENGTH, "seed": seed}
    SamplePrompts(teacher, drawn["train"], out_val=drawn["held_out"], **given).run()
    texts = {name: [row["prompt"] for row in read_jsonl(path)] for name, path in drawn.items()}
    tokenizer = load_tokenizer(ModelSpec(path=teacher))
    ids = tokenizer(texts["train"])["input_ids"]
    openings = tokenizer.batch_decode([row[: OPENING + 1] for row in ids], skip_special_tokens=True)
    written = {name: [{"text": text} for text in some] for name, some in texts.items()}
    written["openings"] = [{"prompt": text} for text in openings]
    return {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in written.items()}


class HeldOut(L.Callback):
    """Mean per token on held-out stories: negative log-likelihood of student and teacher, KL(teacher || student)."""

    def __init__(self, teacher: str, path: str) -> None:
        self.teacher = Reference(load_policy(ModelSpec(path=teacher)))
        data = RLHFDataModule(train=path, batch_size=256, add_eos=False, shuffle=False)
        self.batches = list(data.setup_for("tokens", teacher).train_dataloader())
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if (trainer.current_epoch + 1) % EVERY:
            return
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in self.batches:
            lesson = teach(module.policy, self.teacher, batch, Distillation(), with_scores=True, with_teacher=True)
            assert lesson.scores is not None
            assert lesson.teacher_logprobs is not None
            numbers = (-lesson.scores.logprobs, -lesson.teacher_logprobs, lesson.divergence)
            sums += torch.tensor([*(x.double().sum() for x in numbers), batch.mask[:, 1:].sum()])
        *means, _ = (sums / sums[-1]).tolist()
        self.rows.append(dict(zip(("student", "teacher", "kl"), means, strict=True)))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)


def train(way: str, teacher: str, files: dict[str, str], folder: Path, seed: int) -> list[dict[str, float]]:
    """One student trained; what it was worth after every other epoch."""
    common = {"optimizer": adamw, "seed": seed}
    taught_by = ModelSpec(path=teacher)
    if way.startswith("GKD"):
        generation = GenerationSpec(max_new_tokens=LENGTH - OPENING)
        options = {"on_policy_frac": 0.5, "generation": generation}
        module: Any = GKDModule(student(teacher, seed), taught_by, WAYS[way], **options, **common)
        sources = {"train": files["openings"], "pretraining": files["train"], "pretraining_batch_size": BATCH}
    else:
        named = None if way == "likelihood" else taught_by
        module = SFTModule(student(teacher, seed), WAYS[way], teacher=named, **common)
        sources = {"train": files["train"]}
    held_out = HeldOut(teacher, files["held_out"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        default_root_dir=str(folder),
        enable_model_summary=False,
        callbacks=[held_out],
        **quiet,
    )
    trainer.fit(module, datamodule=RLHFDataModule(**sources, batch_size=BATCH, add_eos=False))
    print(f"seed {seed}, {way}: {[round(row['kl'], 3) for row in held_out.rows]}", flush=True)
    return held_out.rows


def measure(teacher: str, seed: int) -> dict[str, Any]:
    """All ways from one seed, on stories of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = stories(teacher, folder, seed)
        curves = {way: train(way, teacher, files, folder, seed) for way in WAYS}
    return {
        "seed": seed,
        "teacher": curves["likelihood"][0]["teacher"],
        "best": {way: min(rows, key=lambda row: row["student"]) for way, rows in curves.items()},
        "last": {way: rows[-1] for way, rows in curves.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a pretrained model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = {
        name: sum(p.numel() for p in load_policy(spec).parameters())
        for name, spec in (("teacher", ModelSpec(path=options.teacher)), ("student", student(options.teacher, 1)))
    }
    setup = {
        "parameters": sizes,
        "stories": STORIES,
        "tokens": LENGTH,
        "epochs": EPOCHS,
        "steps": EPOCHS * STORIES // BATCH,
    }
    result = {"about": about(), **setup, "seeds": [measure(options.teacher, seed) for seed in options.seeds]}
    print(f"wrote {write_json(HERE / 'results' / 'distillation.json', result)}")


if __name__ == "__main__":
    main()
