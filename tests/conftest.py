"""A tiny tokenizer and model, built once per session; nothing is downloaded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import sys
from pathlib import Path

import pytest

SENTENCE = "the film was good bad long short great dull and but very not a plot actors end"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """Folder of a word-level tokenizer with <pad>, <bos>, <eos>, <unk> and 17 words; puts <bos> in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """A two-layer Llama of a few thousand parameters, as a transformers config."""
    return {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer, tiny_config) -> Path:
    """Hugging Face folder of a tiny random Llama with the tiny tokenizer."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_policy, load_tokenizer
    from rlhf_lightning.models.spec import ModelSpec

    spec = ModelSpec(config=tiny_config, tokenizer=str(tiny_tokenizer))
    return export_policy(load_policy(spec), load_tokenizer(spec), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory, tiny_tokenizer, tiny_config) -> Path:
    """The same with rows of 64 and 128 numbers, which 4-bit weights are made of."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_policy, load_tokenizer
    from rlhf_lightning.models.spec import ModelSpec

    config = tiny_config | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    spec = ModelSpec(config=config, tokenizer=str(tiny_tokenizer))
    return export_policy(load_policy(spec), load_tokenizer(spec), tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory, tiny_tokenizer, tiny_config) -> Path:
    """The same as a mixture of four experts, two for each token (Qwen3-MoE)."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_policy, load_tokenizer
    from rlhf_lightning.models.spec import ModelSpec

    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    spec = ModelSpec(config=tiny_config | experts, tokenizer=str(tiny_tokenizer))
    return export_policy(load_policy(spec), load_tokenizer(spec), tmp_path_factory.mktemp("models") / "experts")


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records to a JSONL file and gives its path."""

    def write(name: str, records: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What Lightning's launcher leaves in the environment of a fit that failed under a strategy of several processes."""


@pytest.fixture(autouse=True)
def alone_afterwards():
    """A test under such a strategy leaves no process group behind, and no variables for the next one to find."""
    before = {name: os.environ.get(name) for name in LAUNCHED}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
