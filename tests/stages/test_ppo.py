"""PPO: every detail of its training by its effect, every metric by hand on a batch with padding."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fits import fit
from one_step import records
from ppo_runs import MASK, NAN, REAL, on_mask, ppo, prompts, scored

from rlhf_lightning.__main__ import main
from rlhf_lightning.advantages import Centred, ReMax
from rlhf_lightning.advantages.kl_control import FixedKL
from rlhf_lightning.core.batches import Rollouts, TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.loading import load_policy, load_scalar_model
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.python_function import PythonFunction
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.resample import Resample
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import PPOModule
from rlhf_lightning.stages.critic import CriticSpec, critic_values
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping, Shaped

# ---- the first minibatch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_ratio_of_the_first_minibatch_is_1(kind, temperature, tiny_model, write_jsonl, tmp_path):
    module = ppo(
        tiny_model,
        critic=CriticSpec(kind=kind),
        generation=GenerationSpec(max_new_tokens=6, temperature=temperature, num_samples=2),
    )
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    metrics = trainer.callback_metrics
    assert metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clip_frac"].item() == 0
    # the policy is still its own reference, and whitened advantages have mean 0
    assert metrics["rollout/kl"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["policy/loss"].item() == pytest.approx(0, abs=1e-5)


# ---- what of a rollout is trained on ---------------------------------------------------------------------------------


def test_a_rollout_is_trained_on_by_its_scores(tiny_model, write_jsonl, tmp_path):
    """Only the best and the worst answers are left, with the credit that they had among all."""
    generation = GenerationSpec(max_new_tokens=6, num_samples=2, keep_logprobs=True)
    module = ppo(tiny_model, resample=Resample("best_worst"), generation=generation, old_logprobs="sampler")
    whole, drawn, choose = [], [], module.choose

    def keeping(rollouts, *more):
        whole.append(rollouts)
        drawn.append(choose(rollouts, *more)[0])
        return drawn[0], {}

    module.choose = keeping
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    [before], [after] = whole, drawn
    ends = {float(before.scores.max()), float(before.scores.min())}
    assert set(before.scores.tolist()) > ends
    assert len(after.scores) == len(before.scores) == 24
    assert set(after.scores.tolist()) == ends
    for row, advantages in zip(after.tokens, after.advantages, strict=True):
        of = (before.tokens == row).all(-1)
        assert any(torch.equal(advantages, other) for other in before.advantages[of])
    # what the sampler said of its tokens, without a forward pass of the policy: near its own, as both are float32
    assert "rollout/logprob_gap" not in trainer.callback_metrics
    assert trainer.callback_metrics["policy/ratio"].item() == pytest.approx(1, abs=1e-4)


def test_the_best_answer_of_another_rank_is_nobodys_here(tiny_model, monkeypatch):
    """Best and worst are those of the whole rollout: here only the worst is on this rank."""
    module = ppo(tiny_model, resample=Resample("best_worst"))
    monkeypatch.setattr(PPOModule, "data_ranks", 2)
    module._loader = SimpleNamespace(rollouts=0)

    def with_another_rank(of_ranks):
        return of_ranks + torch.tensor([[0.0, 0.0], [9.0, -7.0]])  # its best, and less its worst

    monkeypatch.setattr(module, "add_over_ranks", with_another_rank)
    here = replace(rollouts(), scores=torch.tensor([5.0, 1.0]))
    drawn, _ = module.choose(here, SimpleNamespace(), torch.zeros(MASK.shape))
    assert drawn.scores.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_clipped_together_or_apart(apart, tiny_model, write_jsonl, tmp_path):
    """Gradients of 3 and 4: together 5 becomes 1; apart each becomes 1."""
    module, seen = ppo(tiny_model, critic=CriticSpec(clip_apart=apart)), []

    def norm(model):
        return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    clip = module.configure_gradient_clipping

    def noting(optimizer, **more):
        for model, size in ((module.policy, 3.0), (module.critic, 4.0)):
            now = norm(model)
            for parameter in model.parameters():
                parameter.grad *= size / now
        clip(optimizer, **more)
        seen.extend((norm(module.policy), norm(module.critic)))
        assert len(optimizer.param_groups) == 2

    module.configure_gradient_clipping = noting
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12}, gradient_clip_val=1.0)
    assert seen == pytest.approx([1.0, 1.0] if apart else [0.6, 0.8], rel=1e-4)


def test_a_fixed_length_may_be_another_than_the_longest_answer(tiny_model, write_jsonl, tmp_path):
    losses = {}
    for length in (None, 5, 20):
        module = ppo(tiny_model, reduction="fixed_length", reduction_length=length, whiten_advantages=False)
        step = module.training_step
        seen = []
        module.training_step = lambda *args, step=step, seen=seen: seen.append(step(*args)) or seen[-1]
        fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
        losses[length] = seen[0].item()
    assert losses[None] == losses[5] == pytest.approx(4 * losses[20])  # max_new_tokens is 5
    assert losses[None] != 0


# ---- metrics ---------------------------------------------------------------------------------------------------------


def rollouts() -> Rollouts:
    noise = torch.where(MASK, 0.0, NAN)  # in everything that is not promised to be 0 outside of the mask
    return Rollouts(
        tokens=torch.zeros(MASK.shape, dtype=torch.long),
        attention_mask=REAL,
        mask=MASK,
        positions=torch.zeros(MASK.shape, dtype=torch.long),
        finished=torch.tensor([True, False]),
        scores=torch.tensor([3.0, 1.0]),
        old_logprobs=on_mask(-1.0, -1.0, -1.0, -2.0),
        ref_logprobs=on_mask(-1.5, -2.0, -1.0, -1.0),
        rewards=on_mask(0.5, 0.5, 1.0, 4.0),
        advantages=on_mask(1, 1, 1, 1) + noise,
        values=on_mask(1.0, 2.0, 3.0, 4.0) + noise,
        returns=on_mask(1.0, 2.0, 3.0, 8.0) + noise,
        groups=torch.arange(2),
    )


def test_rollout_metrics_by_hand(tiny_model):
    entropy = on_mask(1.0, 2.0, 3.0, 6.0) + torch.where(MASK, 0.0, NAN)
    metrics = ppo(tiny_model).rollout_metrics(rollouts(), scored(3.0, 1.0), Shaped(on_mask(0, 0, 0, 0), {}), entropy)
    assert metrics["rollout/score"] == 2.0
    assert metrics["rollout/score_std"] == 1.0
    assert metrics["rollout/reward"] == (2.0 + 4.0) / 2
    assert metrics["rollout/kl"] == ((0.5 + 1.0 + 0.0) + -1.0) / 2
    assert metrics["rollout/kl_per_token"] == 0.5 / 4
    assert metrics["rollout/entropy"] == 12.0 / 4
    assert metrics["rollout/length"] == 2.0
    assert metrics["rollout/finished_frac"] == 0.5
    assert (metrics["rollout/sequences"], metrics["rollout/tokens"]) == (2, 4)
    assert metrics["reward/length"] == 2.0
    # returns 1 2 3 8: variance 7.25; errors 0 0 0 4: variance 3
    assert metrics["value/explained_variance"] == pytest.approx(1 - 3 / 7.25)


def test_training_metrics_by_hand(tiny_model, tmp_path):
    module = ppo(tiny_model, entropy_coef=0.1)
    module.configure_model()
    batch = replace(rollouts(), tokens=torch.tensor([[1, 4, 5, 6, 7], [0, 1, 8, 0, 0]]))
    with torch.no_grad():
        now = module.policy(batch, with_entropy=True)
        values = torch.where(MASK, critic_values(module.critic, module.policy, batch), NAN)
    module.log_step_means = lambda batch_idx, prog_bar=False: None
    module.training_step(batch, 0)
    means = {k: v.item() for k, v in module.step_means.take(lambda v: v).items()}

    ratio = [float((now.logprobs - batch.old_logprobs).exp()[i, j]) for i, j in MASK.nonzero()]
    said = [float(values[i, j]) for i, j in MASK.nonzero()]
    old, returns = (1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 8.0)
    held = [o + min(max(v - o, -0.2), 0.2) for v, o in zip(said, old, strict=True)]
    value = [max((v - r) ** 2, (h - r) ** 2) / 2 for v, h, r in zip(said, held, returns, strict=True)]
    assert means["policy/ratio"] == pytest.approx(sum(ratio) / 4, rel=1e-5)
    assert means["policy/loss"] == pytest.approx(-sum(min(r, max(min(r, 1.2), 0.8)) for r in ratio) / 4, rel=1e-5)
    assert means["policy/clip_frac"] == sum(r > 1.2 for r in ratio) / 4
    assert means["policy/entropy"] == pytest.approx(float(now.entropy[MASK].mean()), rel=1e-5)
    import math

    logs = [math.log(r) for r in ratio]  # k3 of old against new: exp(d) - 1 - d with d = log ratio
    assert means["policy/approx_kl"] == pytest.approx(
        sum(r - 1 - d for r, d in zip(ratio, logs, strict=True)) / 4, rel=1e-4
    )
    assert means["value/loss"] == pytest.approx(sum(value) / 4, rel=1e-5)
    assert means["value/mean"] == pytest.approx(sum(said) / 4, abs=1e-6)
    assert means["value/return"] == pytest.approx(14 / 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_kl_term_of_the_loss_by_hand(weighted, tiny_model):
    batch = replace(rollouts(), tokens=torch.tensor([[1, 4, 5, 6, 7], [0, 1, 8, 0, 0]]))
    losses = []
    for coef in (0.0, 0.5):
        module = ppo(tiny_model, kl=KLSpec(loss_coef=coef, loss_estimator="k2", loss_importance_weighted=weighted))
        module.configure_model()
        module.log_step_means = lambda batch_idx, prog_bar=False: None
        losses.append(module.training_step(batch, 0).item())
    with torch.no_grad():
        now = module.policy(batch).logprobs
    kl = 0.5 * (now - batch.ref_logprobs)[MASK].square()
    weights = (now - batch.old_logprobs)[MASK].exp() if weighted else torch.ones(4)
    assert losses[1] - losses[0] == pytest.approx(0.5 * float((weights * kl).mean()), rel=1e-4)


def test_the_other_terms_may_have_a_mean_of_their_own(tiny_model):
    """Answers of 3 and 1 tokens: by sequences the policy's loss, by tokens KL, entropy and the critic's."""
    batch = replace(rollouts(), tokens=torch.tensor([[1, 4, 5, 6, 7], [0, 1, 8, 0, 0]]))
    means = {}
    for name, reductions in {
        "sequences": ("sequence_mean", None),
        "tokens": ("token_mean", None),
        "both": ("sequence_mean", "token_mean"),
    }.items():
        kl = KLSpec(loss_coef=0.5, loss_estimator="k2")
        module = ppo(
            tiny_model,
            kl=kl,
            entropy_coef=0.1,
            value_coef=1.0,
            reduction=reductions[0],
            auxiliary_reduction=reductions[1],
        )
        module.configure_model()
        module.log_step_means = lambda batch_idx, prog_bar=False: None
        scores = module.policy(batch, with_entropy=True)
        means[name] = module.policy_terms(batch, scores) | {"all": module.training_step(batch, 0)}
    assert means["both"]["policy"] == means["sequences"]["policy"] != means["tokens"]["policy"]
    for term in ("kl", "entropy"):
        assert means["both"][term] == means["tokens"][term] != means["sequences"][term]
    policy = means["tokens"]["policy"] - means["both"]["policy"]
    torch.testing.assert_close(means["tokens"]["all"] - means["both"]["all"], policy)


def test_validation_scores_held_out_prompts(tiny_model, write_jsonl, tmp_path):
    path = prompts(write_jsonl, 3)
    module = ppo(tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer = fit(module, tmp_path, data={"train": path, "val": path, "batch_size": 3, "eval_batch_size": 2})
    metrics = trainer.callback_metrics
    assert metrics["val/kl"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["val/score"].item() == pytest.approx(metrics["val/reward_LengthReward"].item())
    assert 1 <= metrics["val/length"].item() <= 5


# ---- what trains and what does not -----------------------------------------------------------------------------------


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def moved(before, module):
    return {name.split(".")[0] for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def test_critic_warm_up_moves_the_critic_alone(tiny_model, write_jsonl, tmp_path):
    module = ppo(tiny_model, critic_warmup_steps=2, critic=CriticSpec(learning_rate=0.1))
    module.configure_model()
    before = weights(module)
    data = {"train": prompts(write_jsonl), "batch_size": 4}
    fit(module, tmp_path, data=data, max_steps=2)
    assert moved(before, module) == {"critic"}
    module = ppo(tiny_model, critic_warmup_steps=2)
    module.configure_model()
    fit(module, tmp_path, data=data, max_steps=3)
    assert moved(before, module) == {"critic", "policy"}


def test_steps_after_target_kl_are_not_taken(tiny_model, write_jsonl, tmp_path):
    taken = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            taken.append(1)
            return super().step(closure)

    def run(target_kl):
        taken.clear()
        module = ppo(
            tiny_model,
            target_kl=target_kl,
            updates=UpdateSpec(inner_epochs=4),
            optimizer=lambda params: Counting(params, lr=1.0),
        )
        trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 6})
        assert trainer.global_step == 8, "the schedule goes on"
        return len(taken)

    assert run(None) == 8
    # the first step of a rollout finds ratio 1; the second finds the policy moved, and is the last
    assert run(1e-9) == 4


def test_ptx_adds_gamma_times_the_gradient_of_sft_on_the_second_source(tiny_model):
    ids = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 0]])
    real = ids > 0
    texts = TokenBatch(ids, real, real & (ids > 1), torch.arange(4).expand(2, 4))

    def gradient(ptx_coef, totals):
        module = ppo(tiny_model, ptx_coef=ptx_coef)
        module.configure_model()
        module.log_step_means = lambda batch_idx, prog_bar=False: None
        batch = replace(rollouts(), tokens=torch.tensor([[1, 4, 5, 6, 7], [0, 1, 8, 0, 0]]), extra=texts)
        module.training_step(batch.with_totals(totals), 0).backward()
        return module.policy.head().weight.grad, module

    totals = {"tokens": 4.0, "sequences": 2.0, "extra_tokens": 10.0}
    without, module = gradient(0.0, totals)
    with_ptx, _ = gradient(0.5, totals)
    module.zero_grad()
    (-module.policy(texts).logprobs.sum() / 10.0).backward()
    torch.testing.assert_close(with_ptx - without, 0.5 * module.policy.head().weight.grad, rtol=1e-4, atol=1e-5)


def test_frozen_models_are_in_no_checkpoint_and_no_optimiser(tiny_model):
    module = ppo(tiny_model)
    module.configure_model()
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic"}
    ours = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert ours == {id(p) for p in module.parameters()}


def test_critic_starts_from_the_reward_model_on_the_scale_of_its_scores(tiny_model, tmp_path):
    reward_model = load_scalar_model(ModelSpec(path=str(tiny_model)), pooling="last", seed=3)
    reward_model.set_normalisation(0.5, 2.0)
    from rlhf_lightning.models.export import export_scalar_model
    from rlhf_lightning.models.loading import load_tokenizer

    folder = export_scalar_model(reward_model, load_tokenizer(ModelSpec(path=str(tiny_model))), tmp_path / "rm")
    module = ppo(tiny_model, critic=CriticSpec(model=ModelSpec(path=str(folder))))
    module.configure_model()
    batch = replace(rollouts(), tokens=torch.tensor([[1, 4, 5, 6, 7], [0, 1, 8, 0, 0]]))
    raw = reward_model.eval().token_values(batch.tokens, batch.attention_mask, batch.positions)
    # the value of token t was said one position before it
    torch.testing.assert_close(critic_values(module.critic, module.policy, batch)[0, 1:], (raw[0, :-1] - 0.5) / 2.0)
    from_zeros = ppo(tiny_model, critic=CriticSpec(model=ModelSpec(path=str(folder)), keep_head=False))
    from_zeros.configure_model()
    assert not from_zeros.critic.head.weight.any()


def test_policy_and_critic_are_exported(tiny_model, write_jsonl, tmp_path):
    module = ppo(tiny_model)
    fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 12})
    folder = module.export(tmp_path / "hf")
    policy = load_policy(ModelSpec(path=str(folder)))
    critic = load_scalar_model(ModelSpec(path=str(folder / "critic")))
    for ours, theirs in ((module.policy, policy), (module.critic, critic)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(value, ours.state_dict()[name], rtol=0, atol=0, msg=name)


def test_lora_uses_itself_without_adapter_as_reference(tiny_model, write_jsonl, tmp_path):
    from rlhf_lightning.models.spec import LoraSpec

    module = PPOModule(
        ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2)),
        [WeightedReward(LengthReward(target=3))],
        generation=GenerationSpec(max_new_tokens=5),
        updates=UpdateSpec(inner_epochs=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-2),
        seed=1,
    )
    trainer = fit(module, tmp_path, data={"train": prompts(write_jsonl), "batch_size": 4}, max_epochs=3)
    assert abs(trainer.callback_metrics["rollout/kl"].item()) > 1e-4
    names = {n.rsplit(".", 3)[-3] for n, p in module.policy.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}


def test_it_learns_the_length_that_is_rewarded(tiny_model, write_jsonl, tmp_path):
    module = PPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(LengthReward(target=2))],
        generation=GenerationSpec(max_new_tokens=8, num_samples=8),
        updates=UpdateSpec(inner_epochs=2),
        kl=KLSpec(control=FixedKL(0.0)),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        seed=1,
    )
    path = prompts(write_jsonl)
    scores = []
    module.log_pending = lambda: scores.append(module._pending_metrics["rollout/score"])
    fit(module, tmp_path, data={"train": path, "batch_size": 12}, max_epochs=20)
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.2


# ---- bad input -------------------------------------------------------------------------------------------------------


def fit_with_reward(tiny_model, write_jsonl, tmp_path, body: str):
    (tmp_path / "mine.py").write_text(f"def reward(prompts, completions, **columns):\n    {body}\n")
    module = PPOModule(
        ModelSpec(path=str(tiny_model)),
        [WeightedReward(PythonFunction(f"{tmp_path}/mine.py:reward"), name="mine")],
        generation=GenerationSpec(max_new_tokens=3),
    )
    fit(module, tmp_path, data={"train": prompts(write_jsonl, 2), "batch_size": 2})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [None, 1.0]", r"reward function mine returned None for sample 0 \(prompt '.*', completion '.*'\)"),
        ("return [1.0, float('nan')]", r"reward function mine returned nan for sample 1"),
        ("return [1.0]", r"reward function mine returned 1 scores for 2 samples"),
        ("raise KeyError('answer')", r"reward function mine raised KeyError: 'answer'"),
    ],
)
def test_a_bad_reward_names_the_function_and_the_sample(body, message, tiny_model, write_jsonl, tmp_path):
    with pytest.raises(UserError, match=message):
        fit_with_reward(tiny_model, write_jsonl, tmp_path, body)


def test_options_that_cannot_work_say_what_to_do(tiny_model, tiny_config, tiny_tokenizer, write_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"temperature=0 samples nothing to learn from"):
        ppo(tiny_model, generation=GenerationSpec(temperature=0.0))
    with pytest.raises(UserError, match=r"rewards is empty: name at least one"):
        PPOModule(ModelSpec(path=str(tiny_model)), [])
    with pytest.raises(
        UserError,
        match=r"credit=ReMax compares with something else.*: use GRPOModule, or credit=Gae",
    ):
        ppo(tiny_model, credit=ReMax())
    with pytest.raises(UserError, match=r"critic.model is given but critic.kind is shared"):
        CriticSpec(kind="shared", model=ModelSpec(path="x"))
    other = ModelSpec(config=tiny_config | {"vocab_size": 50}, tokenizer=str(tiny_tokenizer))
    with pytest.raises(UserError, match=r"the critic .* has 50 tokens, the policy .* has 21"):
        ppo(tiny_model, critic=CriticSpec(model=other)).configure_model()
    with pytest.raises(UserError, match=r"50.*21|21.*50"):
        ppo(tiny_model, reference=other).configure_model()
    with pytest.raises(UserError, match=r"data.pretraining is not set"):
        fit(ppo(tiny_model, ptx_coef=0.1), tmp_path, data={"train": prompts(write_jsonl)})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rows_at_once", 0),
        ("value_coef", -1.0),
        ("entropy_coef", -0.1),
        ("ptx_coef", -0.1),
        ("target_kl", 0.0),
        ("critic_warmup_steps", -1),
        ("reduction_length", 0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(option, value, tiny_model):
    with pytest.raises(ValueError, match=rf"^{option}={value}.*: give"):
        PPOModule(ModelSpec(path=str(tiny_model)), [WeightedReward(LengthReward(target=3))], **{option: value})


@pytest.mark.parametrize("option", ["reduction", "auxiliary_reduction"])
def test_a_reduction_that_there_is_not_is_none_of_the_others(option, tiny_model):
    with pytest.raises(UserError, match=rf"^{option}='mean': use one of token_mean, .*, token_sum$"):
        ppo(tiny_model, **{option: "mean"})


def test_clipping_scores_to_nothing_is_refused():
    with pytest.raises(ValueError, match=r"shaping\.clip=0\.0 leaves room for no number"):
        RewardShaping(clip=0.0)
    with pytest.raises(ValueError, match=r"shaping\.clip=\(3\.0, -1\.0\) leaves room for no number"):
        RewardShaping(clip=(3.0, -1.0))


def test_prices_and_factors_that_make_no_sense_are_refused(tiny_model):
    for name, value in (("missing_eos_factor", 1.5), ("missing_eos_penalty", -1.0), ("overlong_factor", -1.0)):
        with pytest.raises(UserError, match=rf"shaping\.{name}={value} would pay for not ending"):
            RewardShaping(**{name: value})
    with pytest.raises(UserError, match=r"kl\.bound=0\.0 would erase every KL"):
        KLSpec(bound=0.0)
    with pytest.raises(UserError, match=r"kl\.loss_max_weight=0\.5 would shrink the KL of exact tokens"):
        KLSpec(loss_max_weight=0.5)
    with pytest.raises(UserError, match=r"clip_advantages=0\.0 leaves room for no number"):
        ppo(tiny_model, clip_advantages=0.0)
    with pytest.raises(
        UserError, match=r"credited='to_come' adds .* to a number per answer, and credit=Gae gives numbers"
    ):
        ppo(tiny_model, kl=KLSpec(credited="to_come"))
    with pytest.raises(UserError, match=r"whiten_rewards scales rewards with their KL, and kl\.credited='to_come'"):
        ppo(
            tiny_model,
            credit=Centred(),
            kl=KLSpec(credited="to_come"),
            shaping=RewardShaping(whiten_rewards=True),
        )


def test_options_without_effect_are_named(tiny_model):
    kl = KLSpec(loss_estimator="k2", loss_importance_weighted=False)
    resample = Resample("best_worst", power=3.0)
    inert = dict(ppo(tiny_model, kl=kl, value_coef=0.0, resample=resample, reduction_length=9).inert_options())
    assert inert == {
        "kl.loss_estimator": "kl.loss_coef is 0",
        "kl.loss_importance_weighted": "kl.loss_coef is 0",
        "value_coef": "0 leaves the critic untrained while its values are used",
        "resample.power": "resample.by is best_worst",
        "reduction_length": "no reduction is fixed_length",
    }
    assert not dict(ppo(tiny_model).inert_options())
    kl = KLSpec(control=FixedKL(0.0), bound=10.0, credited="to_come", loss_max_weight=10.0)
    shaping = RewardShaping(missing_eos_score=-1.0, missing_eos_factor=0.5)
    inert = dict(ppo(tiny_model, credit=Centred(), kl=kl, shaping=shaping).inert_options())
    assert set(inert) == {"kl.bound", "kl.credited", "kl.loss_max_weight", "shaping.missing_eos_factor"}


def test_clipping_apart_where_nothing_is_clipped_is_refused(tiny_model, write_jsonl, tmp_path, capsys):
    options = [
        f"--model.policy.path={tiny_model}",
        "--model.critic.clip_apart=true",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    rewards = '--model.rewards=[{"reward": {"class_path": "LengthReward", "init_args": {"target": 4}}}]'
    data = f"--data.train={write_jsonl('prompts.jsonl', records('ppo'))}"
    assert main(["fit", "--model=PPOModule", *options, rewards, data]) == 2
    assert "critic.clip_apart does nothing: trainer.gradient_clip_val is not set" in capsys.readouterr().err
