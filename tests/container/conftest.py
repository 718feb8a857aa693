"""One engine, for every test in here and each process that runs some, and its images.

What is run is a copy of what the image is made of, with things beside it that must stay out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.container import engine as engines
from tests.container.engine import Engine, Unavailable
from tests.helpers import REPOSITORY, SHARED

IMAGE = "sam3-finetuning-test"
JETSON_IMAGE = "sam3-finetuning-test-jetson"
CALLER = 4242  # nobody that this machine or the image knows
CANARY = "canary-5d1f7c"
SECRETS = {
    "HF_TOKEN": f"{CANARY}-hf",
    "ROBOFLOW_API_KEY": f"{CANARY}-roboflow",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
}
# Beside or among what is copied into the image, and no part of it.
KEPT_OUT = (".env", ".git/config", "outputs/run.log", "data/set.zip", "app/.env", "configs/.token")


@dataclass(frozen=True)
class Caller:
    """Someone with a home and a working folder, and secrets in the environment."""

    engine: Engine
    repository: Path
    folder: Path
    dataset: Path
    image: str = IMAGE

    def environment(self, **more: str) -> dict[str, str]:
        named = {"HOME": str(self.folder.parent / "home"), "SAM3_IMAGE": self.image, "GPUS": "none"}
        return {**self.engine.environment, "SAM3_RUNTIME": "docker", **SECRETS, **named, **more}

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command, a script by its path in the repository."""
        script, *arguments = map(str, words)
        return subprocess.Popen(
            [str(self.repository / script), *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            user=CALLER,
            group=CALLER,
            extra_groups=[],
            umask=0o022,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: object, code: int = 0, **environment: str) -> str:
        """Run a command to its end, which must be `code`; what it printed."""
        process = self.start(*words, **environment)
        out, _ = process.communicate(timeout=1800)
        assert process.returncode == code, out
        return out


@pytest.fixture(scope="session")
def workplace() -> Iterator[Caller]:
    """The engine is started, with a base image, by whoever comes first; the last one cleans up.

    SAM3_TEST_ENGINE=FOLDER keeps what the engine stores in there, so that the next build is short.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    kept = os.environ.get("SAM3_TEST_ENGINE")
    folder = Path(kept or f"/var/tmp/sam3-tests-{run[:8]}")
    user = folder / f"user-{os.getpid()}"
    with _alone(folder):
        try:
            if not list(folder.glob("user-*")):
                _start(folder, keep=bool(kept))
        except Unavailable as reason:
            folder.with_suffix(".lock").unlink(missing_ok=True)
            pytest.skip(f"no container engine: {reason}")
        user.touch()
    yield _caller(folder)
    with _alone(folder):
        user.unlink()
        if not list(folder.glob("user-*")):
            engines.stop(folder, keep=bool(kept))
            folder.with_suffix(".lock").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def caller(workplace: Caller) -> Caller:
    """Where the image is built."""
    _build_once(workplace, IMAGE)
    return workplace


@pytest.fixture(scope="session")
def jetson(workplace: Caller) -> Caller:
    """Where a Jetson's image is built, on a base that is none, and so for ONNX Runtime."""
    _build_once(workplace, JETSON_IMAGE, "--jetson", "--build-arg", "BACKEND=onnxruntime")
    return replace(workplace, image=JETSON_IMAGE)


def _build_once(caller: Caller, image: str, *options: str) -> None:
    built = caller.engine.folder / f"built-{image}"
    with _alone(caller.engine.folder):
        if not built.exists():
            caller("build.sh", "--base-image", engines.BASE_IMAGE, "--tag", image, *options)
            built.touch()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _caller(folder: Path) -> Caller:
    place = folder / "caller"
    places = (place / "repository", place / "wörk, here", place / "data set")
    return Caller(engines.reach(folder), *places)


def _start(folder: Path, *, keep: bool) -> None:
    engines.check()
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    for built in folder.glob("built-*"):  # by an earlier run, of what was then
        built.unlink()
    try:
        caller = _caller(folder)
        _prepare(caller)
        engine = engines.start(folder, group=CALLER)
        if not engine("images", "--quiet", engines.BASE_IMAGE):
            engines.make_base(engine)
    except BaseException:
        engines.stop(folder, keep=keep)
        raise


def _prepare(caller: Caller) -> None:
    """The caller's folders, the repository's copy and what must stay out of the image, the data."""
    shutil.rmtree(caller.folder.parent, ignore_errors=True)
    caller.folder.parent.mkdir()
    for folder in (caller.folder, caller.folder.parent / "home"):
        folder.mkdir()
        os.chown(folder, CALLER, CALLER)
    for name in ("app", "configs", "scripts"):
        shutil.copytree(
            REPOSITORY / name,
            caller.repository / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("LICENSE", ".dockerignore"):
        shutil.copy(REPOSITORY / name, caller.repository)
    for pattern in ("*.sh", "*.y*ml", "*.lock", "Dockerfile*"):
        for file in REPOSITORY.glob(pattern):
            shutil.copy(file, caller.repository)
    for name in KEPT_OUT:
        file = caller.repository / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"SECRET={CANARY}\n")
    if (SHARED / "potholes").is_dir():
        shutil.copytree(SHARED / "potholes", caller.dataset)
    else:
        from app.datasets.synthetic.shapes import make_shapes

        make_shapes(caller.dataset, train=8, valid=4, fog=0, width=96, height=64, seed=3)
    for folder in (caller.repository, caller.dataset):
        subprocess.run(["chmod", "-R", "a+rX,u+w", str(folder)], check=True)
    private = caller.repository / "configs" / "train.yaml"  # as where the umask is 077
    os.chown(private, CALLER, CALLER)
    private.chmod(0o600)
