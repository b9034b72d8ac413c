"""One folder, one run: what a run leaves, when a new one may start there, and where an old one goes on."""

import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.callbacks.atomic_checkpoint import check_plain, damage, entries_of, newest_first
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.parallel.sharded_checkpoint import check_sharded

RUN_FILES = ("metrics.csv", "hparams.yaml", "samples.jsonl", "data_report.json", "health.jsonl", "finished.json")
RUN_FOLDERS = ("checkpoints", "hf", "nonfinite")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run (`trainer.default_root_dir`): config.yaml, metrics.csv, samples.jsonl, checkpoints/, hf/."""

    path: Path

    @property
    def holds_a_run(self) -> bool:
        """Whether something would be lost; the config of a run that stopped before its first step is nothing."""
        if any((self.path / folder).is_dir() and any((self.path / folder).iterdir()) for folder in RUN_FOLDERS):
            return True
        files = (self.path / name for name in ("metrics.csv", "samples.jsonl", "finished.json"))
        return any(file.exists() and file.stat().st_size > 0 for file in files)

    def last_checkpoint(self, *, required: bool = False) -> Path | None:
        """The newest checkpoint that is whole; None if there is none (an error if `required`).

        Says which ones it passes over, and why. If all are damaged, that is an error: a new run would delete them.
        """
        damaged = []
        for path, reason in newest_first(self.path / "checkpoints"):
            if reason is None:
                return path
            damaged.append(path)
            if not rank_zero_only.rank:
                print(f"skipped {path}, which {reason}", file=sys.stderr)
        if damaged:
            raise UserError(f"no checkpoint of {self.path} can be read; --overwrite true starts anew without them")
        if required:
            path = self.path / "checkpoints" / "last.ckpt"
            raise UserError(
                f"there is no {path}: the run of this config has not reached its first checkpoint; run `fit` first, "
                "or give --ckpt_path a file"
            )
        return None

    def clear(self) -> None:
        """Deletes what a run leaves, on the first process only.

        Not config.yaml: it may be the very file that this run was told to read, and is written anew anyway.
        """
        if rank_zero_only.rank:
            return
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in RUN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def prepare(self, resume: str, overwrite: bool, ckpt_path: str | Path | None) -> str | None:
        """Makes the folder ready for `fit`.

        Args:
            resume: never, auto or the path of a checkpoint.
            overwrite: delete the run that is there.
            ckpt_path: Lightning's own way to name a checkpoint to go on from.
        Returns:
            The checkpoint to go on from, or None to start anew.
        """
        check_writable(self.path, "--trainer.default_root_dir")
        for left in self.path.glob("hpc_ckpt_*.ckpt"):  # Lightning goes on from these under SLURM without being asked
            checked(left)
        if ckpt_path is not None:
            if resume not in ("never", str(ckpt_path)):
                raise UserError(f"both --ckpt_path {ckpt_path} and --resume {resume} are given; keep one")
            resume = "auto" if str(ckpt_path) == "last" else str(ckpt_path)
        if overwrite:
            if resume != "never":
                raise UserError(f"--overwrite deletes the run that --resume {resume} would go on with; keep one")
            self.clear()
            return None
        if resume == "auto":
            last = self.last_checkpoint()
            if last is not None:
                check_plain(last)
            if last is None:
                self.clear()  # it broke before its first checkpoint: there is nothing to go on from
            if last is not None and not rank_zero_only.rank:
                step = next((f", step {entry.step}" for entry in entries_of(last)), "")
                print(f"resuming from {last}{step}")
            return None if last is None else str(last)
        if resume != "never":
            if not Path(resume).exists():
                raise UserError(f"--resume {resume}: no such checkpoint (never, auto, or the path of a .ckpt)")
            return checked(resume)
        # the other processes may look after the first one has begun to write
        if self.holds_a_run and not rank_zero_only.rank:
            raise UserError(
                f"the folder {self.path} already holds a run; go on with it by --resume auto, delete it by "
                "--overwrite true, or name another folder by --trainer.default_root_dir FOLDER"
            )
        return None


def check_writable(folder: Path, option: str) -> None:
    """Makes a folder; refuses one that nothing can be written to before anything is computed for it.

    Args:
        folder: where results will go.
        option: that names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another folder by {option}") from error


def checked(checkpoint: str | Path) -> str:
    """The path of a checkpoint, if it is one and whole; a folder is a sharded one."""
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_file() and (reason := damage(path)) is not None:
        raise UserError(f"{path} {reason}")
    # here, whatever reads it later: some of Lightning's strategies do so by pickle
    if path.is_dir():
        check_sharded(path)
    else:
        check_plain(path)
    return str(path)


def misfit(checkpoint: str | Path | None, error: BaseException) -> UserError:
    """What is said when weights and model do not belong together."""
    return UserError(f"{checkpoint} does not fit the model of the config: {textwrap.shorten(str(error), 400)}")
