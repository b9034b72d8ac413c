"""Runs `interpreted/` in a process of its own: triton reads TRITON_INTERPRET once, when the kernels are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.timeout(600)
def test_the_kernels_in_the_interpreter():
    folder = Path(__file__).parent / "interpreted"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RLHF_KERNELS_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider", "-n", "0"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
