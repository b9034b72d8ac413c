"""Cases in several processes.

Run as a script by each of them: parallel_processes.py CASES MODEL FOLDER, with LOCAL_RANK and its kin in the
environment. CASES are names of cases, with ; between; the first process writes what each gives to FOLDER/CASE.pt.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from fsdp1_cases import FLATTENED
from one_card import ON_ONE_CARD
from sharded_cases import SHARDED
from tensor_parallel_cases import IN_PARTS


def in_processes(cases: Sequence[str], model: str, folder: Path, *, count: int = 2, timeout: float = 280) -> None:
    """Run cases in `count` processes; an error, with what they said, if one of them fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    environment |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), ";".join(cases), model, str(folder)]
    outputs = [folder / f"rank{rank}.txt" for rank in range(count)]
    running = []
    for rank, output in enumerate(outputs):
        with output.open("w") as said:
            own = environment | {"LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(command, env=own, stdout=said, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * count, "\n".join(output.read_text()[-3000:] for output in outputs)


def main() -> None:
    names, model, folder = sys.argv[1:]
    # Lightning takes it away after a fit, and a case may take processes of one machine for machines of one process
    world, rank = int(os.environ["WORLD_SIZE"]), os.environ["LOCAL_RANK"]
    cases = SHARDED | IN_PARTS | FLATTENED | ON_ONE_CARD
    for name in names.split(";"):
        result = cases[name](model, Path(folder), world)
        if rank == "0":
            torch.save(result, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    main()
