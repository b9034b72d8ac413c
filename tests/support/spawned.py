"""The end of a process that a test spawned as one of a group."""

import os
import sys
from typing import NoReturn

import torch.distributed as distributed


def leave_group() -> NoReturn:
    """End this process when all of the group are done with it, and leave the interpreter as it stands.

    Taking it apart has been seen to abort ("terminate called without an active exception"): a thread of gloo that still
    lets go of tensors asks for an interpreter that is no longer there.
    """
    distributed.barrier()  # one that leaves closes what another may still be reading
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
