"""The engine of a stage: when it is given weights, when it rests, and what it may not be asked for."""

import warnings
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from copy_engine import CopyEngine
from fits import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from moving import moved
from one_step import another, records
from safetensors.torch import load_file

from rlhf_lightning.advantages import ReMax
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GKDModule, GRPOModule, OnlineDPOModule, PPOModule
from rlhf_lightning.stages.online_dpo import Opponent

STAGES = {
    "grpo": partial(GRPOModule, updates=UpdateSpec(inner_epochs=2)),
    "remax": partial(GRPOModule, credit=ReMax()),
    "ppo": partial(PPOModule, updates=UpdateSpec(inner_epochs=1, num_minibatches=2)),
    "online dpo": OnlineDPOModule,
    "gkd": lambda spec, rewards, **options: GKDModule(spec, another(spec.path), rewards=rewards, **options),
    "online dpo with an opponent": partial(OnlineDPOModule, opponent=Opponent(reference_share=0.5)),
}


def made(stage, model, **options):
    defaults = {
        "generation": GenerationSpec(max_new_tokens=5, num_samples=4),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "seed": 1,
    }
    rewards = [WeightedReward(LengthReward(target=3), name="reward")]
    return STAGES[stage](ModelSpec(path=str(model)), rewards, **(defaults | options))


def data(write_jsonl):
    prompts = write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in records("ppo")[:12]])
    return {"train": prompts, "val": prompts, "batch_size": 4}


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_with_its_own_weights_trains_as_the_policy_itself_does(stage, tiny_model, write_jsonl, tmp_path):
    """Bit for bit: whenever it is asked, it holds what the policy is."""
    policies = []
    events = []
    for options in ({}, {"engine": partial(CopyEngine, events=events)}):
        module = made(stage, tiny_model, **options)
        fit(module, tmp_path, data=data(write_jsonl), val_check_interval=2)
        policies.append(module.policy.state_dict())
    assert all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())
    start = load_policy(ModelSpec(path=str(tiny_model))).state_dict()
    assert not all(torch.equal(value, policies[0][name]) for name, value in start.items())
    assert events.count("rest") == 3
    assert events[-1] == "close"


def test_weights_are_handed_over_once_per_rollout_and_once_per_evaluation(tiny_model, write_jsonl, tmp_path):
    events = []
    module = made("grpo", tiny_model, engine=partial(CopyEngine, events=events))
    fit(module, tmp_path, data=data(write_jsonl), limit_val_batches=2)
    assert events == ["weights", "generate", "rest"] * 3 + ["weights", "generate", "generate", "close"]


def test_a_stale_engine_would_have_been_seen(tiny_model, write_jsonl, tmp_path):
    class Stale(CopyEngine):
        def take_weights(self, policy):
            if not self.held:
                super().take_weights(policy)

    policies = []
    for engine in (CopyEngine, Stale):
        module = made("grpo", tiny_model, engine=engine)
        fit(module, tmp_path, data=data(write_jsonl))
        policies.append(module.policy.state_dict())
    assert not all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())


def test_a_resumed_run_hands_its_weights_over_anew(tiny_model, write_jsonl, tmp_path):
    def run(folder, callbacks=(), **more):
        module = made("grpo", tiny_model, engine=CopyEngine)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                **options,
                accelerator="cpu",
                devices=1,
                max_epochs=2,
                callbacks=list(callbacks),
                enable_checkpointing=bool(callbacks),
                default_root_dir=str(folder),
            )
            trainer.fit(module, datamodule=RLHFDataModule(**data(write_jsonl)), **more)
        return module.policy.state_dict()

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(tmp_path / "whole", [every_step])
    for step in (3, 4):  # inside a rollout, and between two
        resumed = run(tmp_path / "resumed", ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if "engine" in key]
    assert "engine" not in saved["hyper_parameters"]


def test_the_gap_is_logged_whenever_the_engine_says_its_log_probabilities(tiny_model, write_jsonl, tmp_path):
    metrics = {}
    for says in (False, True):
        module = made("grpo", tiny_model, engine=partial(CopyEngine, says=says))
        metrics[says] = fit(module, tmp_path, data=data(write_jsonl)).callback_metrics
    assert "rollout/logprob_gap" not in metrics[False]
    assert 0 <= metrics[True]["rollout/logprob_gap"] < 1e-5


def test_a_sampler_without_entropies_is_believed_and_its_entropy_estimated(tiny_model, write_jsonl, tmp_path):
    keep = GenerationSpec(max_new_tokens=5, num_samples=64, keep_logprobs=True)
    entropies = []
    for old in ("recomputed", "sampler"):
        module = made(
            "grpo", tiny_model, engine=partial(CopyEngine, says=True), old_logprobs=old, generation=keep, credit=ReMax()
        )
        trainer = fit(module, tmp_path, data=data(write_jsonl) | {"batch_size": 12}, max_steps=1)
        entropies.append(trainer.callback_metrics["rollout/entropy"].item())
    assert entropies[1] == pytest.approx(entropies[0], abs=0.05)
    assert entropies[1] != entropies[0]


def test_a_correction_reads_what_the_engine_said(tiny_model, write_jsonl, tmp_path):
    keep = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True)
    module = made(
        "grpo", tiny_model, engine=partial(CopyEngine, says=True), generation=keep, correction=SamplerCorrection()
    )
    metrics = fit(module, tmp_path, data=data(write_jsonl)).callback_metrics
    assert metrics["correction/ratio"].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}])
def test_truncation_that_nobody_says_the_sets_of_is_refused(option, tiny_model):
    [(name, value)] = option.items()
    generation = GenerationSpec(max_new_tokens=5, num_samples=4, **option)
    module = made("grpo", tiny_model, engine=CopyEngine, generation=generation)
    with pytest.raises(UserError, match=f"generation.{name}={value}: CopyEngine does not say which tokens it kept"):
        module.configure_model()
    made("grpo", tiny_model, engine=CopyEngine, generation=generation, renormalise_truncated=False).configure_model()
    minimum = replace(generation, min_new_tokens=2, **dict.fromkeys(option, 0 if name != "top_p" else 1.0))
    made("grpo", tiny_model, engine=CopyEngine, generation=minimum).configure_model()


def test_a_share_of_the_entropies_needs_entropies(tiny_model):
    keep = GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True)
    module = made("grpo", tiny_model, engine=CopyEngine, generation=keep, old_logprobs="sampler", entropy_top_frac=0.2)
    with pytest.raises(UserError, match=r"entropy_top_frac=0.2 needs the entropy of every token, which CopyEngine"):
        module.configure_model()


# ---- what is handed over ---------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_export_with_the_adapter_added_in(tiny_model, tmp_path):
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.handover import checkpoint_weights
    from rlhf_lightning.models.loading import load_tokenizer

    for lora in (None, LoraSpec(r=4)):
        spec = ModelSpec(path=str(tiny_model), lora=lora)
        policy = load_policy(spec)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.ones_like(parameter))
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        given = dict(checkpoint_weights(policy))
        written = load_file(export_policy(policy, load_tokenizer(spec), tmp_path / str(lora)) / "model.safetensors")
        assert written.keys() == given.keys()
        for name, value in written.items():
            torch.testing.assert_close(given[name], value, rtol=0, atol=1e-6)
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert not any(given[name].requires_grad for name in given)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_head_that_is_the_embedding_is_said_to_be_it(config, tiny_model, tmp_path):
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.handover import checkpoint_weights, tied_weights
    from rlhf_lightning.models.loading import load_tokenizer

    spec = ModelSpec(config=config | {"tie_word_embeddings": True}, tokenizer=str(tiny_model))
    policy = moved(load_policy(spec))
    given, tied = dict(checkpoint_weights(policy)), tied_weights(policy)
    written = load_file(export_policy(policy, load_tokenizer(spec), tmp_path / "hf") / "model.safetensors")
    assert list(tied) == ["lm_head.weight"]
    assert given.keys() == {*written, *tied}
    assert all(torch.equal(value, written[tied.get(name, name)]) for name, value in given.items())
    assert tied_weights(load_policy(ModelSpec(path=str(tiny_model)))) == {}


def test_vllm_that_is_not_installed_is_named(tiny_model, monkeypatch):
    from rlhf_lightning.rollout import vllm_engine

    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"VLLMEngine needs vLLM, which is not installed: docs/engines.md"):
        vllm_engine.VLLMEngine(GenerationSpec(), None).take_weights(load_policy(ModelSpec(path=str(tiny_model))))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"rows_at_once": 8}, {}, "generation.rows_at_once=8 does nothing with VLLMEngine"),
        ({"cache": "static"}, {}, "generation.cache='static' does nothing with VLLMEngine"),
        (
            {"min_new_tokens": 2, "stop_strings": ["a"]},
            {},
            "generation.min_new_tokens=2 keeps vLLM from seeing stop_strings",
        ),
        ({"suppress_tokens": ["a"]}, {}, r"generation.suppress_tokens=\['a'\] is not known to vLLM's engines here"),
        ({}, {"gpu_memory_utilization": 0.0}, "engine.gpu_memory_utilization=0.0: give a share"),
        ({}, {"kv_cache_gib": -1.0}, "engine.kv_cache_gib=-1.0: give a positive number"),
    ],
)
def test_options_that_vllm_cannot_follow_are_refused(spec, options, message):
    from rlhf_lightning.rollout.vllm_engine import VLLMEngine

    with pytest.raises(UserError, match=message):
        VLLMEngine(GenerationSpec(**spec), None, **options)


def test_weights_that_are_not_whole_are_refused(tiny_model, monkeypatch):
    from rlhf_lightning.models import handover

    policy = load_policy(ModelSpec(path=str(tiny_model)))
    monkeypatch.setattr(handover, "is_sharded", lambda module: True)
    with pytest.raises(UserError, match="shares the policy's weights out"):
        handover.checkpoint_weights(policy)


def peft_policy(tiny_model, **options):
    from peft import LoraConfig

    from rlhf_lightning.models.lora import wrap
    from rlhf_lightning.models.policy import Policy

    model = load_policy(ModelSpec(path=str(tiny_model))).causal_lm
    return Policy(wrap(model, LoraConfig(**{"target_modules": ["q_proj", "down_proj"]} | options)))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"r": 2, "lora_alpha": 7}, {"rank_pattern": {"q_proj": 3}, "r": 2}]
)
def test_an_adapter_is_told_with_its_scale(options, tiny_model):
    from rlhf_lightning.models.handover import adapter_rank, adapter_weights

    policy = moved(peft_policy(tiny_model, **options))
    told = adapter_weights(policy)
    layers = {name.rpartition(".lora_")[0] for name in told}
    assert len(told) == 2 * len(layers) == 2 * 2 * policy.config.num_hidden_layers
    for layer in layers:
        wanted = policy.causal_lm.get_submodule(layer).get_delta_weight("default")
        product = told[f"{layer}.lora_B.weight"] @ told[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-6)
        assert wanted.abs().max() > 1e-3
    assert adapter_rank(told) == max([options.get("r", 8), *options.get("rank_pattern", {}).values()])
    before = {name: value.clone() for name, value in told.items()}
    moved(policy)  # what was told does not move along
    assert all(torch.equal(value, before[name]) for name, value in told.items())


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_do_more_are_refused_whichever_way_they_go(options, tiny_model):
    from rlhf_lightning.models.handover import adapter_weights, checkpoint_weights

    policy = peft_policy(tiny_model, **options)
    for hand_over in (adapter_weights, checkpoint_weights):
        with pytest.raises(
            UserError, match=r"more than a low-rank update of weights .*use plain LoRA, or the engine HF"
        ):
            hand_over(policy)


def test_adapters_that_cannot_be_sent_are_named(tiny_model):
    from rlhf_lightning.models.handover import adapter_weights

    with pytest.raises(UserError, match=r"engine.adapter='sent' .*and the policy has none: give policy.lora, or set"):
        adapter_weights(load_policy(ModelSpec(path=str(tiny_model))))
    policy = peft_policy(tiny_model, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match=r"embed_tokens is another \(Embedding\): leave it out of lora.target_modules"):
        adapter_weights(policy)
    policy = peft_policy(tiny_model)
    policy.model.merge_adapter()
    with pytest.raises(UserError, match=r"q_proj has one that is merged into the weights: set engine.adapter: merged"):
        adapter_weights(policy)


def test_the_weights_under_an_adapter_are_those_that_it_was_put_over(tiny_model):
    from rlhf_lightning.models.handover import GivenBase, checkpoint_weights

    plain = dict(checkpoint_weights(load_policy(ModelSpec(path=str(tiny_model)))))
    policy = moved(load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2))))
    under = dict(checkpoint_weights(policy, with_adapter=False))
    assert all(torch.equal(under[name], value) for name, value in plain.items())
    assert under.keys() == plain.keys()
    given = GivenBase()
    assert not given.is_of(policy)
    given.give(policy)
    moved(policy)
    assert given.is_of(policy)
    assert not given.is_of(load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2))))
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.mul_(2)
    assert not given.is_of(policy)


def test_weights_in_few_bits_are_put_back_or_refused(wide_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.handover import checkpoint_weights
    from rlhf_lightning.models.loading import load_tokenizer

    spec = ModelSpec(path=str(wide_model), lora=LoraSpec(r=2), quantization=QuantizationSpec())
    policy = moved(load_policy(spec))
    written = load_file(export_policy(policy, load_tokenizer(spec), tmp_path / "hf") / "model.safetensors")
    given = dict(checkpoint_weights(policy))
    assert written.keys() == given.keys()
    for name, value in written.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=1e-6)
    eight = load_policy(replace(spec, quantization=QuantizationSpec(8)))
    with pytest.raises(UserError, match=r"policy.quantization.bits=8 rounds the layers' inputs .*use bits: 4, leave"):
        checkpoint_weights(eight)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("VLLMEngine", {"adapter": "added"}, "engine.adapter='added': use merged or sent"),
        ("VLLMServer", {"adapter": "added"}, "engine.adapter='added': use merged or sent"),
        ("VLLMEngine", {"adapter": "sent", "sleep": True}, "engine.sleep=true drops the weights that engine.adapter"),
    ],
)
def test_ways_to_hand_an_adapter_over_that_there_are_not(engine, options, message):
    from rlhf_lightning import rollout

    with pytest.raises(UserError, match=message):
        getattr(rollout, engine)(GenerationSpec(), None, **options)


def test_ranks_have_the_room_that_vllm_has():
    from rlhf_lightning.rollout.vllm_adapters import room_for

    assert [room_for(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(
        UserError, match=r"lora.r=513: vLLM takes adapters up to rank 512: lower it, or set engine.adap"
    ):
        room_for(513)


# ---- the order of calls ----------------------------------------------------------------------------------------------


class Recorded:
    """Notes what a vLLM is told, and breaks off where it is told to."""

    def __init__(self, breaks=()):
        self.calls, self.breaks = [], breaks

    def collective_rpc(self, method, args=(), kwargs=None):
        what = method if isinstance(method, str) else method.__name__
        if what == "reload_weights":
            dict(kwargs["weights_iterator"])
        self.calls.append(what)
        if what in self.breaks:
            self.breaks = ()
            raise RuntimeError("on purpose")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def reset_prefix_cache(self, reset_running_requests):
        assert reset_running_requests
        self.calls.append("reset")


def started(monkeypatch, llm, **options):
    from rlhf_lightning.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(GenerationSpec(), None, **options)
    monkeypatch.setattr(engine._running, "_start", lambda policy, rank: setattr(engine._running, "llm", llm))
    return engine


def test_a_sleeping_engine_is_given_weights_before_its_cache_comes_back(tiny_model, monkeypatch):
    policy, llm = load_policy(ModelSpec(path=str(tiny_model))), Recorded()
    engine = started(monkeypatch, llm, sleep=True)
    engine.rest()  # nothing is started yet
    assert llm.calls == []
    engine.take_weights(policy)
    assert llm.calls == ["reload_weights", "reset"]
    for _ in range(2):
        llm.calls.clear()
        engine.rest()
        engine.rest()  # an evaluation may end where a rollout did
        engine.take_weights(policy)
        assert llm.calls == ["sleep 2", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "reset"]
    # weights that were not taken up: it is awake, nothing is answered, and it is given them again
    engine.rest()
    llm.calls.clear()
    llm.breaks = ("reload_weights",)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.take_weights(policy)
    assert not engine._running.has_weights
    engine.take_weights(policy)
    # what is awake is not woken again
    assert llm.calls == ["wake ['weights']", "reload_weights", "reload_weights", "wake ['kv_cache']", "reset"]
    assert engine._running.has_weights


def test_an_engine_without_sleep_never_rests(tiny_model, monkeypatch):
    policy, llm = load_policy(ModelSpec(path=str(tiny_model))), Recorded()
    engine = started(monkeypatch, llm)
    for _ in range(2):
        engine.take_weights(policy)
        engine.rest()
    assert llm.calls == ["reload_weights", "reset"] * 2


def test_a_base_is_handed_over_once_and_again_after_a_failure(tiny_model, monkeypatch):
    from rlhf_lightning.rollout import vllm_engine

    monkeypatch.setattr(vllm_engine, "adapter_request", lambda name, number: (name, number))
    policy, llm = load_policy(ModelSpec(path=str(tiny_model), lora=LoraSpec(r=2))), Recorded()
    engine = started(monkeypatch, llm, adapter="sent")
    for number in (1, 2):
        engine.take_weights(policy)
        assert engine._running.adapter == (f"adapter-{number}", number)
    assert llm.calls == ["reload_weights", "take_adapter", "reset", "take_adapter", "reset"]
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.mul_(2)
    llm.breaks = ("reload_weights",)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.take_weights(policy)
    llm.calls.clear()
    engine.take_weights(policy)
    assert llm.calls == ["reload_weights", "take_adapter", "reset"]


def test_out_of_memory_names_what_the_engine_heeds(tiny_model, write_jsonl, tmp_path):
    class Full(CopyEngine):
        def generate(self, policy, prompts, *, seed):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"out of memory in generation: set data.batch_size=2"):
        fit(made("grpo", tiny_model, engine=Full), tmp_path, data=data(write_jsonl))
