"""The kernels compiled without a GPU: nothing spills, and a new length is not a new kernel."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from rlhf_kernels import gluon_policy, triton_gae, triton_policy, triton_rows
from rlhf_kernels.rows import Transform

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("bench_compile", ROOT / "benchmarks" / "bench_compile.py")
bench_compile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench_compile)


def recorded(target):
    return json.loads((bench_compile.RESULTS / f"{target}.json").read_text())


@pytest.mark.parametrize("target", bench_compile.TARGETS)
def test_every_shipped_configuration_is_on_record_without_a_spill(target):
    report = recorded(target)["kernels"]
    shipped = {(config.kernel, config.name, config.warps) for config in bench_compile.configs(target)}
    assert {(row["kernel"], row["name"], row["warps"]) for row in report} == shipped
    assert [row for row in report if row["spill_stores"] or row["spill_loads"]] == []


SAMPLES = (
    "row_stats", "row_grads", "policy_loss", "kl", "gae", "linear_stats", "linear_merge", "moments", "whiten",
    "policy_loss_resident", "token_offsets",
)  # fmt: skip


@pytest.mark.parametrize("kernel", SAMPLES)
def test_compiles_now_without_a_spill(kernel):
    # one configuration of each kernel, the one with most on; bench_compile.py compiles them all
    configs = {name: [c for c in bench_compile.configs(name) if c.kernel == kernel] for name in bench_compile.TARGETS}
    targets = [name for name in configs if configs[name]]
    target = targets[SAMPLES.index(kernel) % len(targets)]
    config = configs[target][-1]
    result = bench_compile.compile_config(config, bench_compile.TARGETS[target])
    assert result.spill_stores == result.spill_loads == 0
    report = recorded(target)
    if report["triton"] == triton.__version__:
        row = next(row for row in report["kernels"] if (row["kernel"], row["name"]) == (kernel, config.name))
        assert (row["registers"], row["shared_bytes"]) == (result.registers, result.shared_bytes)


def key(kernel, arguments, constants):
    """What triton looks its compiled kernels up by: types and specialised values of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    return str(binder(*arguments, **constants, debug=False)[1])


def rows_key(batch, length, vocab=4096, temperature=1.0, strides=None, begin=0):
    logits = torch.empty(batch, length + 1, vocab, dtype=torch.bfloat16)[:, :-1]
    rows = triton_rows.layout(logits)
    if strides:
        rows = rows._replace(outer=strides[0], stride=strides[1])
    n, per_row = batch * length, torch.empty(batch * length + begin)[begin:]
    tokens, flags = torch.empty(n + begin, dtype=torch.long)[begin:], torch.empty(n + begin, dtype=torch.uint8)[begin:]
    numbers = triton_rows.scalars(logits.device, temperature, 0.0, 1.0)
    constants = {
        "LANES": 512, "WIDTH": 8, "HAS_MASK": True, "ROW_TEMPERATURE": False, "SCALED": False, "CAPPED": False,
        "ENTROPY": True, "ALIGNED": rows.aligned,
    }  # fmt: skip
    arguments = (
        rows.tensor, tokens, flags, tokens, numbers, *[per_row] * 5, flags, rows.inner, rows.outer, rows.stride, vocab,
    )  # fmt: skip
    return key(triton_rows.row_stats_kernel, arguments, constants)


def test_a_new_length_batch_or_temperature_is_the_same_kernel():
    first = rows_key(2, 3)
    assert rows_key(2, 16) == first
    assert rows_key(1, 1) == first
    assert rows_key(5, 37, temperature=0.7) == first
    assert rows_key(2, 3, vocab=4097) != first  # the vocabulary may be compiled in


def test_rows_more_than_two_thousand_million_elements_apart_are_the_same_kernel():
    # 14 135 positions of 152k words: the stride between sequences needs 64 bits from there on
    assert rows_key(2, 3, strides=(2**31, 4096)) == rows_key(2, 3)


@pytest.mark.parametrize("name", bench_compile.kernels())
def test_a_tensor_that_begins_anywhere_is_the_same_kernel(name):
    # rows of a chunk, tokens[1:], one sequence's values[:, 1:]: 16-byte boundaries come and go
    params = {p.name: p for p in bench_compile.kernels()[name].params if p.name.endswith("_ptr")}
    aligned = {n for n, p in params.items() if not p.do_not_specialize_on_alignment}
    per_column = {"logits_ptr", "grads_ptr", "out_ptr", "ref_ptr", "hidden_ptr", "weight_ptr", "bias_ptr", "x_ptr"}
    outputs = {"shaped_ptr", "advantages_ptr", "returns_ptr", "kl_ptr", "moments_ptr", "partials_ptr", "pieces_ptr",
               "exponentials_ptr"}  # fmt: skip
    assert aligned <= per_column | outputs | ({"mask_ptr"} if name in ("moments", "whiten") else set())


def test_rows_from_the_middle_of_a_tensor_are_the_same_kernel():
    assert rows_key(2, 3, begin=1) == rows_key(2, 3)


def test_a_new_horizon_is_the_same_scan():
    def scan(batch, length, segments):
        x, flags = torch.empty(batch, length), torch.empty(batch, length, dtype=torch.uint8)
        moments, words = torch.empty(3, dtype=torch.float64), torch.empty(9, dtype=torch.int64)
        constants = {
            "LANES": 256, "REWARDS": False, "SCORES": True, "ESTIMATOR": 3, "CRITIC": False, "SPLIT": True,
            "STREAM": True,
        }  # fmt: skip
        arguments = (x, x, x, x, x, flags, x, words, x, x, x, x, moments, length, batch, segments)
        return key(triton_gae.gae_kernel, arguments, constants)

    assert scan(2, 1025, 2) == scan(3, 1040, 2) == scan(1, 4096, 4) == scan(16, 16384, 16)


@pytest.mark.parametrize("name", bench_compile.kernels())
def test_no_kernel_compiles_anew_for_a_number_that_varies(name):
    # triton specialises an integer that is 1 or a multiple of 16, and takes a float by its type: lengths and strides
    # must be exempt, coefficients must come through a pointer. Of the sizes only those of a model may be compiled in.
    params = [p for p in bench_compile.kernels()[name].params if not (p.is_constexpr or p.name.endswith("_ptr"))]
    varies = {p.name for p in params if not p.do_not_specialize}
    assert varies <= {"V", "H"}
    assert {p.name for p in params} <= {"V", "H", "T", "size", "pieces", "steps", "segments", "inner", "num_rows",
                                        "factor_stride"} | set(bench_compile._LONG)  # fmt: skip


def test_the_policy_kernel_specialises_nothing_that_varies():
    names = triton_policy.policy_loss_kernel.arg_names
    varies = {names[p.num] for p in triton_policy.policy_loss_kernel.params if p.do_not_specialize}
    assert {"num_rows", "inner", "stride_outer", "stride_inner", "out_stride_outer", "out_stride_inner"} <= varies
    assert not any(p.annotation_type.startswith("fp") for p in triton_policy.policy_loss_kernel.params)


@pytest.mark.parametrize(("size", "largest"), [(2, 163840), (4, 81920)])
def test_rows_are_kept_where_there_is_room_for_all_their_programs(size, largest):
    kept = [v for v in range(16, largest + 1, 16) if gluon_policy.plan_for(v, size, 228 << 10)]
    assert kept == list(range(16384 // size, largest + 1, 16))
    assert not gluon_policy.plan_for(largest + 16, size, 228 << 10)
    for plan, vocab in {gluon_policy.plan_for(v, size, 228 << 10): v for v in kept}.items():
        block = plan.lanes * 16
        assert (plan.held + plan.slots - 1) * block < vocab * size <= (plan.held + plan.slots) * block
        assert plan.held * block < vocab * size  # the blocks in registers are whole
        assert plan.slots % plan.together == 0
        # an H200: 64 Ki registers, 228 KiB of which each program loses 1 to the device, and 32 bytes a warp to sums
        assert plan.programs * plan.warps * 32 * plan.registers <= 1 << 16
        assert plan.programs * (plan.slots * block + 32 * plan.warps + 1024) <= 228 << 10


def plan_of(monkeypatch, vocab=151936, major=9, begin=0, softcap=0.0, device="cuda", stride=None):
    """What a GPU would choose for rows that begin there: only where tensors are is made up."""
    tensor = SimpleNamespace(
        device=SimpleNamespace(type=device), data_ptr=lambda: begin, shape=(4, vocab), element_size=lambda: 2
    )
    properties = SimpleNamespace(major=major, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    rows = triton_rows.Layout(tensor, 4, 0, stride or vocab)
    return triton_policy.resident_plan(rows, rows, Transform(softcap=softcap))


def test_which_rows_are_kept_on_the_multiprocessor(monkeypatch):
    assert plan_of(monkeypatch).programs == 1
    assert plan_of(monkeypatch, vocab=32000).programs == 3
    for other in (
        {"vocab": 50257}, {"vocab": 262144}, {"vocab": 1024}, {"major": 8}, {"major": 10}, {"begin": 8},
        {"softcap": 30.0}, {"device": "cpu"}, {"stride": 151937},
    ):  # fmt: skip
        assert plan_of(monkeypatch, **other) is None
