"""A run handed to Slurm by submitit: saved and queued again when it is preempted or out of time."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
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
    if shutil.which("sbatch") is None:
        raise UserError(
            "--cluster slurm: there is no sbatch on this machine. Start the run where jobs are "
            "submitted (with SAM3_RUNTIME=local), or leave --cluster out"
        )
    folder = Path(config.output_dir).resolve()
    # An output folder that holds no run was checked before; the job's own second start finds one.
    words = [word for word in arguments if word != "--overwrite"]
    run = Run([*words, f"--output-dir={folder}"], resume or "auto")
    cluster, training = config.cluster, config.training
    executor = submitit.SlurmExecutor(folder / FOLDER, max_num_timeout=TIMES)
    parameters: dict[str, object] = {
        "job_name": folder.name,
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
    try:
        job = executor.submit(run)
    except (subprocess.CalledProcessError, FailedJobError) as error:
        raise UserError(f"--cluster slurm: sbatch refused the job: {_message(error)}") from None
    log.info(
        "submitted: job %s; output: %s; stop it with scancel %s",
        job.job_id,
        job.paths.stdout,
        job.job_id,
    )
    return str(job.job_id)


class Run:
    """Run the command in a process of its own, which Slurm's signals reach as well."""

    def __init__(self, arguments: Sequence[str], resume: str) -> None:
        self.arguments, self.resume = list(arguments), resume
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        queued_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        resume = f"--resume={'auto' if queued_again else self.resume}"
        self._process = subprocess.Popen([sys.executable, "-m", "app", *self.arguments, resume])
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
