"""Short fits of tiny stages, without logs, bars or checkpoints."""

import warnings
from typing import Any

import lightning as L

from rlhf_lightning.data.datamodule import RLHFDataModule


def fit(
    module: L.LightningModule, folder: Any, *, data: dict[str, Any], ckpt_path: Any = None, **trainer: Any
) -> L.Trainer:
    """Train `module` on the CPU and give the trainer."""
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, **trainer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = L.Trainer(
            **options,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=str(folder),
        )
        made.fit(module, datamodule=RLHFDataModule(**data), ckpt_path=ckpt_path)
    return made
