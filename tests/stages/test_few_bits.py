"""Stages whose base is in 4 bits, and optimisers whose state is in 8: what they train, keep and resume."""

import importlib.util
import warnings

import lightning as L
import pytest
import torch
from one_step import records

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.losses import KTO, Distillation
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import DPOModule, GRPOModule, KTOModule, OnlineDPOModule, PPOModule, RewardModule, SFTModule
from rlhf_lightning.stages.critic import CriticSpec

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes: pip install 'rlhf-lightning[quant]'", allow_module_level=True)

QUANTIZED = {"quantization": QuantizationSpec(compute_dtype="float32"), "lora": LoraSpec(r=2)}
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "online dpo")


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def module_for(stage, model, optimizer=adamw, **spec):
    policy = ModelSpec(path=str(model), **spec)
    common = {"optimizer": optimizer, "seed": 5}
    if stage == "sft":
        return SFTModule(policy, **common)
    if stage == "reward":
        return RewardModule(policy, **common)
    if stage == "dpo":
        return DPOModule(policy, **common)
    if stage == "kto":
        return KTOModule(policy, KTO(), **common)
    rewards, generation = [WeightedReward(LengthReward(target=3))], GenerationSpec(max_new_tokens=8, num_samples=6)
    if stage == "ppo":
        return PPOModule(policy, rewards, critic=CriticSpec("shared"), generation=generation, **common)
    return {"grpo": GRPOModule, "online dpo": OnlineDPOModule}[stage](policy, rewards, generation=generation, **common)


class SaveAt(L.Callback):
    """Writes a checkpoint after one step, and what the loss was at each."""

    def __init__(self, path, step):
        self.path, self.step, self.losses = path, step, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(module, stage, write_jsonl, folder, ckpt_path=None, **trainer):
    data = RLHFDataModule(train=write_jsonl("records.jsonl", records(stage)), batch_size=4)
    save = SaveAt(folder / "first.ckpt", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "enable_progress_bar": False} | trainer
        options |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        made = L.Trainer(**options, default_root_dir=str(folder), callbacks=[save])
        made.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return save.losses


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_adapters_over_four_bits_and_resumes(stage, wide_model, write_jsonl, tmp_path):
    whole = module_for(stage, wide_model, **QUANTIZED)
    losses = fit(whole, stage, write_jsonl, tmp_path)
    assert len(losses) == 3
    resumed = module_for(stage, wide_model, **QUANTIZED)
    assert fit(resumed, stage, write_jsonl, tmp_path, str(tmp_path / "first.ckpt")) == losses[1:]
    expected = dict(whole.named_parameters())
    assert all(torch.equal(expected[name], parameter) for name, parameter in resumed.named_parameters())
    untouched = dict(module_for_start(stage, wide_model).named_parameters())
    moved = {name for name, parameter in expected.items() if not torch.equal(parameter, untouched[name])}
    assert moved == {name for name, parameter in expected.items() if parameter.requires_grad}
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert not any("base_layer" in name or "embed" in name for name in saved)
    if stage in ("dpo", "kto", "ppo", "grpo", "online dpo"):  # no second model
        assert whole.reference.shared


def test_a_teacher_in_four_bits_is_near_the_whole_one(tiny_model, wide_model, write_jsonl, tmp_path):
    few = {"quantization": QuantizationSpec(compute_dtype="float32")}
    losses = []
    for options in ({}, few):
        taught_by = ModelSpec(path=str(wide_model), **options)
        student = ModelSpec(path=str(tiny_model))
        module = SFTModule(student, Distillation(), teacher=taught_by, optimizer=adamw, seed=5)
        losses.append(fit(module, "sft", write_jsonl, tmp_path, max_steps=2))
        (tmp_path / "first.ckpt").unlink()
    whole, quantized = losses
    assert quantized != whole
    assert quantized == pytest.approx(whole, rel=0.2)


def module_for_start(stage, model):
    module = module_for(stage, model, **QUANTIZED)
    module.configure_model()
    return module


def test_the_reference_is_the_quantised_base(wide_model):
    module = module_for_start("dpo", wide_model)
    tokens = torch.arange(3, 11).view(2, 4)
    base = load_base(wide_model)
    with torch.no_grad():
        expected = base(input_ids=tokens).logits
        for name, parameter in module.policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        with module.reference.as_it_was():
            assert torch.equal(module.policy.model(input_ids=tokens).logits, expected)
        assert not torch.equal(module.policy.model(input_ids=tokens).logits, expected)


def load_base(model):
    from rlhf_lightning.models.loading import load_policy

    return load_policy(ModelSpec(path=str(model), quantization=QUANTIZED["quantization"])).eval().causal_lm


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_an_optimiser_of_bitsandbytes_resumes_with_the_same_bits(name, wide_model, write_jsonl, tmp_path):
    import bitsandbytes

    def optimizer(parameters):
        return getattr(bitsandbytes.optim, name)(parameters, lr=1e-3)

    whole = module_for("sft", wide_model, optimizer)
    losses = fit(whole, "sft", write_jsonl, tmp_path)
    resumed = module_for("sft", wide_model, optimizer)
    assert fit(resumed, "sft", write_jsonl, tmp_path, str(tmp_path / "first.ckpt")) == losses[1:]
    expected = dict(whole.named_parameters())
    assert all(torch.equal(expected[name], parameter) for name, parameter in resumed.named_parameters())
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    kinds = {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in saved.values()}
    # weights of fewer than 4096 numbers (norms) keep 32 bits
    assert kinds == ({torch.uint8, torch.float32} if "8bit" in name else {torch.float32})


# --- what is refused


@pytest.mark.parametrize("stage", STAGES)
def test_few_bits_without_adapters_train_nothing(stage, wide_model):
    with pytest.raises(UserError, match=r"weights of 4 bits cannot be trained.*give lora beside it"):
        module_for(stage, wide_model, quantization=QUANTIZED["quantization"])


def test_a_critic_in_few_bits_needs_adapters_too(wide_model):
    policy = ModelSpec(path=str(wide_model))
    critic = CriticSpec(model=ModelSpec(path=str(wide_model), quantization=QUANTIZED["quantization"]))
    module = PPOModule(policy, [WeightedReward(LengthReward(target=3))], critic=critic)
    with pytest.raises(UserError, match=r"weights of 4 bits cannot be trained"):
        module.configure_model()


def test_few_bits_are_not_sharded(wide_model, write_jsonl, tmp_path):
    with pytest.raises(UserError, match=r"strategy fsdp2 cannot share out weights that bitsandbytes has quantised"):
        fit(module_for("sft", wide_model, **QUANTIZED), "sft", write_jsonl, tmp_path, strategy="fsdp2")
