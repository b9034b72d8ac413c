"""A vLLM server as a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    """A vLLM server of its own process group."""

    url: str
    process: subprocess.Popen
    log: Path

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def start_server(model, folder: Path, *more: str) -> Server:
    """`python -m rlhf_lightning.rollout.vllm_serve` on a free port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--port", str(port), *more]
    command = [sys.executable, "-m", "rlhf_lightning.rollout.vllm_serve", "--model", str(model), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return server
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(1)
    server.signal(signal.SIGKILL)
    raise AssertionError(log.read_text()[-3000:])
