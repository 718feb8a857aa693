"""Runs that send to MLflow: real stores, real servers on loopback, and servers that fail."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import mlflow
import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from app.config.compose import load_config
from app.datasets.images import open_image
from app.files import read_json, write_json
from app.inference import Predictor
from app.tracking.files import followed_by_mlflow
from app.tracking.mlflow import Sender, _requirements, _valid_name
from app.tracking.state import State, mlflow_uri, read_state, without_password
from tests.helpers import PATIENCE, REPOSITORY, TINY, Command, until
from tests.loopback import free_port

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("_own_environment")]
CANARY = "canary-4f1d9b"
SECRETS = dict.fromkeys(("HF_TOKEN", "ROBOFLOW_API_KEY", "AWS_SECRET_ACCESS_KEY"), CANARY)


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serving(port: int, health: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow WORDS`, as in an activated .venv, until the block ends."""
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *map(str, words), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | own | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}{health}"
        until(lambda: process.poll() is not None or answers(address), "mlflow answers")
        assert process.poll() is None, "mlflow ended"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Server:
    """A tracking server that can be started again on the same store."""

    root: Path
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        return self.root / "mlflow.db"

    @contextmanager
    def up(self) -> Iterator[subprocess.Popen[bytes]]:
        where = ("--backend-store-uri", f"sqlite:///{self.store}", "--workers", 1)
        files = ("--artifacts-destination", self.root / "files", "--host", "127.0.0.1")
        with serving(self.port, "/health", "server", *where, *files) as process:
            yield process


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as MLflow makes it: its tables alone, of which to make some takes seconds."""
    store = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{store}").search_experiments()
    return store


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    """An empty store of this test's own."""
    own = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(empty_store)) as source:
        source.execute("VACUUM INTO ?", (str(own),))
    return own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("mlflow"), free_port())
    with one.up():
        yield one


@pytest.fixture(scope="module")
def sent(shapes: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes and two epochs that the server followed."""
    folder = tmp_path_factory.mktemp("sent") / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "app", "train", "--dataset-dir", str(shapes)),
            *("--model", "nano", "--checkpoint", "none", "--output-dir", str(folder)),
            *("--epochs=2", "--num-gpus=2", f"--mlflow={server.uri}", "--register=shapes"),
            *("evaluation.pictures=1", *TINY),
        ],
        cwd=REPOSITORY,
        env=os.environ | SECRETS | {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    completed(folder, 2)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_arrives_whole_and_once(server: Server, sent: Path) -> None:
    client, state = MlflowClient(server.uri), read_state(sent)
    assert state.complete
    assert state.run_id is not None
    experiment = client.get_experiment_by_name("sam3-finetuning")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])  # of the first process alone
    assert (run.info.run_id, run.info.status) == (state.run_id, "FINISHED")
    for name in ("train/loss", "segm/AP", "bbox/AP/circle"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [
            (int(row["epoch"]), float(row[name])) for row in rows(sent)
        ]
    figures = read_json(sent / "metrics.json")
    assert run.data.metrics["best/segm/AP"] == figures["segm/AP"]
    assert run.data.metrics["baseline/segm/AP"] == figures["baseline/segm/AP"]
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    environment = read_json(sent / "environment.json")
    expected = {
        "method.name": "full",
        "training.num_gpus": "2",
        "sam3_commit": "84cc43bca4347b772f17d1078a1ddb4c054655c2",
        "data_sha256": environment["data"]["train"]["sha256"],
        "git": str(environment["git"]),
    }
    assert {name: run.data.params[name] for name in expected} == expected
    data = {tag.value: entry.dataset for entry in run.inputs.dataset_inputs for tag in entry.tags}
    assert data["train"].digest == expected["data_sha256"][:36]
    assert json.loads(data["valid"].profile) == {"images": 2}
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "config_resolved.yaml", "metrics.csv", "plots", "predictions"} <= files
    champion = client.get_model_version_by_alias("shapes", "champion")
    assert f"shapes/{champion.version}" == state.version


def test_secrets_do_not_arrive(server: Server, sent: Path) -> None:
    kept = [path for path in server.root.rglob("*") if path.is_file()]
    assert server.store in kept
    assert any(path.suffix == ".safetensors" for path in kept)
    assert not [path for path in kept if CANARY.encode() in path.read_bytes()]


def test_the_served_model_finds_what_infer_finds(
    server: Server, sent: Path, shapes: Path, tmp_path: Path, command: Command
) -> None:
    image = next((shapes / "valid").rglob("*.jpg"), None) or next((shapes / "valid").rglob("*.png"))
    ours = command(
        *("infer", "--checkpoint", sent / "weights" / "best", "--input", image),
        *("--prompt", "circle", "--prompt", "triangle", "--threshold", "0.001", "--save", "coco"),
        *("--output-dir", tmp_path / "found"),
    )
    assert ours.code == 0, ours.err
    expected = read_json(tmp_path / "found" / "predictions.json")
    port = free_port()
    environment = {"MLFLOW_TRACKING_URI": server.uri, "OMP_NUM_THREADS": "1"}
    row = {
        "image": base64.b64encode(image.read_bytes()).decode(),
        "prompts": ["circle", "triangle"],
        "threshold": 0.001,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with serving(
            *(port, "/ping", "models", "serve", "--model-uri", "models:/shapes@champion"),
            *("--env-manager", "local", "--workers", 1),
        ):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/invocations",
                json={"dataframe_records": [row]},
                timeout=PATIENCE,
            )
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["predictions"]
    assert len(found["scores"]) == len(expected) > 0
    for index, annotation in enumerate(expected):
        left, top, right, bottom = found["boxes_xyxy"][index]
        assert [left, top, right - left, bottom - top] == pytest.approx(
            annotation["bbox"], abs=1e-2
        )
        assert found["scores"][index] == pytest.approx(annotation["score"], abs=1e-5)
        assert found["masks"][index] == annotation["segmentation"]


def copy_of(run: Path, folder: Path, figure: float | None = None) -> Path:
    """The run again, as one that MLflow has not seen, of another mask AP."""
    shutil.copytree(run, folder)
    (folder / "mlflow.json").unlink(missing_ok=True)
    if figure is not None:
        figures = read_json(folder / "metrics.json")
        write_json(folder / "metrics.json", figures | {"segm/AP": figure})
    return folder


def test_the_champion_is_the_better_one_on_the_same_images(
    tiny_run: Path, tmp_path: Path, command: Command, store: Path
) -> None:
    uri = f"sqlite:///{store}"
    client, champions = MlflowClient(uri), []
    for number, figure in enumerate([0.2, 0.1, 0.3], start=1):
        run = copy_of(tiny_run, tmp_path / f"run-{number}", figure)
        done = command("track", run, f"--mlflow={uri}", "--register", "things")
        assert done.code == 0
        where = f"at {uri} (models:/things/{number})"
        assert f"registered: things, version {number}, {where}" in done.out.splitlines()
        champions.append(client.get_model_version_by_alias("things", "champion").version)
    other = copy_of(tiny_run, tmp_path / "other", 0.9)
    environment = read_json(other / "environment.json")
    environment["data"]["valid"]["sha256"] = "of other images"
    write_json(other / "environment.json", environment)
    assert command("track", other, f"--mlflow={uri}", "--register", "things").code == 0
    champions.append(client.get_model_version_by_alias("things", "champion").version)
    assert [int(version) for version in champions] == [1, 1, 3, 3]


def test_a_resumed_run_goes_on_in_mlflow(tiny_run: Path, tmp_path: Path, store: Path) -> None:
    run, uri = copy_of(tiny_run, tmp_path / "run"), f"sqlite:///{store}"
    follow(run, uri, lambda: True)
    first = completed(run, 1)
    settings = (run / "config_resolved.yaml").read_text(encoding="utf-8")
    changed = settings.replace("  epochs: 1\n", "  epochs: 2\n")
    assert changed != settings
    (run / "config_resolved.yaml").write_text(changed, encoding="utf-8")
    add_epoch(run)
    follow(run, uri, lambda: True)
    client = MlflowClient(uri)
    assert first.run_id is not None
    assert completed(run, 2).run_id == first.run_id
    assert [m.step for m in client.get_metric_history(first.run_id, "train/loss")] == [1, 2]
    found = client.get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.epochs"] == "1"  # MLflow changes no parameter
    assert found.data.tags["resumed.training.epochs"] == "2"


def completed(run: Path, epochs: int) -> State:
    """What mlflow.json says when a sender that was late, and left alone, is done."""

    def is_sent() -> bool:
        state = read_state(run)
        return state.complete and state.epochs == epochs

    until(is_sent, f"all sent of {run}")
    return read_state(run)


def add_epoch(run: Path) -> None:
    """A second row of metrics.csv, like the first."""
    table = (run / "metrics.csv").read_text(encoding="utf-8").rstrip()
    row = table.splitlines()[-1]
    (run / "metrics.csv").write_text(f"{table}\n2{row[1:]}\n", encoding="utf-8")


class Failing(ThreadingHTTPServer):
    """Answer every request with 500, once it may.

    Attributes:
        asked, answered: how many requests came, and how many were answered.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, may_answer: threading.Event) -> None:
        super().__init__(("127.0.0.1", 0), _Failure)
        self.may_answer = may_answer
        self.asked = self.answered = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Failure(BaseHTTPRequestHandler):
    server: Failing

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.may_answer.wait(PATIENCE)
        self.server.answered += 1
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_words: object) -> None:
        pass


@contextmanager
def failing(*, answers: bool) -> Iterator[Failing]:
    """Serve failures, or nothing until the block ends."""
    may_answer = threading.Event()
    if answers:
        may_answer.set()
    with Failing(may_answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        may_answer.set()
        server.shutdown()


def follow(folder: Path, uri: str, tried: Callable[[], bool]) -> None:
    """A run that a tracker should follow, which ends once the tracker was tried."""
    tracking = load_config().tracking.model_copy(update={"mlflow": uri})
    with followed_by_mlflow(tracking, folder):
        until(tried, f"{uri} tried")


def opened(file: Path) -> bool:
    """Whether a process that this one started has the file open."""
    children = psutil.Process().children()
    return any(str(file) == held.path for child in children for held in child.open_files())


@pytest.mark.parametrize("tracker", ["absent", "500", "silent", "locked"])
def test_a_tracker_that_fails_is_not_waited_for_and_loses_nothing(
    tracker: str,
    tiny_run: Path,
    tmp_path: Path,
    command: Command,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run ends before a silent tracker answers, and before a locked store is free again."""
    run = copy_of(tiny_run, tmp_path / "run")
    if tracker == "absent":
        follow(run, f"http://127.0.0.1:{free_port()}", lambda: read_state(run).problem is not None)
    elif tracker == "locked":
        with closing(sqlite3.connect(store)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            follow(run, f"sqlite:///{store}", lambda: opened(store))
    elif tracker == "500":
        with failing(answers=True) as server:
            follow(run, server.uri, lambda: server.answered > 0)
            assert server.asked < 7  # MLflow by itself asks seven times, for minutes
    else:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE))
        with failing(answers=False) as server:
            follow(run, server.uri, lambda: server.asked > 0)
            assert server.answered == 0
    assert not read_state(run).complete
    later = command("track", run, f"--mlflow=sqlite:///{store}")
    assert later.code == 0, later.err
    state = read_state(run)
    assert state.complete
    steps = MlflowClient(f"sqlite:///{store}").get_metric_history(state.run_id, "train/loss")
    assert [metric.step for metric in steps] == [int(row["epoch"]) for row in rows(run)]


def test_a_server_that_dies_and_comes_back(
    tiny_run: Path, tmp_path: Path, command: Command
) -> None:
    """Killed after the first epoch; the second arrives later, and the first no second time."""
    server = Server(tmp_path, free_port())
    run = copy_of(tiny_run, tmp_path / "run")
    finished = (run / "metrics.json").rename(tmp_path / "metrics.json")
    with server.up():
        tracking = load_config().tracking.model_copy(update={"mlflow": server.uri})
        following = followed_by_mlflow(tracking, run)
        following.__enter__()
        until(lambda: read_state(run).epochs == 1, "an epoch sent")
    add_epoch(run)
    finished.rename(run / "metrics.json")
    following.__exit__(None, None, None)
    first = read_state(run)
    assert (first.epochs, first.complete) == (1, False)
    with server.up():
        with closing(sqlite3.connect(server.store)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            locked = command("track", run, f"--mlflow={server.uri}")
        assert (locked.code, server.uri in locked.err) == (2, True)
        assert command("track", run, f"--mlflow={server.uri}").code == 0
        history = MlflowClient(server.uri).get_metric_history(first.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2]
    assert read_state(run).complete


def test_a_lora_goes_as_its_adapter(
    shapes: Path, tiny_run: Path, tmp_path: Path, command: Command, store: Path
) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{store}"
    trained = command(
        *("train", "--dataset-dir", shapes, "--method", "lora-minimal", "--epochs", 1),
        *("--checkpoint", tiny_run / "weights" / "best", "--output-dir", run),
        *("evaluation.pictures=0", "training.cache_features=false"),
    )
    assert trained.code == 0, trained.err
    assert command("track", run, f"--mlflow={uri}").code == 0
    model = f"models:/{read_state(run).model}"
    files = Path(mlflow.artifacts.download_artifacts(model, tracking_uri=uri)) / "artifacts"
    adapter = {path.name: path.stat().st_size for path in files.rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in adapter
    assert "model.safetensors" not in adapter
    assert sum(adapter.values()) < 1e6
    image = next((shapes / "valid").rglob("*.png"))
    rows = pd.DataFrame({"image": [image.read_bytes()], "threshold": [0.0]})
    (found,) = mlflow.pyfunc.load_model(model).predict(rows)
    ours = Predictor.load(run / "weights" / "best").predict(open_image(image), threshold=0.0)
    assert found["scores"] == pytest.approx(ours.scores.tolist())
    assert len(found["masks"]) == len(ours) > 0


def test_a_stopped_run_is_killed_in_mlflow(tiny_run: Path, tmp_path: Path, store: Path) -> None:
    run, uri = copy_of(tiny_run, tmp_path / "run"), f"sqlite:///{store}"
    (run / "metrics.json").unlink()
    sender = Sender(run, uri)
    sender.finish()
    assert sender.state.run_id is not None
    assert MlflowClient(uri).get_run(sender.state.run_id).info.status == "KILLED"


def test_without_boto3_the_figures_arrive(
    tiny_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    run, uri = copy_of(tiny_run, tmp_path / "run"), f"sqlite:///{store}"
    MlflowClient(uri).create_experiment("sam3-finetuning", "s3://bucket/files")
    monkeypatch.setitem(sys.modules, "boto3", None)
    result = command("track", run, f"--mlflow={uri}")
    assert result.code == 3
    assert "boto3 is not installed" in result.out
    state = read_state(run)
    assert (state.figures, state.files) == (True, False)
    assert state.run_id is not None
    assert "best/segm/AP" in MlflowClient(uri).get_run(state.run_id).data.metrics


def test_a_password_is_kept_nowhere(
    tiny_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:{free_port()}")
    result = command("track", run)
    assert result.code == 2
    assert "127.0.0.1" in result.err
    assert CANARY not in result.out + result.err
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in kept if CANARY.encode() in path.read_bytes()]
    refused = command(
        "train", f"--mlflow=http://me:{CANARY}@tracker", "--output-dir", tmp_path / "x"
    )
    assert refused.code == 2
    assert "MLFLOW_TRACKING_PASSWORD" in refused.err
    assert CANARY not in refused.out + refused.err


def test_what_is_no_run_is_refused(tmp_path: Path, command: Command) -> None:
    result = command("track", tmp_path)
    assert (result.code, str(tmp_path) in result.err) == (2, True)
    result = command("train", "--eval-only", "--mlflow", "--output-dir", tmp_path / "x")
    assert (result.code, "--mlflow" in result.err) == (2, True)


def test_which_tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_uri(None) is None
    assert mlflow_uri("auto") == f"sqlite:///{tmp_path.resolve() / 'outputs' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    assert [mlflow_uri(asked) for asked in (None, "auto", "none", "http://other")] == [
        *("http://tracker", "http://tracker", None, "http://other"),
    ]
    assert without_password("http://a:b@tracker:5000/x") == "http://tracker:5000/x"


def test_names_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for name in ("bbox/AP/circle", "bbox/AP/a (b) é", "bbox/AP/..", "/x", "x" * 400, "a//b", "α%"):
        _validate_metric_name(_valid_name(name))
    assert _valid_name("bbox/AP/red circle") == "bbox/AP/red circle"


def test_requirements_are_those_of_the_lock() -> None:
    found = {line.split("==")[0] for line in _requirements()}
    assert {"torch", "sam3", "mlflow", "numpy", "open-clip-torch"} <= found
    assert not any("sha256" in line or "\\" in line for line in _requirements())
