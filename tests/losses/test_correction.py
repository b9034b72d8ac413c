import math

import pytest
import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.correction import SamplerCorrection, SamplerFilter, off_policy_sequence_mask

#                       ratios 4, 0.25, 1.5; product 1.5, geometric mean 1.145 | 3, 3; 9, 3
RATIOS = torch.tensor([[4.0, 0.25, 1.5, 1.0], [3.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])
OLD = torch.full((2, 4), -1.0, dtype=torch.float64)
SAMPLER = torch.where(MASK, OLD - RATIOS.log(), math.inf)


def keeping(*filters):
    return SamplerCorrection(cap=None, filters=list(filters))


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (SamplerCorrection(), [[2.0, 0.25, 1.5], [2.0, 2.0]]),
        (SamplerCorrection(floor=0.5), [[2.0, 0.5, 1.5], [2.0, 2.0]]),
        (SamplerCorrection(cap=None), [[4.0, 0.25, 1.5], [3.0, 3.0]]),
        (SamplerCorrection(weight="sequence"), [[1.5] * 3, [2.0] * 2]),
        (SamplerCorrection(cap=None, keep="token", high=3.5), [[0.0, 0.25, 1.5], [3.0, 3.0]]),
        (SamplerCorrection(cap=None, keep="token", low=0.5, high=5.0), [[4.0, 0.0, 1.5], [3.0, 3.0]]),
        (SamplerCorrection(weight="sequence", cap=None, keep="sequence", high=3.5), [[1.5] * 3, [0.0] * 2]),
        (SamplerCorrection(cap=None, keep="geometric", low=0.5, high=2.0), [[4.0, 0.25, 1.5], [0.0] * 2]),
        (SamplerCorrection(cap=None, keep="every", low=0.3), [[0.0] * 3, [3.0, 3.0]]),
        (SamplerCorrection(cap=None, keep="every", low=0.2, high=3.5), [[0.0] * 3, [3.0, 3.0]]),
        (SamplerCorrection(weight="none", keep="token", high=3.5), [[0.0, 1.0, 1.0], [1.0, 1.0]]),
        (SamplerCorrection(cap=2.0, keep="token", low=0.5), [[2.0, 0.0, 1.5], [2.0, 2.0]]),
        # p = 0.092, 1.472 (of no coin: tv and the ratios take it), 0.245 | 0.123, 0.123 against q = 0.368
        (keeping(SamplerFilter("ratio", low=0.5, high=3.5)), [[0.0, 0.0, 1.5], [3.0, 3.0]]),
        (keeping(SamplerFilter("ratio", "sum", high=3.5)), [[4.0, 0.25, 1.5], [0.0] * 2]),
        (keeping(SamplerFilter("ratio", "mean", high=2.0)), [[4.0, 0.25, 1.5], [0.0] * 2]),
        # k2 = 0.961, 0.961, 0.082 | 0.603, 0.603
        (keeping(SamplerFilter("k2", high=0.7)), [[0.0, 0.0, 1.5], [3.0, 3.0]]),
        (keeping(SamplerFilter("k2", "sum", high=1.5)), [[0.0] * 3, [3.0, 3.0]]),
        # k3 = 1.614, 0.636, 0.095 | 0.901, 0.901
        (keeping(SamplerFilter("k3", high=0.9)), [[0.0, 0.25, 1.5], [0.0] * 2]),
        (keeping(SamplerFilter("k3", "mean", high=0.8)), [[4.0, 0.25, 1.5], [0.0] * 2]),
        (keeping(SamplerFilter("k3", "max", high=1.0)), [[0.0] * 3, [3.0, 3.0]]),
        # tv = 0.276, 1.104, 0.123 | 0.245, 0.245
        (keeping(SamplerFilter("tv", high=0.25)), [[0.0, 0.0, 1.5], [3.0, 3.0]]),
        (keeping(SamplerFilter("tv", "mean", high=0.3)), [[0.0] * 3, [3.0, 3.0]]),
        # a token has to pass all of them
        (keeping(SamplerFilter("tv", high=1.0), SamplerFilter("k3", high=1.0)), [[0.0, 0.0, 1.5], [3.0, 3.0]]),
        (
            SamplerCorrection(cap=2.0, keep="token", low=0.3, filters=[SamplerFilter("k3", high=1.0)]),
            [[0.0, 0.0, 1.5], [2.0, 2.0]],
        ),
    ],
    ids=repr,
)
def test_weights_by_hand(correction, weights):
    out = correction(OLD, SAMPLER, MASK)
    assert out.weights[MASK].tolist() == pytest.approx([w for row in weights for w in row])
    assert (out.weights[~MASK] == 0).all()


def test_a_binary_divergence_is_that_of_two_coins():
    """p 0.9 against q 0.6: 0.9 log(0.9/0.6) + 0.1 log(0.1/0.4) = 0.2263; p 0.1 against 0.1: 0; their mean 0.1131."""
    old, sampler = torch.tensor([[0.6, 0.1]]).log(), torch.tensor([[0.9, 0.1]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)

    def kept(over, high):
        weights = SamplerCorrection(weight="none", filters=[SamplerFilter("binary_kl", over, high)])
        return (weights(old, sampler, mask).weights > 0).tolist()[0]

    assert kept("token", 0.2262) == [False, True]
    assert kept("token", 0.2264) == [True, True]
    assert kept("mean", 0.1130) == [False, False]
    assert kept("mean", 0.1132) == [True, True]


def test_a_token_of_unknown_log_probability_passes_every_filter():
    sampler = torch.full((1, 2), math.nan, dtype=torch.float64)
    for measure in ("k2", "k3", "binary_kl", "tv"):
        correction = SamplerCorrection(weight="none", filters=[SamplerFilter(measure, high=1e-9)])
        assert (correction(OLD[:1, :2], sampler, MASK[:1, :2]).weights == 1).all()


def test_what_is_logged():
    metrics = SamplerCorrection(cap=2.0, keep="token", low=0.5)(OLD, SAMPLER, MASK).metrics
    logged = {name: values[MASK].tolist() for name, values in metrics.items()}
    assert logged["ratio"] == pytest.approx(RATIOS[MASK].tolist())
    assert logged["kept_frac"] == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert logged["truncated_frac"] == [1.0, 0.0, 0.0, 1.0, 1.0]
    dropped = SamplerCorrection(cap=2.0, keep="token", high=3.5)(OLD, SAMPLER, MASK).metrics
    assert dropped["truncated_frac"][MASK].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]  # what is dropped is not truncated
    assert logged["kl"] == pytest.approx([r - 1 - math.log(r) for r in RATIOS[MASK].tolist()])


def test_a_weight_makes_the_samplers_expectation_the_trainers():
    trainer, sampler = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    weights = SamplerCorrection(cap=None)(trainer, sampler, torch.ones(1, 9, dtype=torch.bool)).weights
    torch.testing.assert_close(sampler.exp() * weights, trainer.exp())


def test_normalised_weights_have_mean_1():
    """Of tokens, each counting once, and of answers, each counting once; what a filter drops is in the mean."""
    tokens = SamplerCorrection(cap=2.0, normalise=True)(OLD, SAMPLER, MASK).weights  # of 2, 0.25, 1.5, 2, 2
    assert tokens[MASK].tolist() == pytest.approx([x * 5 / 7.75 for x in (2, 0.25, 1.5, 2, 2)])
    answers = SamplerCorrection(weight="sequence", normalise=True)(OLD, SAMPLER, MASK).weights  # of 1.5 and 2
    assert answers[MASK].tolist() == pytest.approx([1.5 / 1.75] * 3 + [2 / 1.75] * 2)
    kept = SamplerCorrection(cap=2.0, keep="token", low=0.5, normalise=True)(OLD, SAMPLER, MASK).weights
    assert kept[MASK].tolist() == pytest.approx([x * 5 / 7.5 for x in (2, 0, 1.5, 2, 2)])
    dropped = SamplerCorrection(cap=2.0, normalise=True, filters=[SamplerFilter("ratio", low=0.5)])
    assert dropped(OLD, SAMPLER, MASK).weights[MASK].tolist() == pytest.approx(
        [x * 5 / 7.75 for x in (2, 0, 1.5, 2, 2)]
    )
    nothing = SamplerCorrection(keep="token", cap=None, high=1.0, normalise=True)(OLD, OLD - 1.0, MASK)
    assert (nothing.weights == 0).all()
    assert SamplerCorrection(normalise=True)(OLD, SAMPLER, MASK).metrics["truncated_frac"].sum() == 3


def test_the_same_numbers_change_nothing():
    correction = SamplerCorrection(keep="geometric", low=0.5, high=5.0)
    assert torch.equal(correction(OLD, OLD, MASK).weights, MASK.double())


def test_an_unknown_log_probability_counts_as_exact():
    sampler = SAMPLER.clone()
    sampler[1, 0] = math.nan
    out = SamplerCorrection(weight="sequence", cap=None, keep="sequence", high=3.5)(OLD, sampler, MASK)
    assert out.weights[1].tolist() == pytest.approx([3.0, 3.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.5}, r"correction\.cap=0\.5"),
        ({"floor": 2.0}, r"correction\.floor=2\.0"),
        ({"keep": "token", "low": 1.5}, r"correction\.low=1\.5"),
        ({"keep": "token", "high": 0.5}, r"correction\.high=0\.5"),
        ({"keep": "token"}, r"correction\.keep='token' needs a bound"),
        ({"high": 3.0}, r"high=3\.0 bound nothing while keep is 'all'"),
        ({"weight": "none", "normalise": True}, r"correction\.normalise=true has no weights"),
    ],
)
def test_options_that_contradict_are_named(options, message):
    with pytest.raises(UserError, match=message):
        SamplerCorrection(**options)


@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("measure", ["k2", "k3", "binary_kl", "tv"])
def test_answers_that_agree_up_to_rounding_are_kept(measure, over):
    torch.manual_seed(0)
    # tokens of every probability, certain ones included: by float32 those may have a little more than 1
    old = torch.linspace(-6.0, 3e-7, 400).view(20, 20)
    sampler, mask = old + 3e-7 * torch.randn(20, 20), torch.ones(20, 20, dtype=torch.bool)
    correction = SamplerCorrection(weight="none", filters=[SamplerFilter(measure, over, high=0.01)])
    assert correction(old, sampler, mask).weights.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "ratio"}, "a ratio without a bound drops nothing"),
        ({"measure": "ratio", "high": 0.5}, r"correction\.filters\.high=0\.5"),
        ({"measure": "ratio", "over": "max", "high": 2.0}, "use keep: every"),
        ({"measure": "tv", "low": 0.1, "high": 0.2}, r"low=0\.1 of tv"),
        ({"measure": "tv"}, r"high=None of tv"),
        ({"measure": "k3", "high": 0.0}, r"high=0\.0 of k3"),
    ],
)
def test_filters_that_drop_nothing_or_everything_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SamplerFilter(**options)


def test_bad_answers_that_the_policy_has_left_are_dropped():
    # the sampler's log-probabilities are .2 and .6 nats per token above the policy's
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, 5.0]])
    sampler = torch.tensor([[-0.8, -0.8], [-0.5, -0.3], [-0.5, -0.3], [-0.4, 9.0]])
    advantages = torch.tensor([[-1.0], [-1.0], [1.0], [-1.0]]).expand(4, 2)
    mask = torch.tensor([[True, True]] * 3 + [[True, False]])
    kept = off_policy_sequence_mask(logprobs, sampler, advantages, mask, threshold=0.5)
    assert kept.tolist() == [[True, True], [False, False], [True, True], [False, False]]
    with pytest.raises(UserError, match=r"threshold=0\.0"):
        off_policy_sequence_mask(logprobs, sampler, advantages, mask, threshold=0.0)
