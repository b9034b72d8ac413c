"""GRPO: the ratio of its first minibatch, learning, its reference, export and bad input."""

import pytest
import torch
from fits import fit
from grpo_runs import NO_KL, FirstToken, Keep, grpo, largest_change, prompts, weights
from one_step import another

from rlhf_lightning.advantages import (
    BatchNormalised,
    Centred,
    FixedKL,
    Gae,
    LeaveOneOut,
    ReMax,
)
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import ReferenceSync
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.prefix import PrefixSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages.grpo import DynamicSampling
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping


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
