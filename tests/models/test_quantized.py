"""A base in 4 or 8 bits: what is quantised, what is trained and kept, and what an export gives."""

import copy
import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from moving import moved
from transformers import AutoModelForCausalLM

from rlhf_lightning.core.batches import TokenBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.export import export_policy, export_scalar_model
from rlhf_lightning.models.loading import load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.quantized import is_quantized
from rlhf_lightning.models.reference import ReferenceSync, make_reference
from rlhf_lightning.models.spec import LoraSpec, ModelSpec, QuantizationSpec

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes: pip install 'rlhf-lightning[quant]'", allow_module_level=True)

EXACT = QuantizationSpec(compute_dtype="float32")
BITS = {"nf4": EXACT, "fp4": QuantizationSpec(4, "fp4", False, "float32"), "int8": QuantizationSpec(8)}
TOKENS = torch.arange(3, 11).view(2, 4)


@pytest.fixture
def spec(wide_model):
    return ModelSpec(path=str(wide_model), quantization=EXACT, lora=LoraSpec(r=2))


def logits(policy):
    with torch.no_grad():
        return policy.eval().model(input_ids=TOKENS).logits


@pytest.mark.parametrize("bits", BITS)
def test_linear_layers_are_quantised_and_nothing_else(bits, spec):
    policy = load_policy(replace(spec, quantization=BITS[bits]))
    kinds = {"Int8Params"} if bits == "int8" else {"Params4bit"}
    quantised = {name for name, p in policy.named_parameters() if type(p).__name__ in kinds}
    assert len(quantised) == 2 * 7  # of each layer: q, k, v, o, gate, up, down
    assert all("_proj.base_layer" in name for name in quantised)
    rest = [p for name, p in policy.named_parameters() if name not in quantised]
    assert {p.dtype for p in rest} == {torch.float32}
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_four_bits_are_what_the_paper_says(spec):
    """Levels of a block lie at its largest entry times the 16 values of nf4, the outermost -1 and 1."""
    import bitsandbytes.functional as bnb

    spec = replace(spec, quantization=replace(EXACT, double_quant=False))
    layer = load_policy(spec).causal_lm.model.layers[0].self_attn.q_proj.base_layer
    weight = layer.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 64 // 2)
    original = load_policy(ModelSpec(path=spec.path)).causal_lm.model.layers[0].self_attn.q_proj.weight
    blocks = bnb.dequantize_4bit(weight.data, weight.quant_state).view(-1, 64)
    levels = blocks / blocks.abs().amax(1, keepdim=True)
    assert all(len(block.unique()) <= 16 for block in levels)
    error = (blocks.flatten() - original.flatten()).abs().view(-1, 64).amax(1)
    widest = 1 - 0.6962  # between the two lowest levels
    assert (error <= (widest / 2 + 0.01) * original.view(-1, 64).abs().amax(1)).all()


def test_training_and_evaluating_see_the_same_weights(spec):
    """bitsandbytes repacks weights on some CPUs when they are first evaluated, and loses bits."""
    policy = moved(load_policy(spec))
    before = policy.train().model(input_ids=TOKENS).logits
    evaluated = logits(policy)
    assert torch.equal(before, evaluated)
    assert torch.equal(before, policy.train().model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_holds_what_is_trained_and_comes_back(bits, spec):
    spec = replace(spec, quantization=BITS[bits])
    policy = moved(load_policy(spec))
    state = copy.deepcopy(policy.state_dict())
    assert all("lora_" in name or name == "base_checksum" for name in state)
    again = load_policy(spec)
    assert not torch.equal(logits(again), logits(policy))
    again.load_state_dict(state)
    assert torch.equal(logits(again), logits(policy))


def test_adapters_over_another_base_are_refused(spec, tiny_tokenizer, tiny_config, tmp_path):
    config = tiny_config | {"hidden_size": 64, "intermediate_size": 128}
    plain = ModelSpec(config=config, tokenizer=str(tiny_tokenizer), seed=1)
    other = export_policy(load_policy(plain), load_tokenizer(plain), tmp_path / "other")
    policy = load_policy(ModelSpec(path=str(other), quantization=EXACT, lora=LoraSpec(r=2)))
    with pytest.raises(UserError, match="trained over another quantised base than the one that was loaded"):
        policy.load_state_dict(load_policy(spec).state_dict())


def test_an_export_has_the_logits_of_the_policy_and_the_adapter_alone(spec, tmp_path):
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    policy = moved(load_policy(spec))
    expected = logits(policy)
    folder = export_policy(policy, load_tokenizer(spec), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not is_quantized(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert "over weights in 4 bits (QLoRA). Here they are back in full precision" in (folder / "README.md").read_text()
    as_loaded = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(spec.path, quantization_config=as_loaded)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").train()  # evaluated, the CPU's weights are repacked
    torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(policy), expected)  # it can go on training


def test_a_quantised_reward_model_trains_its_head_and_exports(spec, tmp_path):
    model = moved(load_scalar_model(spec))
    on, positions = torch.ones_like(TOKENS, dtype=torch.bool), torch.arange(4).expand(2, 4)
    expected = model.eval().token_values(TOKENS, on, positions)
    assert model.head.weight.requires_grad
    state = model.state_dict()
    assert {"head.weight", "score_mean", "score_std"} <= set(state)
    again = load_scalar_model(spec)
    again.load_state_dict(state)
    assert torch.equal(again.eval().token_values(TOKENS, on, positions), expected)
    folder = export_scalar_model(model, load_tokenizer(spec), tmp_path / "reward")
    loaded = load_scalar_model(ModelSpec(path=str(folder))).eval()
    torch.testing.assert_close(loaded.token_values(TOKENS, on, positions), expected, rtol=1e-5, atol=1e-5)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_batches_run_without_padding_over_few_bits(spec):
    tokens = torch.arange(10).view(2, 5) % 20
    real = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    batch = TokenBatch(tokens, real, real & (positions > 0), positions)
    expected, free = (load_policy(replace(spec, padding_free=free))(batch).logprobs for free in (False, True))
    torch.testing.assert_close(free, expected, rtol=1e-5, atol=1e-5)


# --- what is refused


def test_bits_have_options_of_their_own():
    with pytest.raises(UserError, match=r"quantization.quant_type='fp4' is of 4 bits; with bits: 8 drop it"):
        QuantizationSpec(8, quant_type="fp4")


def test_a_new_model_has_nothing_to_quantise(tiny_config, tiny_tokenizer):
    with pytest.raises(UserError, match="frozen weights teach it nothing: give `path`"):
        load_policy(ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer), quantization=EXACT))


def test_without_the_package_the_remedy_is_named(spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"4 bits need the package bitsandbytes.*pip install 'rlhf-lightning\[quant\]'"):
        load_policy(spec)


def test_a_folder_that_was_saved_in_few_bits_is_refused(spec, tmp_path):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(spec.path, quantization_config=config).save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match=r"saved in few bits.*give the model that it was made from"):
        load_policy(ModelSpec(path=str(tmp_path / "few")))


def test_rows_that_blocks_do_not_divide_are_refused(spec, tiny_model):
    """Else half of the weights would come back from 4 bits with the scale of another block."""
    with pytest.raises(UserError, match=r"q_proj.weight has rows of 16 numbers.*use bits: 8"):
        load_policy(replace(spec, path=str(tiny_model)))
    load_policy(replace(spec, path=str(tiny_model), quantization=QuantizationSpec(8)))


def test_a_quantised_reference_cannot_follow(spec):
    with pytest.raises(UserError, match=r"reference_sync moves every weight .*, and quantised ones cannot"):
        make_reference(load_policy(spec), sync=ReferenceSync())


def test_importing_models_says_nothing():
    """bitsandbytes, imported by peft, has advice for some CPUs that concerns nobody here."""
    done = subprocess.run([sys.executable, "-c", "import rlhf_lightning.models.lora"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels-community" not in done.stderr


def test_eight_bits_compute_with_the_weight_that_was_moved(spec):
    """A move gives the weight other memory; what a layer that has run holds beside it stays where it was."""
    policy = load_policy(replace(spec, quantization=BITS["int8"]))
    expected = logits(policy)
    weights = {
        part: part._parameters.get("weight") for part in policy.modules()
    }  # peft's wrappers have none of their own
    layers = [part for part, weight in weights.items() if type(weight).__name__ == "Int8Params"]
    assert layers
    assert all(layer.weight.CB is None for layer in layers)
    for layer in layers:
        layer.state.CB.zero_()
        layer.weight.data = torch.ones_like(layer.weight)
    assert not torch.equal(logits(policy), expected)
    assert all(layer.state.CB.data_ptr() == layer.weight.data_ptr() for layer in layers)
    assert all(bool((layer.weight == 1).all()) for layer in layers)
