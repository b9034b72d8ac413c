import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from rlhf_lightning.callbacks import AtomicCheckpointIO, LastCheckpoint, atomic_checkpoint
from rlhf_lightning.callbacks.atomic_checkpoint import damage, entries_of, newest_first, read_checkpoint
from rlhf_lightning.core.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_faults
from bench_faults import kill_saves


def state(step: int, size: int = 1000) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}, "optimizer_states": []}


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


def test_a_checkpoint_comes_with_a_manifest_and_the_one_before(io, tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    io.save_checkpoint(state(1), path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.json"]
    io.save_checkpoint(state(2) | {"hyper_parameters": {"lr": 1.0}}, path)
    [entry] = entries_of(path)
    assert (entry.size, entry.step, entry.resumable) == (path.stat().st_size, 2, True)
    assert entry.options != entries_of(path.with_name("last.previous.ckpt"))[0].options
    assert read_checkpoint(path)["global_step"] == 2
    assert read_checkpoint(path.with_name("last.previous.ckpt"))["global_step"] == 1
    assert len(list(path.parent.iterdir())) == 4  # nothing else is left
    assert [file.name for file, _ in newest_first(path.parent)] == ["last.ckpt", "last.previous.ckpt"]


def test_the_previous_one_can_be_done_without_and_goes_with_its_manifest(tmp_path):
    io = AtomicCheckpointIO(keep_previous=False)
    for step in (1, 2):
        io.save_checkpoint(state(step), tmp_path / "last.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]
    io.remove_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_weights_alone_and_broken_files_are_no_place_to_go_on_from(io, tmp_path):
    io.save_checkpoint({"global_step": 9, "state_dict": {}}, tmp_path / "best.ckpt")
    io.save_checkpoint(state(3), tmp_path / "step3.ckpt")
    io.save_checkpoint(state(4), tmp_path / "step4.ckpt")
    (tmp_path / "step4.ckpt").write_bytes(b"")
    torch.save(state(1), tmp_path / "last.ckpt")  # by another CheckpointIO
    found = [(file.name, reason is None) for file, reason in newest_first(tmp_path)]
    assert found == [("step4.ckpt", False), ("step3.ckpt", True), ("last.ckpt", True)]


# --- damage


@pytest.mark.parametrize("kind", ["truncated", "bit flipped", "emptied", "other content of the same size"])
def test_every_corruption_is_found_and_refused(io, tmp_path, kind):
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(25):
        at = draw.randrange(len(whole))
        broken = bytearray(whole)
        broken[at] ^= 1 << draw.randrange(8)
        content = {"truncated": whole[:at], "bit flipped": broken, "emptied": b""}
        path.write_bytes(content.get(kind, whole[:at] + draw.randbytes(len(whole) - at)))
        assert damage(path).startswith("is damaged"), at
    with pytest.raises(UserError, match=r"last\.ckpt is damaged.*--resume auto takes the newest"):
        io.load_checkpoint(path)
    path.write_bytes(whole)
    assert damage(path) is None
    (tmp_path / "last.ckpt.json").write_text("{")
    assert "cannot be read" in damage(path)


def test_a_naive_reader_would_take_a_flipped_bit_for_a_weight(io, tmp_path):
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    broken = path.read_bytes().replace(b"\x00\x00\x80\x3f" * 4, b"\x00\x00\x80\x3e" * 4, 1)
    path.write_bytes(broken)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].min() == 0.25
    with pytest.raises(UserError, match="SHA-256"):
        read_checkpoint(path)


class Bomb:
    """What a malicious checkpoint is made of: reading it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_no_code_of_a_checkpoint_is_run(io, tmp_path, as_zip):
    marker, path = tmp_path / "marker", tmp_path / "last.ckpt"
    evil = state(1) | {"extra": Bomb(marker)}
    if as_zip:
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    refused = "holds more than weights" if as_zip else "is no checkpoint"
    for read in (io.load_checkpoint, read_checkpoint):
        with pytest.raises(UserError, match=refused):
            read(path)
    with pytest.raises(UserError, match="weights_only=False would run code"):
        io.load_checkpoint(path, weights_only=False)
    assert not marker.exists()
    naive = torch.load if as_zip else (lambda path, weights_only: pickle.loads(path.read_bytes()))
    naive(path, weights_only=False)
    assert marker.exists(), "the attack works where nothing is done about it"


# --- killed


def test_a_process_killed_at_any_instant_leaves_a_whole_checkpoint(io, tmp_path):
    found = kill_saves(12, io.save_checkpoint, tmp_path, seed=1)
    assert found.pop("with something saved") > 0
    assert found == {"kills": 12, "corrupt": 0, "lost": 0}


def test_a_naive_saver_is_caught_by_the_same_kills(tmp_path):
    assert kill_saves(12, torch.save, tmp_path, seed=1)["corrupt"] > 0


def test_kills_that_do_not_catch_the_naive_saver_are_no_result(monkeypatch):
    found = {"with something saved": 1, "corrupt": 0, "lost": 0}
    monkeypatch.setattr(bench_faults, "kill_saves", lambda kills, *_: found)
    with pytest.raises(SystemExit, match=r"7 kills did not catch torch\.save"):
        bench_faults.saves(7, seed=0)
    found |= {"with something saved": 0, "corrupt": 1}
    with pytest.raises(SystemExit, match=r"AtomicCheckpointIO: nothing was saved before any of 7 kills"):
        bench_faults.saves(7, seed=0)


@pytest.mark.parametrize("killed_before", range(1, 12))
def test_the_file_is_always_one_that_its_manifest_knows(io, tmp_path, monkeypatch, killed_before):
    """The folder is looked at before each fsync of the save that replaces step 1 by step 2."""
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    count = 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count == killed_before:
            shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-seen"))
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(atomic_checkpoint.os, "fsync", fsync)
    io.save_checkpoint(state(2), path)
    seen = tmp_path.with_name(f"{tmp_path.name}-seen") / "last.ckpt"
    assert damage(seen) is None
    assert read_checkpoint(seen)["global_step"] in (1, 2)
    # a run that goes on there saves as if nothing had happened
    monkeypatch.undo()
    for step in (3, 4):
        io.save_checkpoint(state(step), seen)
        assert damage(seen) is None
        assert damage(seen.with_name("last.previous.ckpt")) is None
    assert read_checkpoint(seen.with_name("last.previous.ckpt"))["global_step"] == 3


# --- a disk that is full, a folder that cannot be written


def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_stays(io, tmp_path):
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (1000, 100_000, 390_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(UserError, match=r"cannot write the checkpoint .*File too large.* is as it was"):
                io.save_checkpoint(state(2, 100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert damage(path) is None
    assert read_checkpoint(path)["global_step"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]


def test_a_folder_that_is_a_file_is_an_error(io, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        io.save_checkpoint(state(1), tmp_path / "file" / "last.ckpt")


def test_a_disk_that_forgets_is_noticed_before_the_old_checkpoint_goes(io, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    monkeypatch.setattr(atomic_checkpoint, "_digest", lambda path: (path.stat().st_size, "0" * 64))
    with pytest.raises(UserError, match="what was read back is not what was written"):
        io.save_checkpoint(state(2), path)
    monkeypatch.undo()
    assert read_checkpoint(path)["global_step"] == 1


def test_a_file_system_without_links_is_copied_on(io, tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(atomic_checkpoint.os, "link", link)
    for step in (1, 2):
        io.save_checkpoint(state(step), tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.previous.ckpt")["global_step"] == 1


def test_from_python_it_is_a_plugin_of_the_trainer(sft, tmp_path):
    module, data = sft
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[LastCheckpoint()],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(module, datamodule=data)
    steps = {p.name: e.step for p in (tmp_path / "checkpoints").glob("*.ckpt") for e in entries_of(p)}
    assert steps == {"last.ckpt": 4, "last.previous.ckpt": 2}
    assert json.loads((tmp_path / "checkpoints/last.ckpt.json").read_text())["format"] == 1
