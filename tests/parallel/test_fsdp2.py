"""Sharded over processes, a stage takes the steps of one process; nothing is gathered or kept beyond need."""

import os
from types import SimpleNamespace

import pytest
import torch
from judged_fits import write_judge
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from parallel_fits import (
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
from sharded_cases import SHARDED, following_reference, poisoned, shared_critic, tied

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.parallel import FSDP2Strategy
from rlhf_lightning.stages import SFTModule

IN_CI = [name for name in SHARDED if not name.endswith(", replicas")]
EXACT = [name for name in IN_CI if name.split(", ")[1] in ("fsdp2", "ddp", "not resharded", "asked in between", *SPECS)]
SHORT = [name for name in IN_CI if name.endswith(", short of memory")]
HALF = ["sft, bfloat16", "sft, bf16-mixed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """What two processes on the CPU gave, a file per case."""
    made = tmp_path_factory.mktemp("parallel")
    write_records(made)
    write_judge(str(tiny_model), made)
    in_processes(IN_CI, str(tiny_model), made)
    return made


@pytest.fixture(scope="module")
def alone(folder, tiny_model):
    """The same stage in one process; each computed once."""
    known = {}

    def given(stage, spec=""):
        if (stage, spec) not in known:
            known[stage, spec] = of_stage(stage, str(tiny_model), folder, spec=SPECS.get(spec, {}))
        return known[stage, spec]

    return given


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_five_steps_move_the_weights_that_are_compared(stage, alone, tiny_model):
    start = load_file(tiny_model / "model.safetensors")
    weights = alone(stage)["weights"]
    under = "model.backbone." if stage == "reward" else "policy.model.model."
    moved = [
        float((weights[under + n.removeprefix("model.")] - w).abs().max()) for n, w in start.items() if "layers" in n
    ]
    assert max(moved) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_take_the_steps_of_one(name, folder, alone):
    stage, how = name.split(", ")
    assert_same(result(folder, name), alone(stage, how))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_one_of_two_processes_that_is_short_of_memory_takes_its_share_in_parts(name, folder, alone):
    found = result(folder, name)
    assert_same(found, alone(name.split(", ")[0]))
    sizes = found["sizes"]
    assert sizes[0] > sizes[1], "nothing was cut"
    assert max(sizes[1:]) == sizes[1], "what had not fitted was tried again"


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_layers_in_bfloat16_keep_weights_in_float32(name, folder, alone):
    found, expected = result(folder, name), alone("sft")
    assert_same(found, expected, tolerance=1e-2)
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
    assert found["losses"] != pytest.approx(expected["losses"], abs=1e-6), "that was float32"


@pytest.mark.slow
@pytest.mark.skipif("RLHF_FOUR_PROCESSES" not in os.environ, reason="four processes: make parallel")
def test_two_groups_of_two_that_each_hold_the_model(tiny_model, alone, tmp_path):
    write_records(tmp_path)
    in_processes(["sft, replicas", "ppo, replicas"], str(tiny_model), tmp_path, count=4)
    for stage in ("sft", "ppo"):
        assert_same(result(tmp_path, f"{stage}, replicas"), alone(stage))


@pytest.mark.slow
def test_a_head_that_is_the_embedding_stays_one(folder, tiny_model):
    assert_same(result(folder, "sft, tied"), tied(str(tiny_model), folder, 1))
    several, one = (load_file(folder / f"tied {count}" / "model.safetensors") for count in (2, 1))
    assert several.keys() == one.keys()
    assert "lm_head.weight" not in several


@pytest.mark.slow
def test_compiled_layers_share_their_graphs_when_sharded(folder, alone):
    found = result(folder, "sft, compiled")
    assert_same(found, alone("sft"))
    assert 0 < found["graphs"] <= 4, "two layers, five steps, batches of other lengths, with padding and without"


@pytest.mark.slow
def test_a_value_head_is_a_unit_of_its_own(folder, tiny_model):
    assert_same(result(folder, "ppo, shared critic"), shared_critic(str(tiny_model), folder, 1))


@pytest.mark.slow
def test_a_step_is_refused_by_all_whoever_holds_what_is_not_finite(folder, tiny_model):
    """A value head has one row, of which the second process holds nothing."""
    found, expected = result(folder, "ppo, poisoned"), poisoned(str(tiny_model), folder, 1)
    assert_same(found, expected)
    assert found["shares"][1][0] == 0
    assert all(shares[1] > 0 for shares in found["shares"])
    taken = result(folder, "ppo, fsdp2")["weights"]["critic.head.weight"]
    assert not torch.allclose(found["weights"]["critic.head.weight"], taken), "no step was refused"


@pytest.mark.slow
def test_a_sharded_reference_follows_a_sharded_policy(folder, tiny_model):
    assert_same(result(folder, "dpo, following reference"), following_reference(str(tiny_model), folder, 1))


@pytest.mark.slow
def test_an_answer_costs_one_gather_per_unit_however_long_it_gets(folder):
    found = result(folder, "ppo, generation")
    assert found["units"] == 3, "two layers, and the rest"
    assert found["gathers"] == [3, 3]
    # one by one: the sum is how often the model ran
    first, second = ([sum(lengths) for lengths in rank] for rank in found["lengths"])
    assert first != second, "ranks that sample alike show nothing"
    assert min(*first, *second) > 3


@pytest.mark.slow
def test_two_sharded_models_sample_together(folder):
    losses = result(folder, "online dpo, mixture")["losses"]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "metric"), [("draws again", "sampling/batches"), ("replays", "groups/replayed")])
def test_shares_of_the_weights_change_nothing_of_what_is_drawn(draws, metric, folder):
    """Each process draws by seeds of its own, so two are not one; sharded or not they are the same two."""
    sharded, whole = result(folder, f"grpo, {draws}, fsdp2"), result(folder, f"grpo, {draws}, ddp")
    assert_same(sharded, whole, steps=6)
    assert [row.keys() for row in sharded["logged"]] == [row.keys() for row in whole["logged"]]
    for ours, theirs in zip(sharded["logged"], whole["logged"], strict=True):
        assert ours == pytest.approx(theirs)
    least = 1 if draws == "draws again" else 0
    assert max(row[metric] for row in sharded["logged"]) > least, "or there was nothing to draw"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_validations_and_samples_are_those_of_whole_weights(stage, folder):
    """Of two processes that each have records, prompts and seeds of their own."""
    sharded, whole = (result(folder, f"{stage}, evaluated, {strategy}") for strategy in ("fsdp2", "ddp"))
    assert_evaluated_alike(sharded, whole)
    assert sharded["samples"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_validations_are_those_of_one_process(stage, folder, tiny_model):
    alone = evaluated(stage, lambda _: "auto")(str(tiny_model), folder, 1)
    assert_evaluated_alike(result(folder, f"{stage}, evaluated, fsdp2"), alone, samples=False)


@pytest.mark.slow
def test_reward_models_are_shared_out_and_say_the_same(folder):
    """Each process keeps half of a judge, but of one that a thread may still be reading after its time is up."""
    sharded, whole = result(folder, "ppo, judged, fsdp2"), result(folder, "ppo, judged, ddp")
    assert_same(sharded, whole, steps=4)
    assert_evaluated_alike(sharded, whole)
    assert sharded["held"] == [pytest.approx(0.5, abs=0.01), pytest.approx(0.5, abs=0.01), 1.0]
    assert whole["held"] == [1.0, 1.0, 1.0]
    assert sharded["half"] == pytest.approx(sharded["whole"], rel=0.05, abs=0.05)
    assert not torch.equal(sharded["half"], sharded["whole"]), "that was float32"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "grpo"])
def test_a_run_resumes_with_the_same_bits(stage, folder):
    found = result(folder, f"{stage}, resumed")
    assert found["whole"]["losses"] == found["resumed"]["losses"]
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(weight, found["resumed"]["weights"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_reference_is_sharded_and_in_no_checkpoint(stage, folder):
    found = result(folder, f"{stage}, resumed")
    assert 0.5 <= found["frozen_share"] < 0.51, "21 rows of an embedding are 11 and 10"
    assert {name.split(".")[0] for name in found["in_checkpoint"]} == (
        {"policy", "critic"} if stage == "ppo" else {"policy"}
    )


@pytest.mark.slow
def test_the_first_process_exports_what_all_hold(folder):
    weights = result(folder, "ppo, exported")["weights"]
    for part, under in (("hf", "policy.model."), ("hf/critic", "critic.backbone.")):
        for name, weight in load_file(folder / part / "model.safetensors").items():
            ours = (
                "critic.head.weight" if name == "score.weight" else under + name.removeprefix("model." * (part != "hf"))
            )
            assert torch.equal(weight, weights[ours]), name


@pytest.mark.slow
def test_what_cannot_work_is_said(folder):
    other, folder_of_files, shards = result(folder, "sft, foreign checkpoint")["said"]
    assert "foreign.ckpt holds an optimiser's state that is not by these parameters' names" in other
    assert "Resume with the strategy it was written with" in other
    assert "foreign is no checkpoint, or was not finished: it holds no .metadata" in folder_of_files
    assert "shards is a folder, a checkpoint in shards; strategies fsdp2 and fsdp write and read single files" in shards
    loose, groups = result(folder, "sft, loose parameter")["said"]
    assert "temperature is trained outside every sharded unit" in loose
    assert "use strategy: ddp" in loose
    assert "2 processes cannot be shared out over num_replicas=3 groups" in groups


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FSDPStrategy, "FSDP1"),
        (ModelParallelStrategy, "nothing would be, and no gradient be added"),
        (DeepSpeedStrategy, "steps, clips and shares out weights by itself"),
    ],
)
def test_other_ways_to_share_out_weights_are_refused(strategy, why, tiny_model):
    module = SFTModule(ModelSpec(path=str(tiny_model)))
    module._trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(UserError, match=f"trainer.strategy: {strategy.__name__} .*{why}.*: use strategy: fsdp2"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_replicas": 0}, "num_replicas=0: 1 shards over all processes"),
        ({"timeout_minutes": 0.0}, "timeout_minutes=0.0: give a positive number"),
    ],
)
def test_meaningless_options_are_errors(options, said):
    with pytest.raises(UserError, match=said):
        FSDP2Strategy(**options)
