"""The real vLLM on the CPU, beside a policy of Hugging Face: `make test-vllm` builds the environment and runs these."""

import os
import signal
from pathlib import Path

import pytest
from vllm_process import start_server

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items):
    try:
        import vllm  # noqa: F401
    except ImportError:
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm"))


@pytest.fixture(autouse=True)
def alone_afterwards():
    """An engine of a whole module keeps vLLM's process group from one test to the next."""


@pytest.fixture(scope="session")
def llama_config() -> dict:
    """A small Llama whose heads have the 32 dimensions that vLLM wants on the CPU."""
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tiny_tokenizer, llama_config):
    """Hugging Face folder of it, with the tiny tokenizer."""
    from rlhf_lightning.models.export import export_policy
    from rlhf_lightning.models.loading import load_policy, load_tokenizer
    from rlhf_lightning.models.spec import ModelSpec

    spec = ModelSpec(config=llama_config, tokenizer=str(tiny_tokenizer))
    return export_policy(load_policy(spec), load_tokenizer(spec), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tokenizer(llama):
    from rlhf_lightning.models.loading import load_tokenizer
    from rlhf_lightning.models.spec import ModelSpec

    return load_tokenizer(ModelSpec(path=str(llama)))


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Four of uneven lengths."""
    from rlhf_lightning.data.collate import collate_prompts
    from rlhf_lightning.data.encode import encode_prompt

    texts = ["the film", "a plot was very", "good", "the actors and the end was not great but"]
    ids = [encode_prompt(tokenizer, text) for text in texts]
    return collate_prompts(ids, texts, [{} for _ in texts], range(len(texts)), tokenizer.pad_token_id)


@pytest.fixture(scope="session")
def token():
    os.environ["RLHF_VLLM_TOKEN"] = "of-these-tests-only-0123456789"
    yield os.environ["RLHF_VLLM_TOKEN"]
    del os.environ["RLHF_VLLM_TOKEN"]


@pytest.fixture(scope="session")
def server(token, llama, tmp_path_factory):
    made = start_server(llama, tmp_path_factory.mktemp("server"))
    yield made
    if made.process.poll() is None:
        made.signal(signal.SIGKILL)
