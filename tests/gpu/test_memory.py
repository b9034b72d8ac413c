"""A card that is too small: what does not fit is taken in parts, with the same result."""

import json
import logging

import pytest
import torch
from on_gpu import ACCELERATOR, ON_GPU, or_skip

or_skip()

from one_step import Keep, words

from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, SFTModule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no card whose memory could be limited")]

import lightning as L

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
ROWS, LENGTH = 16, 500


@pytest.fixture
def limited():
    """Lets this process have so many bytes of the card and no more."""

    def limit(size):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(size / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def step(module, record, folder, accumulate=1):
    """Gradients and metrics of a step over `ROWS` records, and the most that was allocated."""
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for _ in range(ROWS)))
    keep = Keep()
    trainer = L.Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, datamodule=RLHFDataModule(train=str(file), batch_size=ROWS // accumulate))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return keep.gradients, metrics, torch.cuda.max_memory_allocated()


def assert_same(found, expected):
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_a_step_that_does_not_fit_is_taken_in_parts(tiny_tokenizer, tmp_path, limited, caplog):
    record = {"text": words(LENGTH, 0)}

    def run(accumulate=1):
        spec = ModelSpec(config=CONFIG, tokenizer=str(tiny_tokenizer))
        module = SFTModule(spec, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        return step(module, record, tmp_path, accumulate)

    expected, metrics, whole = run()
    half = run(accumulate=2)[2]
    assert whole - half > 64 * 2**20, "too small to tell apart"
    limited((whole + half) // 2)
    with caplog.at_level(logging.WARNING, "rlhf_lightning.stages.splitting"):
        gradients, again, most = run()
    assert f"out of memory in training: {ROWS} sequences" in caplog.text
    assert most < whole
    assert again["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-5)
    assert_same(gradients, expected)


def test_measuring_that_does_not_fit_is_done_in_parts(tiny_tokenizer, tmp_path, limited, caplog):
    """Log-probabilities of a rollout: training on it, two sequences at a time, fits."""

    def run():
        spec = ModelSpec(config=CONFIG, tokenizer=str(tiny_tokenizer))
        module = GRPOModule(
            spec,
            [WeightedReward(LengthReward(target=200))],
            generation=GenerationSpec(max_new_tokens=256, num_samples=8, rows_at_once=32),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            seed=1,
        )
        return step(module, {"prompt": "the film was"}, tmp_path)

    expected, metrics, whole = run()
    limited(whole // 2)
    with caplog.at_level(logging.WARNING, "rlhf_lightning.stages.splitting"):
        gradients, again, most = run()
    assert "out of memory in" in caplog.text
    assert most < whole
    assert again["rollout/score"] == metrics["rollout/score"]
    assert again["policy/loss"] == pytest.approx(metrics["policy/loss"], rel=1e-4, abs=1e-6)
    assert_same(gradients, expected)
