"""Where the tests of tests/gpu run: on the first CUDA device, or where RLHF_GPU_TESTS_DEVICE says.

On the CPU they show that the tests themselves are sound, and nothing about a GPU.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("RLHF_GPU_TESTS_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
ACCELERATOR = "gpu" if ON_GPU else "cpu"
# torch looks for it once, at the process's first product: a test that wants determinism may not be the first
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def or_skip() -> None:
    """Called before anything else is imported: without a device a whole file takes no time."""
    if DEVICE not in ("cuda", "cpu"):
        raise ValueError(f"RLHF_GPU_TESTS_DEVICE={DEVICE!r}: use cuda or cpu")
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (RLHF_GPU_TESTS_DEVICE=cpu runs it without)", allow_module_level=True)


def backend_of(op: str) -> str:
    """What the latest call of a kernel's op ran on."""
    from rlhf_kernels import backend_report

    return backend_report()[op].backend


BACKEND = "triton" if ON_GPU else "reference"
