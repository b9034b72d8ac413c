"""GRPO in two processes (ddp), its rollouts sampled ahead: by a copy of the policy, and by a server that both share.

Run as a script by each of them: ahead_ranks.py MODEL RECORDS URL FOLDER, with LOCAL_RANK and its kin in the
environment. The weights that each run ended with are written to FOLDER/RANK.pt, by the name of the run.
"""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from copy_engine import Lagging
from fits import fit

from rlhf_lightning.losses import SamplerCorrection
from rlhf_lightning.models.spec import ModelSpec
from rlhf_lightning.rewards.combine import WeightedReward
from rlhf_lightning.rewards.text_rules import LengthReward
from rlhf_lightning.rollout import HFGenerate, VLLMServer
from rlhf_lightning.rollout.loader import UpdateSpec
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.stages import GRPOModule


class SlowHere(VLLMServer):
    """Asks late, in the process of the second rank."""

    def generate(self, policy: Any, prompts: Any, *, seed: int) -> Any:
        time.sleep(0.3 * int(os.environ["LOCAL_RANK"]))
        return super().generate(policy, prompts, seed=seed)


def runs(model: str, records: str, url: str, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    ended = {}
    engines = {
        "lagging": (Lagging, False),
        "copy": (HFGenerate, True),
        "server": (partial(VLLMServer, url=url, patience_s=200), True),
        "slow server": (partial(SlowHere, url=url, patience_s=200), True),
    }
    for name, (engine, ahead) in engines.items():
        module = GRPOModule(
            ModelSpec(path=model),
            [WeightedReward(LengthReward(target=3))],
            generation=GenerationSpec(max_new_tokens=5, num_samples=4, keep_logprobs=True),
            updates=UpdateSpec(inner_epochs=1, async_rollouts=ahead),
            correction=SamplerCorrection(),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            engine=engine,
            seed=1,
        )
        data = {"train": records, "batch_size": 2} | (
            {"val": records} if ahead else {}
        )  # which takes weights in between
        options = {"val_check_interval": 1} if ahead else {}
        fit(module, folder, data=data, devices=2, strategy="ddp", max_epochs=2, **options)
        ended[name] = module.state_dict()
    return ended


def in_two_processes(model: str, records: str, url: str, folder: Path) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What every run ended with, in either process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, model, records, url, str(folder)]
    running = [subprocess.Popen(command, env=environment | {"LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(280) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


if __name__ == "__main__":
    *given, out = sys.argv[1:]
    torch.save(runs(*given, Path(out)), Path(out) / f"{os.environ['LOCAL_RANK']}.pt")
