"""The MLflow that a run sends to, and mlflow.json: what was sent of the run."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, NonNegativeInt, ValidationError

from app.errors import UserError
from app.files import read_json, write_text

FILE = "mlflow.json"
STORE = Path("outputs/mlflow.db")  # below the current folder


class State(BaseModel):
    """The parts of one run that were sent to one MLflow server.

    Attributes:
        tracker: address of the server, without a password.
        run_id: id of the run in MLflow; None before the run was created there.
        epochs: number of rows of metrics.csv that were sent.
        figures: whether the figures of the finished run were sent.
        files: whether report, plots and predictions were sent.
        model: id of the weights in MLflow.
        version: version of the weights in the registry, NAME/NUMBER.
        complete: whether all was sent.
        problem: why not, in a line.
    """

    tracker: str = ""
    run_id: str | None = None
    epochs: NonNegativeInt = 0
    figures: bool = False
    files: bool = False
    model: str | None = None
    version: str | None = None
    complete: bool = False
    problem: str | None = None


def registered(state: State) -> str:
    """Return a line of the weights' name and version in the registry, and its address."""
    name, _, version = str(state.version).rpartition("/")
    return f"registered: {name}, version {version}, at {state.tracker} (models:/{name}/{version})"


def read_state(folder: Path) -> State:
    """Return the folder's mlflow.json; an empty state where there is none, or a broken one."""
    try:
        return State.model_validate(read_json(folder / FILE))
    except (UserError, ValidationError):
        return State()


def write_state(folder: Path, state: State) -> None:
    """Write the folder's mlflow.json."""
    write_text(folder / FILE, state.model_dump_json(indent=2) + "\n")


def mlflow_uri(asked: str | None) -> str | None:
    """Return the address that `tracking.mlflow` stands for; None where nothing is sent.

    Args:
        asked: an address; "none"; "auto", which is $MLFLOW_TRACKING_URI or else a store below the
            current folder; None, which is $MLFLOW_TRACKING_URI or else nothing.
    """
    default = os.environ.get("MLFLOW_TRACKING_URI")
    if asked == "none":
        return None
    if asked is None:
        return default or None
    if asked == "auto":
        return default or f"sqlite:///{STORE.resolve()}"
    return asked


def without_password(uri: str) -> str:
    """Return the address as it may be shown and saved."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
