"""Bases in 4 and 8 bits on a GPU: trained, saved there, read on the CPU."""

import copy
import importlib.util

import pytest
import torch
from on_gpu import ACCELERATOR, DEVICE, or_skip

or_skip()
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes: pip install 'rlhf-lightning[quant]'", allow_module_level=True)

import lightning as L
from fits import fit
from one_step import records
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec
from rlhf_lightning.stages import DPOModule, SFTModule

pytestmark = pytest.mark.gpu

BITS = {"nf4": QuantizationSpec(compute_dtype="float32"), "int8": QuantizationSpec(8)}
TOKENS = torch.arange(3, 11).view(2, 4)


def spec(model, bits):
    return ModelSpec(path=str(model), quantization=BITS[bits], lora=LoraSpec(r=2))


def logits(policy, device):
    with torch.no_grad():
        return policy.eval().model(input_ids=TOKENS.to(device)).logits.cpu()


@pytest.mark.parametrize("bits", BITS)
def test_logits_are_near_those_of_the_unquantised_model(bits, wide_model):
    exact = load_policy(ModelSpec(path=str(wide_model)))
    with torch.no_grad():
        expected = exact.eval().model(input_ids=TOKENS).logits
    found = logits(load_policy(spec(wide_model, bits)).to(DEVICE), DEVICE)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < (0.4 if bits == "nf4" else 0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_of_the_gpu_is_read_on_the_cpu_and_back(bits, wide_model):
    policy = load_policy(spec(wide_model, bits)).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    state = {name: value.cpu() for name, value in copy.deepcopy(policy.state_dict()).items()}
    for device in ("cpu", DEVICE):
        again = load_policy(spec(wide_model, bits)).to(device)
        again.load_state_dict(state)
        if device == DEVICE:
            assert torch.equal(logits(again, device), logits(policy, DEVICE))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_adapters_over_four_bits_learn_and_are_exported(stage, wide_model, write_jsonl, tmp_path):
    made = {"sft": SFTModule, "dpo": DPOModule}[stage]
    module = made(spec(wide_model, "nf4"), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), seed=0)
    data = {"train": write_jsonl("records.jsonl", records(stage)), "batch_size": 12}
    losses = []
    for epochs in (1, 8):
        module = made(
            spec(wide_model, "nf4"), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), seed=0
        )
        trainer = fit(module, tmp_path, data=data, max_epochs=epochs, accelerator=ACCELERATOR, precision="bf16-mixed")
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] < losses[0]
    folder = export_policy(module.policy, load_tokenizer(module.model_spec), tmp_path / "hf")
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    theirs = logits(module.policy, module.policy.head().weight.device)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


class Save(L.Callback):
    """The checkpoint after the first epoch, and the loss of every one."""

    def __init__(self, file):
        self.file, self.losses = file, []

    def on_train_epoch_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_an_optimiser_in_eight_bits_learns_and_resumes_with_the_same_bits(name, wide_model, write_jsonl, tmp_path):
    import bitsandbytes

    data = {"train": write_jsonl("records.jsonl", records("sft")), "batch_size": 12}

    def run(file, ckpt_path=None):
        optimizer = lambda parameters: getattr(bitsandbytes.optim, name)(parameters, lr=3e-3)  # noqa: E731
        module, save = SFTModule(ModelSpec(path=str(wide_model)), optimizer=optimizer, seed=0), Save(file)
        options = {"max_epochs": 4, "accelerator": ACCELERATOR, "deterministic": True, "callbacks": [save]}
        fit(module, tmp_path, data=data, ckpt_path=ckpt_path, **options)
        return save.losses, {key: value.detach().cpu() for key, value in module.named_parameters()}

    try:
        losses, expected = run(tmp_path / "first.ckpt")
        rest, resumed = run(tmp_path / "other.ckpt", ckpt_path=tmp_path / "first.ckpt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[-1] < losses[0]
    assert rest == losses[1:]
    assert not [key for key, value in expected.items() if not torch.equal(resumed[key], value)]
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    kinds = {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in saved.values()}
    assert kinds == {torch.uint8, torch.float32}, "weights of fewer than 4096 numbers keep 32 bits"
