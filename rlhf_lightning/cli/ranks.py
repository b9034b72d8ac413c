"""The processes that Lightning starts for one run: one message when one of them fails, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from rlhf_lightning.cli.first_error import (
    JOB,
    claim,
    code_of_another,
    exit_code,
    first_failure,
    forget_job,
    starter,
)
from rlhf_lightning.cli.stacks import CRASHES, ask, is_timeout

GRACE_SECONDS = 5.0
STOPPED_SECONDS = 15.0
POLL_SECONDS = 0.2

ORDERLY = (130, 143)
"""Exit codes of a process that a signal stopped: the others are stopping too."""


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, whose own watchdog kills the first process too: nobody would learn what went wrong.

    Args:
        grace_seconds: what is left to a process, once another one has failed, to notice that by itself.
        stopped_seconds: how long one of the others may be stopped (SIGSTOP) while this one is not.
    """

    def __init__(
        self, *args: Any, grace_seconds: float = GRACE_SECONDS, stopped_seconds: float = STOPPED_SECONDS
    ) -> None:
        super().__init__(*args)
        self.grace_seconds = grace_seconds
        self.stopped_seconds = stopped_seconds

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        starts_others = not self.cluster_environment.creates_processes_externally
        done = threading.Event()
        if starts_others and self.num_processes > 1:
            os.environ[JOB] = f"{os.getpid()}:{mkdtemp(prefix='rlhf-lightning-')}"
            self._call_children_scripts()
            _in_background(lambda: self._watch(done))
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            done.set()

    def _failed(self, error: BaseException) -> None:
        """Lets the first failure speak, and ends what this process started."""
        code = exit_code(error)
        if code == 1:
            self._blame_the_dead()  # what fails here may only be the connection to a process that is gone
        claim(code)
        if is_timeout(error):
            self._ask_the_hanging()
        end(self.procs, 2 * self.grace_seconds if code in ORDERLY else 1.0)

    def _ask_the_hanging(self) -> None:
        """Has those write where they are that have not timed out like this process, and so are what it waited for."""
        deadline = time.monotonic() + self.grace_seconds
        for process in self.procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        for rank, process in enumerate(self.procs, start=1):
            if process.poll() is None:
                ask(rank, process.pid)

    def _blame_the_dead(self) -> None:
        """Says which process died without a word, if one did."""
        deadline = time.monotonic() + 1
        while self.procs and time.monotonic() < deadline and first_failure() is None:
            for rank, process in enumerate(self.procs, start=1):
                if process.poll() and claim(1, process.pid):
                    print(f"error: {obituary(rank, process.returncode)}", file=sys.stderr, flush=True)
            time.sleep(0.05)

    def _watch(self, done: threading.Event) -> None:
        """Ends this process if another one has failed and this one, waiting for it, does not notice."""
        stopped = StoppedFor()
        while not done.wait(POLL_SECONDS):
            for rank, process in enumerate(self.procs, start=1):
                if process.returncode is None and stopped.seconds(process.pid) > self.stopped_seconds:
                    _end_stopped(rank, process.pid, self.stopped_seconds)
            codes = [process.poll() for process in self.procs]
            failed = next((code for code in codes if code), None)
            if failed is None:
                if all(code == 0 for code in codes):
                    return
                continue
            if done.wait(6 * self.grace_seconds if failed in ORDERLY else self.grace_seconds):
                return
            self._blame_the_dead()
            end(self.procs, 0.0)
            sys.stdout.flush()
            sys.stderr.flush()
            code = code_of_another() or 1
            forget_job()
            os._exit(code)


def watched(trainer: Trainer) -> None:
    """Puts a `RankLauncher` in the place of Lightning's own, and has a process that one started watch it."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:  # under some strategies the others have one too, and start nobody
        ours = RankLauncher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        trainer.strategy._launcher = ours
    if "LOCAL_RANK" in os.environ and starter() == os.getppid():
        _in_background(lambda: _end_with_parent(STOPPED_SECONDS))


def end(processes: Sequence[subprocess.Popen[Any]], grace_seconds: float) -> None:
    """Waits for processes to end by themselves, and kills those that have not."""
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def obituary(rank: int, code: int) -> str:
    """What is known of a process that ended without a message."""
    killed_by = signal.Signals(-code).name if code < 0 else None
    how = f"was killed by {killed_by}" if killed_by else f"ended with exit code {code}"
    if killed_by == "SIGKILL":
        how += ": the system may have run out of memory"
    elif killed_by in CRASHES:
        how += ": a crash in native code, whose Python stacks stand further up"
    return f"the process of rank {rank} {how}; the same command with --resume auto goes on"


class StoppedFor:
    """How long processes have been stopped, by the word of the kernel: work, however long, is never taken for it.

    Time in which the watching process was stopped too (Ctrl-Z, a suspended job) does not count.
    """

    def __init__(self) -> None:
        self._polls: Counter[int] = Counter()

    def seconds(self, pid: int) -> float:
        """To be asked every `POLL_SECONDS`."""
        self._polls[pid] = self._polls[pid] + 1 if is_stopped(pid) else 0
        return self._polls[pid] * POLL_SECONDS


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal and not continued; False where the system has no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def _end_stopped(rank: int, pid: int, seconds: float) -> None:
    if claim(1, pid):
        print(
            f"error: the process of rank {rank} has been stopped for {seconds:.0f} s (SIGSTOP, pid {pid}), and the "
            "others wait for it: all are ended; the same command with --resume auto goes on",
            file=sys.stderr,
            flush=True,
        )
    os.kill(pid, signal.SIGKILL)


def _end_with_parent(stopped_seconds: float) -> None:
    parent = starter()
    assert parent is not None
    stopped = StoppedFor()
    while os.getppid() == parent:
        if stopped.seconds(parent) > stopped_seconds:
            _end_stopped(0, parent, stopped_seconds)
            os._exit(1)
        time.sleep(POLL_SECONDS)
    time.sleep(GRACE_SECONDS)  # it may have come to its end before this one, which is about to
    os._exit(1)


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
