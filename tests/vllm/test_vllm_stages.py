"""GRPO by the real vLLM, and answers that end with a string."""

import csv
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.__main__ import main
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout import GenerationSpec, VLLMEngine

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def walks(tmp_path, monkeypatch):
    """Material and a walker that was imitating for a few steps, in the working directory."""
    from rlhf_lightning.tasks.walks import MakeWalks

    monkeypatch.chdir(REPOSITORY)
    MakeWalks(str(tmp_path / "material"), num_walks=1000, num_prompts=480, seed=1).run()
    material = tmp_path / "material"
    options = {
        "trainer.default_root_dir": tmp_path / "sft",
        "trainer.max_steps": 120,
        "trainer.enable_progress_bar": False,
        "model.init_args.policy.tokenizer": material / "tokenizer",
        "data.train": material / "sft.jsonl",
    }
    assert main(["fit", "--config", "configs/random_walks/sft.yaml", *(f"--{k}={v}" for k, v in options.items())]) == 0
    return tmp_path


def metrics(folder: Path) -> dict[str, list[float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0]}


def test_grpo_learns_to_walk_and_its_log_probabilities_are_the_engines(walks):
    options = {
        "trainer.default_root_dir": walks / "grpo",
        "trainer.enable_progress_bar": False,
        "model.init_args.policy.path": walks / "sft" / "hf",
        "model.engine": "configs/engines/vllm.yaml",
        "data.train": walks / "material" / "prompts.jsonl",
    }
    args = ["fit", "--config", "configs/random_walks/grpo.yaml", *(f"--{k}={v}" for k, v in options.items())]
    assert main(args) == 0
    logged = metrics(walks / "grpo")
    scores = logged["reward/optimality"]
    assert len(scores) == 30
    print("optimality", json.dumps(scores))
    assert sum(scores[:3]) / 3 < 0.7
    assert sum(scores[-3:]) / 3 > 0.8
    assert max(logged["rollout/logprob_gap"]) < 1e-3
    assert (walks / "grpo" / "hf" / "model.safetensors").is_file()
    assert not torch.distributed.is_initialized()


def test_a_stop_string_ends_an_answer_and_stays_in_it(llama_config, tmp_path):
    letters = {letter: i for i, letter in enumerate(["<eos>", *"abcdefgh"])}
    characters = Tokenizer(BPE(letters, merges=[]))
    characters.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<eos>").save_pretrained(tmp_path)
    spec = ModelSpec(config=llama_config, tokenizer=str(tmp_path))
    policy, tokenizer = load_policy(spec), load_tokenizer(spec)
    prompts = collate_prompts([[1, 2]], ["ab"], [{}], range(1), tokenizer.pad_token_id)
    generation = GenerationSpec(max_new_tokens=12, num_samples=800, stop_strings=["gh"])
    engine = VLLMEngine(generation, tokenizer)
    engine.take_weights(policy)
    try:
        answers = engine.generate(policy, prompts, seed=1)
    finally:
        engine.close()
    stopped = 0
    for row, mask, finished in zip(answers.tokens, answers.mask, answers.finished, strict=True):
        ids = row[mask].tolist()
        text = "".join(tokenizer.convert_ids_to_tokens(ids))
        assert "gh" not in text[:-1]
        assert bool(finished) == (text.endswith("gh") or ids[-1] == tokenizer.eos_token_id)
        stopped += text.endswith("gh")
    assert stopped > 5
