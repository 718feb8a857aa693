"""Where figures go: metrics.csv, metrics.json and TensorBoard, always; MLflow where it is asked."""

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
from app.files import write_csv, write_json
from app.tracking.state import mlflow_uri, read_state, without_password

log = logging.getLogger("app")
ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 5.0  # that a tracker may cost at the end of a run


class Tracker:
    """The figures of one run, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def log_epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write metrics.csv, whole, with a row an epoch; send the last row to TensorBoard."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_csv(self.folder / "metrics.csv", columns, rows)
        for key, value in rows[-1].items():
            self._board.add_scalar(key, value, int(rows[-1]["epoch"]))
        self._board.flush()

    def finish(self, figures: Mapping[str, float | str | int]) -> None:
        """Write metrics.json and close."""
        write_json(self.folder / "metrics.json", figures)
        self._board.close()


@contextlib.contextmanager
def followed_by_mlflow(config: TrackingConfig, folder: Path) -> Iterator[None]:
    """While the block runs, a process of its own sends what the folder holds to MLflow.

    It reads the files as they are written, so a tracker that is absent, slow or dead costs the
    run nothing but `END_SECONDS` at the end; what it has not taken, `python -m app track` sends.
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
    """Give the sender `END_SECONDS` for figures and files; the weights may take longer.

    Those it sends only to a tracker that has just taken all else, and that answers. A sender that
    is late is left alone: it ends by itself, and killed it might leave a store half made.
    """
    assert sender.stdin is not None
    sender.stdin.close()
    until = time.monotonic() + END_SECONDS
    while sender.poll() is None and time.monotonic() < until and not read_state(folder).files:
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
        log.warning("MLflow: %s (%s); python -m app track '%s' sends it", missing, reason, folder)
