"""Programs of a model, run where they can do no harm: bubblewrap namespaces, limits, a clock."""

import contextlib
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
NOBODY = 65534
"""The user and group that programs run as: no file of the machine is theirs."""
MAX_OUTPUT = 1 << 20
"""Bytes of output that are read; a program that writes more has failed."""
TMP_BYTES = 32 << 20
"""Size of the only place that a program can write to."""
MAX_PROCESSES = 16
MAX_FILES = 64
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")
"""Where another Python may be, if the sandbox's user may not read this one."""


@dataclass(frozen=True)
class Ran:
    """How a script ended."""

    output: bytes
    """Its standard output, `MAX_OUTPUT` bytes of it at most."""
    succeeded: bool
    """It ended by itself, in time, with exit code 0 and within the limits."""
    timed_out: bool


@dataclass(frozen=True)
class Checked:
    """Which tests a program passed."""

    passed: list[bool]
    timed_out: bool


@dataclass(frozen=True)
class Sandbox:
    """Runs programs in bubblewrap: no network, no environment, no files but the system's (to read) and a small /tmp.

    Programs see neither other processes nor whose machine it is, run as nobody with no capability, and are killed at
    the wall limit with all that they started. One sandbox serves many threads.

    Args:
        limit_s: seconds (wall clock) for a program and all its tests.
        memory_bytes: address space of each of its processes, of which there may be `MAX_PROCESSES`.
        python: the Python that runs programs; null = this one, or one of the system's if nobody cannot read this one.
    """

    limit_s: float = 10.0
    memory_bytes: int = 512 << 20
    python: str | None = None
    _command: list[str] = field(default_factory=list, init=False, repr=False)

    def check(self) -> None:
        """Prove that the sandbox holds.

        Raises:
            UserError: bubblewrap is missing or may not make namespaces here, or a probe inside found a way out. Nothing
                is run in any other way.
        """
        if not self._command:
            self._command.extend(_working_command(self.python))

    def run_script(self, program: str, stdin: str = "") -> Ran:
        """Run `program` with standard input."""
        self.check()
        began = time.monotonic()
        with self._started(
            self._order("script", program=program), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            output, in_time = _talk(child, stdin.encode(), began + self.limit_s)
            within = in_time and len(output) <= MAX_OUTPUT
            code = child.wait() if within else None
        return Ran(output[:MAX_OUTPUT], succeeded=code == 0, timed_out=not in_time)

    def run_tests(
        self, program: str, tests: Sequence[str], *, entry_point: str | None = None, setup: str = ""
    ) -> Checked:
        """Run test code against the functions of `program`, in two sandboxes: the program never sees a test.

        Args:
            tests: code that asserts, or that defines `check(candidate)`; each is passed or not.
            entry_point: the function that is `candidate`; functions that no test defines are the program's, too.
            setup: code that the tests need, run before them; may end in the head of an unwritten function.
        """
        self.check()
        began = time.monotonic()
        nonce = secrets.token_hex(16)
        questions, answers, report = os.pipe(), os.pipe(), os.pipe()
        pipes = [*questions, *answers, *report]
        solver = self._order("serve", program=program, reads=questions[0], writes=answers[1])
        tester = self._order("check", tests=list(tests), setup=setup, entry_point=entry_point, nonce=nonce)
        tester |= {"reads": answers[0], "writes": questions[1], "report": report[1]}
        try:
            with (
                self._started(solver, keep=(questions[0], answers[1])),
                self._started(tester, keep=(answers[0], questions[1], report[1])),
            ):
                for end in (questions[0], answers[1], answers[0], questions[1], report[1]):
                    os.close(end)
                    pipes.remove(end)
                said, in_time = _read_all(report[0], began + self.limit_s)
        finally:
            for end in pipes:
                os.close(end)
        return Checked(_verdict(said, nonce, len(tests)), timed_out=not in_time)

    def _order(self, role: str, **order: Any) -> dict[str, Any]:
        seconds = math.ceil(self.limit_s) + 1
        limits = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CPU": seconds,
            "RLIMIT_NPROC": MAX_PROCESSES,
            "RLIMIT_FSIZE": TMP_BYTES,
            "RLIMIT_NOFILE": MAX_FILES,
            "RLIMIT_CORE": 0,
        }
        return {"role": role, "limits": limits, **order}

    @contextlib.contextmanager
    def _started(
        self,
        order: dict[str, Any],
        *,
        keep: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The child at work; dead when the block is left."""
        control = os.pipe()
        try:
            child = subprocess.Popen(
                [*self._command, str(control[0])],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(control[0], *keep),
                start_new_session=True,
                **_as_nobody(),
            )
        finally:
            os.close(control[0])
        teller = threading.Thread(target=_tell, args=(control[1], order), daemon=True)  # a long program fills the pipe
        teller.start()
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            child.wait()
            teller.join()


def _tell(descriptor: int, order: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError), open(descriptor, "wb") as pipe:
        pipe.write(json.dumps(order).encode() + b"\n")


def _as_nobody() -> dict[str, Any]:
    """Root starts bubblewrap as nobody: limits on processes do not bind root, not even in a namespace."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _talk(child: subprocess.Popen[bytes], stdin: bytes, deadline: float) -> tuple[bytes, bool]:
    """Feed standard input and read standard output up to the cap; whether both ended in time."""
    assert child.stdin is not None
    assert child.stdout is not None

    def feed() -> None:
        with contextlib.suppress(OSError, ValueError):
            child.stdin.write(stdin)  # type: ignore[union-attr]
            child.stdin.close()  # type: ignore[union-attr]

    threading.Thread(target=feed, daemon=True).start()
    output, in_time = _read_all(child.stdout.fileno(), deadline)
    if in_time and len(output) <= MAX_OUTPUT:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            in_time = False
    return output, in_time


def _read_all(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """Everything up to the end, or a little more than the cap; whether the end came in time."""
    read = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(read) <= MAX_OUTPUT:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return read, False
            piece = os.read(descriptor, 65536)
            if not piece:
                return read, True
            read += piece
    return read, True


def _verdict(said: bytes, nonce: str, num_tests: int) -> list[bool]:
    """What the tester reported, if it was the tester and reported on every test."""
    try:
        report = json.loads(said)
    except ValueError:
        return [False] * num_tests
    if not isinstance(report, dict) or report.get("nonce") != nonce or len(report["passed"]) != num_tests:
        return [False] * num_tests
    return [passed is True for passed in report["passed"]]


# ---- the walls, and the proof that they stand -----------------------------------------------------------------------

PROBE = """
import json, os, socket
given = {entry.split(b"=")[0].decode() for entry in open("/proc/self/environ", "rb").read().split(b"\\0")}
found = {"uid": os.getuid(), "environment": sorted((given | set(os.environ)) - {"", "PWD"})}
found["processes"] = sum(name.isdigit() for name in os.listdir("/proc"))
def can(what):
    try:
        what()
        return True
    except OSError:
        return False
def reach():
    socket.create_connection(("127.0.0.1", PORT), 1).close()
def write_at(folder):
    return lambda: open(folder + "/probe", "w").close()
found["network"] = can(reach)
found["interfaces"] = [name for _, name in socket.if_nameindex()]
found["writes"] = [f for f in ("/", "/usr", "/dev", "/dev/shm", "/etc", "/var", "/home") if can(write_at(f))]
hidden = ("/root", "/home", "/etc/passwd", "/etc/shadow", "/var", "/run", "/sys")
found["reads"] = [f for f in hidden if can(lambda: os.stat(f))]
found["tmp"] = can(write_at("/tmp"))
print(json.dumps(found))
"""
INSTALL = (
    "install bubblewrap (apt-get install bubblewrap) and allow unprivileged user namespaces (Ubuntu 24.04: "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; in Docker a seccomp profile that permits unshare and "
    "mount). Model-written code is never run without a sandbox"
)


@lru_cache
def _working_command(python: str | None) -> tuple[str, ...]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(f"code needs a sandbox, and there is no bwrap on PATH: {INSTALL}")
    own = os.path.realpath(sys.executable)
    candidates = [python] if python is not None else [own, *(p for p in PYTHONS if Path(p).exists())]
    complaints = []
    for candidate in candidates:
        command = tuple(_command(bwrap, candidate))
        complaint = _complaint(command)
        if complaint is None:
            return command
        complaints.append(f"{candidate}: {complaint}")
    raise UserError(f"code needs a sandbox, and {bwrap} gives none here ({'; '.join(complaints)}): {INSTALL}")


def _command(bwrap: str, python: str) -> list[str]:
    command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    if "--disable-userns" in subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout:
        command.append("--disable-userns")
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL", "--hostname", "sandbox"]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.exists(folder):
            command += ["--ro-bind", folder, folder]
    prefix = _prefix(python)
    if not prefix.startswith("/usr"):
        command += ["--ro-bind", prefix, prefix]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # what bubblewrap builds the root and /dev from is memory, too: nobody may fill it
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, python, "-I", "-S", "-B", "-X", "utf8", "-c", CHILD.read_text(encoding="utf-8")]


def _prefix(python: str) -> str:
    """The folder that holds the interpreter and its library."""
    return str(Path(os.path.realpath(python)).parent.parent)


def _complaint(command: tuple[str, ...]) -> str | None:
    """What is wrong with the sandbox, by a program inside that looks for ways out; None if nothing is."""
    import socket

    sandbox = Sandbox(limit_s=10.0)
    sandbox._command.extend(command)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ran = sandbox.run_script(PROBE.replace("PORT", str(listener.getsockname()[1])))
    if not ran.succeeded:
        return "it does not start" + (" in time" if ran.timed_out else "")
    found = json.loads(ran.output)
    wanted = {"uid": NOBODY, "environment": [], "network": False, "writes": [], "reads": [], "tmp": True}
    wrong = [f"{name}: {found[name]!r}" for name, value in wanted.items() if found[name] != value]
    if found["processes"] > 2:
        wrong.append(f"it sees {found['processes']} processes")
    if found["interfaces"] not in ([], ["lo"]):
        wrong.append(f"network interfaces: {found['interfaces']}")
    return f"it leaks ({'; '.join(wrong)})" if wrong else None
