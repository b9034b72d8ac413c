"""Where a process is, on stderr: the Python stacks of its threads when it crashes, and when somebody asks.

    kill -USR2 PID

The standard library only: `__main__` imports it early.
"""

import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress

from rlhf_lightning.cli.first_error import first_failure, starter

STDERR = 2
ASK = getattr(signal, "SIGUSR2", None)
"""The signal that asks; None where the system has none."""

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
"""Names of the signals of which a process dies that brought them about itself."""

TO_ANSWER_SECONDS = 0.5
TO_FAIL_SECONDS = 3.0


def enable() -> None:
    """From now on this process writes its stacks when it is asked, and when it crashes (`CRASHES`).

    It goes on from the one and dies of the other as it would have. Done in C: that costs nothing before, and needs no
    interpreter that still works.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(STDERR)
    if ASK is not None and signal.getsignal(ASK) == signal.SIG_DFL:
        faulthandler.register(ASK, STDERR)


def is_timeout(error: BaseException) -> bool:
    """Whether a process gave up waiting for the others; not every backend of torch has a class of its own for that."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in said or "timeout" in said)


def ask(rank: int, pid: int) -> None:
    """Has a process of this run, for which others have waited too long, write where it is."""
    if ASK is None:
        return
    print(f"the process of rank {rank}, for which others waited, is here (pid {pid}):", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):
        os.kill(pid, ASK)
        time.sleep(TO_ANSWER_SECONDS)


def ask_the_first(error: BaseException) -> None:
    """Asks the process that started this one, if this one waited in vain and the first does not say so too."""
    if "LOCAL_RANK" not in os.environ or starter() != os.getppid() or not is_timeout(error):
        return
    deadline = time.monotonic() + TO_FAIL_SECONDS
    while time.monotonic() < deadline:
        first = first_failure()
        if first is not None and first[0] != os.getpid():
            return
        time.sleep(0.05)
    ask(0, os.getppid())
