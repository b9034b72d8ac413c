import logging

import pytest
import torch
from rlhf_kernels import backend, backend_report, token_logprobs


def test_the_report_says_which_and_why():
    token_logprobs(torch.zeros(1, 2), torch.tensor([0]))
    choice = backend_report()["token_logprobs"]
    assert (choice.backend, choice.device) == ("reference", "cpu")
    assert choice.reason == "no Triton kernels for cpu tensors"


@pytest.mark.parametrize(
    ("setting", "reason"), [("reference", "RLHF_KERNELS_BACKEND=reference"), ("auto", "no Triton kernels")]
)
def test_the_environment_chooses(monkeypatch, setting, reason):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, setting)
    assert not backend.use_triton("x", torch.zeros(1))
    assert backend_report()["x"].reason.startswith(reason)


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="RLHF_KERNELS_BACKEND='fast': use auto"):
        backend.use_triton("x", torch.zeros(1))


def test_a_fallback_on_an_accelerator_is_logged_once(monkeypatch, caplog):
    class OnAccelerator:
        device = torch.device("cuda")
        dtype = torch.float64

    with caplog.at_level(logging.WARNING, "rlhf_kernels"):
        for _ in range(3):
            assert not backend.use_triton("y", OnAccelerator())
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["rlhf_kernels.y runs the plain-torch reference on cuda: the kernels do not take torch.float64"]


def test_a_call_on_the_cpu_logs_nothing(caplog):
    token_logprobs(torch.zeros(1, 2), torch.tensor([0]))
    assert not caplog.records
