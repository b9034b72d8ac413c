"""Where the processes of a run agree whose error is shown. The standard library only: `__main__` imports it early."""

import os
import shutil
from pathlib import Path

JOB = "RLHF_LIGHTNING_JOB"
"""Environment variable: pid of the process that started the others, a colon, and a folder that all of them share."""


def exit_code(error: BaseException) -> int:
    """2 for a mistake of the user, 130 for Ctrl-C, a `SystemExit`'s own code, 1 for anything else."""
    from rlhf_lightning.core.errors import UserError

    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


def claim(code: int, owner: int | None = None) -> bool:
    """Whether this process failed before all others of its run, and so is the one that speaks.

    Args:
        code: its exit code.
        owner: pid of the process that failed; default: this one.
    """
    folder = _folder()
    if folder is None:
        return True
    owner = os.getpid() if owner is None else owner
    written = folder / f"failed-{os.getpid()}"
    try:
        written.write_text(f"{owner} {code}")
        os.link(written, folder / "first")  # all at once, and only for the first one
    except FileExistsError:
        return first_failure() == (owner, code)
    except OSError:
        return True  # the folder went with the process that made it: better two messages than none
    finally:
        written.unlink(missing_ok=True)  # it is the same file as `first`: writing to it again would change that
    return True


def first_failure() -> tuple[int, int] | None:
    """Pid and exit code of the process that failed first."""
    folder = _folder()
    try:
        pid, code = (folder / "first").read_text().split() if folder is not None else ("", "")
        return int(pid), int(code)
    except (OSError, ValueError):
        return None


def starter() -> int | None:
    """Pid of the process that started the others of this run; None if nobody did."""
    return int(os.environ[JOB].partition(":")[0]) if JOB in os.environ else None


def code_of_another() -> int | None:
    """The exit code to end with if another process failed first, and has said why."""
    if "LOCAL_RANK" in os.environ and starter() not in (None, os.getpid(), os.getppid()):
        return 1  # killed: whoever did that knows
    first = first_failure()
    return None if first is None or first[0] == os.getpid() else first[1]


def forget_job() -> None:
    """Removes the folder that the processes shared, if this is the one that made it."""
    pid, _, folder = os.environ.get(JOB, "").partition(":")
    if pid == str(os.getpid()):
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[JOB]


def _folder() -> Path | None:
    job = os.environ.get(JOB)
    return Path(job.partition(":")[2]) if job else None
