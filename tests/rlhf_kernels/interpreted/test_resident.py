"""The kernel that keeps rows on the multiprocessor: which block is where and when, against the reference in float64."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from rlhf_kernels import PolicyLossSpec, policy_loss, triton_policy

FOLDER = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("gluon_stand_in", FOLDER / "gluon_stand_in.py")
gluon_stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gluon_stand_in)
SOURCE = Path(triton_policy.__file__).with_name("gluon_policy.py")
gluon_policy = gluon_stand_in.load(SOURCE, "gluon_policy_interpreted")


@pytest.fixture
def plan(monkeypatch):
    """The next calls keep rows in blocks of 64 lanes, so many of them in registers and in shared memory."""
    launched = []
    monkeypatch.setitem(sys.modules, "rlhf_kernels.gluon_policy", gluon_policy)

    def use(held, slots):
        some = gluon_policy.Plan(lanes=64, held=held, slots=slots, warps=1, registers=128, programs=1, most_together=2)
        monkeypatch.setattr(triton_policy, "resident_plan", lambda *_: launched.append(some) or some)
        return launched

    return use


def inputs(num_rows, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    tokens = torch.randint(vocab, (num_rows,), generator=generator)
    mask = torch.rand(num_rows, generator=generator) > 0.3
    mask[-1] = True
    return logits, tokens, mask, torch.randn(num_rows, generator=generator), torch.rand(num_rows, generator=generator)


def same(ours, exact, tolerance=1e-5):
    for x, y in zip(ours, exact, strict=True):
        if x is not None:
            torch.testing.assert_close(x.double(), y.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def outputs(logits, tokens, mask, advantages, weights, dtype, **options):
    x = logits.to(dtype).requires_grad_()
    old = torch.full(tokens.shape, -7.0)
    result = policy_loss(
        x, tokens, old, advantages, mask=mask, denominator=3.0, weights=weights, ref_logprobs=old - 0.3, **options
    )
    return *result, torch.autograd.grad(result.loss, x)[0]


# blocks of 256 columns in float32: [held, slots] of the plan, and a row that ends with its last block or within it
SHAPES = [(0, 1, 256), (0, 3, 768), (0, 3, 528), (1, 2, 752), (3, 2, 1280), (2, 1, 576), (0, 5, 1200), (1, 6, 1744)]


@pytest.mark.parametrize(("held", "slots", "vocab"), SHAPES)
def test_every_block_of_every_row(both, plan, held, slots, vocab):
    # four programs: rows 0, 4, 8 and so on are one program's, some of them masked
    launched = plan(held, slots)
    some = inputs(11, vocab)
    same(*both(lambda dtype: outputs(*some, dtype)))
    assert launched


OPTIONS = {
    "entropy": {"with_entropy": True, "loss": PolicyLossSpec(entropy_coef=0.3, kl_coef=0.2, kl_estimator="k3")},
    "scale": {"logit_scale": 1.3, "temperature": 0.7, "loss": PolicyLossSpec("cispo", kl_coef=0.1, kl_estimator="k1")},
    "sapo": {"loss": PolicyLossSpec("sapo")},
    "dual": {"loss": PolicyLossSpec(dual_clip=3.0)},
    "reinforce": {"loss": PolicyLossSpec("reinforce", entropy_coef=0.1)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(both, plan, options):
    launched = plan(1, 2)
    logits, tokens, mask, advantages, weights = inputs(9, 752, seed=1)
    same(*both(lambda dtype: outputs(logits, tokens, mask, advantages, weights, dtype, **options)))
    per_row = {**options, "temperature": weights + 0.5}
    same(*both(lambda dtype: outputs(logits, tokens, mask, advantages, None, dtype, **per_row)))
    assert len(launched) == 2


def test_the_token_anywhere_in_the_row(both, plan):
    # in a held block, at both ends of one in shared memory, in the last vector; nearly certain, and impossible
    launched = plan(1, 2)
    tokens = torch.tensor([0, 3, 255, 256, 511, 512, 739, 740, 743, 300, 100])
    logits, _, _, advantages, weights = inputs(len(tokens), 744 + 8, seed=2)
    logits[torch.arange(9), tokens[:9]] = 40.0
    logits[9, 300] = logits[10, 100] = -math.inf
    spec = PolicyLossSpec("reinforce", entropy_coef=0.1)
    some = (logits, tokens, tokens >= 0, advantages, weights)
    ours, exact = both(lambda dtype: outputs(*some, dtype, loss=spec))
    same(ours, exact)
    # 1 - p = 1e-14: its digits survive
    torch.testing.assert_close(ours[-1][3, 256].double(), exact[-1][3, 256], rtol=1e-4, atol=0)
    assert launched


def test_rows_that_do_not_count_are_not_read(both, plan):
    launched = plan(1, 2)
    logits, tokens, mask, advantages, weights = inputs(9, 640, seed=3)
    for counts in (mask, torch.zeros(9, dtype=torch.bool), torch.arange(9) == 4, torch.arange(9) != 4):
        spoilt = torch.where(counts[:, None], logits, math.nan)
        # a row whose loss has no slope: clipped away
        advantages[8] = 0.0
        ours, exact = both(lambda dtype, x=spoilt, m=counts: outputs(x, tokens, m, advantages, weights, dtype))
        same(ours, exact)
        assert not ours[-1][~counts].any()
    assert launched


def test_hostile_rows(both, plan):
    plan(1, 1)
    logits, tokens, _, advantages, weights = inputs(6, 320, seed=4)
    logits[0], logits[1] = 1e4, -1e4
    logits[2, 5:] = -math.inf
    logits[3, 7] = math.nan
    logits[4] = logits[4] * 3000
    tokens[:3] = 3
    options = {"with_entropy": True, "loss": PolicyLossSpec("reinforce")}
    ours, exact = both(lambda dtype: outputs(logits, tokens, tokens >= 0, advantages, weights, dtype, **options))
    same(ours, exact, tolerance=1e-4)
    assert ours[-1][3].isnan().all()
    assert not ours[-1][torch.arange(6) != 3].isnan().any()


def test_a_token_that_is_none_makes_its_row_nan(plan, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(sys.modules["rlhf_kernels.policy_loss"], "check_token_range", lambda *_: None)  # as on a GPU
    plan(1, 1)
    logits, tokens, mask, advantages, weights = inputs(5, 320)
    tokens[0], tokens[1], tokens[2] = -100, 320, 2**40
    loss = PolicyLossSpec("reinforce")
    grad = outputs(logits, tokens, mask | True, advantages, weights, torch.float32, loss=loss)[-1]
    assert grad[:3].isnan().all()
    assert grad[3:].isfinite().all()


def test_views_of_a_batch(both, plan):
    launched = plan(0, 2)
    logits, _, _, advantages, _ = inputs(8, 320, seed=5)
    tokens = torch.tensor([[3, 4, 319], [256, 255, 0]])

    def use(dtype):
        x = logits.view(2, 4, 320).to(dtype).requires_grad_()
        old, some = torch.full((2, 3), -7.0), advantages[:6].view(2, 3)
        result = policy_loss(x[:, :-1], tokens, old, some, mask=tokens != 4, denominator=3.0)
        return *result, torch.autograd.grad(result.loss, x)[0]

    same(*both(use))
    assert launched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_logits_in_a_word(plan, monkeypatch, dtype):
    # blocks of 512 columns; the interpreter cuts a bfloat16 off where a GPU rounds it
    launched = plan(1, 2)
    logits, tokens, mask, advantages, weights = inputs(6, 1360, seed=6)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")
    ours = outputs(logits, tokens, mask, advantages, weights, dtype)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    exact = outputs(logits.to(dtype), tokens, mask, advantages, weights, torch.float64)
    same(ours[:-1], exact[:-1])
    torch.testing.assert_close(ours[-1].double(), exact[-1], rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert launched
