"""verl's policy losses, value loss, KL and entropy terms beside ours: value and gradient on ragged batches."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peer_packages import peer_module
from torch import Tensor
from verl_peer import WIDTH, actor, assert_same, assert_same_loss, core_algos, ragged

from rlhf_lightning.advantages import RewardsToCome
from rlhf_lightning.core.kl import kl_estimate, kl_penalty
from rlhf_lightning.core.logprobs import LMHead, token_scores
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses import (
    Cispo,
    ClipCov,
    ClippedSurrogate,
    ClippedValue,
    Corrected,
    Dppo,
    Dro,
    Gmpo,
    Gspo,
    KlCov,
    Reinforce,
    SamplerCorrection,
    SamplerFilter,
    Sapo,
    token_nll,
)

DTYPES = [torch.float64, torch.float32]
CLIPS = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3}
NARROW = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08}
TINY = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02}
COV = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0}
CORRECTED = {"rollout_is": "token", "rollout_is_threshold": 1.3, "rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
WITHIN_TWO = SamplerFilter("ratio", low=0.5, high=2.0)

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vanilla": (ClippedSurrogate(0.15, 0.3, dual_clip=1.4), CLIPS | {"clip_ratio_c": 1.4}),
    "dppo_tv": (Dppo("tv", 0.05, 0.08, max_ratio=1.4), NARROW | {"clip_ratio_c": 1.4}),
    "dppo_kl": (Dppo("kl", 0.01, 0.02, max_ratio=1.4), TINY | {"clip_ratio_c": 1.4}),
    "gspo": (Gspo(0.05, 0.08, per_token=True), NARROW),
    "sapo": (Sapo(1.0, 1.3), {"tau_pos": 1.0, "tau_neg": 1.3}),
    "gpg": (Reinforce(), {}),
    # every candidate is spared: verl draws them with torch's generator, we by a hash
    "clip_cov": (ClipCov(0.15, 0.3, frac=1.0, cov_low=0.2, cov_high=1.0), CLIPS | {"policy_loss": COV}),
    "kl_cov": (KlCov(kl_coef=0.5, frac=0.1), {"policy_loss": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5}}),
    "geo_mean": (Gmpo(0.15, 0.3), CLIPS),
    "dro": (Dro(0.3), {"policy_loss": {"dro_beta": 0.3}}),
    "cispo": (Cispo(0.15, 0.3), CLIPS),
    "bypass_mode": (
        Corrected(ClippedSurrogate(0.15, 0.3, dual_clip=1.4), SamplerCorrection(weight="none", filters=[WITHIN_TWO])),
        CLIPS | {"clip_ratio_c": 1.4, "policy_loss": {"rollout_correction": CORRECTED | {"loss_type": "ppo_clip"}}},
    ),
    "bypass_mode, reinforce": (
        Corrected(Reinforce(), SamplerCorrection(cap=1.3, filters=[WITHIN_TWO])),
        {"policy_loss": {"rollout_correction": CORRECTED | {"loss_type": "reinforce"}}},
    ),
}
MODES = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "length_weighted",
    "seq-mean-token-sum-norm": "fixed_length",
}
ONE_MODE = {"sapo": ["seq-mean-token-mean"], "geo_mean": ["seq-mean-token-mean"]}
"""verl reduces these in one way whatever loss_agg_mode says."""


def theirs(name: str, batch: Any, advantages: Tensor, mode: str, mask: Tensor | None = None, **more: Any) -> Tensor:
    """verl's loss, with the counts of the whole step in the config as its trainers give them."""
    function, options = core_algos.get_policy_loss_fn(name.split(",")[0]), dict(LOSSES[name][1])
    mask = batch.response_mask if mask is None else mask
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask)} if "bypass" in name else {}
    config = actor(**options, global_batch_info=counts)
    return function(batch.old, batch.logprobs, advantages, mask, mode, config, **more)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss(name, dtype):
    assert set(core_algos.POLICY_LOSS_REGISTRY) == {known.split(",")[0] for known in LOSSES}, "all that it registers"
    loss, batch = LOSSES[name][0], ragged(dtype)
    advantages = batch.advantages if name == "geo_mean" else batch.per_token
    output = loss(batch.logprobs, batch.old, advantages, batch.mask)
    if name not in ("sapo", "gpg", "kl_cov", "dro", "bypass_mode, reinforce"):  # these have no bound
        assert output.clipped[batch.mask].any()
        assert not output.clipped[batch.mask].all()
    modes = ONE_MODE.get(name, list(MODES))
    if "bypass" in name:
        modes.remove("seq-mean-token-mean")  # see test_differs_the_mean_over_an_answer_...
    for mode in modes:

        def ours(mode: str = mode) -> Tensor:
            per_token = loss(batch.logprobs, batch.old, advantages, batch.mask).per_token
            return reduce_tokens(per_token, batch.mask, MODES[mode], max_length=WIDTH)

        assert_same_loss(batch, ours, lambda mode=mode: theirs(name, batch, advantages, mode))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "geo_mean" and "bypass" not in name])
def test_weights_of_a_sampler_that_differs(name):
    batch, mode = ragged(), ONE_MODE.get(name, ["token-mean"])[0]
    weights = SamplerCorrection(cap=1.5)(batch.old, batch.sampler, batch.mask).weights
    assert len(weights[batch.mask].unique()) > 10

    def ours() -> Tensor:
        per_token = LOSSES[name][0](batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        return reduce_tokens(per_token * weights, batch.mask, MODES[mode])

    assert_same_loss(batch, ours, lambda: theirs(name, batch, batch.per_token, mode, rollout_is_weights=weights))


@pytest.mark.parametrize("name", ["vanilla", "dppo_tv", "dppo_kl", "sapo", "gpg", "cispo", "dro"])
def test_policies_that_have_left_one_another(name):
    """Log-ratios of up to 60 nats, where only bounds keep the numbers finite."""
    batch, mode = ragged(spread=20.0), ONE_MODE.get(name, ["token-mean"])[0]
    assert (batch.logprobs - batch.old).abs().max() > 40

    def ours() -> Tensor:
        per_token = LOSSES[name][0](batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        return reduce_tokens(per_token, batch.mask, MODES[mode])

    assert_same_loss(batch, ours, lambda: theirs(name, batch, batch.per_token, mode))


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_with_the_counts_of_the_whole_step(mode):
    """verl's batch_num_tokens and global_batch_size are our denominators."""
    batch = ragged()
    x, mask = batch.logprobs.square(), batch.mask
    tokens, answers = int(mask.sum()), len(mask)
    whole = reduce_tokens(x, mask, MODES[mode], max_length=WIDTH)
    for rows in (slice(0, 2), slice(2, 9)):
        counts = {"batch_num_tokens": tokens, "global_batch_size": answers}
        other = core_algos.agg_loss(x[rows], batch.response_mask[rows], mode, **counts, loss_scale_factor=WIDTH)
        denominator = float(tokens if mode == "token-mean" else answers)
        share = reduce_tokens(x[rows], mask[rows], MODES[mode], denominator, max_length=WIDTH)
        assert_same(share, other)
        whole = whole - share
    assert whole.abs() < 1e-12


class Data(dict):
    """Stands for its nested tensors, which are padded before anything is computed."""

    def select(self, *names: str) -> Any:
        return SimpleNamespace(to_padded_tensor=lambda: self["padded"].select(*names))


def test_one_step_of_its_actor_is_one_of_ours():
    """`ppo_loss`: policy loss, entropy bonus and KL term by one reduction, as its workers add them."""
    batch, coefs = ragged(), {"entropy_coeff": 0.05, "kl_loss_coef": 0.2}
    entropy = -batch.logprobs.exp() * batch.logprobs  # some function of the policy
    losses = peer_module("verl.workers.utils.losses")
    tensors = {"response_mask": batch.mask, "old_log_probs": batch.old, "advantages": batch.per_token}
    padded = losses.TensorDict(tensors | {"ref_log_prob": batch.ref}, batch_size=[len(batch.mask)])
    counts = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(batch.mask)}

    data = Data(counts, **tensors, ref_log_prob=0, padded=padded)

    def whole() -> Tensor:
        config = actor(use_kl_loss=True, **LOSSES["vanilla"][1], **coefs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "no_padding_2_padding", lambda x, _: x)
            return losses.ppo_loss(config, {"log_probs": batch.logprobs, "entropy": entropy}, data)[0]

    def ours() -> Tensor:
        policy = LOSSES["vanilla"][0](batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        kl = kl_penalty(batch.logprobs, batch.ref, batch.old, estimator="k3", bound=10.0)
        return reduce_tokens(policy - 0.05 * entropy + 0.2 * kl, batch.mask, "token_mean")

    mine, other = ours(), whole()
    assert_same(mine, other)
    gradients = [torch.autograd.grad(loss, batch.logprobs, retain_graph=True)[0] for loss in (mine, other)]
    assert_same(*gradients)


GEOMETRIC = SamplerFilter("ratio", "mean", low=1 / 1.001, high=1 / 0.999)


@pytest.mark.parametrize("spread", [5e-4, 0.4])
@pytest.mark.parametrize(
    ("preset", "loss"),
    [
        ("bypass_ppo_clip", ClippedSurrogate(dual_clip=3.0)),
        (
            "bypass_ppo_clip_geo_rs",
            Corrected(ClippedSurrogate(dual_clip=3.0), SamplerCorrection(weight="none", filters=[GEOMETRIC])),
        ),
        (
            "bypass_ppo_clip_k3_rs",
            Corrected(
                ClippedSurrogate(dual_clip=3.0),
                SamplerCorrection(weight="none", filters=[SamplerFilter("k3", "mean", high=0.01)]),
            ),
        ),
        ("bypass_pg_is", Corrected(Reinforce(), SamplerCorrection(weight="sequence"))),
        (
            "bypass_pg_token_icepop",
            Corrected(Reinforce(), SamplerCorrection(cap=None, keep="token", low=0.5, high=5.0)),
        ),
        ("bypass_pg_geo_rs", Corrected(Reinforce(), SamplerCorrection(weight="none", filters=[GEOMETRIC]))),
    ],
)
def test_bypass_presets_of_verls_configuration(preset, loss, spread):
    """The weights and filters are taken anew from the policy that trains, at every step."""
    configs = peer_module("verl.trainer.config.algorithm")
    settings = vars(getattr(configs.RolloutCorrectionConfig, preset)())
    for seed in range(3):
        batch = ragged(spread=spread, seed=seed)
        counts = {"batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(batch.mask)}
        config = actor(policy_loss={"rollout_correction": settings}, global_batch_info=counts)
        function = core_algos.get_policy_loss_fn("bypass_mode")
        per_token = loss(batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        ours = reduce_tokens(per_token, batch.mask, "token_mean")
        other = function(batch.old, batch.logprobs, batch.per_token, batch.response_mask, "token-mean", config)[0]
        assert_same(ours, other)
        assert_same(*(torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, other)))


def test_bypass_with_weights_normalised_over_the_micro_batch():
    settings = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.3}
    batch = ragged()
    config = actor(policy_loss={"rollout_correction": settings | {"rollout_is_batch_normalize": True}})
    loss = Corrected(Reinforce(), SamplerCorrection(cap=1.3, normalise=True))
    assert loss.whole_batch
    function = core_algos.get_policy_loss_fn("bypass_mode")

    def ours() -> Tensor:
        per_token = loss(batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        return reduce_tokens(per_token, batch.mask, "token_mean")

    arguments = (batch.old, batch.logprobs, batch.per_token, batch.response_mask, "token-mean", config)
    assert_same_loss(batch, ours, lambda: function(*arguments)[0])


def test_differs_rejected_tokens_are_still_held_near_the_reference():
    """verl masks rejected tokens in the KL term too (and in entropy and critic); ours drops them from the policy's."""
    batch = ragged()
    losses = peer_module("verl.workers.utils.losses")
    left = SamplerCorrection(weight="none", filters=[WITHIN_TWO])(batch.old, batch.sampler, batch.mask).weights > 0
    tensors = {"response_mask": left, "old_log_probs": batch.old, "advantages": batch.per_token}
    padded = losses.TensorDict(tensors | {"ref_log_prob": batch.ref}, batch_size=[len(batch.mask)])
    tokens = int(batch.mask.sum())  # its trainers count them before they are rejected
    data = Data(dp_size=1, batch_num_tokens=tokens, global_batch_size=9, **tensors, ref_log_prob=0, padded=padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "no_padding_2_padding", lambda x, _: x)
        config = actor(use_kl_loss=True, kl_loss_coef=2.0)
        other = losses.ppo_loss(config, {"log_probs": batch.logprobs}, data)[0]
    policy = ClippedSurrogate(dual_clip=3.0)(batch.logprobs, batch.old, batch.per_token, batch.mask).per_token * left
    kl = 2.0 * kl_penalty(batch.logprobs, batch.ref, batch.old, bound=10.0)
    assert_same(reduce_tokens(policy + kl * left, batch.mask, "token_mean"), other)
    ours = reduce_tokens(policy + kl, batch.mask, "token_mean")
    assert (ours - other).abs() > 1e-3


# --- supervised


def test_sft():
    """`sft_loss`: of the whole step's tokens, prompts' left out."""
    batch = ragged()
    losses = peer_module("verl.workers.utils.losses")
    rows = [slice(0, 4), slice(4, 9)]
    counts = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum())}
    ours = reduce_tokens(token_nll(batch.logprobs), batch.mask, "token_mean")
    shares = []
    for part in rows:
        data = losses.TensorDict({"response_mask": batch.mask[part]}, batch_size=[len(batch.mask[part])])
        peer_module("verl.utils.tensordict_utils").assign_non_tensor(data, pad_mode="left_right", **counts)
        shares.append(losses.sft_loss(actor(), {"log_probs": batch.logprobs[part]}, data)[0])
    assert_same(ours, sum(shares))
    assert_same(*(torch.autograd.grad(x, batch.logprobs)[0] for x in (ours, sum(shares))))


# --- distillation from a teacher by the tokens that were drawn


# as a loss by k1 it is refused: such a gradient says nothing of the teacher
@pytest.mark.parametrize(
    ("estimator", "by_policy_gradient", "with_task"),
    [(estimator, False, with_task) for estimator in ("k2", "k3", "abs") for with_task in (False, True)]
    + [(estimator, True, False) for estimator in ("k1", "k2", "k3", "abs")],
)
def test_distillation_is_a_reference_that_is_a_teacher(estimator, by_policy_gradient, with_task):
    """As a loss: the KL term. By policy gradient: each token's KL its reward, and `RewardsToCome` with gamma 0."""
    batch, coef = ragged(spread=3.0), 0.3
    module, losses = peer_module("verl.trainer.distillation.losses"), peer_module("verl.workers.utils.losses")
    settings = {"use_policy_gradient": by_policy_gradient, "use_task_rewards": with_task, "loss_mode": estimator}
    made = peer_module("verl.workers.config.distillation").DistillationLossConfig(
        **settings, distillation_loss_coef=coef
    )
    tensors = {"response_mask": batch.mask, "old_log_probs": batch.old, "advantages": batch.per_token}
    padded = losses.TensorDict(tensors, batch_size=[len(batch.mask)])
    counts = {"dp_size": 1, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": len(batch.mask)}
    data = Data(counts, **tensors, teacher_logprobs=batch.ref[..., None], padded=padded)
    surrogate, weight = ClippedSurrogate(dual_clip=3.0), coef if with_task else 1.0

    def ours() -> Tensor:
        task = surrogate(batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
        kl = kl_penalty(batch.logprobs, batch.ref, batch.old, estimator=estimator, bound=10.0)
        if by_policy_gradient:
            nothing = torch.zeros_like(batch.old)
            credit, _ = RewardsToCome(gamma=0.0)(-kl.detach(), nothing, batch.mask, batch.groups)
            kl = surrogate(batch.logprobs, batch.old, credit, batch.mask).per_token
        return reduce_tokens(weight * kl + with_task * task, batch.mask, "token_mean")

    def other() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for place in (module, losses):
                patch.setattr(place, "no_padding_2_padding", lambda x, _: x)
            config = SimpleNamespace(distillation_loss=made)
            return module.distillation_ppo_loss(actor(), config, {"log_probs": batch.logprobs}, data)[0]

    assert_same_loss(batch, ours, other)


# --- KL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.4, 6.0])
@pytest.mark.parametrize(
    ("name", "estimator", "bound"),
    [
        ("kl", "k1", None),
        ("k1", "k1", None),
        ("abs", "abs", None),
        ("mse", "k2", None),
        ("k2", "k2", None),
        ("low_var_kl", "k3", 10.0),
        ("k3", "k3", 10.0),
        ("k1+", "k1+", None),
        ("abs+", "abs+", None),
        ("mse+", "k2", None),
        ("k2+", "k2", None),
        ("k3+", "k3+", 10.0),
        ("low_var_kl+", "k3+", 10.0),
    ],
)
def test_kl(name, estimator, bound, spread, dtype):
    batch = ragged(dtype, spread=spread)

    def ours() -> Tensor:
        kl = kl_penalty(batch.logprobs, batch.ref, batch.old, estimator=estimator, bound=bound)
        return reduce_tokens(kl, batch.mask, "token_mean")

    def other() -> Tensor:
        kl = core_algos.kl_penalty(batch.logprobs, batch.ref, name)
        return core_algos.agg_loss(kl, batch.response_mask, "token-mean")

    assert_same_loss(batch, ours, other)
    if bound is not None and spread > 1:
        unbounded = kl_estimate(batch.logprobs, batch.ref, estimator)
        assert (unbounded[batch.mask] > bound).any(), "the bound is to matter"


def test_verl_itself_has_no_full_kl():
    batch = ragged()
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(batch.logprobs, batch.ref, "full")


# --- critic and entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode, dtype):
    batch = ragged(dtype)
    values = batch.logprobs  # the leaf: any numbers will do
    returns = 2 * batch.per_token

    def ours() -> Tensor:
        per_token, clipped = ClippedValue(0.3)(values, batch.old, returns)
        assert clipped[batch.mask].any()
        assert not clipped[batch.mask].all()
        return reduce_tokens(per_token, batch.mask, MODES[mode], max_length=WIDTH)

    def other() -> Tensor:
        return core_algos.compute_value_loss(values, returns, batch.old, batch.response_mask, 0.3, mode)[0]

    assert_same_loss(batch, ours, other)


@pytest.mark.parametrize("mode", MODES)
def test_entropy(mode):
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    mask[:, 0] = False  # nothing predicts a first token
    hidden = torch.randn(3, 6, 8, generator=draw)
    head = torch.randn(11, 8, generator=draw).requires_grad_()
    tokens = torch.randint(11, (3, 6), generator=draw)
    entropy = token_scores(hidden, tokens, mask, LMHead(head), with_entropy=True).entropy
    ours = reduce_tokens(entropy, mask, MODES[mode], max_length=5)
    logits = hidden[:, :-1] @ head.T
    other = core_algos.compute_entropy_loss(logits, mask[:, 1:].long(), mode)
    assert_same(ours, other)
    mine, expected = (torch.autograd.grad(loss, head)[0] for loss in (ours, other))
    assert expected.abs().max() > 1e-3
    assert_same(mine, expected)


# --- differences on purpose


def test_differs_gspo_is_held_at_ten_nats():
    """A bad answer that has become exp(12) times as likely: verl's value stops at exp(10), and so does its gradient."""
    batch = ragged()
    old = batch.logprobs.detach() - 12.0
    bad = -batch.mask.double()
    one = replace(batch, old=old)
    loss, config = Gspo(0.05, 0.08, per_token=True), actor(**NARROW)
    per_token = loss(batch.logprobs, old, bad, batch.mask).per_token
    ours = reduce_tokens(per_token, batch.mask, "sequence_mean")
    function = core_algos.get_policy_loss_fn("gspo")
    other = function(one.old, batch.logprobs, bad, batch.response_mask, "seq-mean-token-mean", config)[0]
    assert ours.item() == pytest.approx(math.exp(12))
    assert other.item() == pytest.approx(math.exp(10))
    assert torch.autograd.grad(other, batch.logprobs)[0].abs().max() == 0
    assert torch.autograd.grad(ours, batch.logprobs)[0].abs().max() > 1


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_differs_the_ratios_of_the_covariance_losses_have_no_bound_in_verl(name):
    batch = ragged()
    far = replace(batch, old=batch.logprobs.detach() - 25.0)
    up = torch.ones_like(batch.old) * batch.mask
    loss = LOSSES[name][0]
    ours = reduce_tokens(loss(far.logprobs, far.old, -up, far.mask).per_token, far.mask, "token_mean")
    other = theirs(name, far, -up, "token-mean")
    assert ours.item() == pytest.approx(math.exp(20), rel=1e-3)
    assert other.item() == pytest.approx(math.exp(25), rel=1e-3)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_differs_answers_without_a_token_that_counts(mode):
    """verl's reduction leaves them out of the count, as we do, but its trainers hand it the size of the minibatch."""
    batch = ragged()
    mask = batch.mask.clone()
    mask[2:5] = False
    x, answers = batch.logprobs.square(), len(mask)
    ours = reduce_tokens(x, mask, MODES[mode])
    assert_same(ours, core_algos.agg_loss(x, mask.long(), mode))
    as_trained = core_algos.agg_loss(x, mask.long(), mode, global_batch_size=answers)
    assert_same(ours * 6 / 9, as_trained)


def test_differs_the_mean_over_an_answer_is_over_the_tokens_it_was_sampled_with():
    """Of an answer whose tokens are dropped in part, verl's seq-mean-token-mean divides by those that are left."""
    batch, mode = ragged(), "seq-mean-token-mean"
    loss = LOSSES["bypass_mode"][0]
    per_token = loss(batch.logprobs, batch.old, batch.per_token, batch.mask).per_token
    left = loss.correction(batch.logprobs, batch.old, batch.mask).weights > 0
    assert 0 < left.sum() < batch.mask.sum()
    ours = reduce_tokens(per_token, batch.mask, "sequence_mean")
    other = theirs("bypass_mode", batch, batch.per_token, mode)
    assert_same(reduce_tokens(per_token, left, "sequence_mean", float(len(left))), other)
    assert (ours - other).abs() > 1e-3


def test_differs_gmpos_weights_are_averaged_as_they_are():
    """verl multiplies an answer's loss by the geometric mean of its tokens' weights, we by the arithmetic one."""
    batch = ragged()
    weights = SamplerCorrection(cap=1.5)(batch.old, batch.sampler, batch.mask).weights
    per_token = LOSSES["geo_mean"][0](batch.logprobs, batch.old, batch.advantages, batch.mask).per_token
    ours = reduce_tokens(per_token * weights, batch.mask, "sequence_mean")
    other = theirs("geo_mean", batch, batch.advantages, "seq-mean-token-mean", rollout_is_weights=weights)
    lengths = batch.mask.sum(-1)
    mean, geometric = weights.sum(-1) / lengths, (torch.where(batch.mask, weights, 1.0).log().sum(-1) / lengths).exp()
    assert_same((per_token[:, 0] * mean).mean(), ours)
    assert_same((per_token[:, 0] * geometric).mean(), other)
    assert (ours - other).abs() > 1e-3


def test_differs_dppos_largest_ratio():
    """It is clip_ratio_c, 3 in verl's config and 20 in the function without one; ours is 20, as in the paper."""
    assert actor().get("clip_ratio_c", 20.0) == 3.0
    assert Dppo().max_ratio == 20.0
