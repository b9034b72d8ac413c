"""With the vocabulary cut over the processes of a group, a stage takes the steps of one process."""

import os
from types import SimpleNamespace

import pytest
import torch
from judged_fits import judged, write_judge
from lightning.pytorch.trainer.states import TrainerFn
from parallel_fits import (
    EVALUATED,
    SPECS,
    STAGES,
    assert_evaluated_alike,
    assert_same,
    evaluated,
    of_stage,
    result,
    write_records,
)
from parallel_processes import in_processes
from safetensors.torch import load_file
from tensor_parallel_cases import IN_PARTS, by_groups, dpo_without_exact_kl, sampled

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy
from rlhf_lightning.stages import SFTModule

pytestmark = pytest.mark.slow
PARTS = "tensor parallel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """What a group of two processes gave, a file per case."""
    made = tmp_path_factory.mktemp("tensor_parallel")
    write_records(made)
    write_judge(str(tiny_model), made)
    names = [name for name in IN_PARTS if not name.endswith("two groups")]
    in_processes(names, str(tiny_model), made)
    return made


@pytest.mark.parametrize("stage", [*STAGES, "kto"])
def test_two_processes_with_half_of_the_vocabulary_take_the_steps_of_one(stage, folder, tiny_model):
    expected = dpo_without_exact_kl if stage == "dpo" else lambda *given: of_stage(stage, *given[:2])
    assert_same(result(folder, f"{stage}, {PARTS}"), expected(str(tiny_model), folder, 1))


def test_adapters_are_trained_below_a_frozen_head_in_parts(folder, tiny_model):
    assert_same(result(folder, f"sft, {PARTS}, lora"), of_stage("sft", str(tiny_model), folder, spec=SPECS["lora"]))


@pytest.mark.parametrize("how", ["bf16-mixed", "bfloat16"])
def test_half_precision_is_near_and_keeps_weights_in_float32(how, folder, tiny_model):
    found, expected = result(folder, f"sft, {PARTS}, {how}"), of_stage("sft", str(tiny_model), folder)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert found["losses"] != pytest.approx(expected["losses"], abs=1e-6), "that was float32"
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}


def test_a_group_samples_in_half_precision(folder):
    found = result(folder, f"ppo, {PARTS}, sampled in half")
    assert len(found["losses"]) == 10
    assert all(torch.tensor(found["losses"]).isfinite())


def test_a_group_samples_the_answers_of_one_process(folder, tiny_model):
    found = result(folder, f"ppo, {PARTS}, sampled")
    assert_same(found, sampled(str(tiny_model), folder, 1), steps=10)
    held, vocab = found["held"]
    assert held == -(-vocab // 2) < vocab


@pytest.mark.parametrize("stage", EVALUATED)
def test_a_group_validates_and_writes_samples_as_one_process_does(stage, folder, tiny_model):
    found = result(folder, f"{stage}, {PARTS}, evaluated")
    assert_evaluated_alike(found, evaluated(stage, by_groups)(str(tiny_model), folder, 1))
    assert bool(found["samples"]) == (stage != "reward"), "a reward model answers nothing"


def test_a_group_asks_reward_models_that_are_shared_out(folder, tiny_model):
    found, alone = result(folder, f"ppo, {PARTS}, judged"), judged(by_groups)(str(tiny_model), folder, 1)
    assert_same(found, alone, steps=4)
    assert_evaluated_alike(found, alone)
    assert found["held"] == [pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01), 1.0]


def test_a_run_resumes_with_the_same_bits(folder):
    found = result(folder, f"ppo, {PARTS}, resumed")
    assert found["whole"]["losses"] == found["resumed"]["losses"]
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(weight, found["resumed"]["weights"][name]), name


def test_an_export_is_read_by_one_process(folder):
    weights = result(folder, f"ppo, {PARTS}, exported")["weights"]
    for name, weight in load_file(folder / "hf of parts" / "model.safetensors").items():
        assert torch.equal(weight, weights[f"policy.model.{name}"]), name
    load_policy(ModelSpec(path=str(folder / "hf of parts")))


def test_what_does_not_go_together_is_said(folder):
    said = result(folder, f"sft, {PARTS}, refused")["said"]
    parts = [
        "is the input embedding (tie_word_embeddings): use tensor_parallel_size: 1",
        "logprobs: fused reads all of it in one kernel: set logprobs: auto",
        "set disable_dropout: true and lora.dropout: 0, or tensor_parallel_size: 1",
        "transformers has no such plan for models of type 'gpt2'",
        "use another loss than TDPO or Distillation, or tensor_parallel_size: 1",
        "set renormalise_truncated: false, generate without them, or use tensor_parallel_size: 1",
        "2 processes cannot be cut into groups of tensor_parallel_size=3: use a divisor",
    ]
    assert len(said) == len(parts)
    for message, part in zip(said, parts, strict=True):
        assert part in message


@pytest.mark.skipif("RLHF_FOUR_PROCESSES" not in os.environ, reason="four processes: make parallel")
def test_two_groups_of_two_that_share_out_the_records(tiny_model, tmp_path):
    write_records(tmp_path)
    stages = ("sft", "reward", "ppo")
    in_processes([f"{stage}, {PARTS}, two groups" for stage in stages], str(tiny_model), tmp_path, count=4)
    for stage in stages:
        found = result(tmp_path, f"{stage}, {PARTS}, two groups")
        assert_same(found, of_stage(stage, str(tiny_model), tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: 1 keeps heads whole"),
        ({"tensor_parallel_size": 2, "num_replicas": 2}, "tensor_parallel_size=2 makes groups .* leave num_replicas"),
    ],
)
def test_meaningless_options_are_errors(options, said):
    with pytest.raises(UserError, match=said):
        FSDP2Strategy(**options)


def test_a_checkpoint_of_other_groups_is_refused():
    module = SFTModule(ModelSpec(path="unused"))
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), world_size=2, global_rank=0)
    with pytest.raises(
        UserError, match=r"1 of 2 processes read records of their own, and here 2 do: .*same tensor_par"
    ):
        module.on_load_checkpoint({"loader_progress": [{}, {}], "data_ranks": 1})
