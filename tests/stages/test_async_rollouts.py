"""Rollouts that are sampled while the policy is trained on the one before: by which weights, and with what weight."""

import threading
import time
from functools import partial

import ahead_ranks
import lightning as L
import pytest
import torch
from copy_engine import CopyEngine, Lagging, Own
from fake_vllm import TOKEN, FakeVLLM, serving
from fits import fit
from lightning.pytorch.plugins.precision import HalfPrecision
from one_step import records

from rlhf_lightning.advantages import ReMax
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RewardFn, RolloutEngine
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import HFContinuousBatching, HFGenerate, VLLMEngine, VLLMServer
from rlhf_lightning.rollout.frozen_copy import FrozenCopy
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.prefix import PrefixSpec
from rlhf_lightning.rollout.replay import ReplaySpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule, OnlineDPOModule, PPOModule
from rlhf_lightning.stages.grpo import DynamicSampling

STAGES = {"grpo": GRPOModule, "ppo": PPOModule}
KEEP = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True)
AHEAD = UpdateSpec(inner_epochs=2, async_rollouts=True)
TOGETHER = UpdateSpec(inner_epochs=2)
EXACT = SamplerCorrection(cap=None)


def made(stage, model, *, reward=None, lora=None, **options):
    defaults = {
        "generation": KEEP,
        "updates": AHEAD,
        "correction": EXACT,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    rewards = [WeightedReward(reward or LengthReward(target=3), name="reward")]
    return STAGES[stage](ModelSpec(path=str(model), lora=lora), rewards, **(defaults | options))


def data(write_jsonl, count=12, **columns):
    rows = [{"prompt": row["prompt"], **columns} for row in records("ppo")[:count]]
    return {"train": write_jsonl("prompts.jsonl", rows), "batch_size": 4}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "rollout ahead"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Metrics(L.Callback):
    """What every rollout's first step logged."""

    def __init__(self):
        self.rollouts = []

    def on_rollout_end(self, trainer, module, rollouts):
        self.rollouts.append(dict(module._pending_metrics))

    def all(self, name):
        return [rollout[name] for rollout in self.rollouts]


# ---- by which weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_rollout_is_one_behind_whatever_is_faster(stage, tiny_model, write_jsonl, tmp_path):
    """Bit for bit what an engine gives that lags by one rollout and knows nothing of threads."""

    def run(engine, updates, **options):
        module = made(stage, tiny_model, engine=engine, updates=updates)
        fit(module, tmp_path, data=data(write_jsonl), max_epochs=2, **options)
        return module.state_dict()

    expected = run(Lagging, TOGETHER)
    assert not same(expected, run(Own, TOGETHER)), "a lag of one rollout makes no difference here"
    for engine in (Own, partial(Own, seconds=0.1), HFGenerate):
        assert same(expected, run(engine, AHEAD))
    assert not threads()


@pytest.mark.parametrize("interval", [1, 3])
def test_a_validation_in_between_is_of_the_policy_as_it_is_and_changes_nothing(
    interval, tiny_model, write_jsonl, tmp_path
):
    class AsItIs(L.Callback):
        seen = 0

        def on_validation_batch_end(self, trainer, module, *args):
            assert same(module.engine.held["policy"].state_dict(), module.policy.state_dict())
            self.seen += 1

    runs = []
    for validated in (False, True):
        module, as_it_is = made("grpo", tiny_model, engine=partial(Own, seconds=0.02)), AsItIs()
        prompts = data(write_jsonl)
        if validated:
            prompts["val"] = prompts["train"]
        fit(
            module,
            tmp_path,
            data=prompts,
            val_check_interval=interval if validated else None,
            limit_val_batches=1,
            callbacks=[as_it_is],
        )
        assert as_it_is.seen == validated * 6 // interval
        runs.append(module.state_dict())
    assert same(*runs)


def test_the_weight_of_a_token_is_its_ratio_to_the_policy_that_sampled_it(tiny_model, write_jsonl, tmp_path):
    """By hand, from full logits of both policies; the ratio of the first minibatch is to the policy as it is, and 1."""
    checked, held = [], []

    class Remembered(Own):
        def take_weights(self, policy):
            super().take_weights(policy)
            held.append(self.held["policy"])

    class Check(L.Callback):
        def on_rollout_end(self, trainer, module, rollouts):
            older = held[max(len(checked) - 1, 0)]
            now, then = (by_hand(policy, rollouts) for policy in (module.policy, older))
            ratio = (now - then).exp()[rollouts.mask]
            torch.testing.assert_close(rollouts.weights[rollouts.mask], ratio, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rollouts.old_logprobs[rollouts.mask], now[rollouts.mask], rtol=1e-4, atol=1e-4)
            checked.append(float((ratio - 1).abs().max()))

    def by_hand(policy, rollouts):
        policy.eval()
        with torch.no_grad():
            logits = policy.causal_lm(
                input_ids=rollouts.tokens,
                attention_mask=rollouts.attention_mask.long(),
                position_ids=rollouts.positions,
                use_cache=False,
            ).logits
        said = logits[:, :-1].log_softmax(-1).gather(-1, rollouts.tokens[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(said, (1, 0))

    for stage in STAGES:
        checked.clear()
        held.clear()
        module = made(stage, tiny_model, engine=Remembered)
        fit(module, tmp_path, data=data(write_jsonl), callbacks=[Check()])
        assert checked[0] < 1e-4
        assert all(gap > 1e-2 for gap in checked[1:])
        assert len(checked) == 3


def test_two_processes_share_a_server_or_have_a_copy_each(tiny_model, write_jsonl, tmp_path, monkeypatch):
    """Weights are given when both have their answers by the old ones, whichever is late, and evaluations too."""
    monkeypatch.setenv("RLHF_VLLM_TOKEN", TOKEN)
    spec = ModelSpec(path=str(tiny_model))
    with serving(FakeVLLM(load_policy(spec), load_tokenizer(spec))) as server:
        first, second = ahead_ranks.in_two_processes(
            str(tiny_model), data(write_jsonl, 8)["train"], server.url, tmp_path
        )
    for name, ended in first.items():
        assert same(ended, second[name]), name
    assert same(first["copy"], first["lagging"])
    assert same(first["server"], first["slow server"])
    assert not same(first["server"], first["copy"])  # which draw from other seeds


def test_what_is_frozen_is_not_copied(tiny_model):
    policy = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=4)))
    engine = HFGenerate(KEEP, None).ahead()
    engine.take_weights(policy)
    pairs = list(zip(policy.parameters(), engine.policy.parameters(), strict=True))
    assert all((own is copied) != own.requires_grad for own, copied in pairs)
    with torch.no_grad():
        trained = [own for own, _ in pairs if own.requires_grad]
        for own in trained:
            own.add_(1.0)
    assert not any(torch.equal(own, copied) for own, copied in pairs if own.requires_grad)
    engine.with_spec(KEEP).take_weights(policy)
    assert all(torch.equal(own, copied) for own, copied in pairs)


# ---- when ------------------------------------------------------------------------------------------------------------


def test_sampling_and_training_wait_for_each_other_at_no_time(tiny_model, write_jsonl, tmp_path):
    """Answers come only after a step on the rollout before was taken, and that step only when they are asked for."""
    stepped, asked = threading.Event(), threading.Event()
    seen = []

    class Waiting(Own):
        def generate(self, policy, prompts, *, seed):
            if threading.current_thread() is not threading.main_thread():
                asked.set()
                assert stepped.wait(60), "no optimiser step is taken while answers are sampled"
                stepped.clear()
                seen.append("answers")
            return super().generate(policy, prompts, seed=seed)

    class Step(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if module._ahead is not None and not stepped.is_set() and "answers" not in seen[-1:]:
                assert asked.wait(60), "answers are not asked for before the policy is trained"
                asked.clear()
                stepped.set()
                seen.append("step")
            elif trainer.global_step % 2:
                seen.append("rest")

    module = made("grpo", tiny_model, engine=Waiting)
    fit(module, tmp_path, data=data(write_jsonl), callbacks=[Step()])
    assert [what for what in seen if what != "rest"] == ["step", "answers"] * 2


@pytest.mark.parametrize(
    ("trainer", "rollouts"),
    [
        ({}, 3),
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 3, "max_steps": 4}, 2),
        ({"max_epochs": -1, "max_steps": 5}, 3),
        ({"max_epochs": 2, "limit_train_batches": 3}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 2),
    ],
)
def test_nothing_is_sampled_that_nobody_trains_on(trainer, rollouts, tiny_model, write_jsonl, tmp_path):
    events, metrics = [], Metrics()
    module = made("grpo", tiny_model, engine=partial(Own, events=events))
    fit(module, tmp_path, data=data(write_jsonl), callbacks=[metrics], **trainer)
    assert events.count("generate") == rollouts
    assert metrics.all("rollout/staleness") == [0.0] + [1.0] * (rollouts - 1)
    assert metrics.all("correction/ratio")[0] == pytest.approx(1, abs=1e-5)
    assert all(abs(ratio - 1) > 1e-4 for ratio in metrics.all("correction/ratio")[1:])
    assert events[-2:] == ["rest", "close"]
    assert events.count("rest") == 1


# ---- errors ----------------------------------------------------------------------------------------------------------


class Failing(Own):
    """Fails at the second batch of prompts, after a while."""

    def generate(self, policy, prompts, *, seed):
        if "generate" in self.events:
            time.sleep(0.05)
            raise UserError("the sampler has run out of ink: buy some")
        return super().generate(policy, prompts, seed=seed)


class StopEarly(L.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        trainer.should_stop = True


@pytest.mark.parametrize("callbacks", [[], [StopEarly()]])
def test_what_the_sampler_says_is_what_the_run_says(callbacks, tiny_model, write_jsonl, tmp_path):
    """When its answers are needed, and when the run stops before."""
    module = made("grpo", tiny_model, engine=Failing)
    with pytest.raises(UserError, match="the sampler has run out of ink: buy some"):
        fit(module, tmp_path, data=data(write_jsonl), callbacks=callbacks)
    assert not threads()


def test_running_out_of_memory_in_the_background_says_what_to_set(tiny_model, write_jsonl, tmp_path):
    class Full(Own):
        def generate(self, policy, prompts, *, seed):
            if "generate" in self.events:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().generate(policy, prompts, seed=seed)

    with pytest.raises(UserError, match=r"out of memory in generation: set data.batch_size=2"):
        fit(made("grpo", tiny_model, engine=Full), tmp_path, data=data(write_jsonl))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_answers_are_on_their_way_leaves_no_thread(error, tiny_model, write_jsonl, tmp_path):
    class Broken(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert threads()
            raise error("of the training")

    module = made("grpo", tiny_model, engine=partial(Own, seconds=0.3))
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(module, tmp_path, data=data(write_jsonl), callbacks=[Broken()])
    assert not threads()


# ---- what else a rollout is made of ----------------------------------------------------------------------------------


class FirstTokenIsEven(RewardFn):
    def __call__(self, samples):
        return [float(bool(sample.tokens) and sample.tokens[0] % 2 == 0) for sample in samples]


OTHERS = {
    "dynamic sampling": {"dynamic_sampling": DynamicSampling(max_batches=3, at_least=0.5)},
    "replay": {"replay": ReplaySpec(capacity=4)},
    "prefix": {"prefix": PrefixSpec(share=0.7)},
    "remax": {"credit": ReMax()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_filters_prefixes_and_greedy_answers_go_along(name, tiny_model, write_jsonl, tmp_path):
    policies, metrics = [], Metrics()
    generation = GenerationSpec(max_new_tokens=5, num_samples=2, keep_logprobs=True)
    for seconds in (0.0, 0.05):
        module = made(
            "grpo",
            tiny_model,
            reward=FirstTokenIsEven(),
            engine=partial(Own, seconds=seconds),
            generation=generation,
            **OTHERS[name],
        )
        fit(module, tmp_path, data=data(write_jsonl, prefix="film was"), max_epochs=2, callbacks=[metrics])
        policies.append(module.state_dict())
    assert same(*policies)
    stale = metrics.all("rollout/staleness")[:6]
    assert stale[0] == 0
    if name == "dynamic sampling":  # further batches are drawn by the policy as it is
        drawn = metrics.all("sampling/batches")[:6]
        assert all(share == 1 for share, batches in zip(stale[1:], drawn[1:], strict=True) if batches == 1)
        assert any(0 < share < 1 for share in stale[1:])
    else:
        assert stale[1:] == [1.0] * 5


def test_prompts_are_those_of_a_run_without_it(tiny_model, write_jsonl, tmp_path):
    """In the same order, with the same prefixes, from epoch to epoch."""
    prompts = {}
    for updates in (TOGETHER, AHEAD):

        class Heard(L.Callback):
            def on_rollout_scored(self, trainer, module, answers, scored, here=prompts.setdefault(updates, [])):
                read = answers.attention_mask & ~answers.mask
                here.append([row[real].tolist() for row, real in zip(answers.tokens, read, strict=True)])

        module = made("grpo", tiny_model, updates=updates, prefix=PrefixSpec(share=0.5))
        fit(module, tmp_path, data=data(write_jsonl, prefix="film was"), max_epochs=2, callbacks=[Heard()])
    assert prompts[TOGETHER] == prompts[AHEAD]
    assert len(prompts[AHEAD]) == 6


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": None}, r"async_rollouts=true .* correction=null .* set correction: \{cap: 2.0\} \(TIS\)"),
        ({"generation": GenerationSpec(num_samples=2)}, r"generation.keep_logprobs is false: set it to true"),
        (
            {"correction": SamplerCorrection(weight="none", keep="token", high=3.0)},
            r"correction.weight='none' weighs none of them: set it to token or sequence",
        ),
    ],
)
def test_without_a_correction_it_is_refused(stage, options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        made(stage, tiny_model, **options)


def test_log_probabilities_of_the_sampler_leave_nothing_to_correct_by(tiny_model):
    with pytest.raises(UserError, match=r"old_logprobs='sampler' leaves correction without .* set it to recomputed"):
        made("grpo", tiny_model, old_logprobs="sampler")


def test_online_dpo_has_no_weight_for_older_answers(tiny_model):
    with pytest.raises(UserError, match=r"async_rollouts=true .* use GRPOModule or PPOModule"):
        OnlineDPOModule(ModelSpec(path=str(tiny_model)), [WeightedReward(LengthReward(target=3))], updates=AHEAD)


class Foreign(RolloutEngine):
    def __init__(self, spec, tokenizer):
        pass

    def with_spec(self, spec):
        return self

    def generate(self, policy, prompts, *, seed):
        raise AssertionError


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Foreign, r"async_rollouts=true samples while the policy is trained, and Foreign cannot: use VLLMServer"),
        (HFContinuousBatching, r"async_rollouts=true with HFContinuousBatching, .* use VLLMServer"),
        (
            partial(VLLMEngine, sleep=True),
            r"engine.sleep=true .* updates.async_rollouts=true samples then: leave one of them out",
        ),
    ],
)
def test_engines_that_cannot_are_refused(engine, message, tiny_model):
    with pytest.raises(UserError, match=message):
        made("grpo", tiny_model, engine=engine).configure_model()


def test_transformers_own_generate_is_refused(tiny_model, monkeypatch):
    static = GenerationSpec(max_new_tokens=5, num_samples=2, keep_logprobs=True, cache="static")
    with pytest.raises(UserError, match=r"generation.cache='static'.* set cache: dynamic"):
        made("grpo", tiny_model, generation=static).configure_model()
    monkeypatch.setattr("rlhf_lightning.rollout.frozen_copy.why_not", lambda policy: "its cache is made of wax")
    with pytest.raises(UserError, match=r"models of type 'llama' .*\(its cache is made of wax\).* use VLLMEngine"):
        FrozenCopy(HFGenerate(KEEP, None)).take_weights(load_policy(ModelSpec(path=str(tiny_model))))


def test_sharded_weights_are_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.rollout.frozen_copy.is_sharded", lambda policy: True)
    with pytest.raises(UserError, match=r"HFGenerate samples from a copy of the policy, .* use strategy ddp"):
        FrozenCopy(HFGenerate(KEEP, None)).take_weights(load_policy(ModelSpec(path=str(tiny_model))))


def test_a_dropout_and_vllm_in_one_process_draw_from_one_generator(tiny_model):
    engine = VLLMEngine(KEEP, None).ahead()
    policy = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(dropout=0.1)))
    with pytest.raises(UserError, match=r"VLLMEngine, .* set disable_dropout: true and lora.dropout: 0, or use VLLM"):
        engine.with_spec(KEEP).take_weights(policy)
    assert VLLMServer(KEEP, None).ahead().ahead()


def test_a_stage_that_samples_by_itself_is_refused(tiny_model):
    class Mine(GRPOModule):
        def sample(self, prompts):
            raise AssertionError

    with pytest.raises(UserError, match=r"async_rollouts=true .* Mine has a sample\(\) of its own: leave"):
        Mine(ModelSpec(path=str(tiny_model)), [WeightedReward(LengthReward(target=3))], updates=AHEAD)


def test_a_precision_that_changes_every_thread_is_refused(tiny_model, write_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"trainer.precision='bf16-true', .* use 32-true or bf16-mixed"):
        fit(made("grpo", tiny_model), tmp_path, data=data(write_jsonl), plugins=[HalfPrecision("bf16-true")])


def test_mixed_precision_holds_in_the_background_too(tiny_model, write_jsonl, tmp_path):
    runs = []
    for engine, updates in ((Lagging, TOGETHER), (HFGenerate, AHEAD)):
        module = made("grpo", tiny_model, engine=engine, updates=updates)
        fit(module, tmp_path, data=data(write_jsonl), precision="bf16-mixed")
        runs.append(module.state_dict())
    assert same(*runs)


def test_an_engine_that_says_no_log_probabilities_cannot_be_corrected(tiny_model, write_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"CopyEngine does not say the log-probabilities of its tokens"):
        fit(made("grpo", tiny_model, engine=CopyEngine), tmp_path, data=data(write_jsonl))
