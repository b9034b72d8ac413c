"""An export is a plain Hugging Face folder: transformers loads it and gives the same logits."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.models.export import ModelCard, export_policy, export_scalar_model
from rlhf_lightning.models.loading import HEAD_FILE, load_policy, load_scalar_model, load_tokenizer
from rlhf_lightning.models.spec import LoraSpec, ModelSpec

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(ModelSpec(tokenizer=str(tiny_tokenizer), chat_template="{{ messages[0].content }}"))


def trained(model):
    """`model` after a step: every trainable weight a little off, so that adapters do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("given_weights", [False, True], ids=["own weights", "gathered weights"])
@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
def test_a_policy_comes_back_with_equal_logits(lab, family, lora, given_weights, tokenizer, tmp_path):
    policy, tokens = trained(lab.policy(family, lora=lora)).eval(), torch.stack(lab.records(6, 6))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = policy.model(input_ids=tokens).logits
    weights = before if given_weights else None
    if given_weights:
        with torch.no_grad():  # as if the modules held shards only
            for parameter in policy.parameters():
                parameter.zero_()
    folder = export_policy(policy, tokenizer, tmp_path / "hf", state_dict=weights)
    # named, since older transformers run Gemma 2 on sdpa, without its cap
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=policy.config._attn_implementation)
    torch.testing.assert_close(model(tokens).logits, expected, **EXACT)
    assert not any("lora" in name for name in model.state_dict())
    assert (folder / "adapter").is_dir() == policy.has_adapter
    if policy.has_adapter:  # alone too, with the weights that were given
        alone = load_file(folder / "adapter" / "adapter_model.safetensors")
        wanted = {name.removeprefix("model."): value for name, value in before.items() if "lora_" in name}
        assert len(alone) == len(wanted)
        assert all(torch.equal(alone[name.replace(".default.", ".")], value) for name, value in wanted.items())
    tied = policy.config.tie_word_embeddings  # stays so: one matrix in the file and in memory
    assert model.config.tie_word_embeddings == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert policy.has_adapter == (lora is not None)  # the policy itself can go on training
    if not given_weights:
        assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_what_a_folder_holds(lab, tokenizer, tmp_path):
    card = ModelCard("A title", "PPOModule", "model: {a: 1}", {"val/loss": 1.25}, "owner/base")
    folder = export_policy(lab.policy("llama"), tokenizer, tmp_path / "a" / "hf", card=card)
    assert folder == tmp_path / "a" / "hf"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "chat_template.jinja", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert [file.name for file in folder.parent.iterdir()] == ["hf"]  # no temporary folder is left
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("the film").input_ids == tokenizer("the film").input_ids
    assert loaded.apply_chat_template([{"role": "user", "content": "good"}], tokenize=False) == "good"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 0, 1)
    readme = (folder / "README.md").read_text()
    for part in ("# A title", "`PPOModule`", "model: {a: 1}", "| val/loss | 1.25 |", "base_model: owner/base"):
        assert part in readme


def test_a_generation_config_that_transformers_would_not_save_is_mended(lab, tokenizer, tmp_path):
    policy = lab.policy("llama")
    policy.model.generation_config.temperature = 0.6  # as published with some models, without do_sample
    folder = export_policy(policy, tokenizer, tmp_path / "hf")
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6
    assert GenerationConfig.from_pretrained(folder).do_sample
    assert policy.model.generation_config.do_sample is not True


def test_a_card_names_no_local_folder_as_hub_id(lab, tokenizer, tmp_path):
    folder = export_policy(lab.policy("llama"), tokenizer, tmp_path / "hf", card=ModelCard(base_model=str(tmp_path)))
    assert "base_model:" not in (folder / "README.md").read_text()


def test_the_config_of_dropout_and_attention_stays_the_files_own(lab, tokenizer, tmp_path):
    folder = export_policy(lab.policy("llama", attn_implementation="eager"), tokenizer, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_dropout"] == 0.5
    assert "eager" not in json.dumps(config)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("given_weights", [False, True], ids=["own weights", "gathered weights"])
def test_a_scalar_model_comes_back_with_equal_scores(lab, family, lora, given_weights, tokenizer, tmp_path):
    spec = ModelSpec(config={"model_type": family, **lab.configs[family]}, lora=lora)
    model = trained(load_scalar_model(spec, pooling="mean", seed=3)).eval()
    model.set_normalisation(0.25, 2.0)
    batch = lab.padded([row.clamp(min=3) for row in lab.records(6, 4)])
    expected = model(batch)
    values = model.token_values(batch.tokens, batch.attention_mask, batch.positions)
    weights = {name: value.clone() for name, value in model.state_dict().items()} if given_weights else None
    if given_weights:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    folder = export_scalar_model(model, tokenizer, tmp_path / "rm", state_dict=weights)
    back = load_scalar_model(ModelSpec(path=str(folder)))
    assert (back.pooling, back.score_mean.item(), back.score_std.item()) == ("mean", 0.25, 2.0)
    torch.testing.assert_close(back(batch), expected, **EXACT)

    if type(model.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        assert family not in ("granite", "cohere")
        attention = model.config._attn_implementation
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
        logits = classifier(batch.tokens, attention_mask=batch.attention_mask.long()).logits
        torch.testing.assert_close(logits[:, 0], values[[0, 1], [5, 3]], **EXACT)
        assert not (folder / HEAD_FILE).exists()
    else:
        assert family in ("granite", "cohere")
        assert HEAD_FILE in (folder / "README.md").read_text()
    assert model.config.num_labels == 2  # transformers' default: exporting leaves the model's config as it was
    assert not hasattr(model.config, "score_mean")


def test_a_scalar_export_says_what_transformers_would_not(lab, tokenizer, tmp_path):
    def readme(pooling):
        model = load_scalar_model(ModelSpec(config={"model_type": "llama", **lab.configs["llama"]}), pooling=pooling)
        return (export_scalar_model(model, tokenizer, tmp_path / pooling) / "README.md").read_text()

    assert "trained on the mean over the completion" in readme("mean")
    assert "one token too early" not in readme("last")
    tokenizer.pad_token = tokenizer.eos_token
    assert "one token too early" in readme("last")
    # what transformers' class goes by is the tokenizer's, not what the base model's config said (0)
    assert json.loads((tmp_path / "last" / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id == 2


def test_a_model_of_others_with_a_scalar_head_is_read(lab, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen2", **lab.configs["qwen2"], num_labels=1)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    batch = lab.padded([row.clamp(min=3) for row in lab.records(6, 4)], "left")
    model = load_scalar_model(ModelSpec(path=str(tmp_path)))
    expected = classifier(batch.tokens, attention_mask=batch.attention_mask, position_ids=batch.positions).logits[:, 0]
    assert model.pooling == "last"
    torch.testing.assert_close(model(batch), expected, **EXACT)


def test_an_export_replaces_the_last_one_but_nothing_else(lab, tokenizer, tmp_path):
    target = tmp_path / "hf"
    first, second = lab.policy("llama"), trained(lab.policy("llama"))
    export_policy(first, tokenizer, target)
    (target / "left over").write_text("")
    export_policy(second, tokenizer, target)
    assert not (target / "left over").exists()
    assert torch.equal(load_policy(ModelSpec(path=str(target))).head().weight, second.head().weight)

    other = tmp_path / "run"
    other.mkdir()
    (other / "metrics.csv").write_text("x")
    with pytest.raises(UserError, match=r"holds other things than a model \(metrics.csv\)"):
        export_policy(first, tokenizer, other)
    assert (other / "metrics.csv").read_text() == "x"
    with pytest.raises(UserError, match="it is a file"):
        export_policy(first, tokenizer, other / "metrics.csv")


def test_a_failed_export_leaves_the_last_one_and_no_rubbish(lab, tokenizer, tmp_path, monkeypatch):
    target = export_policy(lab.policy("llama"), tokenizer, tmp_path / "hf")
    content = {file.name: file.read_bytes() for file in target.iterdir()}
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_policy(trained(lab.policy("llama")), tokenizer, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == content
    assert list(tmp_path.iterdir()) == [target]


def test_half_precision_is_exported_as_such(lab, tokenizer, tmp_path):
    folder = export_policy(lab.policy("llama", dtype="bfloat16"), tokenizer, tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert json.loads((Path(folder) / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_said_while_exporting(lab, tokenizer, tmp_path, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        export_policy(lab.policy("llama", lora=LoraSpec(r=2)), tokenizer, tmp_path / "hf")
    assert not caplog.text
    assert not "".join(capfd.readouterr())
