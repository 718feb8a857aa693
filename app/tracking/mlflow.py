"""A run's figures, files and weights → MLflow, from what its folder holds.

`training.tracking` starts this as a process of its own; `python -m app track` does the same by
hand, later. mlflow.json says what has been taken, so nothing is sent twice.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import posixpath
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

from app.config.compose import read_yaml
from app.errors import UserError
from app.files import flatten, locked, read_json
from app.tracking.state import State, mlflow_uri, read_state, without_password, write_state
from app.training.metric import gain, metric_name

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 2.0  # between looks at the folder
RETRY_SECONDS = 30.0  # after the tracker has failed
FILES = (
    *("report.html", "dataset_report.html", "config.yaml", "config_resolved.yaml"),
    *("environment.json", "metrics.csv", "metrics.json", "metrics_by_class.csv", "train.log"),
)
FOLDERS = ("plots", "predictions")
MODEL_SCRIPT = Path(__file__).with_name("served_model.py")
CHAMPION = "champion"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# What one request may hold, and how long names and values may be (mlflow/utils/validation.py).
METRICS_A_REQUEST, PARAMS_A_REQUEST = 1000, 100
NAME_LENGTH, VALUE_LENGTH, DIGEST_LENGTH = 250, 6000, 36


class Sender:
    """Brings what MLflow has of a run up to what its folder holds.

    Each method does what is left to do, and raises whatever the tracker makes of it.

    Args:
        folder: of the run.
        uri: the tracker.
        register_as: name in the registry for the weights; None: the one of the run's settings.
    """

    def __init__(self, folder: Path, uri: str, register_as: str | None = None) -> None:
        self.folder, self.uri = folder, uri
        self.settings: dict[str, Any] = read_yaml(folder / "config_resolved.yaml")
        environment = folder / "environment.json"  # a run from Python has none
        self.environment = read_json(environment) if environment.is_file() else {}
        tracking = self.settings.get("tracking", {})
        self.experiment = tracking.get("experiment", "sam3-finetuning")
        self.register_as = register_as or tracking.get("register_as")
        mlflow.set_tracking_uri(uri)
        self.client = MlflowClient(uri)
        self.state = read_state(folder)
        if self.state.tracker != without_password(uri):  # another one knows nothing of the run
            self.state = State(tracker=without_password(uri))

    def keep(self, **changes: object) -> None:
        """Note in mlflow.json what was taken."""
        self.state = self.state.model_copy(update=changes)
        write_state(self.folder, self.state)

    def reopen(self) -> None:
        """The run goes on: what ended it before is to be sent again."""
        self.keep(figures=False, files=False, model=None, version=None, complete=False)

    def send_epochs(self) -> str:
        """The run, its settings, and the rows of metrics.csv; returns MLflow's id of the run."""
        run_id = self.state.run_id
        if run_id is None or not self._is_there(run_id):
            run_id = self._create()
        table = self.folder / "metrics.csv"
        if table.is_file():
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            for row in rows[self.state.epochs :]:
                self._log(run_id, {k: float(v) for k, v in row.items() if v}, int(row["epoch"]))
                self.keep(epochs=self.state.epochs + 1)
        return run_id

    def finish(self) -> None:
        """All that a run has when it ended; what fails leaves the rest to be sent all the same."""
        run_id = self.send_epochs()
        finished = self.folder / "metrics.json"
        if not finished.is_file():  # stopped, and perhaps resumed one day
            self.client.set_terminated(run_id, "KILLED")
            self.keep(complete=True, problem=None)
            return
        figures = read_json(finished)
        if not self.state.figures:
            last = int(figures["epochs"])
            self._log(run_id, _best_and_baseline(figures), last)
            self.client.set_terminated(run_id, "FINISHED")
            self.keep(figures=True)
        problems = []
        for step in (self._send_files, self._send_model):
            try:
                step(run_id, figures)
            except Exception as error:  # a store of files may fail where figures do not
                problems.append(self.explain(error))
        self.keep(complete=not problems, problem="; ".join(problems) or None)

    def explain(self, error: Exception) -> str:
        """What went wrong, in a line that holds no password."""
        if isinstance(error, ImportError) and error.name:
            return f"no files: {error.name} is not installed"
        text = " ".join(str(error).split()).replace(self.uri, without_password(self.uri))
        return f"{text or type(error).__name__}"[:300]

    def _is_there(self, run_id: str) -> bool:
        """Whether the tracker knows the run, which then goes on."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.status != "RUNNING" and not self.state.figures:
            self.client.update_run(run_id, status="RUNNING")
            self._log_settings(run_id, run.data.params)
        return True

    def _create(self) -> str:
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            number = experiment.experiment_id
        else:
            number = self.client.create_experiment(self.experiment, self._place_of_files())
        run = self.client.create_run(number, run_name=self.folder.resolve().name)
        run_id: str = run.info.run_id
        self.keep(run_id=run_id, epochs=0, figures=False, files=False, model=None, version=None)
        self._log_settings(run_id, {})
        self._log_data(run_id)
        return run_id

    def _place_of_files(self) -> str | None:
        """Files lie beside a store of SQLite; a server says itself where it keeps them."""
        kind, _, path = self.uri.partition(":///")
        if kind != "sqlite":
            return None
        return (Path(path).resolve().parent / "mlflow").as_uri()

    def _log_settings(self, run_id: str, known: Mapping[str, str]) -> None:
        """The settings as parameters; MLflow changes none, so changed ones become tags."""
        environment = self.environment
        settings = _parameters(self.settings) | {
            "sam3_commit": str(environment.get("sam3_commit")),
            "git": str(environment.get("git")),
            "git_modified": str(environment.get("git_modified")),
            "data_sha256": self._data_hash("train"),
            "valid_sha256": self._data_hash("valid"),
        }
        new = [Param(key, value) for key, value in settings.items() if key not in known]
        changed = [
            RunTag(f"resumed.{key}", value)
            for key, value in settings.items()
            if key in known and known[key] != value
        ]
        for start in range(0, len(new), PARAMS_A_REQUEST):
            self.client.log_batch(run_id, params=new[start : start + PARAMS_A_REQUEST])
        self.client.log_batch(run_id, tags=changed[:PARAMS_A_REQUEST])

    def _log_data(self, run_id: str) -> None:
        data = self.settings["dataset"]
        source = data["dir"] or data["huggingface"]["name"] or data["roboflow"] or "shapes"
        inputs = [
            DatasetInput(
                Dataset(
                    name=Path(source).name,
                    digest=split["sha256"][:DIGEST_LENGTH],
                    source_type="local" if data["dir"] else "other",
                    source=json.dumps({"uri": source}),
                    profile=json.dumps({"images": split["images"]}),
                ),
                tags=[InputTag("mlflow.data.context", name)],
            )
            for name, split in self.environment.get("data", {}).items()
        ]
        if inputs:
            self.client.log_inputs(run_id, datasets=inputs)

    def _log(
        self, run_id: str, figures: Mapping[str, float], step: int, model: str | None = None
    ) -> None:
        now = int(1000 * time.time())
        metrics = [
            Metric(_valid_name(name), value, now, step, model_id=model)
            for name, value in figures.items()
        ]
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_REQUEST])

    def _send_files(self, run_id: str, _figures: Mapping[str, Any]) -> None:
        if self.state.files:
            return
        for name in FILES:
            if (self.folder / name).is_file():
                self.client.log_artifact(run_id, str(self.folder / name))
        for name in FOLDERS:
            if (self.folder / name).is_dir():
                self.client.log_artifacts(run_id, str(self.folder / name), name)
        self.keep(files=True)

    def _send_model(self, run_id: str, figures: Mapping[str, Any]) -> None:
        """The best weights as a model that `mlflow models serve` serves.

        Of a LoRA that is the adapter with the reference to its base, as it lies in weights/best.
        """
        best = self.folder / "weights" / "best"
        name = metric_name(figures, self.settings["evaluation"]["metric"])
        if self.state.model is None:
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="sam3",
                    python_model=str(MODEL_SCRIPT),
                    artifacts={"weights": str(best.resolve())},
                    code_paths=[str(ROOT / "app"), str(ROOT / "configs")],
                    pip_requirements=_requirements(),
                    signature=_signature(),
                    metadata={"metric": name, "valid_sha256": self._data_hash("valid")},
                )
            best_figure = {f"best/{name}": float(figures[name])}
            self._log(run_id, best_figure, int(figures["epochs"]), info.model_id)
            self.keep(model=info.model_id)
        if self.register_as and self.state.version is None:
            self.keep(version=self._register(name, float(figures[name])))

    def _register(self, name: str, value: float) -> str:
        """A version in the registry, and the champion where it is better than the one there was.

        Returns:
            NAME/NUMBER.
        """
        tags = {"metric": name, "value": repr(value), "valid_sha256": self._data_hash("valid")}
        version = mlflow.register_model(f"models:/{self.state.model}", self.register_as, tags=tags)
        try:
            champion = self.client.get_model_version_by_alias(self.register_as, CHAMPION)
        except MlflowException:
            champion = None
        then = champion.tags if champion is not None else {}
        same = all(then.get(key) == tags[key] for key in ("metric", "valid_sha256"))
        if champion is None or (same and gain(name, value, float(then["value"])) > 0):
            self.client.set_registered_model_alias(self.register_as, CHAMPION, version.version)
        return f"{self.register_as}/{version.version}"

    def _data_hash(self, split: str) -> str:
        return str(self.environment.get("data", {}).get(split, {}).get("sha256"))


def _parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as MLflow takes parameters: dotted key → text, both of limited length."""
    return {
        key[:NAME_LENGTH]: (value if isinstance(value, str) else json.dumps(value))[:VALUE_LENGTH]
        for key, value in flatten(settings).items()
    }


def _best_and_baseline(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the best weights as best/…, and those from before training."""
    return {
        name if name.startswith("baseline/") else f"best/{name}": float(value)
        for name, value in figures.items()
        if "/" in name and not name.startswith("last/") and isinstance(value, int | float)
    }


def _valid_name(name: str) -> str:
    """The name with nothing that MLflow refuses: a class may be called anything."""
    kept = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(kept).lstrip("./")[:NAME_LENGTH]


def _requirements() -> list[str]:
    """What the lock names, without hashes."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return re.findall(r"^[\w.\-\[\]]+==[^\\\n]*[^\\\s]", lock, re.MULTILINE)


def _signature() -> ModelSignature:
    """What app/tracking/served_model.py takes and gives."""
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.binary, "image"),
        ColSpec(Array(DataType.string), "prompts", required=False),
        ColSpec(DataType.double, "threshold", required=False),
    ]
    return ModelSignature(inputs=Schema(inputs))


def track(folder: Path, asked: str = "auto", register_as: str | None = None) -> tuple[str, State]:
    """Send what is left of a run; returns the tracker's address, and what it has then.

    Args:
        asked: as `tracking.mlflow`.

    Raises:
        UserError: no run in the folder, or the tracker took no figures; says why.
    """
    if not (folder / "config_resolved.yaml").is_file():
        raise UserError(f"{folder}: no run of this project (it has no config_resolved.yaml)")
    uri = mlflow_uri(asked)
    if uri is None:
        raise UserError("--mlflow=none: nowhere to send to")
    os.environ.setdefault(RETRIES, "1")  # MLflow's own seven take minutes
    with locked(folder):
        sender = Sender(folder, uri, register_as)
        try:
            with _quiet():
                sender.finish()
        except Exception as error:
            raise UserError(
                f"MLflow at {without_password(uri)} took not all figures: {sender.explain(error)}"
            ) from None
    return without_password(uri), sender.state


def follow(folder: Path, uri: str, ended: TextIO) -> None:
    """Send what the folder holds as it grows, until `ended` can be read; then all that is left."""
    sender = Sender(folder, uri)
    sender.reopen()
    monitor: SystemMetricsMonitor | None = None
    seen, wait = "", 0.0
    while not select.select([ended], [], [], wait)[0]:
        wait = POLL_SECONDS
        table = folder / "metrics.csv"
        now = str(table.stat().st_mtime_ns) if table.is_file() else "none"
        if now == seen:
            continue
        try:
            run_id = sender.send_epochs()
            if monitor is None:
                monitor = SystemMetricsMonitor(run_id, resume_logging=True)
                monitor.start()
            seen = now
        except Exception as error:
            if sender.state.problem is None:
                print(f"MLflow: {sender.explain(error)}", file=sys.__stderr__)
            sender.keep(problem=sender.explain(error))
            wait = RETRY_SECONDS
    if monitor is not None:
        monitor.finish()
    try:
        sender.finish()
    except Exception as error:
        sender.keep(problem=sender.explain(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells of its progress on both streams, among a run's own lines."""
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Follow the run in the folder that is named, until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run says when it ends
    os.environ.setdefault(RETRIES, "0")  # the next try is RETRY_SECONDS later
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # at the end someone waits
    folder = Path(sys.argv[1])
    with _quiet(), locked(folder):
        follow(folder, os.environ["MLFLOW_TRACKING_URI"], sys.stdin)


if __name__ == "__main__":
    main()
