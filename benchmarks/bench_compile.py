"""Compile every Triton kernel in its shipped configurations, without a GPU, and record what it needs.

    python benchmarks/bench_compile.py                    # sm_80, sm_90, sm_100 -> benchmarks/results/compile/sm_*.json
    python benchmarks/bench_compile.py --target sm_90 --check     # compare, write nothing, exit 1 on a spill

Registers, shared memory and spilled instructions (STL, LDL in the machine code) come from the cubin. A spill is an
error: every number in here was chosen so that there is none.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rlhf_kernels import (
    gluon_policy,
    triton_exponentials,
    triton_gae,
    triton_kl,
    triton_linear,
    triton_policy,
    triton_rows,
    triton_whiten,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

RESULTS = Path(__file__).parent / "results" / "compile"
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
VOCABULARIES = (151936, 50257)
"""Aligned (divisible by 16) and not: nothing else about the vocabulary changes the machine code."""
_BYTES = ("mask_ptr", "argmax_ptr", "clipped_ptr")
_LONG = ("stride_outer", "stride_inner", "out_stride_outer", "out_stride_inner", "ref_stride_outer", "ref_stride_inner",
         "stride_hidden", "stride_weight")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One kernel as one op launches it."""

    kernel: str
    name: str
    """What distinguishes it, in words."""
    constants: dict[str, Any]
    warps: int
    vocab: int = 0
    """The size that is specialised, if the kernel has one."""
    types: tuple[tuple[str, str], ...] = ()
    """Argument types that differ from the usual."""
    registers: int = 0
    """Ceiling given to the assembler; 0 = none."""
    stages: int = 0
    """Loads in flight, where the kernel multiplies; 0 = the compiler's default."""
    since: int = 0
    """Lowest compute capability that launches it."""
    until: int = 1000
    """Highest one that does."""


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of it."""

    kernel: str
    name: str
    warps: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int


def kernels() -> dict[str, Any]:
    modules = (
        triton_rows, triton_policy, gluon_policy, triton_kl, triton_gae, triton_whiten, triton_linear,
        triton_exponentials,
    )  # fmt: skip
    return {name: kernel for module in modules for name, kernel in module.KERNELS.items()}


def _row_configs(vocab: int) -> Iterator[Config]:
    plain = {"HAS_MASK": True, "ROW_TEMPERATURE": False, "SCALED": False, "CAPPED": False, "ALIGNED": vocab % 16 == 0}
    full = {**plain, "ROW_TEMPERATURE": True, "SCALED": True, "CAPPED": True, "ALIGNED": False}
    for kind, common in (("plain", plain), ("scale, cap, row temperature", full)):
        for entropy in (False, True):
            label = f"{kind}{', entropy' if entropy else ''}, V={vocab}"
            for logits in ("*bf16", "*fp32"):
                types = (("logits_ptr", logits), ("out_ptr", logits), ("grads_ptr", logits))
                size = 2 if logits == "*bf16" else 4
                lanes, width, warps = triton_rows.lanes_for(vocab, size)
                constants = {**common, "LANES": lanes, "WIDTH": width, "ENTROPY": entropy}
                registers = triton_rows.row_registers(common["CAPPED"])
                yield Config("row_stats", f"{label}, {logits[1:]}", constants, warps, vocab, types, registers)
                block, warps = triton_rows.block_for(vocab, 4096)
                yield Config("row_grads", f"{label}, {logits[1:]}", {**common, "BLOCK": block, "ENTROPY": entropy,
                             "TOGETHER": True}, warps, vocab, types)  # fmt: skip


def _policy_configs(vocab: int) -> Iterator[Config]:
    lanes, width, warps = triton_policy.policy_lanes_for(vocab, 2, vocab % 16 == 0)
    base = {"LANES": lanes, "WIDTH": width, "WEIGHTS": True, "GRADS": True, "ALIGNED": vocab % 16 == 0}
    base["TOGETHER"] = True
    base |= {"ROW_TEMPERATURE": False, "SCALED": False}
    types = (("logits_ptr", "*bf16"), ("grads_ptr", "*bf16"))
    for form, name in enumerate(("clipped", "reinforce", "cispo", "sapo")):
        constants = {**base, "FORM": form, "ESTIMATOR": 0, "DUAL": False, "ENTROPY": False, "ENTROPY_LOSS": False}
        constants["CAPPED"] = False
        yield Config(
            "policy_loss",
            f"{name}, V={vocab}",
            constants,
            warps,
            vocab,
            types,
            triton_rows.row_registers(False),
        )
    everything = {**base, "FORM": 0, "ESTIMATOR": 3, "DUAL": True, "ENTROPY": True, "ENTROPY_LOSS": True}
    lanes, width, warps = triton_policy.policy_lanes_for(vocab, 2, False)
    everything |= {"ROW_TEMPERATURE": True, "SCALED": True, "CAPPED": True, "ALIGNED": False}
    everything |= {"LANES": lanes, "WIDTH": width}
    name = f"clipped, everything on, V={vocab}"
    yield Config("policy_loss", name, everything, warps, vocab, types, triton_rows.row_registers(True))


SHARED_BYTES = 228 << 10
"""Of a multiprocessor of sm_90, the device that keeps rows there."""


def _resident_configs() -> Iterator[Config]:
    """One vocabulary for each choice of `plan_for`, and the largest that fits: the most registers."""
    largest = max(v for v in range(16, 1 << 18, 16) if gluon_policy.plan_for(v, 2, SHARED_BYTES))
    plain = {"FORM": 0, "ESTIMATOR": 0, "DUAL": False, "ENTROPY": False, "ENTROPY_LOSS": False, "WEIGHTS": False}
    plain |= {"ROW_TEMPERATURE": False, "SCALED": False}
    entropy = {**plain, "ESTIMATOR": 3, "ENTROPY": True, "ENTROPY_LOSS": True, "WEIGHTS": True}
    everything = {**entropy, "DUAL": True, "ROW_TEMPERATURE": True, "SCALED": True}
    kinds = {"plain": plain, "KL, entropy": entropy, "everything on": everything}
    cases = [(kind, "bf16", vocab) for kind in kinds for vocab in (32000, 65536, 151936, largest)]
    cases += [("everything on", dtype, largest) for dtype in ("fp16", "fp32")]
    for kind, dtype, vocab in cases:
        options, size = kinds[kind], 4 if dtype == "fp32" else 2
        plan = gluon_policy.plan_for(vocab * 2 // size, size, SHARED_BYTES)
        assert plan is not None
        constants = {**options, "LANES": plan.lanes, "WIDTH": 16 // size, "HELD": plan.held, "SLOTS": plan.slots}
        constants |= {"TOGETHER": plan.together, "LAG": plan.lag}
        types = (("logits_ptr", f"*{dtype}"), ("grads_ptr", f"*{dtype}"))
        name = f"{kind}, {dtype}, V={vocab * 2 // size}"
        yield Config("policy_loss_resident", name, constants, plan.warps, vocab, types, plan.registers,
                     since=90, until=90)  # fmt: skip


def _linear_configs(vocab: int) -> Iterator[Config]:
    plain = {"BIAS": False, "ROW_TEMPERATURE": False, "SCALED": False, "CAPPED": False, "ENTROPY": False}
    plain["ALIGNED"] = True
    everything = dict.fromkeys(plain, True)
    kinds = {
        "plain": plain, "entropy": {**plain, "ENTROPY": True},
        "everything on, odd sizes": {**everything, "ALIGNED": False}, "everything on": everything,
        "exponentials": {**plain, "EXPONENTIALS": True},
        "exponentials, everything on": {**everything, "CAPPED": False, "EXPONENTIALS": True},
    }  # fmt: skip
    tiles = (
        ("bf16", triton_linear.WIDE_TILE, 90, 1000),
        ("bf16", triton_linear.SQUARE_TILE, 0, 89),
        ("bf16", triton_linear.NARROW_TILE, 0, 1000),
        ("bf16", triton_linear.tile_for_device(torch.bfloat16, True, 227 << 10, rounded=True), 0, 1000),
        ("bf16", triton_linear.tile_for_device(torch.bfloat16, False, 227 << 10, rounded=True), 0, 1000),
        ("fp32", triton_linear.FLOAT_TILE, 0, 1000),
    )
    for kind, options in kinds.items():
        for (dtype, tile, since, until), descriptors in itertools.product(tiles, (True, False)):
            if descriptors and (dtype == "fp32" or not options["ALIGNED"]):
                continue
            if dtype == "bf16" and tile.rows != triton_linear.NARROW_TILE.rows and not options["ALIGNED"]:
                continue
            if tile.promote and tile.rows != triton_linear.NARROW_TILE.rows and not descriptors:
                until = 89  # from there on such operands are copied to where descriptors can be
            stores = options.get("EXPONENTIALS", False)
            if stores and not descriptors:
                continue
            constants = {**options, "BLOCK_N": tile.rows, "BLOCK_V": tile.columns, "BLOCK_H": tile.depth}
            constants |= {"PIECE_TILES": tile.piece, "GROUP": triton_linear.group_for(2048, 2, tile)}
            constants |= {"DESCRIPTORS": descriptors, "EXPONENTIALS": stores, "PROMOTE": tile.promote}
            constants["PARTS"] = tile.parts
            loads = "descriptors" if descriptors else "pointers"
            sizes = (("hidden_ptr", tile.rows), ("weight_ptr", tile.columns))
            types = tuple(
                (name, f"tensordesc<{dtype}[{size}, {tile.depth}]>" if descriptors else f"*{dtype}")
                for name, size in sizes
            )
            if stores:
                types += (("exponentials_ptr", f"tensordesc<{dtype}[{tile.rows}, {tile.columns // tile.parts}]>"),)
            sums = ", rounded sums" if tile.promote else ""
            name = f"{kind}{sums}, {loads}, {dtype}, {tile.rows}x{tile.columns}x{tile.depth}, V={vocab}"
            since, until = max(since, 90) if descriptors else since, min(until, 90) if stores else until
            yield Config("linear_stats", name, constants, tile.warps, vocab, types, triton_linear.LINEAR_REGISTERS,
                         tile.stages, since, until)  # fmt: skip


def _other_configs() -> Iterator[Config]:
    yield from _resident_configs()
    yield from _linear_configs(VOCABULARIES[0])
    for entropy, stores in itertools.product((False, True), (False, True)):
        constants = {"MERGE_ROWS": triton_linear.MERGE_ROWS, "ENTROPY": entropy, "EXPONENTIALS": stores}
        constants |= {"MERGE_PIECES": triton_linear.MERGE_PIECES, "BLOCK_N": triton_linear.WIDE_TILE.rows}
        name = f"{'entropy' if entropy else 'plain'}{', exponentials' if stores else ''}"
        yield Config("linear_merge", name, constants, 4, VOCABULARIES[0], until=90 if stores else 1000)
    flags = dict.fromkeys(("ALIGNED", "BIAS", "ROW_TEMPERATURE", "SCALED"), True)
    types = (("hidden_ptr", "*bf16"), ("weight_ptr", "*bf16"))
    yield Config("token_offsets", "everything on", {**flags, "CAPPED": False, "BLOCK": 1024}, 4, VOCABULARIES[0], types,
                 since=90, until=90)  # fmt: skip
    for vocab in VOCABULARIES:
        block, warps = triton_rows.block_for(vocab, 4096)
        types = (("logits_ptr", "*bf16"), ("grads_ptr", "*bf16"), ("ref_ptr", "*bf16"))
        yield Config("scale_rows", f"V={vocab}", {"BLOCK": block}, warps, vocab, types)
        for forward in (False, True):
            lanes, width, warps = triton_rows.lanes_for(vocab, 2)
            constants = {"LANES": lanes, "WIDTH": width, "FORWARD": forward, "HAS_MASK": True, "WEIGHTS": True}
            constants |= {"GRADS": True, "TOGETHER": True}
            name = f"{'forward' if forward else 'reverse'}, gradient, V={vocab}"
            yield Config("kl", name, {**constants, "ALIGNED": vocab % 16 == 0}, warps, vocab, types)
    for span, critic in itertools.product((32, 64, 128, 256, 8192), (False, True)):
        lanes, warps = triton_gae.lanes_for_time(span)
        constants = {"LANES": lanes, "REWARDS": False, "SCORES": True, "ESTIMATOR": 3, "CRITIC": critic}
        rows = "segments" if span > lanes else "whole rows"
        name = f"KL-shaped{', critic lambda' if critic else ''}, {rows} of {lanes} lanes"
        registers = triton_gae.segment_registers(critic) if span > lanes else 0
        yield Config("gae", name, {**constants, "SPLIT": span > lanes, "STREAM": True}, warps, registers=registers)
    yield Config("moments", "float32", {"BLOCK": triton_whiten.BLOCK}, 4, types=(("pieces_ptr", "*fp64"),))
    constants = {"BLOCK": triton_whiten.BLOCK, "PIECES": triton_whiten.MAX_PIECES, "SHIFT": True}
    yield Config("whiten", "float32", constants, 4, types=(("pieces_ptr", "*fp64"),))


def configs(target: str) -> list[Config]:
    """Every shipped configuration that a device of this kind launches."""
    rows = [config for vocab in VOCABULARIES for make in (_row_configs, _policy_configs) for config in make(vocab)]
    return [config for config in (*rows, *_other_configs()) if config.since <= TARGETS[target] <= config.until]


def _type_of(name: str, config: Config) -> str:
    special = dict(config.types)
    if name in special:
        return special[name]
    if name in _LONG:
        return "i64"
    if not name.endswith("_ptr"):
        return "i32"
    if name in _BYTES:
        return "*u8"
    if name == "tokens_ptr":
        return "*i64"
    if name == "words_ptr":
        return "*i64"
    if name == "wanted_ptr":
        return "*i32"
    return "*fp64" if name == "moments_ptr" and config.kernel == "gae" else "*fp32"


def compile_config(config: Config, capability: int) -> Compiled:
    """Compile for a compute capability with the installed triton; needs no driver."""
    kernel = kernels()[config.kernel]
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in config.constants else _type_of(name, config)
    divisible = {}
    for index, name in enumerate(kernel.arg_names):
        aligned = not kernel.params[index].do_not_specialize_on_alignment
        if (signature[name].startswith("*") and aligned) or (name == "V" and config.vocab % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
        if name == "H" and config.constants["ALIGNED"]:
            divisible[(index,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(kernel, signature=signature, constexprs=config.constants, attrs=divisible)
    options = {"num_warps": config.warps}
    if config.registers:
        options = triton_rows.launch_options(config.warps, config.registers)
    if config.stages:
        options["num_stages"] = config.stages
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = _inspect(compiled.asm["cubin"])
    return Compiled(
        kernel=config.kernel,
        name=config.name,
        warps=config.warps,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        shared_bytes=int(compiled.metadata.shared),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        spill_stores=len(re.findall(r"\bSTL\b", code)),
        spill_loads=len(re.findall(r"\bLDL\b", code)),
    )


def _inspect(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a spill")
    arguments = parser.parse_args()
    spilled = 0
    for target in arguments.target or TARGETS:
        results = [compile_config(config, TARGETS[target]) for config in configs(target)]
        for result in results:
            bad = result.spill_stores + result.spill_loads
            spilled += bad
            flag = "  SPILLS" if bad else ""
            print(
                f"{target} {result.kernel:12} {result.registers:4} regs {result.shared_bytes:6} B  {result.name}{flag}"
            )
        if not arguments.check:
            RESULTS.mkdir(parents=True, exist_ok=True)
            report = {"target": target, "triton": triton.__version__, "kernels": [asdict(result) for result in results]}
            (RESULTS / f"{target}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
