"""What the reference says of every record, measured once and kept on disk: training holds no second model.

One file for each data set, `FOLDER/train.safetensors`, `FOLDER/val.safetensors`, ...: the log-probabilities of all
scored tokens in float32, and in its head what they were measured with. A file that was measured with other weights,
another precision or other tokens is refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.data.collate import collate_tokens
from rlhf_lightning.data.datamodule import RLHFDataModule
from rlhf_lightning.data.encode import Encoded
from rlhf_lightning.data.tokenizers import padding_id
from rlhf_lightning.models.digest import weights_digest
from rlhf_lightning.models.loading import load_policy
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.spec import ModelSpec

log = logging.getLogger(__name__)

FORMAT = "1"
"""Raised when the meaning of the files changes."""


def measure_reference(trainer: L.Trainer, spec: ModelSpec, folder: str | Path) -> None:
    """Let the batches of every data set that is read carry the reference's log-probabilities; measure what is missing.

    Called on all ranks, after the datamodule's `setup` and before any loader is made. The ranks share the work, the
    first one writes.

    Args:
        spec: the reference; of a model with an adapter the model without it.
        folder: where the files lie.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RLHFDataModule):
        raise UserError(
            f"reference_cache: {folder} is keyed by the records of an RLHFDataModule, and the trainer was given "
            f"{type(data).__name__}: leave reference_cache out"
        )
    reference: Reference | None = None
    for name in data.names:
        rows = data.rows(name)
        path = Path(folder).expanduser() / f"{name}.safetensors"
        measured_with = _measured_with(trainer, spec, rows)
        if not trainer.strategy.broadcast(path.is_file()):
            if reference is None:
                # from where it came from: on a resumed run the policy's own weights are no longer those
                reference = Reference(load_policy(replace(spec, lora=None)))
                reference.to(trainer.strategy.root_device)
            log.info(f"{name}: measuring the reference on {len(rows)} rows, for {path}")
            logprobs = _measure(trainer, reference, rows, data)
            if trainer.is_global_zero:
                _write(path, logprobs, {"measured_with": measured_with, "origin": data.origin(name)})
            trainer.strategy.barrier("reference_cache")
        logprobs = _read(path, measured_with, data.origin(name))
        lengths = [int(row.scored.sum()) for row in rows]
        data.attach_reference(name, np.split(logprobs, np.cumsum(lengths)[:-1]))


def _measured_with(trainer: L.Trainer, spec: ModelSpec, rows: Sequence[Encoded]) -> dict[str, str]:
    """Everything that decides the numbers."""
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(len(row.ids).to_bytes(8, "little"))
        tokens.update(np.asarray(row.ids, np.int32).tobytes())
        tokens.update(np.packbits(row.scored).tobytes())
    return {
        "format": FORMAT,
        "weights": weights_digest(spec),
        "dtype": spec.dtype,
        "precision": str(trainer.precision),
        **({} if spec.quantization is None else {"quantization": str(spec.quantization)}),
        "tokens": tokens.hexdigest()[:32],
    }


@torch.no_grad()
def _measure(trainer: L.Trainer, reference: Reference, rows: Sequence[Encoded], data: RLHFDataModule) -> Tensor:
    """Log-probabilities of all scored tokens, row after row [tokens]; every rank measures its share."""
    starts = np.concatenate([[0], np.cumsum([int(row.scored.sum()) for row in rows])])
    device = trainer.strategy.root_device
    logprobs = torch.zeros(int(starts[-1]), device=device)
    batch_size = data.options["eval_batch_size"] or data.options["batch_size"]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    parts = [by_length[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    for part in parts[trainer.global_rank :: trainer.world_size]:
        batch = collate_tokens([rows[i] for i in part], padding_id(data.tokenizer)).to(device)
        with trainer.precision_plugin.forward_context():
            scores = reference(batch).logprobs.float()
        places = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part]))
        logprobs[places.to(device)] = scores[batch.mask]
    if trainer.world_size > 1:
        torch.distributed.all_reduce(logprobs)
    return logprobs.cpu()


def _write(path: Path, logprobs: Tensor, head: Mapping[str, Any]) -> None:
    """The file, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({"logprobs": logprobs}, partial, {name: json.dumps(value) for name, value in head.items()})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, measured_with: Mapping[str, str], origin: Mapping[str, str]) -> np.ndarray:
    """What the file holds, if it was measured with just this."""
    try:
        with safe_open(path, "np") as file:
            head = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            then = head["measured_with"]
            if then != measured_with:
                changes = _changes(then, measured_with, head["origin"], origin)
                raise UserError(
                    f"reference_cache: {path} was measured with something else: {'; '.join(changes)}. Delete the file "
                    "(it is measured anew) or give reference_cache another folder"
                )
            return file.get_tensor("logprobs")
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"reference_cache: {path} cannot be read ({error}): delete it, and it is measured anew"
        ) from error


def _changes(
    then: Mapping[str, str], now: Mapping[str, str], origin_then: Mapping[str, str], origin: Mapping[str, str]
) -> list[str]:
    """What is different, in words."""
    changes = []
    if then["weights"] != now["weights"]:
        changes.append(f"the reference's weights were {then['weights'][:8]}... and are {now['weights'][:8]}...")
    for name in ("dtype", "precision", "format"):
        if then[name] != now[name]:
            changes.append(f"{name} was {then[name]} and is {now[name]}")
    if then["tokens"] != now["tokens"]:
        of_options = [
            f"{name} was {_short(origin_then.get(name))} and is {_short(value)}"
            for name, value in origin.items()
            if origin_then.get(name) != value
        ]
        changes += of_options or ["the records of its sources have changed, or their order"]
    return changes


def _short(text: str | None, length: int = 60) -> str:
    shown = repr(text) if text is None or "\n" in text or " " in text else text
    return shown if len(shown) <= length else shown[: length - 3] + "..."
