"""SFT's numbers against the model's own logits."""

import math

import pytest
import torch
from fits import fit
from one_step import records
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.stages import SFTModule


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_validation_is_the_token_mean_over_ragged_batches(tiny_model, write_jsonl, tmp_path):
    rows = records("sft")
    path = write_jsonl("sft.jsonl", rows)
    module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=frozen)
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 5})

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    losses, hits = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        logprobs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        losses += (-logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0]).tolist()
        hits += (logprobs.argmax(-1) == torch.tensor(answer)).tolist()
    mean = sum(losses) / len(losses)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(mean, rel=1e-5)
    assert trainer.callback_metrics["val/perplexity"].item() == pytest.approx(math.exp(mean), rel=1e-5)
    assert trainer.callback_metrics["val/token_accuracy"].item() == pytest.approx(sum(hits) / len(hits))


def test_training_logs_the_loss_of_the_whole_step(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("sft.jsonl", records("sft"))
    data = {"train": path, "val": path, "batch_size": 5}
    module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=frozen)
    trainer = fit(module, tmp_path, data=data, accumulate_grad_batches=3)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
        trainer.callback_metrics["val/loss"].item(), rel=1e-5
    )


def test_texts_train_every_token_but_the_first(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("text.jsonl", [{"text": "the film was good"}])
    module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=frozen)
    seen = []
    module.training_step = lambda batch, batch_idx: seen.append(batch) or module.policy.head().weight.sum()
    fit(module, tmp_path, data={"train": path, "batch_size": 1})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(seen[0].tokens[0][seen[0].mask[0]]).split() == ["the", "film", "was", "good", "<eos>"]


def test_it_learns(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("sft.jsonl", records("sft"))
    module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 4}, max_epochs=15)
    assert trainer.callback_metrics["val/loss"].item() < 0.5 * math.log(21)


def test_records_are_cut_to_the_context_of_the_model(tiny_model, write_jsonl, tmp_path):
    path = write_jsonl("text.jsonl", [{"text": "the film was good " * 40}])
    module = SFTModule(ModelSpec(path=str(tiny_model)), optimizer=frozen)
    trainer = fit(module, tmp_path, data={"train": path, "val": path})
    (batch,) = trainer.datamodule.val_dataloader()
    assert batch.tokens.shape[1] == 64
