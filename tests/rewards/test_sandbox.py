"""The sandbox under attack: what a program does to get out, to stay, to eat up the machine."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rewards import sandbox as sandbox_module
from rlhf_lightning.rewards.sandbox import MAX_OUTPUT, Sandbox

LIMIT_S = 1.0


def why_not() -> str:
    try:
        Sandbox().check()
    except UserError as error:
        return str(error)
    return ""


MISSING = why_not()
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """For programs that end by themselves, which a busy machine makes wait."""
    return Sandbox(limit_s=60.0, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def hasty() -> Sandbox:
    """For programs that do not."""
    return Sandbox(limit_s=LIMIT_S, memory_bytes=256 << 20)


def naively(program: str) -> str:
    """The same program without a sandbox."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def running(marker: str) -> list[str]:
    """Processes of this machine that carry the marker in their memory of how they were started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "cmdline").read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
    return found


def wait_for(what: Callable[[], Any], seconds: float) -> bool:
    """Whether it came about in time."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(what())


# ---- what uses up the machine ---------------------------------------------------------------------------------------

EATERS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "endless loop": "while True:\n    pass",
    "deaf to signals": "import signal as s, time\n"
    "for n in set(s.valid_signals()) - {9, 19}:\n    s.signal(n, s.SIG_IGN)\nwhile True:\n    time.sleep(0.1)",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "files": "files = [open('/dev/null') for _ in range(5000)]",
    "flood": "while True:\n    print('x' * 10000)",
    "disk": "with open('/tmp/x', 'wb') as f:\n    while True:\n        f.write(bytes(1 << 20))",
    "many files": "import itertools\nfor i in itertools.count():\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
    "shared memory": "open('/dev/shm/x', 'wb').write(b'x')",
    "root folder": "open('/x', 'wb').write(b'x')",
    "crash": "import ctypes\nctypes.string_at(0)",
    "kills everyone": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nraise SystemExit(1)",
    "core dump": "import os\nos.abort()",
}


@needs_sandbox
@pytest.mark.parametrize("program", EATERS.values(), ids=EATERS)
def test_no_program_succeeds_at_eating_the_machine_up(program, hasty):

    def seconds() -> float:
        began = time.perf_counter()
        ran = hasty.run_script(program)
        assert not ran.succeeded
        assert len(ran.output) <= MAX_OUTPUT
        return time.perf_counter() - began

    # on an idle machine + 0.1; a busy one is late now and then, a limit that does not hold is late every time
    assert any(seconds() < LIMIT_S + 3.0 for _ in range(4))


@needs_sandbox
def test_nothing_is_left_running(sandbox):
    daemon = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "MARKER"])
    os._exit(0)
time.sleep(0.3)
print("left")
"""
    marker = "left-behind-" + os.urandom(6).hex()
    assert sandbox.run_script(daemon.replace("MARKER", marker)).output == b"left\n"
    assert wait_for(lambda: not running(marker), 5)
    subprocess.run([sys.executable, "-c", daemon.replace("MARKER", marker)], stdout=subprocess.DEVNULL, check=True)
    assert wait_for(lambda: running(marker), 5), "without a sandbox the daemon lives on: the test can tell"
    for pid in running(marker):
        with suppress(ProcessLookupError):  # the one that was to leave another behind has left itself
            os.kill(int(pid), 9)


@needs_sandbox
def test_a_killed_trainer_leaves_nothing_running():
    marker = "orphan-" + os.urandom(6).hex()
    trainer = f"""
from rlhf_lightning.rewards.sandbox import Sandbox
import subprocess, os, sys
Sandbox(limit_s=60).run_script('''
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{marker}"])
''')
"""
    process = subprocess.Popen([sys.executable, "-c", trainer], cwd=Path(sandbox_module.__file__).parents[2])

    def inside() -> list[str]:
        return [pid for pid in running(marker) if int(pid) != process.pid]

    assert wait_for(lambda: inside() or process.poll() is not None, 60)
    assert inside()
    process.kill()
    process.wait()
    assert wait_for(lambda: not inside(), 5)


# ---- what looks for a way out ---------------------------------------------------------------------------------------


def spy(body: str) -> str:
    """A program that says whether it got what it wanted."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return f"import ctypes, os, socket\ntry:\n{indented}\nexcept Exception as e:\n    got = False\nprint(bool(got))"


LIBC = "libc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPES = {
    "reads a secret": "got = open(SECRET).read()",
    "reads a secret through a link": "link = '/tmp/' + ABSTRACT\nos.symlink(SECRET, link)\n"
    "try:\n    got = open(link).read()\nfinally:\n    os.unlink(link)",
    "writes to the host": "open(SECRET + '.new', 'w').write('x')\ngot = True",
    "environment": "got = 'VERY_SECRET' in os.environ",
    "sees the runner": "got = os.path.exists(f'/proc/{RUNNER}/cmdline') and b'python' in "
    "open(f'/proc/{RUNNER}/cmdline', 'rb').read()",
    "loopback": "got = socket.create_connection(('127.0.0.1', PORT), 1)",
    "unix socket by name": "s = socket.socket(socket.AF_UNIX)\ns.connect(SOCKET)\ngot = True",
    "abstract unix socket": "s = socket.socket(socket.AF_UNIX)\ns.connect('\\0' + ABSTRACT)\ngot = True",
}
PRIVILEGES = {
    "first process's environment": "got = open('/proc/1/environ', 'rb').read()",
    "parent's environment": "got = open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "is somebody": "got = os.getuid() != 65534 or os.getgid() != 65534",
    "has capabilities": "got = int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16)",
    "becomes root": "os.setuid(0)\ngot = True",
    "new user namespace": LIBC + "got = libc.unshare(0x10000000) == 0",
    "new mount namespace": LIBC + "got = libc.unshare(0x00020000) == 0",
    "mounts": LIBC + "got = libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "enters a namespace": LIBC + "got = libc.setns(os.open('/proc/1/ns/net', os.O_RDONLY), 0) == 0",
    "traces the runner": LIBC + "got = libc.ptrace(16, RUNNER, 0, 0) == 0",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\ngot = True",
    "loads a kernel's table": "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')\ngot = True",
    "makes a device": "os.mknod('/tmp/d', 0o020600, os.makedev(1, 1))\ngot = True",
    "types into the terminal": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')\ngot = True",
    "network devices": "got = [n for _, n in socket.if_nameindex() if n != 'lo']",
    "raw packets": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\ngot = True",
}


@needs_sandbox
@pytest.mark.parametrize("name", [*ESCAPES, *PRIVILEGES])
def test_no_way_out(name, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("VERY_SECRET", "canary")
    secret = tmp_path / "secret.txt"
    secret.write_text("canary")
    secret.chmod(0o644)
    abstract = f"sandbox-{os.urandom(6).hex()}"
    path = str(Path("/tmp") / f"{os.urandom(6).hex()}.socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
    ):
        named.bind(path)
        named.listen()
        unnamed.bind("\0" + abstract)
        unnamed.listen()
        here = {"SECRET": secret, "SOCKET": path, "ABSTRACT": abstract}
        setup = "\n".join(f"{word} = {str(value)!r}" for word, value in here.items())
        numbers = f"PORT, RUNNER = {tcp.getsockname()[1]}, {os.getpid()}"
        program = f"{setup}\n{numbers}\n{spy({**ESCAPES, **PRIVILEGES}[name])}"
        ran = sandbox.run_script(program)
        assert ran.output.decode().strip() == "False", name
        if name in ESCAPES:
            assert naively(program) == "True", "without a sandbox it works: the test can tell"
    os.unlink(path)
    assert sorted(p.name for p in tmp_path.iterdir()) in (["secret.txt"], ["secret.txt", "secret.txt.new"])


@needs_sandbox
def test_output_that_is_no_text_is_handed_over_as_it_is(sandbox):
    assert sandbox.run_script("import sys\nsys.stdout.buffer.write(bytes(range(256)))").output == bytes(range(256))


@needs_sandbox
def test_a_script_reads_its_input_and_its_exit_code_counts(sandbox):
    assert sandbox.run_script("print(int(input()) + 1)", "41\n").output == b"42\n"
    assert not sandbox.run_script("print(1)\nraise SystemExit(3)").succeeded
    assert sandbox.run_script("import sys\nprint(len(sys.stdin.read()))", "x" * 300_000).output == b"300000\n"


@needs_sandbox
def test_two_runs_share_nothing(sandbox):
    sandbox.run_script("open('/tmp/x', 'w').write('1')")
    assert sandbox.run_script("import os\nprint(os.listdir('/tmp'))").output == b"[]\n"


# ---- no sandbox, no start -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_bwrap(monkeypatch):
    """A bwrap that is a shell script of the test, where user nobody can run it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)

        def make(script: str) -> None:
            file = Path(folder) / "bwrap"
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o755)

        monkeypatch.setenv("PATH", folder)
        sandbox_module._working_command.cache_clear()
        yield make
        sandbox_module._working_command.cache_clear()


def test_without_bubblewrap_nothing_is_run(fake_bwrap):
    with pytest.raises(
        UserError, match=r"there is no bwrap on PATH: install bubblewrap .* never run without a sandbox"
    ):
        Sandbox().run_script("print(1)")


def test_a_bubblewrap_that_may_make_no_namespaces_is_refused(fake_bwrap):
    fake_bwrap('echo "bwrap: setting up uid map: Permission denied" >&2; exit 1')
    with pytest.raises(
        UserError, match=r"gives none here \(.*it does not start.*apparmor_restrict_unprivileged_userns"
    ):
        Sandbox().run_script("print(1)")


def test_a_bubblewrap_that_isolates_nothing_is_refused(fake_bwrap):
    # runs the command that stands behind bubblewrap's own options as it is
    fake_bwrap('while [ "$1" != "/usr/bin/python3" ] && [ $# -gt 0 ]; do shift; done; exec "$@"')
    if shutil.which("/usr/bin/python3") is None:
        pytest.skip("there is no /usr/bin/python3 to run the probe with")
    with pytest.raises(UserError, match=r"it leaks \(.*network: True.*reads: "):
        Sandbox(python="/usr/bin/python3").run_script("print(1)")
