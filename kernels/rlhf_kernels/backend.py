"""Which implementation an op runs: the Triton kernels where they can, the plain-torch reference elsewhere, and why.

Every op asks `use_triton(name, tensor)` when it runs. The answer and its reason are remembered for `backend_report()`,
and a fallback on an accelerator, or where `triton` was asked for, is logged once.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_log = logging.getLogger("rlhf_kernels")

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"
"""`auto` (default), `reference` (torch everywhere), or `triton` (also on CPU tensors, under TRITON_INTERPRET=1)."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Asked once, here: `choose` may be traced by torch.compile, which cannot follow the question."""

_choices: dict[str, "BackendChoice"] = {}
_said: set[tuple[str, "BackendChoice"]] = set()
_Inputs = ParamSpec("_Inputs")
_Output = TypeVar("_Output")


@dataclass(frozen=True)
class BackendChoice:
    """What an op ran on at its latest call."""

    backend: str
    """`triton` or `reference`."""
    device: str
    """Type of the device the tensors were on."""
    reason: str
    """Why that backend, in words."""


def choose(x: Tensor) -> BackendChoice:
    """Kernels or reference for tensors like `x`."""
    device = x.device.type
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if wanted not in ("auto", "reference", "triton"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={wanted!r}: use auto, reference or triton")
    if wanted == "reference":
        return BackendChoice("reference", device, f"{ENVIRONMENT_VARIABLE}=reference")
    if not HAS_TRITON:
        return BackendChoice("reference", device, "triton is not installed")
    if x.dtype not in KERNEL_DTYPES:
        return BackendChoice("reference", device, f"the kernels do not take {x.dtype}")
    if device == "cuda":
        return BackendChoice("triton", device, "CUDA tensors and triton")
    if wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return BackendChoice("triton", device, "interpreted: TRITON_INTERPRET=1")
    return BackendChoice("reference", device, f"no Triton kernels for {device} tensors")


def use_triton(op: str, x: Tensor, *, has_kernel: bool = True) -> bool:
    """Whether `op` should launch its kernel for tensors like `x`; remembered for the report.

    Args:
        has_kernel: False of an op that nobody has written one for.
    """
    choice = choose(x) if has_kernel else BackendChoice("reference", x.device.type, "it has no Triton kernel")
    expected = choice.device not in ("cpu", "meta") or os.environ.get(ENVIRONMENT_VARIABLE) == "triton"
    if choice.backend == "reference" and expected and (op, choice) not in _said:
        _log.warning("rlhf_kernels.%s runs the plain-torch reference on %s: %s", op, choice.device, choice.reason)
        _said.add((op, choice))
    _choices[op] = choice
    return choice.backend == "triton"


def backend_report() -> dict[str, BackendChoice]:
    """For each op called so far in this process: the backend of its latest call, and why that one."""
    return dict(sorted(_choices.items()))


def on_device(launch: Callable[_Inputs, _Output]) -> Callable[_Inputs, _Output]:
    """Run `launch` on the device of its first tensor: Triton launches on the current one, wherever the tensors are."""

    @functools.wraps(launch)
    def run(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Output:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):  # type: ignore[no-untyped-call]
            return launch(*args, **kwargs)

    return run


def scalars(device: torch.device, *values: float) -> Tensor:
    """Numbers a kernel reads at run time, as float32 on `device`.

    A kernel argument that is a Python float is a new compilation for every value in some compilers; a pointer never is.
    """
    if device.type != "cuda":
        return _scalars(device, 0, values)
    if torch.cuda.is_current_stream_capturing():
        # A graph reads this memory at every replay: it has to be the graph's own, and filled without the host.
        return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])
    return _scalars(device, torch.cuda.current_stream(device).cuda_stream, values)


@functools.lru_cache(maxsize=256)
def _scalars(device: torch.device, stream: int, values: tuple[float, ...]) -> Tensor:
    """Per stream: nothing makes another one wait for the copy."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
