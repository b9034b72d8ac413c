"""GRPO: groups, filters and prefixes by their effect."""

import math
from dataclasses import replace

import pytest
import torch
from fits import fit
from one_step import another, records

from rlhf_lightning.advantages import (
    BatchNormalised,
    Centred,
    FixedKL,
    Gae,
    LeaveOneOut,
    OptimalTokenBaseline,
    ReMax,
    RewardsToCome,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.prefix import PrefixSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping

NO_KL = KLSpec(control=FixedKL(0.0))


def grpo(model, reward=None, **options) -> GRPOModule:
    defaults = {
        "generation": GenerationSpec(max_new_tokens=5, num_samples=4),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    rewards = [WeightedReward(reward or LengthReward(target=3), name="reward")]
    return GRPOModule(ModelSpec(path=str(model)), rewards, **(defaults | options))


def prompts(write_jsonl, count: int = 12, **columns) -> str:
    return write_jsonl("prompts.jsonl", [{"prompt": row["prompt"], **columns} for row in records("ppo")[:count]])


class Keep:
    """Rollouts of a run, as they are given to training."""

    def __init__(self, module: GRPOModule) -> None:
        self.rollouts, collect = [], module.collect

        def keeping(draw):
            self.rollouts.append(collect(draw))
            return self.rollouts[-1]

        module.collect = keeping


class FirstToken(RewardFn):
    """1 for answers that begin with one of these tokens, else 0."""

    def __init__(self, *wanted: int) -> None:
        self.wanted = wanted

    def __call__(self, samples):
        return [float(bool(sample.tokens) and sample.tokens[0] in self.wanted) for sample in samples]


class Constant(RewardFn):
    def __call__(self, samples):
        return [1.0] * len(samples)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_change(before, module) -> float:
    return max(float((p.detach() - before[name]).abs().max()) for name, p in module.named_parameters())


# ---- the first minibatch, and learning -------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [{}, {"temperature": 0.7}, {"top_p": 0.7}, {"top_k": 4, "min_p": 0.05}])
def test_the_ratio_of_the_first_minibatch_is_1_whatever_the_sampler_cuts_off(
    generation, tiny_model, write_jsonl, tmp_path
):
    module = grpo(tiny_model, generation=GenerationSpec(max_new_tokens=5, num_samples=4, **generation))
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-6)
    assert metrics["policy/clip_frac"].item() == 0
    assert metrics["rollout/kl"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("renormalise", [True, False])
def test_validation_measures_truncated_samples_as_training_does(renormalise, tiny_model, write_jsonl, tmp_path):
    """The weights stay as they are; against another model the two choices are far apart."""
    module = grpo(
        tiny_model,
        reference=another(str(tiny_model)),
        renormalise_truncated=renormalise,
        generation=GenerationSpec(max_new_tokens=5, num_samples=4, top_k=3),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    path = prompts(write_jsonl)
    metrics = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 12}).callback_metrics
    assert metrics["val/kl"].item() == pytest.approx(metrics["rollout/kl"].item(), rel=0.3)


def test_a_second_step_on_truncated_samples_has_the_ratio_of_the_renormalised_policies(
    tiny_model, write_jsonl, tmp_path
):
    """By hand from full logits: after a step, at one fixed set, and not what the whole vocabulary would give."""
    generation = GenerationSpec(max_new_tokens=5, num_samples=4, top_k=3)
    module = grpo(tiny_model, FirstToken(*range(4, 13)), generation=generation)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    module.eval()
    with torch.no_grad():
        hidden = module.policy.hidden_states(rollouts.tokens, rollouts.attention_mask, rollouts.positions)
        now = module.policy_scores(rollouts, hidden).logprobs
        logits = module.policy.causal_lm(
            input_ids=rollouts.tokens,
            attention_mask=rollouts.attention_mask,
            position_ids=rollouts.positions,
            use_cache=False,
        ).logits
    bits = rollouts.kept[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    inside = bits.flatten(-2)[..., : logits.shape[-1]].bool()
    assert inside[rollouts.mask].sum(-1).tolist() == [3] * int(rollouts.mask.sum())
    by_hand = logits[:, :-1].masked_fill(~inside[:, 1:], -torch.inf).log_softmax(-1)
    by_hand = by_hand.gather(-1, rollouts.tokens[:, 1:, None])[..., 0]
    real = rollouts.mask[:, 1:]
    torch.testing.assert_close(now[:, 1:][real], by_hand[real], rtol=1e-5, atol=1e-5)
    ratio = (now - rollouts.old_logprobs)[rollouts.mask].exp()
    assert (ratio - 1).abs().max() > 1e-3


@pytest.mark.parametrize("credit", [LeaveOneOut(), ReMax(), BatchNormalised()], ids=lambda c: type(c).__name__)
def test_it_learns_what_is_rewarded(credit, tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, FirstToken(4, 5, 6, 7), credit=credit, kl=NO_KL, use_reference=False)
    scores = []
    module.log_pending = lambda: scores.append(module._pending_metrics["rollout/score"])
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}, max_epochs=12)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.2


def test_without_a_reference_there_is_no_second_model_and_no_kl(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, kl=NO_KL, use_reference=False)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    assert module.reference is None
    assert not [name for name in metrics if name.startswith("rollout/kl")]


# ---- groups that teach nothing ---------------------------------------------------------------------------------------


def test_answers_that_are_all_cut_off_change_no_parameter(tiny_model, write_jsonl, tmp_path):
    generation = GenerationSpec(max_new_tokens=1, num_samples=4)  # no room for an end token besides

    class NeverEnds(GRPOModule):
        def generate(self, prompts, seed):
            answers = super().generate(prompts, seed)
            return replace(answers, finished=torch.zeros_like(answers.finished))

    module = NeverEnds(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=generation,
        mask_truncated=True,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    )
    module.configure_model()
    before = weights(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 4}, max_epochs=2)
    assert largest_change(before, module) == 0.0
    assert trainer.callback_metrics["groups/trained_sequences"].item() == 0


def test_uninformative_groups_change_only_the_normaliser(tiny_model, write_jsonl, tmp_path):
    """Kept they add zeros to the sum; dropped they leave the denominator: the gradients differ by one factor."""
    gradients, counts = [], []
    for drop in (False, True):
        module = grpo(
            tiny_model,
            FirstToken(4, 5, 6),
            drop_uninformative=drop,
            kl=NO_KL,
            reduction="token_mean",
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        )
        keep = Keep(module)
        seen = {}
        module.on_before_optimizer_step = lambda optimizer, m=module, seen=seen: seen.update(
            {n: p.grad.clone() for n, p in m.named_parameters()}
        )
        fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
        gradients.append(seen)
        counts.append(float(keep.rollouts[0].mask.sum()))
    assert 0 < counts[1] < counts[0], "some groups must be informative and some not"
    for name, kept in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], kept * counts[0] / counts[1], rtol=1e-4, atol=1e-6)


def test_dynamic_sampling_fills_the_rollout_with_informative_groups(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, FirstToken(4, 5), dynamic_sampling=DynamicSampling(max_batches=30), kl=NO_KL)
    keep = Keep(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6})
    for rollouts in keep.rollouts:
        assert len(rollouts.scores) == 6 * 4
        for group in range(6):
            scores = rollouts.scores[rollouts.groups == group]
            assert len(scores) == 4
            assert 0 < scores.sum() < 4
    assert trainer.global_step == 2, "an epoch is as many rollouts as there are batches of prompts"
    metrics = trainer.callback_metrics
    assert metrics["sampling/batches"].item() > 1
    assert metrics["sampling/used_frac"].item() <= metrics["sampling/informative_frac"].item() < 1


def test_dynamic_sampling_keeps_groups_by_their_mean(tiny_model, write_jsonl, tmp_path):
    sampling = DynamicSampling(max_batches=30, mean_within=(0.3, 0.8))
    module = grpo(tiny_model, FirstToken(4, 5, 6, 7), dynamic_sampling=sampling, kl=NO_KL)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6})
    sums = [r.scores[r.groups == group].sum().item() for r in keep.rollouts for group in range(6)]
    assert set(sums) == {2.0, 3.0}, "of four answers 2 or 3 right, not 1: that is 0.25"


def test_kl_is_credited_with_the_score_or_to_the_tokens_before_it(tiny_model):
    """Two answers to one prompt, of 3 and 1 tokens; scores 4 and 2, KL rewards -1 0 -2 and -3: by hand."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    scores, kl = torch.tensor([[0.0, 0.0, 4.0], [2.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, -2.0], [-3.0, 0.0, 0.0]])
    groups, zeros = torch.tensor([0, 0]), torch.zeros(2, 3)
    module = grpo(tiny_model, credit=Centred(), kl=KLSpec(control=FixedKL(0.1), credited="to_come"))
    apart, returns = module.advantages(scores, zeros, mask, groups, kl_rewards=kl)
    assert apart.tolist() == [[1 - 3, 1 - 2, 1 - 2], [-1 - 3, 0, 0]]
    assert returns.tolist() == [[4 - 3, 4 - 2, 4 - 2], [2 - 3, 0, 0]]
    together, _ = grpo(tiny_model, credit=Centred()).advantages(scores + kl, zeros, mask, groups)
    assert together.tolist() == [[1, 1, 1], [-1, 0, 0]]  # scores 1 and -1: their mean is 0


def test_kl_apart_reaches_advantages_and_metrics(tiny_model, write_jsonl, tmp_path):
    """The reference is the policy with other weights: its KL is in the rewards that are logged, and in each token's
    advantage, and the baseline is of scores alone."""
    kl = KLSpec(control=FixedKL(0.5), credited="to_come", loss_coef=0.0)
    module = grpo(tiny_model, credit=Centred(), kl=kl)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.reference.policy.parameters():
            parameter.mul_(1.5)
    keep = Keep(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    rollouts = keep.rollouts[0]
    price = -0.5 * (rollouts.old_logprobs - rollouts.ref_logprobs)
    assert price.abs().max() > 1e-2
    scores = rollouts.scores
    mean = torch.stack([scores[rollouts.groups == g].mean() for g in rollouts.groups])
    to_come = price.flip(-1).cumsum(-1).flip(-1)
    expected = torch.where(rollouts.mask, (scores - mean)[:, None] + to_come, 0.0)
    torch.testing.assert_close(rollouts.advantages, expected, rtol=1e-4, atol=1e-5)
    rewards = (scores + price.sum(-1)).mean().item()
    assert trainer.callback_metrics["rollout/reward"].item() == pytest.approx(rewards, rel=1e-4)


def test_dynamic_sampling_is_bounded_and_trains_on_nothing_if_it_finds_nothing(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, Constant(), dynamic_sampling=DynamicSampling(max_batches=3))
    module.configure_model()
    before = weights(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6})
    assert trainer.callback_metrics["sampling/batches"].item() == 3
    assert trainer.callback_metrics["sampling/informative_frac"].item() == 0
    assert trainer.callback_metrics["sampling/score"].item() == 1
    assert largest_change(before, module) == 0.0


def test_replay_puts_earlier_groups_in_the_place_of_unanimous_ones(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, FirstToken(4, 5), replay=ReplaySpec(capacity=8), kl=NO_KL)
    keep = Keep(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6}, max_epochs=3)
    assert trainer.callback_metrics["groups/replayed"].item() > 0
    last = keep.rollouts[-1]
    assert len(last.scores) == 24, "as many answers as ever"
    unanimous = [g for g in last.groups.unique() if last.scores[last.groups == g].std() == 0]
    assert len(unanimous) < 6
    fresh = [g for g in last.groups.unique() if g < 6]
    replayed = [g for g in last.groups.unique() if g >= 6]
    assert len(fresh) + len(replayed) == 6
    for group in replayed:
        rows = last.groups == group
        assert any(
            torch.equal(early.old_logprobs[early.mask], last.old_logprobs[rows][last.mask[rows]])
            for before in keep.rollouts[:-1]
            for early in [before.select((before.groups == g).nonzero()[:, 0]) for g in before.groups.unique()]
        ), "a replayed group keeps the log-probabilities that it was sampled with"


@pytest.mark.parametrize("loss_taken_off", [{"mask_truncated": True}, {"on_error": "drop"}])
def test_replay_never_makes_a_rollout_longer(loss_taken_off, tiny_model, write_jsonl, tmp_path):
    """Answers that carry no loss leave groups of other sizes behind."""

    class Sometimes(RewardFn):
        def __call__(self, samples):
            return [math.nan if s.tokens[0] % 3 == 0 and on_error == "drop" else float(s.finished) for s in samples]

    on_error = loss_taken_off.pop("on_error", "error")
    module = grpo(tiny_model, replay=ReplaySpec(capacity=16), kl=NO_KL, **loss_taken_off)
    module.rewards = [WeightedReward(Sometimes(), name="reward", on_error=on_error)]
    keep = Keep(module)
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6}, max_epochs=3)
    assert len(keep.rollouts) == 6
    assert max(len(rollouts.scores) for rollouts in keep.rollouts) <= 24
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


def test_only_the_tokens_of_highest_entropy_carry_the_loss(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, entropy_top_frac=0.25)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    share = rollouts.weights[rollouts.mask].mean().item()
    assert share == pytest.approx(0.25, abs=0.02)
    assert set(rollouts.weights.unique().tolist()) == {0.0, 1.0}


def test_a_sampler_that_was_exact_has_weights_of_1(tiny_model, write_jsonl, tmp_path):
    generation = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True, top_p=0.9)
    module = grpo(tiny_model, generation=generation, correction=SamplerCorrection(cap=2.0))
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    [rollouts] = keep.rollouts
    torch.testing.assert_close(rollouts.weights[rollouts.mask], torch.ones(int(rollouts.mask.sum())), atol=1e-4, rtol=0)
    assert metrics["correction/ratio"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["correction/truncated_frac"].item() == 0


@pytest.mark.parametrize("generation", [{"temperature": 0.7}, {"top_p": 0.8}])
def test_what_the_sampler_said_saves_a_forward_pass(generation, tiny_model, write_jsonl, tmp_path):
    spec = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True, **generation)
    both = []
    for source in ("recomputed", "sampler"):
        module = grpo(tiny_model, generation=spec, old_logprobs=source)
        keep = Keep(module)
        metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
        both.append((keep.rollouts[0].old_logprobs, metrics["rollout/entropy"]))
        assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-5)


def test_a_sampler_that_was_wrong_is_weighed_by_the_ratio(tiny_model, write_jsonl, tmp_path):
    class OffByHalf(GRPOModule):
        def generate(self, prompts, seed):
            answers = super().generate(prompts, seed)
            return replace(answers, sampler_logprobs=answers.sampler_logprobs - math.log(1.5))

    module = OffByHalf(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True),
        correction=SamplerCorrection(cap=2.0),
    )
    keep = Keep(module)
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    weights = keep.rollouts[0].weights[keep.rollouts[0].mask]
    torch.testing.assert_close(weights, torch.full_like(weights, 1.5), rtol=1e-4, atol=0)
    assert metrics["rollout/logprob_gap"].item() == pytest.approx(math.log(1.5), rel=1e-4)


def test_long_answers_lose_a_point_bit_by_bit(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, Constant(), shaping=RewardShaping(overlong_cache=2, overlong_factor=0.5), kl=NO_KL)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    # limit 5: free up to 3 tokens, half a point at 4, all of it at 5
    expected = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1 - 0.25, 5: 1 - 0.5}
    lengths = rollouts.mask.sum(-1).tolist()
    assert {4, 5} & set(lengths)
    assert rollouts.rewards.sum(-1).tolist() == pytest.approx([expected[length] for length in lengths])


def test_the_reference_follows_the_policy_and_is_in_the_checkpoint(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, reference_sync=ReferenceSync(every=3, share=1.0))
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 4})
    assert trainer.global_step == 3
    ours, reference = module.policy.state_dict(), module.reference.policy.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in reference.items())
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = grpo(tiny_model, reference_sync=ReferenceSync(every=3))
    other.configure_model()
    other.on_load_checkpoint(checkpoint)
    assert all(torch.equal(ours[name], value) for name, value in other.reference.policy.state_dict().items())


def test_a_reference_follows_at_its_step_even_if_that_one_was_skipped(tiny_model, write_jsonl, tmp_path):
    """target_kl ends every rollout after its second step: its fourth, the reference's turn, is never taken."""
    module = grpo(
        tiny_model,
        updates=UpdateSpec(inner_epochs=4),
        target_kl=1e-6,
        reference_sync=ReferenceSync(every=4, share=1.0),
    )
    module.configure_model()
    before = weights(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6})
    assert largest_change(before, module) > 0
    for followed, own in zip(module.reference.policy.parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(followed, own)


def test_bad_answers_that_the_policy_has_left_carry_no_loss(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, off_policy_threshold=1e-6, updates=UpdateSpec(inner_epochs=2))
    metrics = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}).callback_metrics
    assert 0 < metrics["policy/off_policy_frac"].item() < 1


def test_weights_multiply_the_loss_of_their_tokens_and_no_denominator(tiny_model, write_jsonl, tmp_path):
    """By hand: sum of weight times loss over the tokens, divided by all tokens, whatever they weigh."""
    module = grpo(
        tiny_model, kl=NO_KL, reduction="token_mean", optimizer=lambda params: torch.optim.SGD(params, lr=0.0)
    )
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    module.log_step_means = lambda batch_idx: None
    rollouts = keep.rollouts[0]
    weights = torch.linspace(0, 3, rollouts.mask.numel()).view(rollouts.mask.shape)
    # off policy by 0.1 nats: no clipping, and no ratio is 1
    rollouts = replace(rollouts, weights=weights, old_logprobs=rollouts.old_logprobs - 0.1 * rollouts.mask)
    count = float(rollouts.mask.sum())
    found = module.training_step(rollouts.with_totals({"tokens": count, "sequences": 48.0}), 0)
    by_hand = -(math.exp(0.1) * rollouts.advantages * weights)[rollouts.mask].sum() / count
    assert abs(by_hand) > 1e-2
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_two_kinds_of_weights_are_multiplied(tiny_model, write_jsonl, tmp_path):
    class OffByHalf(GRPOModule):
        def generate(self, prompts, seed):
            answers = super().generate(prompts, seed)
            return replace(answers, sampler_logprobs=answers.sampler_logprobs - math.log(1.5))

    module = OffByHalf(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True),
        correction=SamplerCorrection(cap=2.0),
        entropy_top_frac=0.25,
    )
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    weights = keep.rollouts[0].weights[keep.rollouts[0].mask]
    chosen = weights > 0
    assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(weights[chosen], torch.full_like(weights[chosen], 1.5), rtol=1e-4, atol=0)


def test_remax_compares_with_the_score_of_the_greedy_answer(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model, FirstToken(4, 5, 6, 7), credit=ReMax(), kl=NO_KL)
    greedy, score = [], module.score

    def noting(prompts, answers):
        scored = score(prompts, answers)
        greedy.append(scored.total) if len(scored.total) == len(prompts.texts) else None
        return scored

    module.score = noting
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    baseline = greedy[0].repeat_interleave(4)
    assert 0 < baseline.sum() < 48, "some greedy answers score and some do not"
    torch.testing.assert_close(rollouts.values.sum(-1), baseline)
    # the reward comes at the end: every token of an answer has the same lead over the greedy one
    lead = (rollouts.scores - baseline)[:, None].expand_as(rollouts.mask)
    torch.testing.assert_close(rollouts.advantages[rollouts.mask], lead[rollouts.mask])


@pytest.mark.parametrize("truncated", [False, True])
def test_the_token_baseline_is_told_how_far_gradients_vary(truncated, tiny_model, write_jsonl, tmp_path):
    """1 - 2 p + sum p^2 of the logits themselves, over what the tokens were sampled from."""
    generation = GenerationSpec(max_new_tokens=4, num_samples=4, temperature=0.7, top_k=5 if truncated else 0)
    options = {"kl": NO_KL, "generation": generation, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    module = grpo(tiny_model, FirstToken(*range(4, 12)), credit=OptimalTokenBaseline(), **options)
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [rollouts] = keep.rollouts
    with torch.no_grad():
        logits = module.policy.causal_lm(
            input_ids=rollouts.tokens,
            attention_mask=rollouts.attention_mask.long(),
            position_ids=rollouts.positions,
        ).logits[:, :-1]
    logits = logits / 0.7
    if truncated:
        logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    variance = 1 - 2 * probs.gather(-1, rollouts.tokens[:, 1:, None])[..., 0] + probs.square().sum(-1)
    mask = rollouts.mask[:, 1:]
    torch.testing.assert_close(rollouts.values[:, 1:][mask], variance[mask], atol=1e-5, rtol=1e-4)
    assert variance[mask].max() > 0.5
    expected, _ = OptimalTokenBaseline()(rollouts.rewards, rollouts.values, rollouts.mask, rollouts.groups)
    torch.testing.assert_close(rollouts.advantages, expected)
    assert rollouts.advantages.any()


def test_a_reference_that_is_a_teacher_is_what_a_token_is_credited_with(tiny_model, tiny_config, tmp_path, write_jsonl):
    """On-policy distillation: each token's advantage is the teacher's log-probability less its own, held."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_tokenizer

    spec = ModelSpec(config=tiny_config | {"num_hidden_layers": 3}, tokenizer=str(tiny_model))
    teacher = export_policy(load_policy(spec), load_tokenizer(spec), tmp_path / "teacher")
    module = GRPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=3), weight=0.0)],
        reference=ModelSpec(path=str(teacher)),
        generation=GenerationSpec(max_new_tokens=5, num_samples=1),
        updates=UpdateSpec(inner_epochs=5),
        credit=RewardsToCome(gamma=0.0),
        kl=KLSpec(control=FixedKL(1.0), bound=10.0),
        reduction="token_mean",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        seed=1,
    )
    keep = Keep(module)
    data = {"train": prompts(write_jsonl), "batch_size": 12}
    trainer = fit(module, tmp_path, data=data, max_epochs=8)
    for rollouts in keep.rollouts:
        lead = (rollouts.ref_logprobs - rollouts.old_logprobs).clamp(-10, 10)
        torch.testing.assert_close(rollouts.advantages, torch.where(rollouts.mask, lead, 0.0))
    first, last = (float(-r.advantages.sum() / r.mask.sum()) for r in (keep.rollouts[0], keep.rollouts[-1]))
    assert last < 0.7 * first, f"KL per token to the teacher went from {first} to {last}"
    assert trainer.callback_metrics["rollout/score"].item() == 0


def test_the_token_baseline_weighs_gradients_as_the_correction_does(tiny_model, write_jsonl, tmp_path):
    """A token whose gradient is multiplied by w varies w^2 times as much."""
    seen = []
    for correction in (None, SamplerCorrection(cap=1.2)):
        options = {"kl": NO_KL, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
        generation = GenerationSpec(max_new_tokens=4, num_samples=4, keep_logprobs=True)
        credit = OptimalTokenBaseline()
        module = grpo(tiny_model, credit=credit, generation=generation, correction=correction, **options)
        sample = module.sample

        def mistaken(prompts, sample=sample):
            answers = sample(prompts)
            wrong = answers.sampler_logprobs + 0.4 * torch.sin(answers.tokens.float())
            return replace(answers, sampler_logprobs=wrong)

        module.sample = mistaken
        keep = Keep(module)
        fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
        seen += keep.rollouts
    plain, weighed = seen
    assert len(weighed.weights[weighed.mask].unique()) > 3
    torch.testing.assert_close(weighed.values, plain.values * weighed.weights.square())
    expected, _ = OptimalTokenBaseline()(weighed.rewards, weighed.values, weighed.mask, weighed.groups)
    torch.testing.assert_close(weighed.advantages, expected)


@pytest.mark.parametrize(("others_short", "batches"), [(0, 1), (2, 3)])
def test_a_process_that_has_enough_goes_on_drawing_while_another_is_short(
    others_short, batches, tiny_model, write_jsonl, tmp_path
):
    """Each draw waits for all processes somewhere: one that stopped alone would leave the others hanging."""
    module = grpo(tiny_model, LengthReward(target=3), dynamic_sampling=DynamicSampling(max_batches=5), kl=NO_KL)
    module._informative = lambda answered, spec: torch.ones_like(answered.groups, dtype=torch.bool)  # enough at once
    asked = []

    def another_process(vector):
        if vector.numel() > 1:
            return vector
        asked.append(float(vector))
        return vector + (len(asked) <= others_short)

    module.add_over_ranks = another_process
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    assert not any(asked), "this one was never short itself"
    assert trainer.callback_metrics["sampling/batches"].item() == batches


# ---- prefixes --------------------------------------------------------------------------------------------------------


class Begins(RewardFn):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, samples):
        self.seen.extend(samples)
        return [float(len(sample.tokens)) for sample in samples]


@pytest.mark.parametrize("in_completion", [True, False])
def test_a_prefix_is_read_but_carries_no_loss(in_completion, tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=1.0, in_completion=in_completion))
    keep = Keep(module)
    fit(module, tmp_path, data={"train": prompts(write_jsonl, prefix="was dull but"), "batch_size": 12})
    [rollouts] = keep.rollouts
    begun = module.tokenizer.encode(" was dull but", add_special_tokens=False)
    assert begun
    for row in range(len(rollouts.scores)):
        first = int(rollouts.mask[row].int().argmax())
        assert rollouts.tokens[row, first - len(begun) : first].tolist() == begun
    for sample in reward.seen:
        text = sample.completion if in_completion else sample.prompt
        assert text.strip().startswith("was dull but") if in_completion else text.endswith("was dull but")
    # the gradient with respect to the logits that predict the prefix is exactly 0
    hidden = module.policy.hidden_states(rollouts.tokens, rollouts.attention_mask, rollouts.positions)
    logits = (hidden @ module.policy.head().weight.T).detach().requires_grad_()
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.tokens[:, 1:, None])[..., 0]
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    output = module.loss(logprobs, rollouts.old_logprobs, rollouts.advantages, rollouts.mask)
    module._mean(output.per_token, rollouts).backward()
    predicts_answer = torch.nn.functional.pad(rollouts.mask[:, 1:], (0, 1))
    assert logits.grad[predicts_answer].abs().max() > 0
    assert not logits.grad[~predicts_answer].any()


def test_a_prefix_that_is_read_back_with_other_spaces_still_belongs_to_the_answer(tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=1.0))
    path = prompts(write_jsonl, prefix="was   dull  but")
    fit(module, tmp_path, data={"train": path, "batch_size": 12})
    asked = {row["prompt"] for row in records("ppo")}
    for sample in reward.seen:
        assert sample.prompt in asked
        assert sample.completion.split()[:3] == ["was", "dull", "but"]
        assert len(sample.tokens) <= 5, "the policy's own"


def test_a_share_of_the_prompts_gets_its_prefix_and_evaluation_none(tiny_model, write_jsonl, tmp_path):
    reward = Begins()
    module = grpo(tiny_model, reward, prefix=PrefixSpec(share=0.5))
    path = prompts(write_jsonl, prefix="was dull but")
    fit(module, tmp_path, data={"train": path, "batch_size": 12}, max_epochs=4)
    begun = [sample.completion.strip().startswith("was dull but") for sample in reward.seen]
    assert 0.25 < sum(begun) / len(begun) < 0.75
    reward.seen.clear()
    fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 12, "eval_batch_size": 12}, max_epochs=1)
    assert not all(sample.record.get("prefilled") for sample in reward.seen)
    assert any("prefilled" not in sample.record for sample in reward.seen)


# ---- export, bad input -----------------------------------------------------------------------------------------------


def test_the_policy_is_exported(tiny_model, write_jsonl, tmp_path):
    module = grpo(tiny_model)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    ours = module.policy.state_dict()
    for name, value in load_policy(ModelSpec(path=str(module.export(tmp_path / "hf")))).state_dict().items():
        torch.testing.assert_close(value, ours[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": GenerationSpec(num_samples=1)}, r"num_samples=1 gives groups of one.*credit=GroupNormalised"),
        (
            {"generation": GenerationSpec(num_samples=1), "credit": ReMax(), "replay": ReplaySpec()},
            r"num_samples=1 gives groups of one answer, and replay compares",
        ),
        ({"credit": Gae()}, r"credit=Gae compares with a critic.*use PPOModule"),
        ({"use_reference": False}, r"kl.loss_coef=0.04 needs a reference, and use_reference is false"),
        (
            {"use_reference": False, "kl": KLSpec(control=FixedKL(0.1))},
            r"kl.control's coefficient=0.1 needs a reference, and use_reference is false",
        ),
        (
            {"use_reference": False, "reference": ModelSpec(path="x"), "kl": NO_KL},
            r"reference='x' with use_reference=false",
        ),
        (
            {"correction": SamplerCorrection()},
            r"correction compares .*keep_logprobs is false: set it to true",
        ),
        ({"old_logprobs": "sampler"}, r"old_logprobs='sampler' takes .*keep_logprobs is false: set it to true"),
        (
            {
                "old_logprobs": "sampler",
                "generation": GenerationSpec(num_samples=4, keep_logprobs=True, top_k=3),
                "renormalise_truncated": False,
            },
            r"old_logprobs='sampler' is over what the sampler kept, and renormalise_truncated is false",
        ),
        ({"off_policy_threshold": 0.0}, r"off_policy_threshold=0.0: give a positive number"),
        ({"use_reference": False, "kl": NO_KL, "reference_sync": ReferenceSync()}, r"reference_sync moves a reference"),
        (
            {"shaping": RewardShaping(overlong_cache=9)},
            r"shaping.overlong_cache=9 is no stretch before generation.max_new_tokens=5: give 1 to 5",
        ),
        ({"entropy_top_frac": 0.0}, r"entropy_top_frac=0.0 is no share of the tokens"),
    ],
)
def test_options_that_cannot_work_say_what_to_do(options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        grpo(tiny_model, **options)


def test_specs_that_cannot_work_say_what_to_do():
    with pytest.raises(UserError, match=r"dynamic_sampling.max_batches=1 leaves nothing to draw again"):
        DynamicSampling(max_batches=1)
    with pytest.raises(UserError, match=r"dynamic_sampling.mean_within=\[1.0, 0.0\] holds nothing"):
        DynamicSampling(mean_within=(1.0, 0.0))
    with pytest.raises(UserError, match=r"dynamic_sampling.at_least=0.5 asks for scores that differ, and mean_within"):
        DynamicSampling(mean_within=(0.0, 1.0), at_least=0.5)
    with pytest.raises(UserError, match=r"replay.capacity=0 keeps nothing"):
        ReplaySpec(capacity=0)
    with pytest.raises(UserError, match=r"replay.max_age=0 forgets at once"):
        ReplaySpec(max_age=0)
    with pytest.raises(UserError, match=r"prefix.share=0.0: give a share"):
        PrefixSpec(share=0.0)


def test_names_that_the_data_or_the_rewards_lack_are_refused(tiny_model, write_jsonl, tmp_path):
    data = {"train": prompts(write_jsonl), "batch_size": 12}
    with pytest.raises(
        UserError, match=r"prefix.column='thoughts' is not in the prompt data, whose columns are 'prompt'"
    ):
        fit(grpo(tiny_model, prefix=PrefixSpec(column="thoughts")), tmp_path, data=data)
    with pytest.raises(UserError, match=r"dynamic_sampling.by='correct' is none of the rewards, .* are 'reward'"):
        fit(grpo(tiny_model, dynamic_sampling=DynamicSampling(by="correct")), tmp_path, data=data)


def test_options_without_effect_are_named(tiny_model):
    module = grpo(tiny_model, dynamic_sampling=DynamicSampling(), drop_uninformative=True, renormalise_truncated=False)
    assert set(dict(module.inert_options())) == {"drop_uninformative", "renormalise_truncated"}
    module = grpo(tiny_model, dynamic_sampling=DynamicSampling(mean_within=(0.0, 1.0)), drop_uninformative=True)
    assert not dict(module.inert_options())
    module = grpo(tiny_model, kl=NO_KL, auxiliary_reduction="token_mean")
    assert set(dict(module.inert_options())) == {"auxiliary_reduction"}
    assert not dict(grpo(tiny_model, credit=Centred(), updates=UpdateSpec(inner_epochs=2)).inert_options())
