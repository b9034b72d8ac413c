"""The short form of `make faults`: a run is killed at every failpoint once, and goes on to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.core.failpoints import POINTS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_killed_at_any_failpoint_ends_with_the_same_bits(tmp_path):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command = [sys.executable, "benchmarks/bench_faults.py", "--only", "points", "ahead", "--num", "0"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "faults.json")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sections = json.loads((tmp_path / "faults.json").read_text())["sections"]
    stages = sections["points"]["figures"] | sections["ahead"]["figures"]
    kills = {stage: figures["kills"] for stage, figures in stages.items()}
    assert sum(kills.values()) == len(POINTS)
    assert {stage: figures["bit-identical, samples too"] for stage, figures in stages.items()} == kills, done.stdout
