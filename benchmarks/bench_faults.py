"""Kills, corruptions, full disks and signals, counted: python benchmarks/bench_faults.py [--only save fit ...]

Every count has a naive double beside it that the same faults catch, else it would show nothing.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_common import HERE, about
from fault_runs import (
    AHEAD,
    ON_POLICY,
    REACHED,
    STAGES,
    Forked,
    Status,
    ended,
    forget,
    lives,
    make_material,
    other_pid,
    outcome,
    prepare,
    said,
    same,
    start,
    undisturbed,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlhf_lightning.callbacks.atomic_checkpoint import AtomicCheckpointIO, damage, newest_first, read_checkpoint
from rlhf_lightning.cli.ranks import is_stopped
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.failpoints import POINTS
from rlhf_lightning.pipelines.files import write_json

Figures = Iterator[dict[str, Any]]
Save = Callable[[dict[str, Any], Path], Any]


def state(step: int, size: int = 200_000) -> dict[str, Any]:
    """A checkpoint of 0.8 MB whose weights all say which step it is of."""
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}, "optimizer_states": []}


# --- killed while saving


def kill_saves(kills: int, save: Save, folder: Path, seed: int) -> dict[str, int]:
    """Kills a child that saves over and over, at random moments: how many left a corrupt file, or lost a done one."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them for ever
    draw, seen, corrupt, lost = random.Random(seed), 0, 0, 0
    path, done = folder / "last.ckpt", folder / "done"
    began = time.perf_counter()
    save(state(0), folder / "first.ckpt")  # which a slow disk makes long: a kill is to come during one of the first few
    longest = max(0.06, 4 * (time.perf_counter() - began))
    for _ in range(kills):
        first = int(done.read_text()) + 1 if done.exists() else 1
        pid = os.fork()
        if pid == 0:
            _save_on(first, save, path, done)
        time.sleep(draw.uniform(0.003, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not done.exists():
            continue  # nothing was said to be saved yet
        seen += 1
        step = _step_of(path)
        corrupt += step is None
        lost += step is not None and step < int(done.read_text())
    return {"kills": kills, "with something saved": seen, "corrupt": corrupt, "lost": lost}


def _save_on(first: int, save: Save, path: Path, done: Path) -> None:
    try:
        for step in range(first, first + 10_000):
            save(state(step), path)
            descriptor = os.open(done, os.O_WRONLY | os.O_CREAT)
            os.pwrite(descriptor, f"{step:09d}".encode(), 0)
            os.close(descriptor)
    finally:
        os._exit(1)


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint that is whole, by its content and by what is said of it."""
    try:
        found = torch.load(path, weights_only=True)
        same = bool((found["state_dict"]["weight"] == found["global_step"]).all())
    except Exception:
        return None
    return int(found["global_step"]) if same and damage(path) is None else None


def saves(num: int, seed: int) -> dict[str, Any]:
    """Ours and others', with TMPDIR on the file system of the target and on another one."""
    others = [Path(p) for p in ("/dev/shm", "/tmp") if Path(p).is_dir()]
    results = {}
    with tempfile.TemporaryDirectory() as near, tempfile.TemporaryDirectory(dir=others[0]) as far:
        savers: dict[str, tuple[Save, str]] = {
            "AtomicCheckpointIO": (AtomicCheckpointIO().save_checkpoint, near),
            "AtomicCheckpointIO, TMPDIR on another file system": (AtomicCheckpointIO().save_checkpoint, far),
            "Lightning's TorchCheckpointIO, TMPDIR on another file system": (TorchCheckpointIO().save_checkpoint, far),
            "torch.save": (torch.save, near),
        }
        for number, (name, (save, where)) in enumerate(savers.items()):
            folder = Path(where) / str(number)
            folder.mkdir()
            results[name] = kill_saves(num, save, folder, seed)
            print(name, results[name], flush=True)
    if not results["torch.save"]["corrupt"]:
        raise SystemExit(f"{num} kills did not catch torch.save, which writes in place: they show nothing of others")
    for name, found in results.items():
        if not found["with something saved"]:
            raise SystemExit(f"{name}: nothing was saved before any of {num} kills, so there was nothing to lose")
    return results


# --- killed while training


class KilledFits:
    """Runs of one stage that are killed at random moments, one to three times each, beside one that is not."""

    def __init__(self, config: Mapping[str, Any], folder: Path, seed: int) -> None:
        self.config, self.folder, self.draw = config, folder, random.Random(seed)
        folder.mkdir()
        whole, self.usual = undisturbed(config, folder)
        self.expected = outcome(whole)
        self.runs = self.kills = 0
        self.equal = Counter[str]()

    def run(self) -> None:
        """One more."""
        run, left, killed = self.folder / f"run{self.runs}", self.draw.randint(1, 3), 0
        while True:
            began, pid = time.perf_counter(), start(self.config, run)
            if left:
                time.sleep(self.draw.uniform(0.1, 0.95) * self.usual)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            if status == -signal.SIGKILL:
                left, killed = left - 1, killed + 1
            elif status == 0 and not killed:  # it was faster than the kill: that shows nothing
                self.usual = 0.5 * (self.usual + time.perf_counter() - began)
                forget(run)
            else:
                break
        self.runs, self.kills = self.runs + 1, self.kills + killed
        found = outcome(run) if status == 0 else {}
        self.equal.update(name for name, digest in self.expected.items() if found.get(name) == digest)
        if found != self.expected:
            print(self.folder.name, run.name, status, said(run), flush=True)
        forget(run)

    def figures(self) -> dict[str, int]:
        counts = {f"same {name}": self.equal[name] for name in self.expected}
        return {"runs": self.runs, "kills": self.kills, **counts}


def fits(num: int, seed: int, stages: Sequence[str] = STAGES) -> Figures:
    """`num` runs of each stage, the stages in turn."""
    prepare()
    with tempfile.TemporaryDirectory() as name:
        configs = make_material(Path(name))
        killed = {stage: KilledFits(configs[stage], Path(name) / stage, seed) for stage in stages}
        for _ in range(num):
            for runs in killed.values():
                runs.run()
            yield {stage: runs.figures() for stage, runs in killed.items()}


# --- killed at every named place


def unreached(stage: str) -> set[str]:
    """Places that a run of a stage never comes to."""
    rooms = () if stage in AHEAD else ("ahead.",)
    rooms += () if stage in ON_POLICY + AHEAD else ("collect.", "score.")
    rooms += ("samples.",) if stage in ("RewardModule", "DPOModule") else ()  # which are not asked for answers
    return {name for name in POINTS if name.startswith(rooms or "-")}


def kill_at_points(config: Mapping[str, Any], folder: Path, points: Sequence[str], draw: random.Random) -> list[str]:
    """Kills a run at each of some places, at a random one of the times it gets there; those after which all is well."""
    whole, _ = undisturbed(config, folder, f"{points[0]}:1000000")
    expected, counts = outcome(whole), json.loads(Path(f"{whole}{REACHED}").read_text())
    well = []
    for point in points:
        run, spec = folder / point.replace(".", "-"), f"{point}:{draw.randint(1, counts.get(point, 1))}"
        killed, after = ended(start(config, run, spec)), ended(start(config, run))
        if killed == -signal.SIGKILL and after == 0 and same(run, expected):
            well.append(point)
        else:
            print(folder.name, spec, killed, after, said(run), flush=True)
        forget(run)
    return well


def points(num: int, seed: int, stages: Sequence[str] = STAGES) -> Figures:
    """Every failpoint times every stage, `num` times; with 0 each place in one of two stages only."""
    prepare()
    results: dict[str, Any] = {}
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        configs = make_material(Path(name))
        for stage in stages:
            config, folder = configs[stage], Path(name) / stage
            wanted = [point for point in POINTS if point not in unreached(stage)] * max(num, 1)
            if num == 0:
                wanted = {
                    "SFTModule": wanted,
                    "GRPOModule": [point for point in wanted if point in unreached("SFTModule")],
                }.get(stage, [])
            if wanted:
                folder.mkdir()
                well = kill_at_points(config, folder, wanted, draw)
                of = f"of {len(POINTS)} places reached"
                results[stage] = {of: len(set(wanted)), "kills": len(wanted), "bit-identical, samples too": len(well)}
                print(stage, results[stage], flush=True)
                yield results


# --- killed while a rollout is sampled ahead


def kills_while_ahead(num: int, seed: int) -> Figures:
    """Stages with `async_rollouts`: `num` runs of each killed at random moments, and one at each place of the loop.

    With 0 one stage only, and only at the places where answers are on their way.
    """
    prepare()
    results: dict[str, Any] = {}
    draw = random.Random(seed)
    rooms = ("ahead.", "collect.", "score.", "step.") if num else ("ahead.",)
    wanted = [point for point in POINTS if point.startswith(rooms)]
    with tempfile.TemporaryDirectory() as name:
        configs = make_material(Path(name))
        for stage in AHEAD if num else AHEAD[-1:]:
            (Path(name) / stage).mkdir()
            well = kill_at_points(configs[stage], Path(name) / stage, wanted, draw)
            results[stage] = {"kills": len(wanted), "bit-identical, samples too": len(well)}
            if num:
                killed = KilledFits(configs[stage], Path(name) / f"{stage}, at random", seed)
                for _ in range(num):
                    killed.run()
                at_random = killed.figures()
                results[stage] |= {"kills at random moments": at_random.pop("kills"), **at_random}
            print(stage, results[stage], flush=True)
            yield results


# --- damaged, full, malicious


def corruptions(num: int, seed: int) -> dict[str, Any]:
    """Truncations and flipped bits at random places: how many are found, and how often the one before is taken."""
    draw, found, fell_back, unnoticed = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        for step in (1, 2):
            AtomicCheckpointIO().save_checkpoint(state(step, 20_000), path)
        whole = path.read_bytes()
        for number in range(num):
            at = draw.randrange(len(whole))
            broken = bytearray(whole[:at] if number % 3 == 0 else whole)
            if number % 3:
                broken[at] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            found += damage(path) is not None
            taken = next(file for file, reason in newest_first(folder) if reason is None)
            fell_back += read_checkpoint(taken)["global_step"] == 1
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                unnoticed += 1
    return {"corruptions": num, "found": found, "fell back on the one before": fell_back, "torch.load took": unnoticed}


def full_disk(num: int, seed: int) -> dict[str, Any]:
    """A tmpfs of 2 MB that has no room for the next checkpoint: how often the one before is intact."""
    draw, kept, loud, naive = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            return {"skipped": "no right to mount a tmpfs"}
        try:
            for number in range(num):
                place = Path(folder) / str(number)
                place.mkdir()
                path = place / "last.ckpt"
                AtomicCheckpointIO().save_checkpoint(state(1, 100_000), path)
                too_large = state(2, draw.randrange(450_000, 900_000))
                try:
                    AtomicCheckpointIO().save_checkpoint(too_large, path)
                except UserError as error:
                    loud += "No space left on device" in str(error)
                kept += damage(path) is None and read_checkpoint(path)["global_step"] == 1
                with contextlib.suppress(Exception):
                    torch.save(too_large, path)
                naive += _step_of(path) == 1
                shutil.rmtree(place)
        finally:
            subprocess.run(["umount", folder], check=True)
    return {"full disks": num, "said so": loud, "kept the one before": kept, "torch.save kept it": naive}


class _Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def malicious(num: int, seed: int) -> dict[str, Any]:
    """Checkpoints that make a folder when they are unpickled, as a zip and as a bare pickle."""
    ran, naive = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num):
            path, marker = Path(folder) / f"{number}.ckpt", Path(folder) / f"marker{number}"
            evil = state(1, 10) | {"extra": _Bomb(str(marker))}
            torch.save(evil, path) if number % 2 else path.write_bytes(pickle.dumps(evil))
            for asked in (None, True, False):
                with contextlib.suppress(UserError):
                    AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)
            ran += marker.exists()
            torch.load(path, weights_only=False) if number % 2 else pickle.loads(path.read_bytes())
            naive += marker.exists()
    return {"attacks": num, "ran": ran, "ran against a naive reader": naive}


# --- signals and dead processes, two of them


def of_two(config: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """A config for two processes, long enough to be caught in the middle."""
    return {**config, "trainer": {**config["trainer"], "devices": 2, "strategy": strategy, "max_epochs": 8}}


def until_gone(pids: Mapping[str, tuple[int, int]], limit: float = 120.0) -> Iterator[tuple[str, Status | None]]:
    """Waits for runs of two processes: each name once both are gone, with the code of the first; None after `limit`."""
    left, began = {what: Forked(first) for what, (first, _) in pids.items()}, time.perf_counter()
    while left:
        late = time.perf_counter() - began > limit
        for what, run in list(left.items()):
            code = run.poll()
            if late or (code is not None and not lives(pids[what][1])):
                yield what, code
                run.kill()
                del left[what]
        time.sleep(0.02)


def faults_of_two(
    strategy: str,
    faults: Mapping[str, tuple[Callable[[Any, Path], int], Sequence[int]]],
    num: int,
    idle: Sequence[str] = (),
) -> Figures:
    """Does something to a run of two processes, `num` times each, and resumes it.

    Args:
        faults: by name, what starts a run, does it, and gives the pid; and the exit codes that are right.
        idle: those after which a run waits for many seconds: all of them at once.
    """
    groups = [[what for what in faults if what in idle], *([what] for what in faults if what not in idle)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = of_two(make_material(folder)["SFTModule"], strategy)
        expected = outcome(undisturbed(config, folder)[0])
        counts = {what: Counter[str]() for what in faults}
        longest = dict.fromkeys(faults, 0.0)
        for number in range(num):  # one of each, then another of each
            for group in groups:
                runs = {what: folder / f"run{number}-{place}" for place, what in enumerate(group)}
                pids, began, codes = {}, {}, {}
                for what, run in runs.items():
                    pid = faults[what][0](config, run)
                    began[what], pids[what] = time.perf_counter(), (pid, other_pid(run))
                for what, code in until_gone(pids):
                    longest[what] = max(longest[what], time.perf_counter() - began[what])
                    counts[what]["left"] += sum(map(lives, pids[what]))
                    codes[what] = code
                for what, run in runs.items():
                    code, again = codes[what], ended(start(config, run)) if codes[what] else None
                    counts[what]["exit code"] += code in faults[what][1]
                    counts[what]["same"] += again == 0 and same(run, expected)
                    if code not in faults[what][1] or again != 0:
                        print(what, code, again, said(run), flush=True)
                    forget(run)
            yield {
                what: {
                    "runs": number + 1,
                    "right exit code": count["exit code"],
                    "seconds until all are gone, longest": round(longest[what], 1),
                    "left behind": count["left"],
                    "resumed, bit-identical": count["same"],
                }
                for what, count in counts.items()
            }


def signalled(what: str, rank: int, draw: random.Random) -> Callable[[Any, Path], int]:
    """Starts a run, and sends one of its processes a signal some time after its first checkpoint."""

    def begin(config: Any, run: Path) -> int:
        pid = start(config, run)
        while not (run / "checkpoints" / "last.ckpt.json").exists():
            assert lives(pid), said(run)
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(other_pid(run) if rank else pid, getattr(signal, what))
        return pid

    return begin


def failing(action: str, rank: int, draw: random.Random) -> Callable[[Any, Path], int]:
    """Starts a run in which one of the processes dies, stops or raises an error at a random step; once it is there."""

    def begin(config: Any, run: Path) -> int:
        pid = start(config, run, f"step.before_update:{draw.randint(3, 20)}:{action}:{rank}")
        while not run.with_suffix(".rank1").exists():
            time.sleep(0.01)
        watched = pid if rank == 0 else other_pid(run)
        while lives(watched) and not is_stopped(watched):
            time.sleep(0.01)
        return pid

    return begin


def signals_to_two(num: int, seed: int) -> Figures:
    """SIGTERM, SIGINT and SIGUSR1 to either of two processes (DDP)."""
    prepare()
    draw, codes = random.Random(seed), {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}
    faults = {f"{s} to rank {r}": (signalled(s, r, draw), [c]) for s, c in codes.items() for r in (0, 1)}
    yield from faults_of_two("ddp", faults, num)


def dead_of_two(num: int, seed: int) -> Figures:
    """kill -9, SIGSTOP and an error in either of two processes (FSDP2)."""
    prepare()
    draw, names = random.Random(seed), {"kill": "kill -9", "stop": "SIGSTOP", "raise": "an exception"}
    faults = {}
    for action, called in names.items():
        for rank in (0, 1):
            right = [1] if action == "raise" or rank else [-signal.SIGKILL]
            faults[f"{called} in rank {rank}"] = (failing(action, rank, draw), right)
    yield from faults_of_two("fsdp2", faults, num, idle=[what for what in faults if what.startswith("SIGSTOP")])


SECTIONS: dict[str, tuple[str, Callable[..., Any], int]] = {
    "saves": ("kill -9 during checkpoint saves", saves, 200),
    "corruptions": ("truncated and bit-flipped checkpoints", corruptions, 300),
    "full_disk": ("full disk", full_disk, 20),
    "malicious": ("malicious checkpoints", malicious, 20),
    "points": ("kill -9 at every failpoint, then --resume auto", points, 1),
    "fits": ("kill -9 during fit, then --resume auto", fits, 40),
    "ahead": ("kill -9 while a rollout is sampled ahead, then --resume auto", kills_while_ahead, 6),
    "signals": ("signals to either of two processes", signals_to_two, 20),
    "dead": ("either of two processes dies, stops or fails", dead_of_two, 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--num", type=int, help="how many of each, instead of the full number; 0: the short form of points"
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, help="of points and fits; the others' figures are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "faults.json")
    options = parser.parse_args()
    for name in options.only:
        title, run, full = SECTIONS[name]
        began = time.perf_counter()
        stages = [options.stages] if options.stages else []
        figures = run(full if options.num is None else options.num, options.seed, *stages)
        for some in [figures] if isinstance(figures, dict) else figures:  # written as it grows: nothing is lost
            section = {"title": title, "seed": options.seed, "seconds": round(time.perf_counter() - began, 1)}
            results = json.loads(options.out.read_text()) if options.out.is_file() else {"sections": {}}
            if stages:
                some = results["sections"].get(name, {}).get("figures", {}) | some
            results["sections"][name] = {**section, "figures": some, "about": about()}
            write_json(options.out, results)
        print(title, results["sections"][name], flush=True)


if __name__ == "__main__":
    main()
