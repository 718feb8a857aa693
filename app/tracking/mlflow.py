"""Send a run's figures, files and weights to MLflow, as its folder holds them.

`tracking.files` starts this module as a process beside the run; `python -m app track` sends by
hand, later. mlflow.json says what has been sent, so nothing is sent twice.

It is a process and not a thread for two reasons: importing MLflow takes seconds in which a training
process would wait for the interpreter lock, and a store of SQLite that is being made when the run
ends must be finished, while the run must not wait for it.
"""

from __future__ import annotations

import contextlib
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
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from app.config.schema import TrackingConfig
from app.errors import UserError
from app.evaluation.run_files import read_environment, read_figures, read_rows, read_settings
from app.files import flatten, locked
from app.tracking.contents import BEST, FILES, FOLDERS, check_own
from app.tracking.state import State, mlflow_uri, read_state, without_password, write_state
from app.training.metric import gain, metric_name

log = logging.getLogger("app")
ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 2.0  # between two looks at the folder
RETRY_SECONDS = 30.0  # after the tracker has failed
MODEL_SCRIPT = Path(__file__).with_name("served_model.py")
CHAMPION = "champion"
PARENT = "SAM3_MLFLOW_PARENT"  # environment variable: the run that a sweep's runs are children of
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# What one request may hold, and how long names and values may be (mlflow/utils/validation.py).
METRICS_A_REQUEST, PARAMS_A_REQUEST = 1000, 100
NAME_LENGTH, VALUE_LENGTH, DIGEST_LENGTH = 250, 6000, 36


def follow(folder: Path, uri: str, ended: TextIO) -> None:
    """Send figures as the run writes them, and all that is left when it ends.

    Args:
        ended: can be read once the run has ended: the pipe whose other end the run holds.
    """
    sender = Sender(folder, uri)
    sender.reopen()
    monitor: SystemMetricsMonitor | None = None
    last_sent, wait = "", 0.0
    while not select.select([ended], [], [], wait)[0]:
        wait = POLL_SECONDS
        table = folder / "metrics.csv"
        now = str(table.stat().st_mtime_ns) if table.is_file() else "none"
        if now == last_sent:
            continue
        try:
            run_id = sender.send_epochs()
            if monitor is None:
                monitor = SystemMetricsMonitor(run_id, resume_logging=True)
                monitor.start()
            last_sent = now
        except Exception as error:
            if sender.state.problem is None:
                print(f"MLflow: {explain(error, uri)}", file=sys.__stderr__)
            sender.save_state(problem=explain(error, uri))
            wait = RETRY_SECONDS
    if monitor is not None:
        monitor.finish()
    try:
        sender.finish()
    except Exception as error:
        sender.save_state(problem=explain(error, uri))


def track(folder: Path, asked: str = "auto", register_as: str | None = None) -> tuple[str, State]:
    """Send what MLflow does not have yet of a run.

    Args:
        folder: of the run, as `contents.check_contents` has found it.
        asked: as `tracking.mlflow` in the configuration.

    Returns:
        The address without a password, and what MLflow has of the run.

    Raises:
        UserError: MLflow took no figures; says why.
    """
    uri = mlflow_uri(asked)
    if uri is None:
        raise UserError("--mlflow=none: nowhere to send to")
    os.environ.setdefault(RETRIES, "1")  # MLflow's own seven take minutes
    with locked(folder):
        try:
            sender = Sender(folder, uri, register_as)
            with _quiet():
                sender.finish()
        except Exception as error:
            raise UserError(
                f"MLflow at {without_password(uri)} took not all figures: {explain(error, uri)}"
            ) from None
    return without_password(uri), sender.state


def open_parent(folder: Path, config: TrackingConfig) -> str | None:
    """Return MLflow's id of a sweep's own run, made once, whose children those of its cells are.

    Args:
        folder: of the sweep, whose mlflow.json keeps it.

    Returns:
        None where nothing is sent to MLflow, or it does not answer: the sweep goes on without.
    """
    uri = mlflow_uri(config.mlflow)
    if uri is None:
        return None
    os.environ.setdefault(RETRIES, "1")
    try:
        with locked(folder), _quiet():
            state, client = read_state(folder), MlflowClient(uri)
            if state.tracker == without_password(uri) and state.run_id is not None:
                return state.run_id
            experiment = _experiment_id(client, config.experiment, uri)
            run = client.create_run(experiment, run_name=folder.resolve().name)
            write_state(folder, State(tracker=without_password(uri), run_id=run.info.run_id))
            return str(run.info.run_id)
    except Exception as error:
        log.warning("MLflow: no run of the sweep's own: %s", explain(error, uri))
        return None


def end_parent(folder: Path, config: TrackingConfig, figures: Mapping[str, float]) -> None:
    """Give the run of a sweep its figures, and end it; where MLflow does not answer, leave it."""
    uri, state = mlflow_uri(config.mlflow), read_state(folder)
    if uri is None or state.run_id is None:
        return
    try:
        with _quiet():
            client = MlflowClient(uri)
            for name, value in figures.items():
                client.log_metric(state.run_id, _valid_name(name), value)
            client.set_terminated(state.run_id, "FINISHED")
    except Exception as error:
        log.warning("MLflow: %s", explain(error, uri))


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Return the id of an experiment, which is made where there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    kind, _, path = uri.partition(":///")
    # A store of SQLite has its files beside it, a server has a place of its own.
    beside = (Path(path).resolve().parent / "mlflow").as_uri() if kind == "sqlite" else None
    return str(client.create_experiment(name, beside))


class Sender:
    """Sends what MLflow does not have yet of the run in a folder.

    Each method does what is left to do, and raises whatever MLflow's client raises.

    Args:
        folder: output folder of the run.
        uri: address of the MLflow server or store.
        register_as: name of the weights in the registry; None takes the one of the run's settings.
    """

    def __init__(self, folder: Path, uri: str, register_as: str | None = None) -> None:
        self.folder, self.uri = folder, uri
        self.settings, self.all_settings = read_settings(folder)
        self.environment = read_environment(folder)
        self.experiment = self.settings.tracking.experiment
        self.register_as: Any = register_as or self.settings.tracking.register_as
        mlflow.set_tracking_uri(uri)
        self.client = MlflowClient(uri)
        self.state = read_state(folder)
        if self.state.tracker != without_password(uri):  # what was sent went to another server
            self.state = State(tracker=without_password(uri))

    def save_state(self, **changes: object) -> None:
        """Write to mlflow.json what was sent."""
        self.state = self.state.model_copy(update=changes)
        write_state(self.folder, self.state)

    def reopen(self) -> None:
        """Forget what was sent of an earlier end of the run, because the run goes on."""
        self.save_state(figures=False, files=False, model=None, version=None, complete=False)

    def send_epochs(self) -> str:
        """Send the settings and the rows of metrics.csv; return MLflow's id of the run."""
        run_id = self.state.run_id
        if run_id is None or not self._reopen_run(run_id):
            run_id = self._create_run()
        for row in read_rows(self.folder)[self.state.epochs :]:
            self._log(run_id, row, int(row["epoch"]))
            self.save_state(epochs=self.state.epochs + 1)
        return run_id

    def finish(self) -> None:
        """Send all of a run that has ended; where files fail, the weights are sent all the same."""
        run_id = self.send_epochs()
        figures = read_figures(self.folder)
        if not figures:  # the run was stopped, and may be resumed one day
            self.client.set_terminated(run_id, "KILLED")
            self.save_state(complete=True, problem=None)
            return
        if not self.state.figures:
            last = int(figures["epochs"])
            self._log(run_id, _best_and_baseline(figures), last)
            self.client.set_terminated(run_id, "FINISHED")
            self.save_state(figures=True)
        problems = []
        for step in (self._send_files, self._send_model):
            try:
                step(run_id, figures)
            except Exception as error:  # a store of files may fail where figures do not
                problems.append(explain(error, self.uri))
        self.save_state(complete=not problems, problem="; ".join(problems) or None)

    def _reopen_run(self, run_id: str) -> bool:
        """Set a run to running that had ended; return False where MLflow has no such run."""
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

    def _create_run(self) -> str:
        """Create the run, and its experiment where there is none; return MLflow's id of the run."""
        parent, folder = os.environ.get(PARENT), self.folder.resolve()
        run = self.client.create_run(
            _experiment_id(self.client, self.experiment, self.uri),
            run_name=folder.name if parent is None else "/".join(folder.parts[-3:]),
            tags={} if parent is None else {MLFLOW_PARENT_RUN_ID: parent},
        )
        run_id: str = run.info.run_id
        self.save_state(
            run_id=run_id, epochs=0, figures=False, files=False, model=None, version=None
        )
        self._log_settings(run_id, {})
        self._log_data(run_id)
        return run_id

    def _log_settings(self, run_id: str, logged: Mapping[str, str]) -> None:
        """Log settings as parameters, and changed ones as tags, because MLflow changes none.

        Args:
            logged: the parameters that MLflow has already.
        """
        environment = self.environment
        settings = _parameters(self.all_settings) | {
            "sam3_commit": str(environment.sam3_commit),
            "git": str(environment.git),
            "git_modified": str(environment.git_modified),
            "data_sha256": self._data_hash("train"),
            "valid_sha256": self._data_hash("valid"),
        }
        new = [Param(key, value) for key, value in settings.items() if key not in logged]
        changed = [
            RunTag(f"resumed.{key}", value)
            for key, value in settings.items()
            if key in logged and logged[key] != value
        ]
        for start in range(0, len(new), PARAMS_A_REQUEST):
            self.client.log_batch(run_id, params=new[start : start + PARAMS_A_REQUEST])
        self.client.log_batch(run_id, tags=changed[:PARAMS_A_REQUEST])

    def _log_data(self, run_id: str) -> None:
        """Log each split: its source, hash and number of images."""
        data = self.settings.dataset
        inputs = [
            DatasetInput(
                Dataset(
                    name=Path(data.source).name,
                    digest=split.sha256[:DIGEST_LENGTH],
                    source_type="local" if data.dir else "other",
                    source=json.dumps({"uri": data.source}),
                    profile=json.dumps({"images": split.images}),
                ),
                tags=[InputTag("mlflow.data.context", name)],
            )
            for name, split in self.environment.data.items()
        ]
        if inputs:
            self.client.log_inputs(run_id, datasets=inputs)

    def _log(
        self, run_id: str, figures: Mapping[str, float], step: int, model: str | None = None
    ) -> None:
        """Log figures at an epoch, and for a model where one is named."""
        now = int(1000 * time.time())
        metrics = [
            Metric(_valid_name(name), value, now, step, model_id=model)
            for name, value in figures.items()
        ]
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_REQUEST])

    def _send_files(self, run_id: str, _figures: Mapping[str, Any]) -> None:
        """Send report, settings, tables, plots and predictions, those that there are."""
        if self.state.files:
            return
        check_own(self.folder)
        for name in FILES:
            if (self.folder / name).is_file():
                self.client.log_artifact(run_id, str(self.folder / name))
        for name in FOLDERS:
            if (self.folder / name).is_dir():
                self.client.log_artifacts(run_id, str(self.folder / name), name)
        self.save_state(files=True)

    def _send_model(self, run_id: str, figures: Mapping[str, Any]) -> None:
        """Send the best weights as a model that `mlflow models serve` can serve.

        Of LoRA those are the adapter and the reference to its base, as they lie in weights/best.
        """
        check_own(self.folder)
        name = metric_name(figures, self.settings.evaluation.metric)
        if self.state.model is None:
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="sam3",
                    python_model=str(MODEL_SCRIPT),
                    artifacts={"weights": str((self.folder / BEST).resolve())},
                    code_paths=[str(ROOT / "app"), str(ROOT / "configs")],
                    pip_requirements=_requirements(),
                    signature=_signature(),
                    metadata={"metric": name, "valid_sha256": self._data_hash("valid")},
                )
            best_figure = {f"best/{name}": float(figures[name])}
            self._log(run_id, best_figure, int(figures["epochs"]), info.model_id)
            self.save_state(model=info.model_id)
        if self.register_as and self.state.version is None:
            self.save_state(version=self._register(name, float(figures[name])))

    def _register(self, name: str, value: float) -> str:
        """Register the model; return its version, NAME/NUMBER.

        It becomes the champion where there was none, or where its figure is better on the same
        validation images.
        """
        tags = {"metric": name, "value": repr(value), "valid_sha256": self._data_hash("valid")}
        version = mlflow.register_model(f"models:/{self.state.model}", self.register_as, tags=tags)
        try:
            champion = self.client.get_model_version_by_alias(self.register_as, CHAMPION)
        except MlflowException:
            champion = None
        theirs = champion.tags if champion is not None else {}
        comparable = all(theirs.get(key) == tags[key] for key in ("metric", "valid_sha256"))
        if champion is None or (comparable and gain(name, value, float(theirs["value"])) > 0):
            self.client.set_registered_model_alias(self.register_as, CHAMPION, version.version)
        return f"{self.register_as}/{version.version}"

    def _data_hash(self, split: str) -> str:
        """Return the SHA-256 of a split's content; "None" where the run did not note it."""
        found = self.environment.data.get(split)
        return str(None if found is None else found.sha256)


def explain(error: Exception, uri: str) -> str:
    """Return what went wrong as a line without the password of the address."""
    if isinstance(error, ImportError) and error.name:
        return f"no files: {error.name} is not installed"
    text = " ".join(str(error).split()).replace(uri, without_password(uri))
    return f"{text or type(error).__name__}"[:300]


def _parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as MLflow takes parameters: dotted key → text, both of limited length."""
    return {
        key[:NAME_LENGTH]: (value if isinstance(value, str) else json.dumps(value))[:VALUE_LENGTH]
        for key, value in flatten(settings).items()
    }


def _best_and_baseline(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the best weights as best/…, and those from before training."""
    return {
        name if name.startswith("baseline/") else f"best/{name}": float(value)
        for name, value in figures.items()
        if "/" in name and not name.startswith("last/") and isinstance(value, int | float)
    }


def _valid_name(name: str) -> str:
    """Replace what MLflow refuses in a figure's name, because a class may be called anything."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:NAME_LENGTH]


def _requirements() -> list[str]:
    """Return the requirements of the lock, without hashes."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return re.findall(r"^[\w.\-\[\]]+==[^\\\n]*[^\\\s]", lock, re.MULTILINE)


def _signature() -> ModelSignature:
    """Return the inputs of app/tracking/served_model.py."""
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.binary, "image"),
        ColSpec(Array(DataType.string), "prompts", required=False),
        ColSpec(DataType.double, "threshold", required=False),
    ]
    return ModelSignature(inputs=Schema(inputs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence MLflow, which prints its progress among the lines of the run."""
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
    """Follow the run in the folder that the command line names, until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run says when it ends
    os.environ.setdefault(RETRIES, "0")  # the next try is RETRY_SECONDS later
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # at the end someone waits
    folder = Path(sys.argv[1])
    with _quiet(), locked(folder):
        follow(folder, os.environ["MLFLOW_TRACKING_URI"], sys.stdin)


if __name__ == "__main__":
    main()
