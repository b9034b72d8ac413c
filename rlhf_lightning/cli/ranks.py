"""The processes that Lightning starts for one run: one message when one of them fails, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from tempfile import mkdtemp
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from rlhf_lightning.cli.first_error import JOB, claim, code_of_another, exit_code, first_failure, forget_job

ORDERLY = (130, 143)
"""Exit codes of a process that a signal stopped: the others are stopping too."""


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, whose own watchdog kills the first process too: nobody would learn what went wrong.

    Args:
        grace_seconds: what is left to a process, once another one has failed, to notice that by itself.
    """

    def __init__(self, *args: Any, grace_seconds: float = 5.0) -> None:
        super().__init__(*args)
        self.grace_seconds = grace_seconds

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        starts_others = not self.cluster_environment.creates_processes_externally
        done = threading.Event()
        if starts_others and self.num_processes > 1:
            os.environ[JOB] = f"{os.getpid()}:{mkdtemp(prefix='rlhf-lightning-')}"
            self._call_children_scripts()
            _in_background(lambda: self._watch(done))
        elif JOB in os.environ:
            _in_background(_end_with_parent)
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
        end(self.procs, 2 * self.grace_seconds if code in ORDERLY else 1.0)

    def _blame_the_dead(self) -> None:
        """Says which process died without a word, if one did."""
        parent = int(os.environ.get(JOB, f"{os.getppid()}:").partition(":")[0])
        if not self.procs and parent not in (os.getpid(), os.getppid()):
            claim(1, parent)  # the process that started this one is gone, and whoever ended it knows
            return
        deadline = time.monotonic() + 1
        while self.procs and time.monotonic() < deadline and first_failure() is None:
            for rank, process in enumerate(self.procs, start=1):
                if process.poll() and claim(1, process.pid):
                    print(f"error: {obituary(rank, process.returncode)}", file=sys.stderr, flush=True)
            time.sleep(0.05)

    def _watch(self, done: threading.Event) -> None:
        """Ends this process if another one has failed and this one, waiting for it, does not notice."""
        while not done.wait(0.2):
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
    """Puts a `RankLauncher` in the place of Lightning's own."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        ours = RankLauncher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        trainer.strategy._launcher = ours


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
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = ": the system may have run out of memory" if code == -signal.SIGKILL else ""
    return f"the process of rank {rank} {how}{hint}; the same command with --resume auto goes on"


def _end_with_parent() -> None:
    parent = int(os.environ[JOB].partition(":")[0])
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
