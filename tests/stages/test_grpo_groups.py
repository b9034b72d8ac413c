"""GRPO: groups that teach nothing, those drawn in their place and those played again."""

import math
from dataclasses import replace

import pytest
import torch
from fits import fit
from grpo_runs import NO_KL, Constant, FirstToken, Keep, grpo, largest_change, prompts, weights

from rlhf_lightning.core.interfaces import RewardFn
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule
from rlhf_lightning.stages.grpo import DynamicSampling


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
