"""Processes that answer one JSON line with another, each with a wall limit, and that may die of it."""

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.core.errors import UserError

GRACE_S = 1.0
"""Seconds after its limit at which a worker that did not end itself is killed."""
START_S = 60.0
"""Seconds that a worker may take to start."""
JOBS_PER_WORKER = 2000
"""A worker is replaced after so many jobs: its caches would grow."""


class WorkerPool:
    """Runs `script` in `num_workers` processes of the same Python, with an empty environment.

    Args:
        script: writes a line when ready, then a line for each line it reads; ends itself when a job takes too long.
        seconds: wall limit of a job, the script's only argument.
        num_workers: processes.
    """

    def __init__(self, script: Path, seconds: float, num_workers: int) -> None:
        self.script = script
        self.seconds = seconds
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self.num_workers = num_workers
        self._alive: set[_Worker] = set()
        for _ in range(num_workers):
            self._idle.put(None)
        self._end = weakref.finalize(self, _kill_all, self._alive)

    def map(self, jobs: Sequence[Any]) -> list[Any]:
        """The answer to each job; None where the worker died or ran out of time."""
        answers: list[Any] = [None] * len(jobs)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            todo.put(index)
        errors: list[UserError] = []

        def work() -> None:
            while not errors:
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers[index] = self._run(jobs[index])
                except UserError as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.num_workers, len(jobs)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return answers

    def close(self) -> None:
        """End all workers."""
        _kill_all(self._alive)

    def _run(self, job: Any) -> Any:
        worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker(self.script, self.seconds)
                self._alive.add(worker)
            answer = worker.ask(job, self.seconds + GRACE_S)
            if answer is None or worker.jobs >= JOBS_PER_WORKER:
                self._alive.discard(worker)
                worker.kill()
                worker = None
            return answer
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self, script: Path, seconds: float) -> None:
        self.jobs = 0
        # its modules come from where ours do; nothing else of our environment (tokens, keys) is its business
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        self._buffer = b""
        if self._line(START_S) is None:
            self.kill()
            raise UserError(
                f"{script.name} does not start (exit code {self.process.returncode}): try "
                f"`{sys.executable} {script} 3`, which must print that it is ready"
            )

    def ask(self, job: Any, seconds: float) -> Any:
        """The answer; None if the process died or did not answer in time."""
        self.jobs += 1
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._line(seconds)
        return None if line is None else json.loads(line)

    def _line(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(seconds):
                    return None
                read = os.read(self.process.stdout.fileno(), 65536)
                if not read:
                    return None
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        self.process.wait()


def _kill_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()
    workers.clear()
