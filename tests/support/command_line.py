"""Command lines of tests, in process: `main([...])` as a shell would call it."""

import csv
from pathlib import Path

import yaml

from rlhf_lightning.__main__ import main

ALLOW = ("--allow_module", "mine")

OWN_STAGE = '''
import torch
from rlhf_lightning import ModelSpec, SFTModule


class MySFT(SFTModule):
    """A user's own stage."""

    def __init__(self, policy: ModelSpec, gain: float = 1.0, **kwargs):
        """Scales the loss.

        Args:
            policy: the model.
            gain: factor.
        """
        super().__init__(policy, **kwargs)
        self.gain = gain

    def training_step(self, batch, batch_idx):
        self.log("train/gain", self.gain)
        return super().training_step(batch, batch_idx) * self.gain

    def inert_options(self):
        yield from super().inert_options()
        if self.gain == 0.5:
            yield "gain", "a half gain is none"


class Full(SFTModule):
    """Finds no memory for more than one sequence, or where it measures none at all."""

    def training_step(self, batch, batch_idx):
        if len(batch.tokens) > 1 or self.seed == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Interrupted(SFTModule):
    def training_step(self, batch, batch_idx):
        raise KeyboardInterrupt
'''


def write(config: dict, file: str = "sft.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def fit(config: dict, *options: str) -> int:
    return main(["fit", "--config", write(config), *options])


def metrics(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
