"""A run handed to Slurm by submitit: saved and queued again when it is preempted or out of time."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from app.config.schema import Config
from app.errors import UserError

log = logging.getLogger("app")
FOLDER = "slurm"  # in the output folder: the job's script and what it printed
TIMES = 1000  # that a run may be queued again for want of time


def is_inside() -> bool:
    """Return whether this process runs in a job that `submit` handed over."""
    return "SUBMITIT_EXECUTOR" in os.environ


def submit(config: Config, arguments: Sequence[str], resume: str | None) -> str:
    """Hand `python -m app ARGUMENTS` to Slurm; return the job's id.

    Args:
        resume: the --resume of ARGUMENTS.

    Raises:
        UserError: there is no Slurm here, or it refuses the job; with its own words.
    """
    folder = Path(config.output_dir).resolve()
    # An output folder that holds no run was checked before; the job's own second start finds one.
    words = [word for word in arguments if word != "--overwrite"]
    executor = _executor(config, folder, folder.name)
    with _refused_is_user_error():
        job = executor.submit(Run([*words, f"--output-dir={folder}"], resume or "auto"))
    log.info(
        "submitted: job %s; output: %s; stop it with scancel %s",
        job.job_id,
        job.paths.stdout,
        job.job_id,
    )
    return str(job.job_id)


def submit_array(
    commands: Sequence[Sequence[str]],
    config: Config,
    folder: Path,
    name: str,
    *,
    at_once: int | None = None,
) -> str:
    """Hand several `python -m app ARGUMENTS` to Slurm as one array; return its number.

    Each is saved and queued again as a single run is, and does what is left when it starts again.

    Args:
        commands: arguments of each.
        config: whose `cluster` and `training` say what each takes.
        folder: where the jobs' script and what they print lie, in FOLDER.
        at_once: most that run together; None: Slurm's own.

    Raises:
        UserError: there is no Slurm here, or it refuses the array; with its own words.
    """
    executor = _executor(config, folder.resolve(), name)
    if at_once is not None:
        executor.update_parameters(array_parallelism=at_once)
    with _refused_is_user_error(), executor.batch():
        jobs = [executor.submit(Run(words, None)) for words in commands]
    array = jobs[0].job_id.partition("_")[0]
    log.info(
        "submitted: array %s of %d; output: %s; stop it with scancel %s",
        *(array, len(jobs), folder / FOLDER, array),
    )
    return array


def _executor(config: Config, folder: Path, name: str) -> submitit.SlurmExecutor:
    """Return what submits jobs as the configuration says."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "--cluster slurm: there is no sbatch on this machine. Start the run where jobs are "
            "submitted (with SAM3_RUNTIME=local), or leave --cluster out"
        )
    cluster, training = config.cluster, config.training
    executor = submitit.SlurmExecutor(folder / FOLDER, max_num_timeout=TIMES)
    parameters: dict[str, object] = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus * training.num_gpus,
        "gpus_per_node": None if training.device == "cpu" else training.num_gpus,
        "mem": None if cluster.memory_gb is None else f"{cluster.memory_gb}G",
        "time": cluster.minutes,
        "signal_delay_s": cluster.save_seconds,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "additional_parameters": {"requeue": True},
    }
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    return executor


@contextlib.contextmanager
def _refused_is_user_error() -> Iterator[None]:
    try:
        yield
    except (subprocess.CalledProcessError, FailedJobError) as error:
        raise UserError(f"--cluster slurm: sbatch refused the job: {_message(error)}") from None


class Run:
    """Run the command in a process of its own, which Slurm's signals reach as well.

    Args:
        resume: of a command that has --resume; another one knows by itself what is left.
    """

    def __init__(self, arguments: Sequence[str], resume: str | None) -> None:
        self.arguments, self.resume = list(arguments), resume
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        words = self.arguments
        if self.resume is not None:
            queued_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
            words = [*words, f"--resume={'auto' if queued_again else self.resume}"]
        self._process = subprocess.Popen([sys.executable, "-m", "app", *words])
        self._await_end()
        if code := self._process.wait():
            sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same job, to queue again once all is saved, when Slurm warns (USR2)."""
        self._await_end()
        return submitit.helpers.DelayedSubmission(Run(self.arguments, self.resume))

    def _await_end(self) -> None:
        """Wait, but not by Popen.wait: its lock would deadlock a signal handler that waits too."""
        if self._process is not None:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def _message(error: Exception) -> str:
    output = getattr(error, "output", None) or getattr(error, "stderr", None) or str(error)
    words = output.decode("utf-8", "replace") if isinstance(output, bytes) else str(output)
    return " ".join(words.split())
