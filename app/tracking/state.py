"""Which MLflow a run sends to, and what it has of the run: mlflow.json in the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from app.errors import UserError
from app.files import read_json, write_text

FILE = "mlflow.json"
STORE = Path("outputs/mlflow.db")  # below the current folder


class State(BaseModel):
    """Of one run at one tracker.

    Attributes:
        tracker: its address, without a password.
        run_id: MLflow's; None while it has not taken the run.
        epochs: rows of metrics.csv that it has.
        figures: whether it has those of the finished run too.
        files: whether it has report, plots and predictions.
        model: MLflow's id of the weights.
        version: what the registry calls them, NAME/NUMBER.
        complete: whether it has all that it was to have.
        problem: why it has not, in a line.
    """

    tracker: str = ""
    run_id: str | None = None
    epochs: int = 0
    figures: bool = False
    files: bool = False
    model: str | None = None
    version: str | None = None
    complete: bool = False
    problem: str | None = None


def read_state(folder: Path) -> State:
    """The folder's mlflow.json; an empty state where there is none, or none that can be read."""
    try:
        return State.model_validate(read_json(folder / FILE))
    except (UserError, ValidationError):
        return State()


def write_state(folder: Path, state: State) -> None:
    write_text(folder / FILE, state.model_dump_json(indent=2) + "\n")


def mlflow_uri(asked: str | None) -> str | None:
    """The tracker that `tracking.mlflow` stands for; None: no tracker."""
    here = os.environ.get("MLFLOW_TRACKING_URI")
    if asked == "none":
        return None
    if asked is None:
        return here or None
    if asked == "auto":
        return here or f"sqlite:///{STORE.resolve()}"
    return asked


def without_password(uri: str) -> str:
    """The address as it may be shown and kept."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
