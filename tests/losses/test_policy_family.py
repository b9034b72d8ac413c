"""What every policy loss owes, and the members that are no form of the kernels."""

import math

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses import (
    Cispo,
    ClipCov,
    ClippedSurrogate,
    Corrected,
    Dppo,
    Dro,
    Gmpo,
    Gspo,
    KlCov,
    Reinforce,
    SamplerCorrection,
    Sapo,
    Vespo,
)
from rlhf_lightning.losses.policy_divergence import binary_divergence

EXACT = [
    ClippedSurrogate(),
    ClippedSurrogate(dual_clip=3.0),
    ClippedSurrogate(ratio="sequence_sum"),
    Gspo(),
    Gspo(per_token=True),
    Reinforce(),
    Cispo(),
    Cispo(ratio="sequence"),
    Sapo(),
    Sapo(ratio="sequence"),
    Gmpo(),
    Vespo(),
    Dppo(),
    Dppo(divergence="kl", limit_low=0.05, limit_high=0.05),
    Dro(),
    Corrected(),
    Corrected(ClippedSurrogate(), SamplerCorrection(weight="none", keep="geometric", low=0.8, high=1.25)),
]
ALL = [*EXACT, ClipCov(frac=0.2, cov_low=0.1), KlCov(frac=0.2)]


def rollout(rows=6, time=10, seed=0, distance=0.5):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, time, generator=generator, dtype=torch.float64) * 3
    old = (logprobs + distance * torch.randn(rows, time, generator=generator, dtype=torch.float64)).clamp(max=-1e-3)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, time).contiguous()
    mask = torch.arange(time) < torch.randint(1, time + 1, (rows, 1), generator=generator)
    return logprobs.requires_grad_(), old, advantages, mask


def one_token(loss, p, q, advantage):
    """Loss and gradient of a token whose probability went from q to p."""
    logprobs = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([[math.log(q)]]).double(), torch.tensor([[advantage]]).double()
    out = loss(logprobs, old, advantages, torch.ones(1, 1, dtype=torch.bool))
    return out.per_token.item(), torch.autograd.grad(out.per_token.sum(), logprobs)[0].item(), out.clipped.item()


# ---- what every loss owes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*EXACT, KlCov(frac=0.2)], ids=repr)
def test_on_policy_the_gradient_is_reinforces(loss):
    logprobs, _, advantages, mask = rollout()
    out = loss(logprobs, logprobs.detach(), advantages, mask)
    ours = torch.autograd.grad(reduce_tokens(out.per_token, mask, "sequence_mean"), logprobs)[0]
    reinforce = reduce_tokens(-advantages * logprobs, mask, "sequence_mean")
    expected = torch.autograd.grad(reinforce, logprobs)[0]
    if isinstance(loss, ClippedSurrogate) and loss.ratio == "sequence_sum":
        expected = expected * mask.sum(-1, keepdim=True)  # of the answer's probability, not of its mean token
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(out.ratio[mask], torch.ones_like(out.ratio[mask]))
    assert not out.clipped[mask].any()
    assert not out.ratio.requires_grad


@pytest.mark.parametrize("loss", EXACT, ids=repr)
def test_an_answer_does_not_depend_on_its_neighbours(loss):
    logprobs, old, advantages, mask = rollout()
    whole = loss(logprobs, old, advantages, mask)
    for row in range(len(mask)):
        alone = loss(*(x[row : row + 1] for x in (logprobs, old, advantages, mask)))
        torch.testing.assert_close(alone.per_token[0], whole.per_token[row])
        assert torch.equal(alone.clipped[0], whole.clipped[row])


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_padding_decides_nothing(loss):
    logprobs, old, advantages, mask = rollout()
    clean = loss(logprobs, old, advantages, mask)
    generator = torch.Generator().manual_seed(1)
    garbage = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * 100
    padded = torch.cat((torch.zeros(len(mask), 3), torch.where(mask, 0.0, garbage)), 1)
    dirty = [torch.nn.functional.pad(x.detach(), (3, 0)) + padded for x in (logprobs, old, advantages)]
    wide = torch.nn.functional.pad(mask, (3, 0))
    dirty[0].requires_grad_()
    out = loss(*dirty, wide)
    torch.testing.assert_close(out.per_token[wide], clean.per_token[mask])
    assert torch.equal(out.clipped[wide], clean.clipped[mask])
    gradient = torch.autograd.grad(reduce_tokens(out.per_token, wide, "token_mean"), dirty[0])[0]
    assert (gradient[~wide] == 0).all()
    expected = torch.autograd.grad(reduce_tokens(clean.per_token, mask, "token_mean"), logprobs)[0]
    torch.testing.assert_close(gradient[wide], expected[mask])


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_the_order_of_answers_makes_no_difference(loss):
    logprobs, old, advantages, mask = rollout()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    out = loss(logprobs, old, advantages, mask)
    permuted = loss(logprobs[order], old[order], advantages[order], mask[order])
    torch.testing.assert_close(permuted.per_token[mask[order]], out.per_token[order][mask[order]])
    assert torch.equal(permuted.clipped, out.clipped[order])


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("log_ratio", [-1e4, -30.0, 30.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_policy_far_away_gives_no_nan(loss, log_ratio, advantage):
    logprobs = torch.tensor([[min(log_ratio, 0.0), -1.0]], requires_grad=True)
    old = torch.tensor([[min(-log_ratio, 0.0), -1.0]])
    out = loss(logprobs, old, torch.full((1, 2), advantage), torch.ones(1, 2, dtype=torch.bool))
    out.per_token.sum().backward()
    assert out.per_token.isfinite().all()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_nothing_that_counts_gives_no_gradient(loss):
    logprobs, old, advantages, mask = rollout()
    out = loss(logprobs, old, advantages, torch.zeros_like(mask))
    total = reduce_tokens(out.per_token, torch.zeros_like(mask), "sequence_mean")
    assert total.item() == 0
    assert (torch.autograd.grad(total, logprobs)[0] == 0).all()


# ---- GMPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gmpo_by_hand(sign):
    # log-ratios .1 .9 -.7, held within -.3 and .5 in the direction of the advantage alone
    old = torch.full((1, 4), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor([[0.1, 0.9, -0.7, 50.0]])).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    out = Gmpo(clip_low=0.3, clip_high=0.5)(logprobs, old, torch.full_like(old, 2 * sign), mask)
    kept = [0.1, 0.5, -0.7] if sign > 0 else [0.1, 0.9, -0.3]
    value = -2 * sign * math.exp(sum(kept) / 3)
    assert out.per_token[mask].tolist() == pytest.approx([value] * 3)
    assert out.clipped[0].tolist() == [False, sign > 0, sign < 0, False]
    gradient = torch.autograd.grad(reduce_tokens(out.per_token, mask, "sequence_mean"), logprobs)[0]
    assert gradient[0].tolist() == pytest.approx([0.0 if c else value / 3 for c in out.clipped[0, :3].tolist()] + [0.0])


def test_gmpo_without_bounds_is_gspo_without_bounds():
    arguments = rollout()
    gmpo, gspo = Gmpo(math.inf, math.inf)(*arguments), Gspo(math.inf, math.inf)(*arguments)
    torch.testing.assert_close(gmpo.per_token, gspo.per_token)


# ---- VESPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "k", "rate"), [(2.0, 2.0, 3.0), (-2.0, 3.0, 2.0)])
def test_vespo_by_hand(advantage, k, rate):
    old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    logprobs = (old + torch.tensor([[0.2, -0.6]])).requires_grad_()
    out = Vespo()(logprobs, old, torch.full_like(old, advantage), torch.ones(1, 2, dtype=torch.bool))
    w = math.exp(-0.4)
    phi = w**k * math.exp(rate * (1 - w))
    assert out.per_token[0].tolist() == pytest.approx([phi * advantage * 0.8, phi * advantage * 2.6])
    assert torch.autograd.grad(out.per_token.sum(), logprobs)[0][0].tolist() == pytest.approx([-phi * advantage] * 2)
    assert out.ratio[0].tolist() == pytest.approx([w] * 2)


# ---- DPPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "advantage", "stopped"),
    [
        (0.001, 1e-5, 1.0, False),  # a ratio of 100, and nothing has moved
        (0.80, 0.99, -1.0, True),  # a ratio of 0.8, and a fifth of the mass has gone
        (0.80, 0.99, 1.0, False),  # pulled back up however far
        (0.60, 0.40, 1.0, True),
        (0.60, 0.40, -1.0, False),
        (0.52, 0.40, 1.0, False),
    ],
)
def test_dppo_stops_at_a_distance_in_probability(p, q, advantage, stopped):
    loss, gradient, clipped = one_token(Dppo(), p, q, advantage)
    weight = 0.0 if stopped else min(p / q, 20.0)
    assert (loss, gradient, clipped) == (
        pytest.approx(-weight * advantage * math.log(p)),
        pytest.approx(-weight * advantage),
        stopped,
    )


def test_dppo_in_kl_by_hand():
    p, q = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.6]], dtype=torch.float64)
    kl = 0.6 * math.log(2) + 0.4 * math.log(0.4 / 0.7)
    assert binary_divergence(p.log(), q.log(), "kl").item() == pytest.approx(kl)
    assert binary_divergence(p.log(), q.log(), "tv").item() == pytest.approx(0.3)
    assert one_token(Dppo("kl", limit_low=kl + 1e-3), 0.3, 0.6, -1.0)[2] is False
    assert one_token(Dppo("kl", limit_low=kl - 1e-3), 0.3, 0.6, -1.0)[2] is True


def test_a_certain_token_has_a_finite_divergence():
    certain, sure = torch.zeros(1, 1), torch.tensor([[-1e-9]])
    assert binary_divergence(certain, sure, "kl").isfinite().all()
    assert binary_divergence(torch.tensor([[-1.0]]), certain, "kl").item() == pytest.approx(1 + 1e-8 * 0, abs=1e-5)


# ---- covariance ----------------------------------------------------------------------------------------------------


def by_hand():
    """Ten tokens on policy: log-probability -2 but for four of one answer, advantages 3 and -3."""
    logprobs = torch.full((2, 5), -2.0, dtype=torch.float64)
    logprobs[0, :4] = torch.tensor([-0.5, -1.0, -1.5, -3.0])
    advantages = torch.tensor([[3.0], [-3.0]], dtype=torch.float64).expand(2, 5)
    return logprobs.requires_grad_(), advantages, torch.ones(2, 5, dtype=torch.bool)


def test_kl_cov_charges_the_tokens_of_largest_covariance():
    logprobs, advantages, mask = by_hand()
    old = logprobs.detach() - 0.1
    out = KlCov(kl_coef=2.0, frac=0.2)(logprobs, old, advantages, mask)  # mean -1.8: covariances 3.9, 2.4, .9, ...
    base = -advantages * math.exp(0.1)
    charged = (out.per_token - base).detach()
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, :2] = 2.0 * 0.1
    torch.testing.assert_close(charged, expected)
    gradient = torch.autograd.grad(out.per_token.sum(), logprobs)[0]
    torch.testing.assert_close(gradient, base + torch.where(expected > 0, 2.0, 0.0))


def test_clip_cov_spares_as_many_candidates_as_it_may():
    logprobs, advantages, mask = by_hand()
    plain = ClippedSurrogate()(logprobs, logprobs.detach(), advantages, mask)
    for frac, number in ((0.01, 1), (0.2, 2), (0.5, 2)):  # the covariances between .95 and 5 are 3.9 and 2.4
        out = ClipCov(frac=frac, cov_low=0.95)(logprobs, logprobs.detach(), advantages, mask)
        spared = out.clipped
        assert int(spared.sum()) == number
        assert not spared[:, 2:].any()
        assert (out.per_token[spared] == 0).all()
        torch.testing.assert_close(out.per_token[~spared], plain.per_token[~spared])
        gradient = torch.autograd.grad(out.per_token.sum(), logprobs)[0]
        assert torch.equal(gradient == 0, spared)


def test_clip_cov_leaves_what_is_clipped_to_the_clip():
    logprobs, advantages, mask = by_hand()
    old = logprobs.detach().clone()
    old[0, 0] -= 1  # the token of largest covariance has left the bounds already
    out = ClipCov(frac=0.01, cov_low=0.95)(logprobs, old, advantages, mask)
    assert out.clipped.nonzero().tolist() == [[0, 0], [0, 1]]
    assert out.per_token[0].tolist() == pytest.approx([-3 * 1.2, 0.0, -3.0, -3.0, -3.0])


def test_clip_cov_draws_every_candidate_alike():
    counts = torch.zeros(3)
    for seed in range(600):
        logprobs = -1.0 - torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)) * 1e-3
        advantages = torch.tensor([[1.0, 1.0, 1.0, -9.0]])  # covariances: a little of either sign
        loss = ClipCov(frac=1e-9, cov_low=-1.0, cov_high=1.0)
        out = loss(logprobs, logprobs, advantages, torch.tensor([[True, True, True, False]]))
        counts += out.clipped[0, :3]
    assert counts.sum() == 600
    assert (counts - 200).abs().max() < 4 * math.sqrt(600 * 2 / 9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gmpo(clip_low=0.0), "clip_low=0.0"),
        (lambda: Vespo(k_pos=0.0), "k_pos=0.0"),
        (lambda: Vespo(lambda_neg=-1.0), "lambda_neg=-1.0"),
        (lambda: Dppo(limit_high=0.0), "limit_high=0.0"),
        (lambda: Dppo(max_ratio=0.5), "max_ratio=0.5"),
        (lambda: ClipCov(frac=0.0), "frac=0.0"),
        (lambda: ClipCov(cov_low=6.0), r"cov_low=6\.0 is not below cov_high=5\.0"),
        (lambda: ClipCov(clip_high=0.0), "clip_high=0.0"),
        (lambda: KlCov(kl_coef=0.0), "kl_coef=0.0"),
        (lambda: KlCov(frac=2.0), "frac=2.0"),
    ],
)
def test_impossible_options_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_dro_pulls_back_by_the_log_ratio_and_stops_at_advantage_over_beta():
    """-A log p + beta/2 (log p/q)^2; the gradient is -A + beta log p/q."""
    loss, gradient, clipped = one_token(Dro(beta=0.5), 0.4, 0.2, 2.0)
    assert loss == pytest.approx(-2 * math.log(0.4) + 0.25 * math.log(2) ** 2)
    assert gradient == pytest.approx(-2 + 0.5 * math.log(2))
    assert not clipped
    assert one_token(Dro(beta=2.0), 0.2 * math.exp(0.5), 0.2, 1.0)[1] == pytest.approx(0, abs=1e-6)


def test_dro_without_a_pull_is_refused():
    with pytest.raises(UserError, match=r"beta=0\.0 would not hold the policy.*give 0\.1, or Reinforce"):
        Dro(beta=0.0)


def test_corrected_weighs_by_the_policy_that_trains():
    """REINFORCE with the capped ratio of the present policy is CISPO without a lower bound."""
    logprobs, old, advantages, mask = rollout()
    ours = Corrected(Reinforce(), SamplerCorrection(cap=1.5))(logprobs, old, advantages, mask)
    cispo = Cispo(clip_high=0.5)(logprobs, old, advantages, mask)
    assert cispo.clipped[mask].any()
    torch.testing.assert_close(ours.per_token[mask], cispo.per_token[mask])


def test_corrected_says_when_it_depends_on_the_micro_batch():
    assert not Corrected().whole_batch
    assert Corrected(ClipCov()).whole_batch
    assert Corrected(Reinforce(), SamplerCorrection(normalise=True)).whole_batch
    with pytest.raises(UserError, match="weighs twice"):
        Corrected(Corrected())
