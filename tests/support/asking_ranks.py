"""Two processes that train on the same weights and share a vLLM server.

Run as a script by each of them: asking_ranks.py RANK STORE URL MODEL FOLDER. What it was answered, and how it ended, is
written to FOLDER/RANK.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_server import VLLMServer


def ask(rank: int, store: str, url: str, model: str) -> dict:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    spec = ModelSpec(path=model)
    policy, tokenizer = load_policy(spec), load_tokenizer(spec)
    engine = VLLMServer(GenerationSpec(max_new_tokens=4, temperature=0.0), tokenizer, url=url, retries=0)
    prompts = collate_prompts([[1, 4 + rank]], [""], [{}], range(1), tokenizer.pad_token_id)
    answered = []
    try:
        for _ in range(3):
            engine.take_weights(policy)
            answered.append(engine.generate(policy, prompts, seed=rank).tokens[0].tolist())
    except UserError as error:
        return {"answered": answered, "error": str(error)}
    return {"answered": answered}


def in_two_processes(url: str, model: str, folder: Path) -> list[dict]:
    """What each was answered."""
    words = [str(folder / "store"), url, model, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, __file__, str(rank), *words], env=environment) for rank in range(2)]
    assert [process.wait(280) for process in running] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


if __name__ == "__main__":
    own_rank, *rest, out = sys.argv[1:]
    (Path(out) / f"{own_rank}.json").write_text(json.dumps(ask(int(own_rank), *rest)))
