"""One process, or several: each GPU (or, where there is none, each CPU process) runs the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from app.errors import UserError


def is_launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(processes: int, arguments: Sequence[str]) -> None:
    """Replace this process by torchrun with `processes` copies of `python -m app ARGUMENTS`."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"--num-gpus {processes}: this machine has {gpus}")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", "-m", "app", *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)
