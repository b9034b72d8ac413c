"""A run's processes, as torchrun or SLURM would start them: forks of one process that has imported everything.

Run as a script: launched.py RUNS, which are JSON: a list of [LAUNCHER, PORT, ARGUMENTS]. Of one after another it starts
two processes, writes what they print to LAUNCHER.N.txt, N = 0 and 1, and prints their exit codes.
"""

import json
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"


def torchrun(rank: int, port: str) -> dict[str, str]:
    """What torchrun's agent sets."""
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**places, "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def slurm(rank: int, port: str) -> dict[str, str]:
    """What `srun` sets on one node; Lightning makes the port of the job's number, so it is given."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    places = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return {**job, **places, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}


LAUNCHERS = {"torchrun": torchrun, "slurm": slurm}


def main() -> None:
    from rlhf_lightning.__main__ import main as command_line
    from rlhf_lightning.cli import app

    app.family()
    for launcher, port, arguments in json.loads(sys.argv[1]):
        children = []
        for rank in (0, 1):
            if (pid := os.fork()) != 0:
                children.append(pid)
                continue
            os.environ.update(LAUNCHERS[launcher](rank, port))
            log = os.open(f"{launcher}.{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["rlhf-lightning", *arguments]
            code = 1
            try:
                code = command_line(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children), flush=True)


if __name__ == "__main__":
    main()
