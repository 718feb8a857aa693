"""Work that is split, as an Indexed Job of Kubernetes: YAML, applied where a cluster answers.

Each pod mounts one claim, which holds what the current folder holds here, and is numbered by
JOB_COMPLETION_INDEX. Exit codes decide what comes after a pod: 2 and 3 are the user's to mend, 143
is a stop after which it goes on.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from app.config.schema import Config
from app.console import plain
from app.errors import UserError
from app.files import write_text
from app.signals import EXIT_CODE

log = logging.getLogger("app")
FILE = "job.yaml"  # in the work's folder
DATA = "/data"  # where the claim is mounted, and the pod works
TRIES = 6  # of an index, beside those that were stopped
MENDED_BY_USER = [2, 3]
SECONDS = 20  # that kubectl has to answer
CONTAINER = "app"


def submit(
    arguments: Sequence[str],
    config: Config,
    folder: Path,
    name: str,
    *,
    completions: int,
    at_once: int | None = None,
) -> Path:
    """Write the job to `folder`, and apply it where kubectl reaches a cluster.

    Args:
        arguments: of `python -m app`, the same for each pod; paths within the current folder.
        config: whose `cluster` and `training` say what each pod takes.
        completions: pods, from 0.
        at_once: most that run together; None: all.

    Returns:
        The file.

    Raises:
        UserError: the folder is outside of the current one, or the cluster refuses the job.
    """
    here = Path.cwd().resolve()
    if not folder.resolve().is_relative_to(here):
        raise UserError(
            f"--cluster kubernetes: {folder} is outside of {here}, which the claim "
            f"{config.cluster.claim} stands for; name a folder within it"
        )
    words = [_within(word, here) for word in arguments]
    job = manifest(words, config, name, completions=completions, at_once=at_once)
    file = folder / FILE
    write_text(file, yaml.safe_dump(job, sort_keys=False))
    claim = config.cluster.claim
    log.info("job: %s, %d pods; the claim %s must hold %s", file, completions, claim, here)
    apply = ["kubectl", "apply", "-f", str(file)]
    if not _answers():
        log.info("apply it where kubectl reaches the cluster: %s", " ".join(apply))
        return file
    done = subprocess.run(apply, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise UserError(f"--cluster kubernetes: kubectl refused it: {plain(done.stderr.strip())}")
    log.info("%s", plain(done.stdout.strip()))
    return file


def _within(word: str, here: Path) -> str:
    """Return a path below the current folder relative to it, and other words as they are."""
    path = Path(word)
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else word


def _answers() -> bool:
    """Return whether kubectl is there and reaches a cluster."""
    if shutil.which("kubectl") is None:
        return False
    try:
        asked = ["kubectl", "version", "--request-timeout=5s"]
        return subprocess.run(asked, capture_output=True, timeout=SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def manifest(
    arguments: Sequence[str],
    config: Config,
    name: str,
    *,
    completions: int,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Return the job, as `submit` writes it."""
    cluster, training = config.cluster, config.training
    called = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:52] or "work"
    labels = {"app": "sam3-finetuning"}
    limits: dict[str, Any] = {}
    if training.device != "cpu":
        limits["nvidia.com/gpu"] = training.num_gpus
    if cluster.memory_gb is not None:
        limits["memory"] = f"{cluster.memory_gb}Gi"
    requests = {"cpu": cluster.cpus * training.num_gpus, **limits}
    spec: dict[str, Any] = {
        "completions": completions,
        "parallelism": min(at_once or completions, completions),
        "completionMode": "Indexed",
        "backoffLimitPerIndex": TRIES,
        "maxFailedIndexes": completions,  # one that fails costs itself
        "podFailurePolicy": {
            "rules": [
                _on_exit("FailIndex", MENDED_BY_USER),
                _on_exit("Ignore", [EXIT_CODE]),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            ]
        },
        "template": {
            "metadata": {"labels": dict(labels)},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": cluster.save_seconds,
                "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": CONTAINER,
                        "image": cluster.image,
                        "args": list(arguments),
                        "workingDir": DATA,
                        "resources": {"requests": requests, "limits": limits},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                        "volumeMounts": [
                            {"name": "data", "mountPath": DATA},
                            {"name": "shm", "mountPath": "/dev/shm"},
                        ],
                    }
                ],
                "volumes": [
                    {"name": "data", "persistentVolumeClaim": {"claimName": cluster.claim}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}},
                ],
            },
        },
    }
    if cluster.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = cluster.queue
        spec["suspend"] = True  # until Kueue admits it
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": called, "labels": labels},
        "spec": spec,
    }


def _on_exit(action: str, codes: Sequence[int]) -> dict[str, Any]:
    asked = {"containerName": CONTAINER, "operator": "In", "values": list(codes)}
    return {"action": action, "onExitCodes": asked}
