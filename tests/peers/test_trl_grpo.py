"""Credit, policy losses, reductions and KL against TRL's GRPO, RLOO and GMPO trainers, on one fixed rollout.

Their generation and their rewards are replaced by fixed ones; the advantages, the loss and its gradient are their own
code's. Where we differ on purpose, the test is named so and states both numbers.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-lightning[peers]'")

import torch
from datasets import Dataset
from fits import fit
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from trl_peers import gradients_of, options

from rlhf_lightning.advantages import (
    Centred,
    FixedKL,
    Gdpo,
    GroupNormalised,
    LeaveOneOut,
    kl_shaped_rewards,
    overlong_mask,
)
from rlhf_lightning.core.batches import Generated, TokenBatch
from rlhf_lightning.core.kl import kl_penalty
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses import (
    AdaptiveEntropy,
    Cispo,
    ClippedSurrogate,
    Gmpo,
    SamplerCorrection,
    Sapo,
    Vespo,
    off_policy_sequence_mask,
    top_entropy_mask,
)
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import ScoredSamples, WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.reward_shaping import KLSpec

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MAX_LENGTH = 7
PROMPTS = [[1, 4, 5], [1, 8]]
ANSWERS = [[6, 7, 2], [9, 10, 11, 12, 2], [4], [13, 5, 6, 7, 8, 9, 10], [11, 2], [12, 4, 4, 2]]
"""Three answers to each prompt; the third and the fourth were cut off."""
SPEED, STYLE = [1.0, 0.0, 0.25, 3.0, 3.5, -1.0], [2.0, 2.0, 1.0, 0.5, 0.0, 4.0]
WEIGHTS = [1.0, 0.5]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
BETA = 0.3


@dataclass
class Rollout:
    """The fixed rollout as we hold it, [batch, time] with time = prompt + answer."""

    batch: TokenBatch
    finished: Tensor
    rewards: Tensor
    breakdown: dict[str, Tensor]
    prompt: int
    """Length of the padded prompts: TRL's tensors begin there."""


def rollout() -> Rollout:
    prompt, time = 3, 3 + MAX_LENGTH
    tokens = torch.zeros(6, time, dtype=torch.long)
    real, mask = torch.zeros(6, time, dtype=torch.bool), torch.zeros(6, time, dtype=torch.bool)
    for row, answer in enumerate(ANSWERS):
        question = PROMPTS[row // 3]
        both = question + answer
        first = prompt - len(question)
        tokens[row, first : first + len(both)] = torch.tensor(both)
        real[row, first : first + len(both)] = True
        mask[row, prompt : prompt + len(answer)] = True
    batch = TokenBatch(tokens=tokens, attention_mask=real, mask=mask, positions=(real.cumsum(1) - 1).clamp(min=0))
    breakdown = {"speed": WEIGHTS[0] * torch.tensor(SPEED), "style": WEIGHTS[1] * torch.tensor(STYLE)}
    scores = sum(breakdown.values())
    zeros = torch.zeros(6, time)
    rewards, _ = kl_shaped_rewards(scores, zeros, zeros, mask, kl_coef=0.0)
    finished = torch.tensor([answer[-1] == 2 for answer in ANSWERS])
    return Rollout(batch, finished, rewards, breakdown, prompt)


def speed(completions: list[str], **_: Any) -> list[float]:
    return SPEED


def style(completions: list[str], **_: Any) -> list[float]:
    return STYLE


def build(trainer: type, config: type, model: Any, folder: Any, optimizer: Any = None, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = AutoModelForCausalLM.from_pretrained(model)
        theirs = trainer(
            model=network,
            optimizers=(None if optimizer is None else optimizer(network.parameters()), None),
            reward_funcs=[speed, style],
            args=options(
                config,
                folder,
                rows=6,
                num_generations=3,
                max_completion_length=MAX_LENGTH,
                reward_weights=WEIGHTS,
                **more,
            ),
            train_dataset=Dataset.from_list([{"prompt": "the film"}] * 4),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    questions = [PROMPTS[row // 3] for row in range(6)]
    if trainer.__name__ == "RLOOTrainer":
        theirs._generate = lambda prompts: (questions, ANSWERS, ["text"] * 6)
    else:
        theirs._generate = lambda prompts: (questions, ANSWERS, None, ["text"] * 6, None, {}, None, None)
    return theirs


@pytest.fixture(scope="module")
def grpo(tiny_model, tmp_path_factory):
    from trl import GRPOConfig, GRPOTrainer

    return build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path_factory.mktemp("grpo"), beta=0.0)


@pytest.fixture
def theirs(grpo, monkeypatch):
    """TRL's trainer, whose attributes a test may set for itself."""

    def configure(**attributes: Any) -> Any:
        for name, value in attributes.items():
            monkeypatch.setattr(
                grpo.args if hasattr(grpo.args, name) and not hasattr(grpo, name) else grpo, name, value
            )
        return grpo

    return configure


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(ModelSpec(path=str(tiny_model)))


def scored(trainer: Any) -> dict[str, Any]:
    """TRL's own batch of the fixed rollout, with its advantages."""
    return trainer._generate_and_score_completions([{"prompt": "the film"}] * 6)


def other_policies(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of an older and of a reference policy, far enough that every bound decides somewhere."""
    generator = torch.Generator().manual_seed(0)
    old, ref = torch.randn(2, *logprobs.shape, generator=generator)
    return tuple(torch.where(mask, (logprobs.detach() + x).clamp(max=-1e-3), 0.0) for x in (old, 0.5 * ref))


LOSSES = {
    "grpo": (lambda ratio: ClippedSurrogate(0.1, 0.3, ratio=ratio), "sequence_mean"),
    "bnpo": (lambda ratio: ClippedSurrogate(0.1, 0.3, ratio=ratio), "token_mean"),
    "dr_grpo": (lambda ratio: ClippedSurrogate(0.1, 0.3, ratio=ratio), "fixed_length"),
    "dapo": (lambda ratio: ClippedSurrogate(0.1, 0.3, ratio=ratio), "token_mean"),
    "luspo": (lambda ratio: ClippedSurrogate(0.1, 0.3, ratio=ratio), "length_weighted"),
    "cispo": (lambda ratio: Cispo(clip_low=1.0, clip_high=0.5, ratio=ratio), "token_mean"),
    "sapo": (lambda ratio: Sapo(ratio=ratio), "sequence_mean"),
    "vespo": (lambda ratio: Vespo(), "token_mean"),
}
CREDITS = {
    "group": GroupNormalised(floor=1e-4),
    "batch": GroupNormalised(floor=1e-4, std_over="batch"),
    "none": Centred(),
}


def both_losses(
    trainer: Any, policy: Any, loss: Any, how: Any, credit: Any, *, weighted: bool = False, beta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Our loss and TRL's, after asserting that the advantages agree."""
    ours = rollout()
    mask, start = ours.batch.mask, ours.prompt
    theirs = scored(trainer)
    advantages, _ = credit(ours.rewards, torch.zeros_like(ours.rewards), mask, GROUPS, breakdown=ours.breakdown)
    torch.testing.assert_close(advantages[:, start], theirs["advantages"], **TOLERANCE)
    assert torch.equal(mask[:, start:], theirs["completion_mask"].bool())

    logprobs = policy(ours.batch).logprobs
    old, ref = other_policies(logprobs, mask)
    per_token = loss(logprobs, old, advantages, mask).per_token
    if beta:
        per_token = per_token + beta * kl_penalty(logprobs, ref, old, estimator="k3", importance_weighted=weighted)
    theirs |= {"old_per_token_logps": old[:, start:], "ref_per_token_logps": ref[:, start:]}
    trainer.beta = beta
    try:
        return reduce_tokens(per_token, mask, how, max_length=MAX_LENGTH), trainer._compute_loss(trainer.model, theirs)
    finally:
        trainer.beta = 0.0


def assert_same(policy: Any, trainer: Any, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    their_gradient = gradients_of(theirs, trainer.model.lm_head.weight)
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradients_of(ours, policy.model.lm_head.weight), their_gradient, **TOLERANCE)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_scale_and_level(theirs, policy, loss_type, scale, level):
    trainer = theirs(
        loss_type=loss_type,
        scale_rewards=scale,
        importance_sampling_level=level,
        use_bias_correction_kl=level == "token",
        epsilon_low=0.1,
        # for CISPO theirs is the bound itself, not its distance from 1
        epsilon_high=1.5 if loss_type == "cispo" else 0.3,
    )
    loss, how = LOSSES[loss_type]
    both = both_losses(trainer, policy, loss(level), how, CREDITS[scale], weighted=level == "token", beta=BETA)
    assert_same(policy, trainer, *both)


def test_two_sided_delta(theirs, policy):
    trainer = theirs(loss_type="dapo", scale_rewards="group", delta=1.6, epsilon_low=0.1, epsilon_high=0.3)
    loss = ClippedSurrogate(0.1, 0.3, dual_clip=1.6)
    both = both_losses(trainer, policy, loss, "token_mean", CREDITS["group"])
    assert_same(policy, trainer, *both)
    without = both_losses(theirs(delta=None), policy, loss, "token_mean", CREDITS["group"])
    assert (without[0] - without[1]).abs() > 1e-3


def test_rewards_normalised_one_by_one(theirs, policy):
    """Our weights of the rewards stay 1, as normalising would take them out again: they are the credit's."""
    trainer = theirs(scale_rewards="group", multi_objective_aggregation="normalize_then_sum")
    ours = rollout()
    breakdown = {"speed": torch.tensor(SPEED), "style": torch.tensor(STYLE)}
    credit = Gdpo(weights={"speed": WEIGHTS[0], "style": WEIGHTS[1]}, floor=1e-4)
    zeros = torch.zeros_like(ours.rewards)
    advantages, _ = credit(ours.rewards, zeros, ours.batch.mask, GROUPS, breakdown=breakdown)
    torch.testing.assert_close(advantages[:, ours.prompt], scored(trainer)["advantages"], **TOLERANCE)


def test_top_entropy_tokens(theirs, policy):
    trainer = theirs(loss_type="grpo", scale_rewards="group", top_entropy_quantile=0.4, epsilon_low=0.1)
    trainer = theirs(epsilon_high=0.3)
    entropy = policy(rollout().batch, with_entropy=True).entropy

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        out = ClippedSurrogate(0.1, 0.3)(logprobs, old, advantages, mask)
        kept = top_entropy_mask(entropy, mask, 0.4)
        assert 0 < kept.sum() < mask.sum()
        return type(out)(out.per_token * kept, out.ratio, out.clipped)

    assert_same(
        policy,
        trainer,
        *both_losses(trainer, policy, loss, "sequence_mean", CREDITS["group"], beta=BETA, weighted=True),
    )


def test_off_policy_sequences_are_dropped(theirs, policy):
    trainer = theirs(loss_type="grpo", scale_rewards="group", off_policy_mask_threshold=0.05, epsilon_low=0.1)
    trainer = theirs(epsilon_high=0.3)

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        out = ClippedSurrogate(0.1, 0.3)(logprobs, old, advantages, mask)
        kept = off_policy_sequence_mask(logprobs, old, advantages, mask, threshold=0.05)
        assert 0 < kept.sum() < mask.sum()
        return type(out)(out.per_token * kept, out.ratio, out.clipped)

    assert_same(policy, trainer, *both_losses(trainer, policy, loss, "sequence_mean", CREDITS["group"]))


@pytest.mark.parametrize(
    ("mode", "correction"),
    [
        ("token_truncate", SamplerCorrection(cap=1.5)),
        ("token_mask", SamplerCorrection(cap=None, keep="token", high=1.5)),
        ("sequence_truncate", SamplerCorrection(weight="sequence", cap=1.5)),
        ("sequence_mask", SamplerCorrection(weight="sequence", cap=None, keep="sequence", high=1.5)),
    ],
)
def test_weights_of_a_sampler_that_differs(theirs, policy, mode, correction):
    ours = rollout()
    mask, start = ours.batch.mask, ours.prompt
    trainer = theirs(loss_type="dapo", scale_rewards="group", epsilon_low=0.1, epsilon_high=0.3, use_vllm=True)
    trainer = theirs(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.5)
    with torch.no_grad():
        old = policy(ours.batch).logprobs
    sampler = torch.where(mask, old + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)), 0.0)
    said = [row[keep].tolist() for row, keep in zip(sampler, mask, strict=True)]
    sampler[1, start + 1] = said[1][1] = float("nan")  # a token that the engine could not score
    questions, texts = [PROMPTS[row // 3] for row in range(6)], ["text"] * 6
    trainer = theirs(_generate=lambda prompts: (questions, ANSWERS, None, texts, said, {}, None, None))
    batch = scored(trainer)
    weights = correction(old, sampler, mask).weights
    expected = torch.where(mask[:, start:], batch["importance_sampling_ratio"], 0.0)
    assert (expected == 0).any() or (expected == 1.5).any()
    torch.testing.assert_close(weights[:, start:], expected, **TOLERANCE)

    advantages, _ = CREDITS["group"](ours.rewards, torch.zeros_like(ours.rewards), mask, GROUPS)
    logprobs = policy(ours.batch).logprobs
    per_token = ClippedSurrogate(0.1, 0.3)(logprobs, old, advantages, mask).per_token * weights
    assert_same(
        policy, trainer, reduce_tokens(per_token, mask, "token_mean"), trainer._compute_loss(trainer.model, batch)
    )


# --- differences on purpose


def test_differs_bnpo_depends_on_the_micro_batch(theirs, policy):
    """TRL divides each micro-batch by its own tokens, then averages; our denominator is the whole step's."""
    trainer = theirs(loss_type="bnpo", scale_rewards="group", epsilon_low=0.1, epsilon_high=0.3)
    ours, whole = both_losses(trainer, policy, ClippedSurrogate(0.1, 0.3), "token_mean", CREDITS["group"])
    torch.testing.assert_close(ours, whole, **TOLERANCE)

    r, batch = rollout(), scored(trainer)
    mask, logprobs = r.batch.mask, policy(r.batch).logprobs
    old, _ = other_policies(logprobs, mask)
    batch["old_per_token_logps"] = old[:, r.prompt :]
    trainer = theirs(current_gradient_accumulation_steps=2)
    parts = (slice(0, 2), slice(2, 6))
    cut = sum(
        trainer._compute_loss(trainer.model, {k: v[part] if v.dim() else v for k, v in batch.items()}) for part in parts
    )
    advantages, _ = CREDITS["group"](r.rewards, torch.zeros_like(r.rewards), mask, GROUPS)
    per_token = ClippedSurrogate(0.1, 0.3)(logprobs, old, advantages, mask).per_token
    local = sum(reduce_tokens(per_token[part], mask[part], "token_mean") for part in parts) / 2
    torch.testing.assert_close(cut, local, **TOLERANCE)
    assert (cut - ours).abs() > 1e-3
    tokens = float(mask.sum())
    torch.testing.assert_close(sum(reduce_tokens(per_token[p], mask[p], "token_mean", tokens) for p in parts), ours)


@pytest.mark.parametrize(("loss_type", "how"), [("grpo", "sequence_mean"), ("dr_grpo", "fixed_length")])
def test_differs_masked_answers_are_not_in_the_denominator(theirs, policy, loss_type, how):
    """Two of six answers were cut off and masked: TRL divides by six, we divide by the four that train (as verl)."""
    trainer = theirs(loss_type=loss_type, scale_rewards="group", mask_truncated_completions=True, epsilon_low=0.1)
    trainer = theirs(epsilon_high=0.3)
    ours = rollout()
    mask = overlong_mask(ours.batch.mask, ours.finished)
    advantages, _ = CREDITS["group"](ours.rewards, torch.zeros_like(ours.rewards), ours.batch.mask, GROUPS)
    logprobs = policy(ours.batch).logprobs
    old, _ = other_policies(logprobs, ours.batch.mask)
    per_token = ClippedSurrogate(0.1, 0.3)(logprobs, old, advantages, mask).per_token
    batch = scored(trainer)
    assert torch.equal(batch["completion_mask"].bool(), mask[:, ours.prompt :])
    batch["old_per_token_logps"] = old[:, ours.prompt :]
    theirs_loss = trainer._compute_loss(trainer.model, batch)
    torch.testing.assert_close(
        reduce_tokens(per_token, mask, how, max_length=MAX_LENGTH) * 4 / 6, theirs_loss, **TOLERANCE
    )


def test_differs_bias_correction_weighs_each_token_by_its_own_ratio(theirs, policy):
    """With a sequence ratio, TRL weighs the KL of each token by the ratio of the whole answer."""
    attributes = {"loss_type": "grpo", "scale_rewards": "group", "importance_sampling_level": "sequence"}
    trainer = theirs(**attributes, use_bias_correction_kl=True, epsilon_low=0.1, epsilon_high=0.3)
    loss = ClippedSurrogate(0.1, 0.3, ratio="sequence")
    ours, with_answers_ratio = both_losses(
        trainer, policy, loss, "sequence_mean", CREDITS["group"], weighted=True, beta=BETA
    )
    assert (ours - with_answers_ratio).abs() > 1e-3
    r = rollout()
    logprobs = policy(r.batch).logprobs
    old, ref = other_policies(logprobs, r.batch.mask)
    own, whole = (
        kl_penalty(logprobs, ref, x, importance_weighted=True)
        for x in (old, logprobs - ClippedSurrogate(ratio="sequence")(logprobs, old, old, r.batch.mask).ratio.log())
    )
    gap = reduce_tokens(BETA * (own - whole), r.batch.mask, "sequence_mean")
    torch.testing.assert_close(ours - with_answers_ratio, gap, **TOLERANCE)


def test_differs_cispos_bound_is_a_distance_from_one(theirs, policy):
    trainer = theirs(loss_type="cispo", scale_rewards="group", epsilon_high=1.5)
    ours, same = both_losses(trainer, policy, Cispo(clip_high=0.5), "token_mean", CREDITS["group"])
    torch.testing.assert_close(ours, same, **TOLERANCE)
    naive, _ = both_losses(trainer, policy, Cispo(clip_high=1.5), "token_mean", CREDITS["group"])
    assert (naive - same).abs() > 1e-3


# --- RLOO and GMPO


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo(tiny_model, tmp_path, policy, beta):
    """KL in the reward, leave-one-out, one clipped ratio of probabilities for each answer."""
    from trl import RLOOConfig, RLOOTrainer

    trainer = build(RLOOTrainer, RLOOConfig, tiny_model, tmp_path, beta=beta, epsilon=0.2)
    ours = rollout()
    mask, start = ours.batch.mask, ours.prompt
    logprobs = policy(ours.batch).logprobs
    ref = torch.zeros_like(logprobs)
    if beta:
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(1.2)
        for parameter, moved in zip(policy.model.parameters(), trainer.ref_model.parameters(), strict=True):
            assert parameter.shape == moved.shape
        keep = ours.batch.tokens.shape[1] - start
        said, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ours.batch.tokens, ours.batch.attention_mask.long(), keep
        )
        ref[:, start:] = torch.where(mask[:, start:], said.detach(), 0.0)
    batch = scored(trainer)
    scores = sum(ours.breakdown.values())
    rewards, kl = kl_shaped_rewards(scores, logprobs.detach(), ref, mask, kl_coef=beta)
    assert not beta or kl.abs().max() > 1e-3
    advantages, _ = LeaveOneOut()(rewards, torch.zeros_like(rewards), mask, GROUPS)
    torch.testing.assert_close(advantages[:, start], batch["advantages"], **TOLERANCE)

    old, _ = other_policies(logprobs, mask)
    old = torch.where(mask, logprobs.detach() + 0.3 * (old - logprobs.detach()), 0.0)
    batch["old_logps"] = old.sum(-1)
    out = ClippedSurrogate(0.2, 0.2, ratio="sequence_sum")(logprobs, old, advantages, mask)
    assert out.clipped[:, start].any()
    assert not out.clipped[:, start].all()
    loss = reduce_tokens(out.per_token, mask, "sequence_mean")
    assert_same(policy, trainer, loss, trainer._compute_loss(trainer.model, batch))


@pytest.fixture(scope="module")
def gmpo(tiny_model, tmp_path_factory):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    bounds = {"epsilon": 0.3, "epsilon_high": 0.5}
    return build(GMPOTrainer, GMPOConfig, tiny_model, tmp_path_factory.mktemp("gmpo"), beta=0.0, **bounds)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_gmpo(gmpo, policy, beta):
    both = both_losses(gmpo, policy, Gmpo(0.3, 0.5), "sequence_mean", CREDITS["group"], beta=beta)
    assert_same(policy, gmpo, *both)


def test_differs_gmpos_mean_is_over_all_tokens_whatever_their_entropy(gmpo, policy, monkeypatch):
    """With top_entropy_quantile TRL's mean is over the tokens kept; ours is over all, and those kept carry it."""
    monkeypatch.setattr(gmpo, "top_entropy_quantile", 0.4)
    r = rollout()
    kept = top_entropy_mask(policy(r.batch, with_entropy=True).entropy, r.batch.mask, 0.4)
    held: dict[str, Tensor] = {}

    def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        out = Gmpo(0.3, 0.5)(logprobs, old, advantages, mask)
        of_kept = Gmpo(0.3, 0.5)(logprobs, old, advantages, kept)
        first = of_kept.per_token[:, r.prompt]  # the same number at each token of an answer
        held["theirs"], held["ours"] = first.mean(), (out.per_token[:, r.prompt] * kept.sum(-1) / mask.sum(-1)).mean()
        return type(out)(out.per_token * kept, out.ratio, out.clipped)

    ours, theirs = both_losses(gmpo, policy, loss, "sequence_mean", CREDITS["group"])
    torch.testing.assert_close(theirs, held["theirs"], **TOLERANCE)
    torch.testing.assert_close(ours, held["ours"], **TOLERANCE)
    assert (ours - theirs).abs() > 1e-3


# --- the whole stage


class Fixed(GRPOModule):
    """GRPO on the fixed rollout."""

    def generate(self, prompts: Any, seed: int) -> Generated:
        ours = rollout()
        batch = ours.batch
        return Generated(batch.tokens, batch.attention_mask, batch.mask, batch.positions, ours.finished)

    def score(self, prompts: Any, answers: Generated) -> ScoredSamples:
        breakdown = rollout().breakdown
        total = sum(breakdown.values())
        return ScoredSamples(total=total, at_end=total, per_token=None, breakdown=breakdown)


@pytest.mark.parametrize(
    ("loss_type", "bias_corrected", "entropy"),
    [
        ("grpo", True, None),
        ("grpo", False, None),
        ("dr_grpo", True, None),
        ("cispo", False, None),
        ("dapo", True, AdaptiveEntropy(target=2.73, delta=0.05, max_coef=0.5)),
    ],
)
def test_twenty_steps_on_one_rollout(loss_type, bias_corrected, entropy, tiny_model, tmp_path, write_jsonl):
    """Collecting, credit, reference, loss, clipping and AdamW: everything but sampling is real on both sides."""
    from trl import GRPOConfig, GRPOTrainer

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    bounds = {"epsilon": 0.1, "epsilon_high": 1.5 if loss_type == "cispo" else 0.3}
    if entropy is not None:
        bounds |= {"entropy_target": entropy.target, "entropy_coef_delta": entropy.delta}
        bounds |= {"entropy_coef": 0.1, "entropy_coef_max": entropy.max_coef, "use_adaptive_entropy": True}
    scale = "none" if loss_type == "dr_grpo" else "group"
    theirs = build(
        GRPOTrainer,
        GRPOConfig,
        tiny_model,
        tmp_path,
        optimizer=adamw,
        beta=0.05,
        loss_type=loss_type,
        scale_rewards=scale,
        use_bias_correction_kl=bias_corrected,
        num_iterations=20,
        steps_per_generation=1,
        max_steps=20,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        **bounds,
    )
    losses = []
    compute = theirs.compute_loss
    theirs.compute_loss = lambda *args, **more: losses.append(compute(*args, **more)) or losses[-1]
    theirs.train()

    loss, how = LOSSES[loss_type]
    ours = Fixed(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=MAX_LENGTH, num_samples=3),
        updates=UpdateSpec(inner_epochs=20),
        loss=loss("token"),
        credit=CREDITS[scale],
        reduction=how,
        kl=KLSpec(control=FixedKL(0.0), loss_coef=0.05, loss_importance_weighted=bias_corrected),
        entropy_coef=0.1 if entropy is not None else 0.0,
        entropy_control=entropy,
        optimizer=adamw,
    )
    ratios, weights = [], []

    def note(t: Any, *_: Any) -> None:
        ratios.append(t.callback_metrics["policy/ratio"].item())
        weights.append(round(t.callback_metrics.get("policy/entropy_coef", torch.zeros(())).item(), 6))

    keep = LambdaCallback(on_train_batch_end=note)
    data = {"train": write_jsonl("prompts.jsonl", [{"prompt": "the film"}, {"prompt": "was"}]), "batch_size": 2}
    trainer = fit(ours, tmp_path, data=data, gradient_clip_val=1.0, callbacks=[keep])
    assert trainer.global_step == len(losses) == 20
    if entropy is not None:
        assert ours.entropy_bonus.coef == pytest.approx(theirs.entropy_coef)
        assert weights[0] == 0, "nothing is known of the entropy before the first step"
        assert {w > 0 for w in weights[1:]} == {True, False}, f"it is to go on and off: {weights}"
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert abs(ratios[-1] - 1) > 0.01, "the later steps must be off policy"
    start = load_policy(ModelSpec(path=str(tiny_model))).causal_lm
    moved = 0.0
    for (name, mine), other, before in zip(
        ours.policy.causal_lm.named_parameters(), theirs.model.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, float((mine - before).detach().abs().max()))
    assert moved > 5e-3
