"""Figures of a run: in metrics.csv, metrics.json and TensorBoard always; in MLflow where asked."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from app.config.schema import TrackingConfig
from app.console import command
from app.files import write_csv, write_json
from app.tracking.state import mlflow_uri, read_state, without_password

log = logging.getLogger("app")
ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 5.0  # the longest that a run waits for MLflow at its end


class Tracker:
    """Writes the figures of one run to its folder.

    Args:
        folder: output folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def log_epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv anew, and the last row to TensorBoard.

        Args:
            rows: one for each epoch so far, with its number as "epoch".
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_csv(self.folder / "metrics.csv", columns, rows)
        for key, value in rows[-1].items():
            self._board.add_scalar(key, value, int(rows[-1]["epoch"]))
        self._board.flush()

    def finish(self, figures: Mapping[str, float | str | int]) -> None:
        """Write metrics.json and close TensorBoard's file."""
        write_json(self.folder / "metrics.json", figures)
        self._board.close()


@contextlib.contextmanager
def followed_by_mlflow(config: TrackingConfig, folder: Path) -> Iterator[None]:
    """Send what the folder holds to MLflow while the block runs, by another process.

    The process reads the files as they are written. A server that is absent, slow or dead costs the
    run no more than `END_SECONDS` at its end; `python -m app track` sends what is left.
    """
    uri = mlflow_uri(config.mlflow)
    if uri is None:
        yield
        return
    log.info("MLflow: %s", without_password(uri))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": os.pathsep.join(paths)}
    sender = subprocess.Popen(
        [sys.executable, "-m", "app.tracking.mlflow", str(folder)],
        stdin=subprocess.PIPE,  # closed when this process ends, however it does
        stdout=subprocess.DEVNULL,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C is for this process
    )
    try:
        yield
    finally:
        _end(sender, folder)


def _end(sender: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait `END_SECONDS` for figures and files, and then, if those were sent, for the weights.

    A sender that is late is left running: it ends by itself, and killing it might leave a store of
    SQLite half made.
    """
    assert sender.stdin is not None
    sender.stdin.close()
    deadline = time.monotonic() + END_SECONDS
    while sender.poll() is None and time.monotonic() < deadline and not read_state(folder).files:
        time.sleep(0.05)
    state = read_state(folder)
    if state.files:
        sender.wait()
        state = read_state(folder)
    if state.complete:
        log.info("MLflow: all sent, run %s", state.run_id)
    else:
        missing = "not all was sent" if state.figures else "not all figures were sent"
        reason = state.problem or "no answer in time"
        sending = command("python", "-m", "app", "track", folder)
        log.warning("MLflow: %s (%s); %s sends it", missing, reason, sending)
