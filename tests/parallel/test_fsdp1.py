"""Flattened and shared out by FSDP1, a stage takes the steps of one process; where it cannot run, it says so.

torch's FSDP1 is made for CUDA. These are two processes on the CPU, by a strategy that leaves the check of the device
out: what shares out, gathers, clips and saves is the same code.
"""

from types import SimpleNamespace

import pytest
import torch
from fsdp1_cases import FLATTENED
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from lightning.pytorch.plugins.precision import FSDPPrecision
from parallel_fits import SPECS, assert_evaluated_alike, assert_same, evaluated, fit, of_stage, result, write_records
from parallel_processes import in_processes
from safetensors.torch import load_file

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.parallel import FSDP1Strategy
from rlhf_lightning.parallel.fsdp1 import _ClipsByRoot
from rlhf_lightning.parallel.single_file import check_callbacks, check_optimizers
from rlhf_lightning.stages import SFTModule

NOT_COMPARED = ("resumed", "evaluated", "exported", "generation", "refused", "broken")
EXACT = [name for name in FLATTENED if name.split(", ")[-1] not in NOT_COMPARED]
BESIDE = ["sft, evaluated, ddp", "ppo, evaluated, ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """What two processes gave, a file per case."""
    made = tmp_path_factory.mktemp("flattened")
    write_records(made)
    in_processes([*FLATTENED, *BESIDE], str(tiny_model), made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_take_the_steps_of_one(name, folder, tiny_model):
    """Five, clipped by norm and accumulated."""
    stage, _, how = name.partition(", fsdp")
    how = how.removeprefix(", ")
    if how and how not in SPECS:
        expected = FLATTENED[name](str(tiny_model), folder, 1)
    else:
        expected = of_stage(stage, str(tiny_model), folder, spec=SPECS.get(how, {}))
    assert_same(result(folder, name), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_validations_and_samples_are_those_of_whole_weights(stage, folder):
    assert_evaluated_alike(result(folder, f"{stage}, fsdp, evaluated"), result(folder, f"{stage}, evaluated, ddp"))


@pytest.mark.slow
def test_validations_of_a_reward_model_are_those_of_one_process(folder, tiny_model):
    alone = evaluated("reward", lambda _: "auto")(str(tiny_model), folder, 1)
    assert_evaluated_alike(result(folder, "reward, fsdp, evaluated"), alone, samples=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo", "grpo"])
def test_a_run_resumes_with_the_same_bits(stage, folder):
    found = result(folder, f"{stage}, fsdp, resumed")
    assert found["whole"]["losses"] == found["resumed"]["losses"]
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(weight, found["resumed"]["weights"][name]), name


@pytest.mark.slow
def test_an_answer_costs_one_gather_per_unit_however_long_it_gets(folder):
    found = result(folder, "ppo, fsdp, generation")
    assert found["gathers"] == [5, 5], "two layers of the policy, two of the critic, and the rest"
    first, second = ([sum(lengths) for lengths in rank] for rank in found["lengths"])
    assert first != second, "ranks that sample alike show nothing"
    assert min(*first, *second) > 5


@pytest.mark.slow
def test_the_first_process_exports_what_all_hold(folder):
    weights = result(folder, "ppo, fsdp, exported")["weights"]
    for part, under in (("", "policy.model."), ("critic", "critic.backbone.")):
        for name, weight in load_file(folder / "flattened hf" / part / "model.safetensors").items():
            ours = "critic.head.weight" if name == "score.weight" else under + name.removeprefix("model." * bool(part))
            assert torch.equal(weight, weights[ours]), name


@pytest.mark.slow
def test_what_cannot_work_is_said(folder):
    moving, apart, ahead = result(folder, "fsdp, refused")["said"]
    assert "strategy fsdp (FSDP1) flattens the weights that reference_sync would mix" in moving
    assert "critic.clip_apart asks for two norms" in apart
    assert all(said.endswith("use strategy: fsdp2, or ddp") for said in (moving, apart))
    assert "updates.async_rollouts=true with HFGenerate samples from a copy of the policy" in ahead


@pytest.mark.slow
def test_a_broken_checkpoint_is_found_out_below_the_units_too(folder):
    (said,) = result(folder, "fsdp, broken")["said"]
    assert "weights that are NaN or infinite: policy.model.model.layers.1.mlp.up_proj.weight" in said


def test_the_name_is_ours_and_a_cpu_is_refused_by_it(tiny_model, tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"text": "the film"}\n')
    said = "strategy fsdp .FSDP1. runs on CUDA devices, and this is a cpu: use strategy: fsdp2, which runs on both"
    for strategy in ("fsdp", FSDP1Strategy()):
        with pytest.raises(UserError, match=said):
            fit(SFTModule(ModelSpec(path=str(tiny_model))), "sft", tmp_path, strategy=strategy)


def test_weights_in_few_bits_are_refused(wide_model):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(path=str(wide_model), quantization=QuantizationSpec(), lora=LoraSpec(r=2))
    module = SFTModule(spec)
    module.configure_model()
    strategy = FSDP1Strategy()
    strategy._lightning_module = module
    with pytest.raises(UserError, match="strategy fsdp cannot share out weights that bitsandbytes has quantised"):
        strategy.setup(SimpleNamespace())


def test_weights_of_two_dtypes_are_refused(tiny_model):
    module = SFTModule(ModelSpec(path=str(tiny_model), dtype="bfloat16", lora=LoraSpec(r=2)))
    module.configure_model()
    strategy = FSDP1Strategy()
    strategy._lightning_module = module
    with pytest.raises(UserError, match=r"is bfloat16 and policy\.\S+ is float32: give the model dtype: float32"):
        strategy.setup(SimpleNamespace(callbacks=[]))


def test_weights_keep_their_dtype_unless_the_trainer_says_otherwise():
    for precision, dtype in (("32-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16), ("16-true", torch.float16)):
        plugin = _ClipsByRoot(FSDPPrecision(precision), lambda: None)
        assert plugin.convert_module(torch.nn.Linear(2, 2, dtype=torch.bfloat16)).weight.dtype == dtype


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp (FSDP1)"])
def test_optimisers_and_callbacks_that_need_whole_weights_are_refused(strategy):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    check_optimizers([torch.optim.AdamW([weight]), torch.optim.SGD([weight])], strategy, ("Adafactor",))
    with pytest.raises(UserError, match="optimizer Adafactor goes by rows, columns or norms of weights"):
        check_optimizers([torch.optim.Adafactor([weight])], strategy, ("Adafactor",))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="optimizer AdamW8bit of bitsandbytes keeps its state in blocks of numbers"):
        check_optimizers([bitsandbytes.optim.AdamW8bit([weight])], strategy)
    check_callbacks(SimpleNamespace(callbacks=[Timer()]), strategy)
    with pytest.raises(UserError, match="EMAWeightAveraging averages whole weights, and strategy fsdp"):
        check_callbacks(SimpleNamespace(callbacks=[EMAWeightAveraging()]), strategy)


def test_a_meaningless_option_is_an_error():
    with pytest.raises(UserError, match=r"timeout_minutes=0.0: give a positive number"):
        FSDP1Strategy(timeout_minutes=0.0)
