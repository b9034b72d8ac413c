"""Checkpoints in which more is pickled than tensors and numbers: refused at every door, never run."""

import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from lightning.fabric.utilities.load import _lazy_load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from rlhf_lightning import ModelSpec, RLHFDataModule, SFTModule
from rlhf_lightning.__main__ import main
from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO, Entry, _digest, _write_manifest
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.parallel.sharded_checkpoint import check_sharded


def write(config: dict, file: str = "fit.yaml") -> str:
    Path(file).write_text(yaml.safe_dump(config, sort_keys=False))
    return file


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self.mark,)


KINDS = ("zip", "pickle", "old torch file")


def plant(path: Path, mark: Path, kind: str = "zip", extra: dict[str, Any] | None = None) -> Path:
    """A checkpoint with a bomb."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"global_step": 1, "state_dict": {}, **(extra or {}), "bomb": Bomb(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def vouch_for(path: Path) -> None:
    """Whoever can write a checkpoint can write its manifest: that is no proof of who wrote it."""
    size, sha256 = _digest(path)
    _write_manifest(path, [Entry(size, sha256, 1, True, "", 0.0)])


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_not_read_whatever_they_look_like(config, mark, works, kind):
    path = plant(Path("evil.ckpt"), mark, kind)
    for asked in (None, True, False):
        with pytest.raises(UserError, match=r"evil\.ckpt"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)
    vouch_for(path)
    with pytest.raises(UserError, match="more than weights and numbers"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists()
    works(lambda: torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes()))


DOORS = {
    "resume from a path": ["fit", "--resume", "evil.ckpt"],
    "fit from a path": ["fit", "--ckpt_path", "evil.ckpt"],
    "fit, asked to trust it": ["fit", "--ckpt_path", "evil.ckpt", "--weights_only", "false"],
    "validate": ["validate", "--ckpt_path", "evil.ckpt", "--data.val", "train.jsonl"],
    "test": ["test", "--ckpt_path", "evil.ckpt", "--data.test", "train.jsonl"],
    "predict": ["predict", "--ckpt_path", "evil.ckpt"],
    "generate": ["generate", "--ckpt_path", "evil.ckpt", "--prompt", "the film"],
    "export": ["export", "--ckpt_path", "evil.ckpt"],
    "another reader": ["fit", "--ckpt_path", "evil.ckpt", "--trainer.plugins", "TorchCheckpointIO"],
}


@pytest.mark.parametrize("door", DOORS)
def test_no_subcommand_reads_a_pickle(config, mark, refused, works, door):
    vouch_for(plant(Path("evil.ckpt"), mark))
    command, *options = DOORS[door]
    said = refused(command, "--config", write(config), *options)
    assert "evil.ckpt holds more than weights and numbers" in said
    works(lambda: torch.load("evil.ckpt", weights_only=False))


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_nobody_is_asked_to_trust_a_checkpoint(config, refused, subcommand):
    said = refused(subcommand, "--config", write(config), "--weights_only", "false")
    assert "--weights_only=false would run code from a checkpoint" in said


def test_what_lies_in_a_run_folder_is_no_more_trusted_than_the_rest(config, mark, refused, works):
    for name in ("checkpoints/last.ckpt", "hpc_ckpt_1.ckpt"):
        path = plant(Path("run") / name, mark, extra={"optimizer_states": []})
        vouch_for(path)
        assert f"{name} holds more than" in refused("fit", "--config", write(config), "--resume", "auto")
        for subcommand in ("validate", "export"):
            if name.startswith("checkpoints"):
                refused(subcommand, "--config", "fit.yaml", "--ckpt_path", "last")
        works(lambda path=path: torch.load(path, weights_only=False))
        shutil.rmtree("run")


def test_lightnings_lazy_reader_would_have_run_it(config, mark, refused, works):
    # FSDPStrategy reads single files by it: the door must hold, for that reader does not
    path = plant(Path("evil.ckpt"), mark)
    said = refused("fit", "--config", write(config), "--ckpt_path", str(path), "--trainer.strategy", "fsdp")
    assert "evil.ckpt holds more than weights and numbers" in said
    works(lambda: _lazy_load(path))


def test_a_chain_does_not_go_on_from_a_pickle(config, mark):
    chain = {"run_dir": "runs/c", "stages": {"sft": {"config": write(config)}}}
    write(chain, "chain.yaml")
    assert main(["chain", "--config", "chain.yaml"]) == 0
    Path("runs/c/sft/finished.json").unlink()
    vouch_for(plant(Path("runs/c/sft/checkpoints/last.ckpt"), mark, extra={"optimizer_states": []}))
    Path("runs/c/sft/checkpoints/last.previous.ckpt").unlink(missing_ok=True)
    assert main(["chain", "--config", "chain.yaml"]) == 2
    assert not mark.exists()


def test_a_checkpoint_of_ours_passes_every_door(config):
    assert main(["fit", "--config", write(config)]) == 0
    last = "run/checkpoints/last.ckpt"
    assert main(["fit", "--config", "fit.yaml", "--resume", last, "--trainer.max_epochs", "2"]) == 0
    assert main(["validate", "--config", "fit.yaml", "--ckpt_path", last, "--data.val", "train.jsonl"]) == 0
    assert main(["export", "--config", "fit.yaml", "--ckpt_path", last, "--folder", "out"]) == 0


# --- sharded


@pytest.fixture
def sharded(config) -> Path:
    """A DCP folder of a small model, its optimiser and some plain values."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(Path("sharded"), {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": 3})
    torch.save({"global_step": 3}, "sharded/meta.pt")
    return Path("sharded")


def save(folder: Path, content: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is only one process
        dcp.save(content, checkpoint_id=folder)


def load(folder: Path, content: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(content, checkpoint_id=folder)


def test_a_sharded_checkpoint_of_torch_is_readable(sharded):
    check_sharded(sharded)


def test_metadata_with_code_is_refused(sharded, config, mark, refused, works):
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = Bomb(mark)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    for args in (["validate", "--data.val", "train.jsonl"], ["fit"], ["export"], ["generate", "--prompt", "film"]):
        said = refused(args[0], "--config", write(config), *args[1:], "--ckpt_path", str(sharded))
        assert "sharded" in said
    with pytest.raises(UserError, match=r"metadata holds more than weights and numbers.*posix.mknod"):
        check_sharded(sharded)
    works(lambda: load(sharded, {"steps": 0}))


def test_a_value_with_code_is_refused(sharded, mark, works):
    shutil.rmtree(sharded)
    save(sharded, {"weight": torch.ones(2), "steps": Bomb(mark)})
    mark.unlink(missing_ok=True)  # torch copies what it saves
    with pytest.raises(UserError, match=r"distcp holds more than weights and numbers"):
        check_sharded(sharded)
    assert not mark.exists()
    works(lambda: load(sharded, {"steps": 0}))


def test_a_tensor_that_is_declared_a_value_is_read_as_one(sharded, mark, works):
    shutil.rmtree(sharded)
    save(sharded, {"weight": Bomb(mark), "other": torch.ones(2)})
    mark.unlink(missing_ok=True)
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    assert isinstance(metadata.state_dict_metadata["weight"], BytesStorageMetadata)
    with pytest.raises(UserError, match="more than weights and numbers"):
        check_sharded(sharded)
    assert not mark.exists()
    works(lambda: load(sharded, {"weight": torch.ones(2)}))


def test_lightnings_part_with_code_is_refused(sharded, mark, works):
    torch.save({"global_step": 3, "bomb": Bomb(mark)}, sharded / "meta.pt")
    with pytest.raises(UserError, match=r"meta\.pt holds more than weights and numbers"):
        check_sharded(sharded)
    assert not mark.exists()
    works(lambda: torch.load(sharded / "meta.pt", weights_only=False))


def test_shards_lie_in_the_folder_and_are_not_packed(sharded):
    whole = (sharded / ".metadata").read_bytes()
    for field, value, said in (
        ("relative_path", "../elsewhere.distcp", "outside of the checkpoint"),
        ("transform_descriptors", ["zstd"], "packed form"),
    ):
        metadata = pickle.loads(whole)
        for place in metadata.storage_data.values():
            object.__setattr__(place, field, value)
        (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UserError, match=said):
            check_sharded(sharded)
    (sharded / ".metadata").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not read"):
        check_sharded(sharded)
    (sharded / ".metadata").unlink()
    with pytest.raises(UserError, match=r"holds no \.metadata"):
        check_sharded(sharded)


def test_from_python_too_a_sharded_checkpoint_is_looked_through_first(sharded, mark, tiny_model):
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data = Bomb(mark)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    read = trainer.strategy.load_checkpoint
    for _ in range(2):
        with pytest.raises(UserError, match=r"metadata holds more than weights and numbers"):
            trainer.fit(SFTModule(ModelSpec(path=str(tiny_model))), RLHFDataModule("train.jsonl"), ckpt_path=sharded)
    assert not mark.exists()
    assert trainer.strategy.load_checkpoint.is_guarded
    assert not hasattr(read, "is_guarded"), "the guard is what was seen to refuse"
