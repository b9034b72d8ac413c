"""Several processes of one run: one message, one exit code, nobody left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from rlhf_lightning.cli import ranks, stacks
from rlhf_lightning.cli.first_error import JOB, claim, code_of_another, exit_code, first_failure, forget_job
from rlhf_lightning.cli.ranks import RankLauncher, obituary
from rlhf_lightning.core.errors import Stopped, UserError

REPOSITORY = Path(__file__).resolve().parents[1]
STAGE = '''
import ctypes
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

from torch.distributed.distributed_c10d import _set_pg_timeout

from rlhf_lightning import ModelSpec, SFTModule
from rlhf_lightning.core.errors import UserError


class Troubled(SFTModule):
    """Waits a little at each batch; in the process that is named, does what is named."""

    def __init__(
        self, policy: ModelSpec, rank: int = -1, does: Literal["fail", "crash", "hang"] = "fail", **kwargs
    ):
        super().__init__(policy, **kwargs)
        self.rank = rank
        self.does = does

    def on_train_batch_start(self, batch, batch_idx):
        Path(f"pid{self.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.1)
        if self.does == "hang":
            _set_pg_timeout(timedelta(seconds=2))
        if self.rank in (self.global_rank, 9):
            getattr(self, self.does)()

    def fail(self):
        raise UserError("the record is bad")

    def crash(self):
        ctypes.string_at(0)  # crashes here

    def hang(self):
        time.sleep(1000)  # hangs here
'''


def line_of(comment: str) -> str:
    """Where a stack names the line of `STAGE` that ends in this comment."""
    number = next(i for i, line in enumerate(STAGE.splitlines(), start=1) if line.endswith(comment))
    return f'mine.py", line {number} in '


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A run whose first process is another one."""
    monkeypatch.setenv(JOB, f"{os.getppid()}:{tmp_path}")
    return tmp_path


def test_the_first_failure_is_the_only_one_that_speaks(job):
    assert claim(2)
    assert claim(2), "the same process may ask twice"
    assert not claim(1, owner=1)
    assert first_failure() == (os.getpid(), 2)
    assert code_of_another() is None


def test_a_process_that_fails_later_takes_the_code_of_the_first(job):
    assert claim(2, owner=1)
    assert not claim(1)
    assert code_of_another() == 2


def test_alone_or_without_the_shared_folder_every_failure_speaks(job, monkeypatch):
    monkeypatch.setenv(JOB, f"1:{job / 'gone'}")
    assert claim(1)
    assert code_of_another() is None
    monkeypatch.delenv(JOB)
    assert claim(1)
    assert first_failure() is None


def test_only_the_process_that_made_the_folder_removes_it(job, monkeypatch):
    forget_job()
    assert job.exists()
    monkeypatch.setenv(JOB, f"{os.getpid()}:{job}")
    forget_job()
    assert not job.exists()
    assert JOB not in os.environ


def test_exit_codes():
    codes = [exit_code(e) for e in (UserError("x"), KeyboardInterrupt(), Stopped("SIGTERM", 143, None), OSError())]
    assert codes == [2, 130, 143, 1]


def test_what_is_said_of_a_process_that_died():
    assert "rank 3 was killed by SIGKILL: the system may have run out of memory" in obituary(3, -9)
    assert "rank 1 was killed by SIGSEGV: a crash in native code, whose Python stacks stand further up;" in obituary(
        1, -11
    )
    assert "rank 1 ended with exit code 7;" in obituary(1, 7)


def test_a_process_that_waits_for_a_dead_one_is_ended(job, monkeypatch, capsys):
    ended = []

    def leave(code):
        ended.append(code)
        raise SystemExit

    monkeypatch.setattr(ranks.os, "_exit", leave)
    launcher = RankLauncher(None, 3, 1, grace_seconds=0.0)
    launcher.procs = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
    launcher.procs[1].wait()
    with pytest.raises(SystemExit):
        launcher._watch(ranks.threading.Event())
    assert ended == [1]
    assert launcher.procs[0].poll() == -signal.SIGKILL
    assert "rank 2 ended with exit code 1" in capsys.readouterr().err


@contextmanager
def exits_with(code, monkeypatch):
    """What is inside ends its process."""
    left = []

    def leave(given):
        left.append(given)
        raise SystemExit

    monkeypatch.setattr(ranks.os, "_exit", leave)
    with pytest.raises(SystemExit):
        yield
    assert left == [code]


@pytest.fixture
def stopped():
    """A process that a signal has stopped."""
    process = subprocess.Popen(["sleep", "60"])
    assert not ranks.is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    while not ranks.is_stopped(process.pid):
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_process_is_stopped_by_the_word_of_the_kernel_and_for_as_long_as_it_is_seen(stopped):
    watch = ranks.StoppedFor()
    assert [watch.seconds(stopped.pid) for _ in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    os.kill(stopped.pid, signal.SIGCONT)
    while ranks.is_stopped(stopped.pid):
        time.sleep(0.01)
    assert watch.seconds(stopped.pid) == 0
    assert not ranks.is_stopped(2**30)


def test_a_stopped_process_is_named_and_ended_with_those_that_wait_for_it(job, stopped, monkeypatch, capsys):
    launcher = RankLauncher(None, 3, 1, grace_seconds=0.0, stopped_seconds=0.3)
    working = subprocess.Popen(["sleep", "60"])
    launcher.procs = [working, stopped]
    with exits_with(1, monkeypatch):
        launcher._watch(ranks.threading.Event())
    assert working.poll() == stopped.poll() == -signal.SIGKILL
    said = capsys.readouterr().err
    assert f"the process of rank 2 has been stopped for 0 s (SIGSTOP, pid {stopped.pid})" in said
    assert "run out of memory" not in said, "nor is it said that somebody else killed it"


def test_the_first_process_is_watched_by_those_that_it_started(tmp_path, stopped, monkeypatch, capsys):
    monkeypatch.setenv(JOB, f"{stopped.pid}:{tmp_path}")
    monkeypatch.setattr(ranks.os, "getppid", lambda: stopped.pid)
    with exits_with(1, monkeypatch):
        ranks._end_with_parent(0.3)
    assert stopped.wait() == -signal.SIGKILL
    assert "the process of rank 0 has been stopped" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [None, _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)])
def test_the_others_watch_whether_or_not_their_strategy_gave_them_a_launcher(launcher, tmp_path, monkeypatch):
    """`ddp` gives them one, `fsdp2` does not."""
    monkeypatch.setenv(JOB, f"{os.getppid()}:{tmp_path}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    begun = []
    monkeypatch.setattr(ranks, "_in_background", begun.append)
    ranks.watched(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher, _launcher=launcher)))
    assert len(begun) == 1
    monkeypatch.setenv(JOB, f"{os.getpid()}:{tmp_path}")
    ranks.watched(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher, _launcher=launcher)))
    assert len(begun) == 1, "a run of its own, started by hand within another one's environment"


def test_nobody_outlives_the_first_process_by_more_than_some_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB, f"{2**30}:{tmp_path}")
    waited = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    with exits_with(1, monkeypatch):
        ranks._end_with_parent(15.0)
    assert waited == [ranks.GRACE_SECONDS]


def test_a_process_whose_starter_was_killed_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB, f"{2**30}:{tmp_path}")
    assert code_of_another() is None, "a run of its own, within another one's environment"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert code_of_another() == 1


# --- where processes are


@pytest.fixture
def working(tmp_path):
    """A process that would write its stacks; its stderr is a file."""
    code = "import time\nfrom rlhf_lightning.cli import stacks\nstacks.enable()\nprint(flush=True)\ntime.sleep(60)\n"
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=said, env={**os.environ, "PYTHONPATH": path}
        )
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_is_asked_says_where_it_is_and_goes_on(working, tmp_path, capsys):
    stacks.ask(1, working.pid)
    assert re.search(r'"<string>", line [45] in <module>', (tmp_path / "said").read_text())
    assert working.poll() is None
    assert f"rank 1, for which others waited, is here (pid {working.pid})" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_told_and_stays_one(number, working, tmp_path):
    working.send_signal(number)
    assert working.wait(10) == -number
    assert re.search(r'"<string>", line [45] in <module>', (tmp_path / "said").read_text())


def test_signals_that_end_a_run_are_not_touched(working, tmp_path):
    working.send_signal(signal.SIGTERM)
    assert working.wait(10) == -signal.SIGTERM
    assert not (tmp_path / "said").read_text()


def test_a_signal_that_is_spoken_for_is_left_alone(monkeypatch):
    before = signal.signal(stacks.ASK, signal.SIG_IGN)
    try:
        monkeypatch.setattr(stacks.faulthandler, "register", lambda *_: pytest.fail("it was somebody's"))
        stacks.enable()
    finally:
        signal.signal(stacks.ASK, before)


def test_who_waited_in_vain_asks_the_first_process_unless_that_one_has_failed_too(working, tmp_path, monkeypatch):
    monkeypatch.setenv(JOB, f"{working.pid}:{tmp_path}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(stacks.os, "getppid", lambda: working.pid)
    monkeypatch.setattr(stacks, "TO_FAIL_SECONDS", 0.2)
    asked = []
    monkeypatch.setattr(stacks, "ask", lambda rank, pid: asked.append((rank, pid)))
    late = RuntimeError("[unbound_buffer.cc:129] Timed out waiting 2000ms for send operation to complete")
    stacks.ask_the_first(RuntimeError("Connection closed by peer"))
    stacks.ask_the_first(TimeoutError("timed out"))
    assert not asked, "nobody was waited for"
    stacks.ask_the_first(late)
    assert asked == [(0, working.pid)]
    assert claim(1)
    stacks.ask_the_first(late)
    assert len(asked) == 2, "that this one has failed says nothing of the first"
    (tmp_path / "first").unlink()
    assert claim(1, owner=working.pid)
    stacks.ask_the_first(late)
    assert len(asked) == 2


def test_only_those_are_asked_that_have_not_timed_out_themselves(working, job, monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "ask", lambda rank, pid: asked.append(rank))
    launcher = RankLauncher(None, 3, 1, grace_seconds=0.5)
    launcher.procs = [subprocess.Popen(["sleep", "0.1"]), working]
    launcher._failed(RuntimeError("Timed out waiting 2000ms for send operation to complete"))
    assert asked == [2]
    assert working.poll() == -signal.SIGKILL
    asked.clear()
    launcher._failed(RuntimeError("Connection closed by peer"))
    assert not asked


# --- two real processes


@pytest.fixture
def two(tmp_path, tiny_tokenizer, tiny_config):
    """Starts `fit` in two processes, in a fresh folder."""
    (tmp_path / "mine.py").write_text(STAGE)
    records = [{"prompt": "the film", "completion": f" was {word}"} for word in ("good", "bad", "long", "short") * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = {"default_root_dir": "run", "accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 40}
    config = {
        "trainer": {**trainer, "enable_model_summary": False, "enable_progress_bar": False},
        "default_callbacks": ["checkpoint", "stop"],
        "model": {
            "class_path": "mine.Troubled",
            "init_args": {"policy": {"config": tiny_config, "tokenizer": str(tiny_tokenizer)}},
        },
        "data": {"train": "train.jsonl", "batch_size": 2},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))

    def start(*options: str) -> subprocess.Popen:
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
        command = [sys.executable, "-m", "rlhf_lightning", "fit", "--config", "fit.yaml"]
        command += ["--allow_module", "mine", *options]
        return subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )

    return start


def pid_of(folder: Path, rank: int, started: subprocess.Popen) -> int:
    file = folder / f"pid{rank}"
    while not (file.exists() and file.read_text()):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    return int(file.read_text())


@pytest.mark.slow
def test_a_users_mistake_in_one_process_is_one_message_and_exit_code_2(two):
    started = two("--model.rank", "1")
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 2, said
    assert said.count("error: the record is bad") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_with_a_checkpoint(two, tmp_path):
    started = two()
    other = pid_of(tmp_path, 1, started)
    os.kill(other, signal.SIGTERM)
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 143, said
    assert said.count("stopped by SIGTERM; the same command with --resume auto goes on from") == 1
    assert not Path(f"/proc/{other}").exists()
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 1
    assert len(saved["loader_progress"]) == 2


@pytest.mark.slow
def test_a_process_that_crashes_is_named_and_says_where(two):
    started = two("--model.rank", "1", "--model.does", "crash")
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 1, said
    assert "error: the process of rank 1 was killed by SIGSEGV" in said
    crashed = said.partition("Fatal Python error: Segmentation fault")[2]
    assert line_of("# crashes here") in crashed


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_says_where(two, tmp_path):
    started = two("--model.rank", "1", "--model.does", "hang")
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 1, said
    assert "the process of rank 1, for which others waited, is here" in said
    assert line_of("# hangs here") in said
    assert not Path("/proc", (tmp_path / "pid1").read_text()).exists()
