"""Images by the million from the command's words: a shard here, all of them, or on a cluster."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from app.console import counted
from app.errors import UserError
from app.inference.folder import unwritable_is_user_error
from app.inference.settings import Settings
from app.launch import clusters, shards
from app.launch.shards import Shard
from app.scale.sources import KINDS
from app.signals import StopRequest

log = logging.getLogger("app")
OWN = ("--shard", "--cluster", "--at-once", "--cluster-option")  # not of a shard's words
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Scale:
    """Hold the flags of work that is split.

    Attributes:
        shards: how many; None: one.
        shard: I, I/N or auto.
        price: of an hour of this machine.
    """

    shards: int | None
    shard: str | None
    cluster: str | None
    at_once: int | None
    cluster_options: Sequence[str]
    price: float | None

    @property
    def is_asked(self) -> bool:
        return any(v is not None for v in (self.shards, self.shard, self.cluster))


def start(
    source: str,
    output: Path,
    settings: Settings,
    scale: Scale,
    stop: StopRequest,
    *,
    batch_size: int,
    processes: int,
) -> None:
    """Predict on a shard, on all of them, or hand them to a cluster.

    Raises:
        UserError: whatever the user must mend; typer.Exit(3): images that could not be read.
    """
    (kind,) = settings.save if len(settings.save) == 1 else ("",)
    if kind not in KINDS:
        raise UserError(f"--save: of many images it is one of {', '.join(KINDS)}")
    which = _which(scale)
    if scale.cluster is not None:
        _hand_over(output, scale, which.count, settings.device)
        return
    if scale.shard is None and which.count > 1:
        _all(which.count, processes, stop)
        return
    from app.inference.worker import load_predictor  # torch: where there is work to do
    from app.scale.predict import predict_shard, tell

    predictor = load_predictor(settings)
    predictor.check_length(settings.prompts)
    with unwritable_is_user_error(output):
        tally = predict_shard(
            *(source, which, output, settings, predictor, kind),
            stop=stop,
            batch_size=batch_size,
        )
    tell(tally, which, output, scale.price)
    if tally.unreachable:
        number = counted(len(tally.unreachable), "image")
        log.error("%s could not be fetched: the same command tries again", number)
    if tally.failed or tally.unreachable:
        raise typer.Exit(3)


def _which(scale: Scale) -> Shard:
    """Return the shard that is meant; of none in particular the first."""
    clusters.check(scale.cluster)
    if scale.cluster is not None and (scale.shards is None or scale.shard is not None):
        raise UserError("--cluster: say by --shards N in how many pieces the images are done")
    text = scale.shard
    if text is None:
        return Shard(0, scale.shards or 1)
    if "/" in text:
        found = shards.parse_shard(text)
        if scale.shards not in (None, found.count):
            raise UserError(f"--shard {text} and --shards {scale.shards}: name other numbers")
        return found
    if scale.shards is None:
        raise UserError(f"--shard {text}: must be I/N, or with --shards N a number, or auto")
    return Shard(shards.choose(text, scale.shards, "--shard", below="--shards "), scale.shards)


def _all(count: int, processes: int, stop: StopRequest) -> None:
    """Do all shards, each by a process of its own, some at a time."""
    from app.model.device import slots  # torch: where there is work to do

    left, free = list(range(count)), slots(processes)
    running: list[tuple[subprocess.Popen[bytes], dict[str, str]]] = []
    codes: list[int] = []
    words = [sys.executable, "-m", "app", *_words()]
    with stop.deferred():
        try:
            while (left or running) and not stop.asked:
                while left and free:
                    slot = free.pop(0)
                    process = subprocess.Popen(
                        [*words, "--shard", f"{left.pop(0)}/{count}"],
                        env=os.environ | slot,
                        start_new_session=True,
                    )
                    running.append((process, slot))
                time.sleep(POLL_SECONDS)
                for process, slot in [each for each in running if each[0].poll() is not None]:
                    running.remove((process, slot))
                    free.append(slot)
                    codes.append(process.returncode)
                    if process.returncode not in (0, 3):
                        left.clear()  # what ends one would end them all
        finally:
            for process, _ in running:
                process.terminate()
            for process, _ in running:
                process.wait()
    if bad := [code for code in codes if code not in (0, 3)]:
        raise typer.Exit(bad[0] if bad[0] > 0 else 1)
    if any(codes):
        raise typer.Exit(3)


def _words() -> list[str]:
    """Return this command's own words, without those that say how the work is split up."""
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        name = word.partition("=")[0]
        if name not in OWN:
            words.append(word)
        elif "=" not in word:
            next(rest, None)
    return words


def _hand_over(output: Path, scale: Scale, count: int, device: str | None) -> None:
    """Let a cluster do the shards, a job each, with a GPU unless a CPU is asked for."""
    from app.config.compose import load_config

    asked = [f"cluster.{text}" for text in scale.cluster_options]
    config = load_config([*asked, *(["training.device=cpu"] if device == "cpu" else [])])
    output.mkdir(parents=True, exist_ok=True)
    assert scale.cluster is not None
    clusters.hand_over(
        *(scale.cluster, _words(), "--shard", config, output),
        count=count,
        at_once=scale.at_once,
    )
