"""Several processes on one machine or more, by torchrun: one a GPU, or so many on a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import torch

from app import signals
from app.errors import UserError
from app.model.device import share_of_threads

SAVE_SECONDS = 600  # between a signal and the end: torchrun's own 30 do not save a large model

FIRST_PORT, PORTS = 20_000, 10_000  # by a job's number: two jobs may share a node


def is_launched() -> bool:
    """Return whether this process is one of several that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(processes: int, arguments: Sequence[str], nodes: int = 1) -> None:
    """Replace this process by torchrun with `processes` copies of `python -m app ARGUMENTS`.

    Args:
        nodes: machines of a job of submitit's, each of which calls this.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"--num-gpus {processes}: this machine has {gpus}")
    command = [
        *(sys.executable, "-m", "app.launch.torchrun", *_meeting(nodes)),
        f"--nproc-per-node={processes}",
        f"--signals-to-handle={','.join(number.name for number in signals.SIGNALS)}",
        f"--shutdown-timeout={SAVE_SECONDS}",
        *("-m", "app", *arguments),
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, os.environ | share_of_threads(processes))


def _meeting(nodes: int) -> list[str]:
    """Return torchrun's words for where its processes meet: on the first of the nodes."""
    if nodes == 1:
        return ["--standalone"]
    import submitit

    job = submitit.JobEnvironment()
    port = FIRST_PORT + int(job.raw_job_id) % PORTS
    return [
        *(f"--nnodes={nodes}", f"--node-rank={job.node}", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={job.hostnames[0]}:{port}", f"--rdzv-id={job.raw_job_id}"),
    ]


@contextlib.contextmanager
def end_quietly_if_peer_died() -> Iterator[None]:
    """End with one line, not a traceback, if a peer died: the peer's log has the cause."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not (is_launched() and lost):
            raise
        sys.exit("error: another process of this run is gone; this one ends too")


def main() -> None:
    """Run torchrun; exit with the code of the process that failed first, or 143 after a signal."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except SignalException:
        sys.exit(signals.EXIT_CODE)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: process {rank} was killed ({name}, often for want of memory), and the others "
            "were ended; go on with the same command and --resume",
            file=sys.stderr,
        )
        sys.exit(128 - failure.exitcode)


if __name__ == "__main__":
    main()
