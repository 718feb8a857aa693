"""Work in numbered pieces, handed to a cluster: a job each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.config.schema import Config
from app.errors import UserError

CLUSTERS = ("slurm", "kubernetes")


def check(cluster: str | None) -> None:
    """Raise UserError where a cluster is of no known kind."""
    if cluster not in (None, *CLUSTERS):
        raise UserError(f"--cluster {cluster}: there is {', '.join(CLUSTERS)}")


def hand_over(
    cluster: str,
    words: Sequence[str],
    flag: str,
    config: Config,
    folder: Path,
    *,
    count: int,
    at_once: int | None,
) -> None:
    """Let a cluster do the pieces of a work.

    Args:
        words: of `python -m app`, which all pieces share.
        flag: that says which piece is meant, by its number or auto.
        folder: of the work.
        count: pieces, from 0.
        at_once: most that run together; None: the cluster's own.

    Raises:
        UserError: there is no such cluster here, or it refuses the work.
    """
    from app.launch import kubernetes, slurm  # submitit takes a moment to import

    name = folder.resolve().name
    if cluster == "slurm":
        commands = [[*words, flag, str(number)] for number in range(count)]
        slurm.submit_array(commands, config, folder, name, at_once=at_once)
        return
    pod = [*words, flag, "auto"]
    kubernetes.submit(pod, config, folder, name, completions=count, at_once=at_once)
