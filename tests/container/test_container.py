"""The image and the scripts in a real engine, run by someone who is neither root nor in the image.

Only here is anything run in containers; what the scripts would run is tested in test_scripts.py.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.conftest import CALLER, CANARY, IMAGE, KEPT_OUT, SECRETS, Caller
from tests.helpers import REPOSITORY, TINY, until

pytestmark = pytest.mark.system
SHORT = ["--model", "nano", "evaluation.pictures=1", *TINY]


def in_image(caller: Caller, *words: str, user: int = CALLER) -> str:
    options = ("--rm", "--network", "none", "--user", f"{user}:{user}", "--entrypoint", words[0])
    return caller.engine("run", *options, IMAGE, *words[1:])


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(path.stat().st_uid, path.stat().st_gid) for path in [folder, *folder.rglob("*")]}


def images(dataset: Path) -> Path:
    """A folder of images in it."""
    return next(
        path for path in sorted(dataset.rglob("*")) if path.suffix in (".jpg", ".png")
    ).parent


# --- the image -----------------------------------------------------------------------------------


def test_the_image_says_what_it_is_and_runs_as_nobody_special(caller: Caller) -> None:
    config = json.loads(caller.engine("image", "inspect", IMAGE))[0]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["python", "-m", "app"]
    labels = {key.removeprefix("org.opencontainers.image.") for key in config["Labels"]}
    assert {"title", "description", "licenses"} <= labels
    assert "Teach SAM 3" in caller.engine("run", "--rm", "--network", "none", IMAGE)


def test_every_cache_is_writable_by_any_uid(caller: Caller) -> None:
    program = """
import getpass, pathlib, huggingface_hub.constants as hub, matplotlib, torch
from torch._inductor.runtime.cache_dir_utils import cache_dir
folders = [pathlib.Path.home(), matplotlib.get_configdir(), matplotlib.get_cachedir(),
           torch.hub.get_dir(), cache_dir(), hub.HF_HUB_CACHE, pathlib.Path.home() / ".triton"]
for folder in map(pathlib.Path, folders):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "probe").touch()
    print(folder)
print(getpass.getuser())
"""
    assert len(in_image(caller, "python", "-c", program).splitlines()) == 8


def test_the_image_holds_no_secret_and_nothing_else_of_the_folder(caller: Caller) -> None:
    listed = in_image(caller, "find", "/opt/sam3-finetuning", "-mindepth", "1", "-printf", "%P\\n")
    inside = set(listed.splitlines())
    tops = {name for name in inside if "/" not in name}
    assert tops == {"LICENSE", "app", "configs", "requirements.lock"}
    assert not inside & set(KEPT_OUT)
    assert all((caller.repository / name).is_file() for name in KEPT_OUT)
    said = caller.engine("history", "--no-trunc", IMAGE) + caller.engine("image", "inspect", IMAGE)
    assert "requirements.lock" in said
    assert CANARY not in said
    # Layer by layer as the engine keeps them, so that nothing hides below a later layer.
    kept = json.loads(caller.engine("image", "inspect", IMAGE))[0]["GraphDriver"]["Data"]
    layers = [*kept["LowerDir"].split(":"), kept["UpperDir"]]
    assert holding("def prove_pin", layers)
    assert not holding(CANARY, layers)


def holding(text: str, folders: list[str]) -> list[str]:
    """The files that hold it; the largest packages, which the lock's hashes vouch for, apart."""
    big = [f"--exclude-dir={name}" for name in ("nvidia", "torch", "triton")]
    done = subprocess.run(
        ["grep", "-rlF", *big, text, *folders], capture_output=True, text=True, timeout=300
    )
    assert done.returncode < 2, done.stderr
    return done.stdout.splitlines()


# --- the scripts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(caller: Caller) -> Path:
    """A run of two epochs on data from elsewhere."""
    output = caller.folder / "outputs" / "ün run"
    printed = caller(
        *("train.sh", "--dataset-dir", caller.dataset, "--limit", 8, *SHORT),
        *("--epochs", 2, "--output-dir", output),
    )
    assert f"runtime: docker (SAM3_RUNTIME=docker, image {IMAGE})" in printed
    assert SECRETS["HF_TOKEN"] not in printed
    return output


def test_training_leaves_the_callers_files(run: Path) -> None:
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert (run / "weights" / "best" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()
    assert owners(run.parent) == {(CALLER, CALLER)}


def test_prediction_needs_no_network(caller: Caller, run: Path) -> None:
    asked = ["--checkpoint", run / "weights" / "best", "--input", images(caller.dataset)]
    printed = caller("infer.sh", *asked, "--output-dir", "found", "--dry-run")
    command = shlex.split(printed.splitlines()[-1])
    assert command[:2] == ["docker", "run"]
    found = caller.folder / "found"
    found.mkdir()
    os.chown(found, CALLER, CALLER)
    caller.engine("run", "--network", "none", *command[2:], cwd=caller.folder)
    pictures = [path for path in images(caller.dataset).iterdir() if path.suffix != ".json"]
    assert len(list(found.glob("*.png"))) == len(pictures)
    assert owners(found) == {(CALLER, CALLER)}


def test_a_stopped_run_saves_and_goes_on(caller: Caller) -> None:
    """`docker stop` first, then Ctrl-C; what the container is given is seen meanwhile."""
    output = caller.folder / "stopped"
    words = ["train.sh", "--dataset-dir", caller.dataset, "--limit", 8, "--output-dir", output]

    def epochs() -> int:
        table = output / "metrics.csv"
        return len(table.read_text().splitlines()) - 1 if table.exists() else 0

    def stop(how: str, *more: object) -> None:
        done = epochs()
        process = caller.start(*words, *SHORT, "--epochs", 500, *more)
        until(lambda: epochs() > done or process.poll() is not None, "an epoch")
        assert process.poll() is None, process.communicate()[0]
        if how == "docker stop":
            container = caller.engine("ps", "--quiet").split()[-1]
            check_container(json.loads(caller.engine("inspect", container))[0])
            caller.engine("stop", container)
        else:
            process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=130)
        assert process.returncode == 143, printed
        assert "stopping: the step is finished and saved" in printed
        assert list((output / "checkpoints").iterdir())

    def check_container(seen: dict) -> None:
        host = seen["HostConfig"]
        assert seen["Config"]["User"] == f"{CALLER}:{CALLER}"
        assert (host["Init"], host["ShmSize"]) == (True, 8 << 30)
        assert seen["Config"]["StopTimeout"] == 120
        assert f"HF_TOKEN={SECRETS['HF_TOKEN']}" in seen["Config"]["Env"]
        writable = {mount["Source"]: mount["RW"] for mount in seen["Mounts"]}
        assert writable[str(caller.dataset)] is False
        assert writable[str(caller.folder)] is True

    stop("docker stop")
    stop("ctrl-c", "--resume")
    assert owners(output) == {(CALLER, CALLER)}


def test_a_full_disk_ends_in_one_message(caller: Caller) -> None:
    small = caller.folder / "small"
    small.mkdir()
    options = f"size=8m,uid={CALLER},gid={CALLER}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
    try:
        words = ["train.sh", "--dataset-dir", caller.dataset, "--limit", 4, "--epochs", 1]
        printed = caller(*words, *SHORT, "--output-dir", small, "--overwrite", code=2)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    assert "small" in printed.rpartition("error: ")[2]


# --- compose -------------------------------------------------------------------------------------

COMPOSE = shutil.which("docker-compose", path=f"{REPOSITORY}/.venv/bin")


class Compose:
    """`docker compose`, in the caller's folder, with what an engine without a bridge needs."""

    def __init__(self, caller: Caller, services: str, **environment: str) -> None:
        if COMPOSE is None:
            pytest.skip("no Compose: tests/container/install.sh brings it")
        self.caller, self.environment = caller, environment
        self.project = f"sam3-test-{os.getpid()}-{next(iter(environment)).lower()}"
        self.override = caller.engine.folder / f"{self.project}.yaml"
        self.override.write_text(f"services: {services}")

    def __call__(self, *words: str) -> str:
        files = [self.caller.repository / "docker-compose.yml", self.override]
        done = subprocess.run(
            [COMPOSE, f"--project-name={self.project}", *(f"--file={f}" for f in files), *words],
            cwd=self.caller.folder,
            env=self.caller.environment(PWD=str(self.caller.folder), **self.environment),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def down(self) -> None:
        self("--profile=*", "down", "--volumes", "--timeout=20")
        self.override.unlink()


@pytest.fixture(scope="module")
def mlflow(caller: Caller) -> Iterator[str]:
    """The address of a healthy server that compose has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = f"{{MLFLOW_HOST: 127.0.0.1, MLFLOW_PORT: {port}}}"
    compose = Compose(
        caller,
        f"{{mlflow: {{network_mode: host, ports: !reset [], environment: {settings}}}}}",
        MLFLOW_PORT=port,
    )
    try:
        compose("up", "--detach", "--wait", "mlflow")
        yield f"http://127.0.0.1:{port}"
    finally:
        compose.down()


def test_compose_runs_the_tool_as_the_caller(caller: Caller) -> None:
    user, data = f"{CALLER}:{CALLER}", str(caller.dataset)
    compose = Compose(caller, "{infer: {network_mode: none}}", SAM3_DATA=data, SAM3_USER=user)
    try:
        printed = compose(
            *("run", "--rm", "infer", "--checkpoint", "/opt/sam3-finetuning/app/assets/nano"),
            *(
                "--input",
                f"/data/{images(caller.dataset).relative_to(caller.dataset)}",
                "--prompt",
                "circle",
            ),
            *("--output-dir", "composed"),
        )
    finally:
        compose.down()
    assert "composed" in printed
    assert owners(caller.folder / "composed") == {(CALLER, CALLER)}


def test_compose_serves_weights_as_another_uid_and_writes_nothing(caller: Caller) -> None:
    """Ready by its own healthcheck; asked with its key, and drained by `docker stop`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {
        "SERVE_PORT": port,
        "SAM3_WEIGHTS": str(caller.repository / "app" / "assets" / "nano"),
        "SAM3_USER": f"{CALLER}:{CALLER}",
        "SAM3_API_KEY": "a key of the container",
    }
    compose = Compose(caller, "{serve: {network_mode: host, ports: !reset []}}", **settings)
    try:
        compose("--profile=serve", "up", "--detach", "--wait", "serve")
        address = f"http://127.0.0.1:{port}"
        picture = next(images(caller.dataset).glob("*.*g")).read_bytes()
        request = urllib.request.Request(
            f"{address}/v1/predict",
            json.dumps(
                {
                    "images": [{"data": base64.b64encode(picture).decode()}],
                    "prompts": [{"text": "circle", "threshold": 0.0}],
                }
            ).encode(),
            {"Content-Type": "application/json", "X-API-Key": settings["SAM3_API_KEY"]},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
        assert found["model"]["name"] == "model"
        assert found["results"][0]["detections"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/v1/models", timeout=30)
        container = compose("--profile=serve", "ps", "--quiet", "serve").strip()
        seen = json.loads(caller.engine("inspect", container))[0]
        assert seen["Config"]["User"] == f"{CALLER}:{CALLER}"
        assert seen["HostConfig"]["ReadonlyRootfs"]
        assert not any(mount["RW"] for mount in seen["Mounts"])
        caller.engine("stop", container)
        assert json.loads(caller.engine("inspect", container))[0]["State"]["ExitCode"] == 143
    finally:
        compose.down()


def test_a_server_in_compose_takes_a_run(caller: Caller, mlflow: str) -> None:
    """Published to this machine alone: `docker compose config`; no bridge here to publish from."""
    printed = caller(
        *("train.sh", "--dataset-dir", caller.dataset, "--limit", 4, "--epochs", 2, *SHORT),
        *("--output-dir", "tracked", "--mlflow"),
        MLFLOW_TRACKING_URI=mlflow,
    )
    assert "network: host (the tracking server is on this machine)" in printed
    experiments = ask(mlflow, "experiments/search", max_results=10)["experiments"]
    found = [experiment["experiment_id"] for experiment in experiments]
    (tracked,) = ask(mlflow, "runs/search", experiment_ids=found)["runs"]
    metrics = {metric["key"] for metric in tracked["data"]["metrics"]}
    assert tracked["info"]["status"] == "FINISHED"
    assert any("AP" in name for name in metrics), metrics
    assert {param["key"] for param in tracked["data"]["params"]}


def test_the_server_answers_this_machine_alone(caller: Caller, mlflow: str) -> None:
    file = caller.repository / "docker-compose.yml"
    asked = [COMPOSE, "--file", file, "config", "--format=json"]
    config = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
    (port,) = config["services"]["mlflow"]["ports"]
    assert (port["host_ip"], port["target"]) == ("127.0.0.1", 5000)
    number = int(mlflow.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", number))
    stranger = urllib.request.Request(
        f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
        headers={"Host": "evil.example"},
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(stranger, timeout=30)


def ask(server: str, what: str, **query: object) -> dict:
    """MLflow's REST API."""
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{what}",
        data=json.dumps(query).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
