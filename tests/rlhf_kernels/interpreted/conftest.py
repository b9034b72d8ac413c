"""These tests run in their own process (see ../test_interpreted.py). Memory that a kernel should fill starts as NaN."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """An output that a kernel forgets shows as NaN (or 255), not as the zeros of a fresh page."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1) if x.dtype == torch.bool else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@pytest.fixture
def both(monkeypatch):
    """Runs a function of a dtype through the kernels in float32 and through the reference in float64."""

    def run(function):
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
        ours = function(torch.float32)
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
        return ours, function(torch.float64)

    return run
