"""Folders, hub ids and configs; what is refused and how it reads."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.body import agree
from rlhf_lightning.models.export import export_policy, export_scalar_model
from rlhf_lightning.models.loading import load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec


def weights(policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def test_a_config_gives_weights_named_by_the_seed_and_leaves_the_global_state_alone(tiny_config, tiny_tokenizer):
    def build(seed):
        return weights(load_policy(ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer), seed=seed)))

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = build(1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    second, other = build(1), build(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_default_device_of_the_caller_does_not_matter(tiny_config, tiny_tokenizer):
    spec = ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer))
    with torch.device("meta"):
        model, scalar = load_policy(spec), load_scalar_model(spec)
    assert not any(p.is_meta for p in model.parameters())
    assert not any(t.is_meta for t in scalar.state_dict().values())


def test_a_config_is_completed_from_the_tokenizer(tiny_config, tiny_tokenizer):
    policy = load_policy(ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer)))
    assert policy.training
    assert (policy.config.vocab_size, policy.config.pad_token_id, policy.config.eos_token_id) == (21, 0, 2)
    larger = load_policy(ModelSpec(config=tiny_config | {"vocab_size": 32}, tokenizer=str(tiny_tokenizer)))
    assert larger.head().weight.shape[0] == 32


def test_a_folder_gives_back_the_weights_it_was_given(tiny_model, tiny_config, tiny_tokenizer):
    built = load_policy(ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer)))
    read = load_policy(ModelSpec(path=str(tiny_model)))
    assert read.training
    assert all(torch.equal(a, b) for a, b in zip(weights(built), weights(read), strict=True))
    assert load_policy(ModelSpec(path=str(tiny_model), dtype="bfloat16")).head().weight.dtype == torch.bfloat16
    assert load_policy(ModelSpec(path=str(tiny_model), dtype="auto")).head().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "./nowhere"}, r"folder './nowhere' does not exist .*has the stage that writes it run"),
        ({"path": "runs/sft/hf"}, "folder 'runs/sft/hf' does not exist"),
        ({"path": "/nowhere"}, "folder '/nowhere' does not exist"),
        ({"path": "~/nowhere"}, "folder '~/nowhere' does not exist"),
        ({}, "either `path` or `config`"),
        ({"path": "a", "config": {}}, "either `path` or `config`"),
        ({"config": {"model_type": "lama"}}, "'lama' is unknown to transformers: did you mean llama"),
        ({"config": {"hidden_size": 8}}, "config.model_type=None is unknown"),
        ({"config": {"model_type": "llama", "hiden_size": 8}}, "config.hiden_size: .* did you mean hidden_size"),
        ({"config": {"model_type": "llama"}}, "no tokenizer to take it from"),
        (
            {"config": {"model_type": "llama", "vocab_size": 9, "hidden_size": "big"}},
            "cannot load a llama .*hidden_size",
        ),
        ({"config": {"model_type": "llama", "vocab_size": 9, "num_attention_heads": 7}}, "cannot load a llama .*heads"),
        ({"config": {"model_type": "llama"}, "dtype": "fp8"}, "dtype='fp8': use one of float32, bfloat16"),
        ({"config": {"model_type": "llama"}, "attn_implementation": "fast"}, "attn_implementation='fast': use one of"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        load_policy(ModelSpec(**options))


@pytest.mark.parametrize(
    ("options", "message"), [({"r": 0}, "lora.r=0: the rank"), ({"dropout": 1.0}, "lora.dropout=1.0: use a share")]
)
def test_an_adapter_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        LoraSpec(**options)


def test_one_slash_is_a_folder_if_its_parent_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(UserError, match="folder 'runs/sft' does not exist"):
        load_policy(ModelSpec(path="runs/sft"))


def test_a_hub_id_without_a_network_gives_one_readable_message(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load 'some-owner/some-model'") as caught:
        load_policy(ModelSpec(path="some-owner/some-model"))
    assert "\n" not in str(caught.value)
    assert "hf download some-owner/some-model --local-dir FOLDER" in str(caught.value)
    with pytest.raises(UserError, match=r"cannot load the tokenizer 'some-owner/some-model'.*hf download some-owner"):
        load_tokenizer(ModelSpec(path="some-owner/some-model"))


def test_flash_attention_without_its_package_says_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-lightning\[flash\]', or use attn_implementation: sdpa"):
        load_policy(ModelSpec(path=str(tiny_model), attn_implementation="flash_attention_2"))


def test_folders_that_hold_no_usable_model_are_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_policy(ModelSpec(path=str(tmp_path)))
    with pytest.raises(UserError, match="is a file"):
        load_policy(ModelSpec(path=str(tiny_model / "config.json")))
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_policy(ModelSpec(path=str(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    for load in (load_policy, load_scalar_model):
        with pytest.raises(UserError, match=r"as a pickle \(pytorch_model.bin\).*convert them to safetensors"):
            load(ModelSpec(path=str(folder)))
    (folder / "config.json").write_text("{not json")
    (folder / "model.safetensors").write_bytes(b"")
    for load in (load_policy, load_scalar_model):
        with pytest.raises(UserError, match="pickled"):
            load(ModelSpec(path=str(folder)))


def test_a_truncated_weights_file_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_model, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot load .*cut.*not fully covered"):
        load_policy(ModelSpec(path=str(folder)))


def test_code_that_comes_with_a_model_does_not_run_unasked(tiny_model, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code: true"):
        load_policy(ModelSpec(path=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_reward_model_is_not_a_policy(tiny_model, tmp_path):
    spec = ModelSpec(path=str(tiny_model))
    folder = export_scalar_model(load_scalar_model(spec), load_tokenizer(spec), tmp_path / "rm")
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, a model that scores"):
        load_policy(ModelSpec(path=str(folder)))


def test_weights_that_are_missing_are_not_drawn_at_random(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for model.norm.weight \(1 missing\)"):
        load_policy(ModelSpec(path=str(folder)))


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_config, tiny_tokenizer, tiny_model, tmp_path):
    with pytest.raises(UserError, match="has 21 tokens and a llama built from config only 10"):
        load_policy(ModelSpec(config=tiny_config | {"vocab_size": 10}, tokenizer=str(tiny_tokenizer)))
    small = export_policy(
        load_policy(ModelSpec(config=tiny_config | {"vocab_size": 10})),
        load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer))),
        tmp_path / "small",
    )
    with pytest.raises(UserError, match=r"has 21 tokens and .*small' only 10"):
        load_policy(ModelSpec(path=str(small), tokenizer=str(tiny_tokenizer)))


def test_a_family_without_sdpa_falls_back_and_says_so(lab, caplog):
    from rlhf_lightning.models.tokenizer import say_once

    say_once.cache_clear()
    asked, batch = lab.policy("gemma2", attn_implementation="eager"), lab.padded(lab.records(6))
    policy = lab.policy("gemma2")
    assert policy.config._attn_implementation == "eager"
    assert torch.equal(policy(batch).logprobs, asked(batch).logprobs)
    assert "sdpa attention does not serve this family, using eager" in caplog.text


@pytest.mark.skipif("RLHF_DATA_DIR" not in os.environ, reason="needs RLHF_DATA_DIR with models/stories260k")
def test_a_trained_model_tells_its_story_word_for_word():
    """Greedy from <s>: the text that the model's own page prints."""
    folder = Path(os.environ["RLHF_DATA_DIR"]) / "models" / "stories260k"
    spec = ModelSpec(path=str(folder))
    policy, tokenizer = load_policy(spec).eval(), load_tokenizer(spec)
    start = torch.tensor([[tokenizer.bos_token_id]])
    out = policy.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=256)
    page = (folder / "stories260K.md").read_text()
    story = page.split("-t 0.0\n")[1].split("\n```")[0]
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == story


def test_weights_of_another_shape_are_refused(tiny_model, tmp_path):
    folder = tmp_path / "reshaped"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"cannot load .*reshaped"):
        load_policy(ModelSpec(path=str(folder)))


def test_a_config_whose_sizes_do_not_fit_is_one_message():
    config = {
        "model_type": "mistral",
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,  # and the family's default of 8 heads for keys and values
    }
    with pytest.raises(UserError, match=r"a mistral built from config does not run: .*check its config"):
        load_policy(ModelSpec(config=config))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_policy, load_scalar_model):
        with pytest.raises(UserError, match=r"weights that are NaN or infinite: .*up_proj\.weight\. .*check_finite"):
            load(ModelSpec(path=str(folder)))
    unchecked = load_scalar_model(ModelSpec(path=str(folder), check_finite=False)).state_dict()
    assert not unchecked[f"backbone.{name.removeprefix('model.')}"].isfinite().all()
    policy = load_policy(ModelSpec(path=str(folder), check_finite=False, padding_free=True))
    assert not policy.state_dict()[f"model.{name}"].isfinite().all()
    policy.check_padding_free()


def test_what_is_not_finite_on_one_side_alone_does_not_agree():
    finite, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert agree(finite, finite, 1e-3)
    assert agree(broken, broken, 1e-3)
    assert not agree(finite, broken, 1e-3)
    assert not agree(broken, finite, 1e-3)
    assert not agree(finite, 1.1 * finite, 1e-3)


def test_a_head_that_is_not_finite_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    model = load_scalar_model(ModelSpec(path=str(tiny_model)))
    model.head.weight.data[0, 0] = float("nan")
    export_scalar_model(model, load_tokenizer(ModelSpec(path=str(tiny_model))), tmp_path / "scorer")
    with pytest.raises(UserError, match=r"weights that are NaN or infinite: score\.weight"):
        load_scalar_model(ModelSpec(path=str(tmp_path / "scorer")))
