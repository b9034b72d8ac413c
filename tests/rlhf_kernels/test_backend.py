import itertools
import logging

import pytest
import rlhf_kernels
import torch
from rlhf_kernels import backend, backend_report, token_logprobs


def test_the_report_says_which_and_why():
    token_logprobs(torch.zeros(1, 2), torch.tensor([0]))
    choice = backend_report()["token_logprobs"]
    assert (choice.backend, choice.device) == ("reference", "cpu")
    assert choice.reason == "no Triton kernels for cpu tensors"


def test_every_op_is_in_the_report(monkeypatch):
    monkeypatch.setattr(backend, "_choices", {})
    x, ids, mask = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    per_token, options = torch.zeros(2), {"mask": mask, "denominator": 1.0}
    token_logprobs(x, ids)
    rlhf_kernels.linear_token_logprobs(x, x, ids)
    rlhf_kernels.exact_kl(x, x)
    rlhf_kernels.linear_exact_kl(x, x, x, x)
    rlhf_kernels.linear_jsd(x, x, x, x)
    rlhf_kernels.policy_loss(x, ids, per_token, per_token, **options)
    rlhf_kernels.linear_policy_loss(x, x, ids, per_token, per_token, **options)
    rlhf_kernels.gae(x, x, x == 0, gamma=1.0, lam=1.0)
    rlhf_kernels.kl_shaped_gae(x[:, 0], x, x, x, x == 0, kl_coef=0.1, gamma=1.0, lam=1.0)
    rlhf_kernels.masked_whiten(x, x == 0)
    expected = {"token_logprobs", "linear_token_logprobs", "exact_kl", "linear_exact_kl", "linear_jsd",
                "policy_loss", "linear_policy_loss", "gae", "kl_shaped_gae", "masked_whiten"}  # fmt: skip
    assert set(backend_report()) == expected
    assert {choice.backend for choice in backend_report().values()} == {"reference"}


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


def test_an_op_without_a_kernel_says_so_where_kernels_are_asked_for(monkeypatch, caplog):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    with caplog.at_level(logging.WARNING, "rlhf_kernels"):
        assert not backend.use_triton("z", torch.zeros(1), has_kernel=False)
    assert backend_report()["z"].reason == "it has no Triton kernel"
    assert caplog.messages == ["rlhf_kernels.z runs the plain-torch reference on cpu: it has no Triton kernel"]


def test_a_fallback_on_an_accelerator_is_logged_once(monkeypatch, caplog):
    class OnAccelerator:
        device = torch.device("cuda")
        dtype = torch.float64

    with caplog.at_level(logging.WARNING, "rlhf_kernels"):
        for _ in range(3):
            assert not backend.use_triton("y", OnAccelerator())
    messages = [record.getMessage() for record in caplog.records]
    expected = ["rlhf_kernels.y runs the plain-torch reference on cuda: the kernels do not take torch.float64"]
    assert messages == expected
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert not backend.use_triton("y", OnAccelerator())
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE)
    assert not backend.use_triton("y", OnAccelerator())  # said before, though another reason came between
    assert [record.getMessage() for record in caplog.records][:1] == expected
    assert len(caplog.records) == 2


def test_kernels_that_were_asked_for_and_do_not_run_are_not_missed_in_silence(monkeypatch, caplog):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setattr(backend, "_said", set())
    for _ in range(2):
        token_logprobs(torch.zeros(1, 2), torch.tensor([0]))
    expected = "rlhf_kernels.token_logprobs runs the plain-torch reference on cpu: no Triton kernels for cpu tensors"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_call_on_the_cpu_logs_nothing(caplog):
    token_logprobs(torch.zeros(1, 2), torch.tensor([0]))
    assert not caplog.records


def test_numbers_are_kept_per_stream_and_a_graph_has_its_own(monkeypatch):
    class Device:
        type = "cuda"

    stream, capturing = torch.device("cpu"), False
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *size, device, **options: full(*size, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": stream}))
    monkeypatch.setattr(backend, "_scalars", lambda device, stream, values: made.setdefault((stream, values), object()))
    made = {}
    stream = 1
    first = backend.scalars(Device(), 0.5, 2.0)
    assert backend.scalars(Device(), 0.5, 2.0) is first
    stream = 2
    assert backend.scalars(Device(), 0.5, 2.0) is not first  # nothing orders the two streams
    capturing = True
    inside = [backend.scalars(Device(), 0.5, 2.0) for _ in range(2)]
    assert len(made) == 2
    assert inside[0].tolist() == [0.5, 2.0]
    assert inside[0] is not inside[1]


def test_programs_have_at_most_a_thousand_threads(monkeypatch):
    triton_policy = pytest.importorskip("rlhf_kernels.triton_policy")
    triton_rows = pytest.importorskip("rlhf_kernels.triton_rows")
    for hip, lanes in ((None, 32), ("6.4", 64)):
        monkeypatch.setattr(torch.version, "hip", hip)
        for vocab, size, aligned in itertools.product((1, 300, 50257, 151936), (2, 4), (False, True)):
            assert triton_policy.policy_lanes_for(vocab, size, aligned)[2] * lanes <= 1024
        assert all(triton_rows.block_for(vocab, 4096)[1] * lanes <= 1024 for vocab in (1, 300, 50257, 151936))
