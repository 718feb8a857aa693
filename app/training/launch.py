"""One process, or several: each GPU (or, where there is none, each CPU process) runs the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from app.errors import UserError
from app.training import signals

SAVE_SECONDS = 600  # between a signal and the end: torchrun's own 30 do not save a large model


def is_launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(processes: int, arguments: Sequence[str]) -> None:
    """Replace this process by torchrun with `processes` copies of `python -m app ARGUMENTS`."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"--num-gpus {processes}: this machine has {gpus}")
    command = [
        *(sys.executable, "-m", "app.training.launch", "--standalone"),
        f"--nproc-per-node={processes}",
        f"--signals-to-handle={','.join(number.name for number in signals.SIGNALS)}",
        f"--shutdown-timeout={SAVE_SECONDS}",
        *("-m", "app", *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


def main() -> None:
    """torchrun, with the exit code of the process that failed first, or 143 after a signal."""
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except SignalException:
        sys.exit(signals.EXIT_CODE)
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


if __name__ == "__main__":
    main()
