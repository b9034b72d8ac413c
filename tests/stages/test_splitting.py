"""A micro-batch that does not fit is taken in parts: same loss, same gradients, same metrics."""

import json
import logging

import pytest
import torch
from one_step import records, step

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.policy_covariance import ClipCov
from rlhf_lightning.losses.preference_batch import AOT
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar_head import ScalarModel
from rlhf_lightning.stages import SFTModule, splitting

STAGES = ("sft", "reward", "dpo", "dpo, ranked", "kto", "bco", "ppo", "grpo", "online dpo")


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """What a step gives for which there is room, by stage."""
    known = {}

    def of(stage):
        if stage not in known:
            path = tmp_path_factory.mktemp("whole") / "records.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records(stage)))
            known[stage] = (str(path), *step(stage, str(tiny_model), str(path)))
        return known[stage]

    return of


class Full:
    """A memory in which a pass over more than `rows` sequences finds no room.

    Args:
        where: forward, or backward: half-way, when the head has its gradient and the layers have none.
        training_only: passes without gradient always find room.
        first: so many passes with gradient find room whatever their size.
    """

    def __init__(self, monkeypatch, rows, where="forward", training_only=True, first=0):
        self.rows, self.where, self.training_only, self.first = rows, where, training_only, first
        self.sizes = []
        for cls, name in ((Policy, "hidden_states"), (Policy, "shared_prompt_states"), (ScalarModel, "token_values")):
            monkeypatch.setattr(cls, name, self.limited(getattr(cls, name)))

    def limited(self, own):
        def run(model, tokens, *args, **options):
            learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
            self.sizes.append(len(tokens))
            self.first -= learns
            if len(tokens) <= self.rows or (self.training_only and not learns) or (learns and self.first >= 0):
                return own(model, tokens, *args, **options)
            if self.where == "forward" or not learns:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            states = own(model, tokens, *args, **options)
            states.register_hook(self.fail)
            return states

        return run

    def fail(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def assert_same(stage, expected, found):
    want_metrics, want = expected
    metrics, gradients = found
    timed = ("time/", "throughput/")
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        if not name.startswith(timed):
            assert metrics[name] == pytest.approx(value, abs=1e-6, rel=1e-5), name
    assert gradients.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-3, "a comparison of zeros shows nothing"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-6, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_parts_have_the_loss_gradient_and_metrics_of_the_whole(stage, where, whole, tiny_model, monkeypatch):
    path, *expected = whole(stage)
    full = Full(monkeypatch, 10, where)
    assert_same(stage, expected, step(stage, str(tiny_model), path))
    assert max(full.sizes) > 10 > min(full.sizes), "nothing was cut"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_later_micro_batch_takes_the_step_anew(stage, where, whole, tiny_model, monkeypatch):
    path, *expected = whole(stage)
    # of micro-batches of 5, 5 and 2 the first fits and the second does not
    Full(monkeypatch, 4, where, first=1)
    assert_same(stage, expected, step(stage, str(tiny_model), path, batch_size=5, accumulate=3))


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo", "grpo"])
def test_passes_without_gradient_are_cut_too(stage, whole, tiny_model, monkeypatch):
    path, *expected = whole(stage)
    full = Full(monkeypatch, 5, training_only=False)
    assert_same(stage, expected, step(stage, str(tiny_model), path))
    assert sum(size > 5 for size in full.sizes) < sum(size <= 5 for size in full.sizes)


def test_parts_under_autocast(whole, tiny_model, monkeypatch):
    path, *_ = whole("sft")
    expected = step("sft", str(tiny_model), path, precision="bf16-mixed")
    Full(monkeypatch, 6)
    metrics, gradients = step("sft", str(tiny_model), path, precision="bf16-mixed")
    assert metrics["train/loss"] == pytest.approx(expected[0]["train/loss"], abs=1e-3)
    for name, gradient in gradients.items():
        want = expected[1][name]
        # bfloat16 has 8 bits: sums of two halves differ in the last one
        torch.testing.assert_close(gradient, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()), msg=name)


def test_the_run_goes_on_in_smaller_pieces_and_says_so_once(whole, tiny_model, monkeypatch, caplog):
    path, *_ = whole("sft")
    full = Full(monkeypatch, 5)
    with caplog.at_level(logging.WARNING, "rlhf_lightning.stages.splitting"):
        step("sft", str(tiny_model), path, max_epochs=3)
    # 1: the model is tried when it is loaded
    assert [size for size in full.sizes if size > 1] == [12, 6, *[3] * 12]
    said = "\n".join(caplog.messages)
    assert said.count("out of memory") == 1
    assert "12 sequences of up to 13 tokens at a time did not fit and were taken in 4 parts, with the same" in said
    assert "set data.batch_size=3 and trainer.accumulate_grad_batches=4" in said


def test_on_policy_stages_are_told_their_own_options(whole, tiny_model, monkeypatch, caplog):
    path, *_ = whole("ppo")
    Full(monkeypatch, 7, training_only=False)
    with caplog.at_level(logging.WARNING, "rlhf_lightning.stages.splitting"):
        step("ppo", str(tiny_model), path)
    assert "like that set rows_at_once=6" in caplog.text
    assert "like that set trainer.accumulate_grad_batches=2" in caplog.text


def test_a_sequence_that_does_not_fit_alone(whole, tiny_model, monkeypatch):
    path, *_ = whole("sft")
    Full(monkeypatch, 0)
    with pytest.raises(UserError, match=r"out of memory in training: one sequence of .* tokens does not fit: cut reco"):
        step("sft", str(tiny_model), path)


def test_a_pair_that_does_not_fit_alone(whole, tiny_model, monkeypatch):
    path, *_ = whole("dpo")
    Full(monkeypatch, 1, "backward")
    with pytest.raises(UserError, match=r"one pair of \d+ and \d+ tokens does not fit"):
        step("dpo", str(tiny_model), path)


@pytest.mark.parametrize(("stage", "loss", "what"), [("dpo", AOT(), "pairs"), ("grpo", ClipCov(), "tokens")])
def test_losses_that_compare_within_a_micro_batch_are_not_cut(stage, loss, what, whole, tiny_model, monkeypatch):
    path, *_ = whole(stage)
    Full(monkeypatch, 4)
    with pytest.raises(UserError, match=f"{type(loss).__name__} compares the {what} of a micro-batch: cut into parts"):
        step(stage, str(tiny_model), path, attributes={"loss": loss})


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_of_several_processes_does_not_go_on_alone(where, whole, tiny_model, monkeypatch):
    path, *_ = whole("sft")
    Full(monkeypatch, 7, where)
    monkeypatch.setattr(splitting.Splitter, "_exchanges_layers", True)
    with pytest.raises(UserError, match=r"process 0. Where processes exchange .* set data.batch_size=6 and trainer"):
        step("sft", str(tiny_model), path)


def test_generation_says_what_to_set(whole, tiny_model, monkeypatch):
    path, *_ = whole("ppo")

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("one_step.Canned.generate", full)
    with pytest.raises(
        UserError,
        match=r"out of memory in generation: set generation.rows_at_once=6; rlhf-lightning plan .*CUDA out of",
    ):
        step("ppo", str(tiny_model), path)


def test_other_errors_stay_what_they_are(whole, tiny_model, monkeypatch):
    path, *_ = whole("sft")
    monkeypatch.setattr(SFTModule, "forward", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        step("sft", str(tiny_model), path)


def test_what_counts_as_out_of_memory():
    on_cpu = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    assert splitting.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert splitting.is_out_of_memory(RuntimeError(on_cpu))
    assert splitting.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not splitting.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not splitting.is_out_of_memory(ValueError(on_cpu))
