"""The shell scripts, run for real: what they ask Docker for, and the life of .venv.

What they pass on, say and refuse is in scripts/scripts.bats, what comes of it in container/. No
network and no engine here: a stub `docker` on PATH answers as an engine would and records what it
is asked to run. Installs are made in a tiny copy of the repository whose lock names no package.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ["train.sh", "infer.sh", "serve.sh", "test.sh", "build.sh", ".ci/run"]
SERVER = [f"MLFLOW_TRACKING_{what}" for what in ("URI", "USERNAME", "PASSWORD", "TOKEN")]
JETSON = str(REPOSITORY / "Dockerfile.jetson")
LABEL_STUDIO = ["LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"]
PASSED_ON = ["HF_TOKEN", "ROBOFLOW_API_KEY", "SAM3_BASE", "SAM3_API_KEY", *LABEL_STUDIO, *SERVER]


def make_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Machine:
    """A machine with a home, a `bin` of stubs before all else on PATH, and a working folder."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.cwd = root / "working folder"
        self.home = root / "home"
        self.record = root / "docker.json"
        for folder in (self.bin, self.cwd, self.home):
            folder.mkdir(parents=True)
        self.docker(engine=False)
        make_executable(self.bin / "nvidia-smi", "#!/bin/sh\nexit 1\n")

    def docker(
        self,
        engine: bool = True,
        image: bool = True,
        runtimes: tuple[str, ...] = ("runc",),
        security: tuple[str, ...] = (),
        info: str | None = None,
    ) -> None:
        """Stub of `docker`; `info` replaces what `docker info` prints."""
        answer = f"{json.dumps({name: {} for name in runtimes})} {json.dumps(security)}"
        make_executable(
            self.bin / "docker",
            f"#!{sys.executable}\n"
            "import json, os, pathlib, sys\n"
            "if sys.argv[1] == 'info':\n"
            f"    print({answer if info is None else info!r})\n"
            f"    sys.exit({0 if engine else 1})\n"
            "if sys.argv[1] == 'image':\n"
            f"    sys.exit({0 if image else 1})\n"
            "asked = {'arguments': sys.argv[1:], 'buildkit': os.environ.get('DOCKER_BUILDKIT')}\n"
            f"pathlib.Path({str(self.record)!r}).write_text(json.dumps(asked))\n",
        )

    def gpu(self) -> None:
        make_executable(self.bin / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: stub'\n")

    def run(
        self, script: str, *arguments: str, repository: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SAM3_", "PYTHON", "HF_"))}
        for name in ("GPUS", *PASSED_ON):
            kept.pop(name, None)
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [str(repository / script), *arguments],
            cwd=self.cwd,
            env={**kept, "HOME": str(self.home), "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def docker_run(
        self, *arguments: str, script: str = "train.sh", **environment: str
    ) -> list[str]:
        """What `docker` was asked for by a run of a script."""
        done = self.run(script, *arguments, SAM3_RUNTIME="docker", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(self.record.read_text())["arguments"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path.resolve() / "ünï machine")


def words(line: str) -> list[str]:
    """The words that bash reads in a printed command."""
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return printed.stdout.split("\0")[:-1]


def mounts(command: list[str]) -> dict[str, str]:
    """Folder -> "rw" or "ro" of the `--mount` options; each at the place it has outside."""
    found = {}
    for option, value in itertools.pairwise(command):
        if option != "--mount":
            continue
        kind, source, target, *mode = next(csv.reader([value]))
        assert kind == "type=bind"
        assert source.removeprefix("source=") == target.removeprefix("target=")
        folder = target.removeprefix("target=")
        assert folder not in found
        found[folder] = "ro" if mode == ["readonly"] else "rw"
    return found


# --- the scripts themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_strict_and_says_its_usage(script: str) -> None:
    path = REPOSITORY / script
    text = path.read_text(encoding="utf-8")
    header = text.split("\nset -euo pipefail\n")[0]
    assert path.stat().st_mode & stat.S_IXUSR
    assert header.startswith("#!/usr/bin/env bash\n# ")
    assert f"# Usage: {'bash ' if script == '.ci/run' else './'}{script}" in header
    assert all(line.startswith("#") for line in header.splitlines())


# --- .venv ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The scripts, a lock without packages, and an `app` that prints where it is and its words."""
    root = tmp_path.resolve() / "cöpy of it"
    (root / "scripts").mkdir(parents=True)
    for script in ("train.sh", "test.sh", "scripts/runtime.sh"):
        shutil.copy(REPOSITORY / script, root / script)
    (root / "requirements.lock").write_text("# no packages\n")
    make_executable(
        root / "app/__main__.py", "import sys\nprint(__file__, *sys.argv[1:], sep='|')\n"
    )
    return root


@pytest.mark.system
def test_the_life_of_a_venv(machine: Machine, copy: Path) -> None:
    """One test, as each making takes seconds."""
    lock, stamp = copy / "requirements.lock", copy / ".venv/.requirements.sha256"
    marker = copy / ".venv/marker"
    make_executable(machine.cwd / "app/__main__.py", "raise SystemExit('the wrong app')\n")

    def train(*flags: str) -> subprocess.CompletedProcess[str]:
        return machine.run(
            *("train.sh", *flags, "a b", "ü=1"),
            repository=copy,
            SAM3_RUNTIME="local",
            PIP_NO_INDEX="1",
        )

    def installs() -> bool:
        done = train()
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{copy}/app/__main__.py|train|a b|ü=1\n"
        assert stamp.exists()
        return "installing requirements.lock into .venv" in done.stderr

    assert train("--dry-run").returncode == 0
    assert not (copy / ".venv").exists()

    assert installs()
    marker.touch()
    assert not installs(), "a current .venv is reused"
    python, elsewhere = copy / ".venv/bin/python", machine.cwd.parent
    asked = [python, "-c", "import app; print(*app.__path__)"]
    found = subprocess.run(asked, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert found.stdout == f"{copy}/app\n", "it is imported from any folder"

    stamp.unlink()
    assert installs()
    assert marker.exists(), "a .venv made by hand has no stamp: it is completed, not replaced"

    lock.write_text(f"no-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    failed = train()
    assert failed.returncode == 2
    assert "No matching distribution found for no-such-package" in failed.stderr
    assert "the installation into .venv failed" in failed.stderr
    assert failed.stdout == ""
    assert not stamp.exists()
    assert not marker.exists(), "a .venv of another lock is made anew"

    marker.touch()
    lock.write_text("# no packages\n")
    assert installs()
    assert not marker.exists(), "an unfinished .venv is made anew"


@pytest.mark.system
def test_uv_installs_and_pip_where_uv_cannot(machine: Machine, copy: Path) -> None:
    """Of the lock's own packages, so that what it says of uv is what is installed."""
    lock = (REPOSITORY / "requirements.lock").read_text()
    entries = [re.search(rf"^{name}==.*?(?=^\S)", lock, re.M | re.S) for name in ("uv", "yacs")]
    (copy / "requirements.lock").write_text("".join(entry[0] for entry in entries if entry))

    def installer(**environment: str) -> tuple[str, str]:
        shutil.rmtree(copy / ".venv", ignore_errors=True)
        done = machine.run("train.sh", repository=copy, SAM3_RUNTIME="local", **environment)
        assert done.returncode == 0, done.stderr
        (record,) = copy.glob(".venv/lib/python*/site-packages/yacs-*.dist-info/INSTALLER")
        return record.read_text().strip(), done.stderr

    name, said = installer()
    assert name == "uv"
    assert "pip goes on" not in said
    name, said = installer(UV_OFFLINE="1", UV_NO_CACHE="1")
    assert name == "pip"
    assert "uv could not: pip goes on" in said


@pytest.mark.system
@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock scripts do not wait")
def test_scripts_started_at_once_install_once(machine: Machine, copy: Path) -> None:
    command = ["bash", "-c", '"$0" & "$0" & wait', str(copy / "train.sh")]
    environment = {**os.environ, "SAM3_RUNTIME": "local"}
    done = subprocess.run(
        command, cwd=machine.cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"{copy}/app/__main__.py|train\n" * 2
    assert done.stderr.count("installing requirements.lock") == 1
    assert "waiting for another script" in done.stderr


def test_without_a_new_enough_python_the_remedy_is_said(machine: Machine, copy: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        make_executable(machine.bin / name, "#!/bin/sh\nexit 1\n")
    done = machine.run("train.sh", repository=copy, SAM3_RUNTIME="local")
    assert done.returncode == 2
    assert "no Python 3.11 or newer with venv found" in done.stderr
    assert "install one" in done.stderr
    assert not (copy / ".venv").exists()


# --- docker --------------------------------------------------------------------------------------


def test_docker_command(machine: Machine) -> None:
    machine.docker()
    arguments = ["--prompts", "cat,dog", "--checkpoint", "none", "lr=1 e"]
    command = machine.docker_run(*arguments, HF_TOKEN="hf_secret")
    options = command[: command.index("sam3-finetuning")]
    assert command[:2] == ["run", "--rm"]
    assert command[len(options) + 1 :] == ["train", *arguments]
    pairs = set(itertools.pairwise(options))
    assert {
        ("--user", f"{os.getuid()}:{os.getgid()}"),
        ("--workdir", str(machine.cwd)),
        ("--shm-size", "8g"),
        ("--stop-timeout", "120"),
        ("-e", "HOME=/tmp/home"),
        *(("-e", name) for name in PASSED_ON),
    } <= pairs
    assert "--init" in options
    assert not {"-it", "--gpus"} & set(options)
    assert not any("hf_secret" in word for word in command)
    cache = machine.home / ".cache/huggingface"
    assert mounts(command) == {str(machine.cwd): "rw", str(cache): "rw"}
    assert ("-e", f"HF_HOME={cache}") in pairs


def test_docker_mounts_the_paths_of_flags_where_they_are(machine: Machine, tmp_path: Path) -> None:
    machine.docker()
    outside = tmp_path.resolve() / 'out, "side" ü'
    for folder in ("images", "data", "weights", "teacher", "linked"):
        (outside / folder).mkdir(parents=True)
    (outside / "my config.yaml").touch()
    (machine.cwd / "inside").mkdir()
    (machine.cwd / "link").symlink_to(outside / "linked")
    arguments = [
        *("--input", f"{outside}/images/*.jpg"),
        f"--dataset-dir={os.path.relpath(outside / 'data', machine.cwd)}",
        f"--checkpoint={outside}/weights",
        f"--teacher={outside}/teacher",
        *("--config", f"{outside}/my config.yaml"),
        *("--prompts", "link"),
        f"--output-dir={outside}/runs/new",
        *("--dataset-dir", "inside"),
        *("--other", str(outside)),
    ]
    command = machine.docker_run(*arguments, script="infer.sh")
    assert command[command.index("sam3-finetuning") + 1 :] == ["infer", *arguments]
    assert mounts(command) == {
        str(machine.cwd): "rw",
        str(machine.cwd / "inside"): "ro",
        str(machine.home / ".cache/huggingface"): "rw",
        str(outside / "runs/new"): "rw",
        str(outside / "images"): "ro",
        str(outside / "data"): "ro",
        str(outside / "weights"): "ro",
        str(outside / "teacher"): "ro",
        str(outside / "my config.yaml"): "ro",
        str(outside / "linked"): "ro",
    }
    assert (outside / "runs/new").is_dir()


def test_docker_mounts_what_a_yaml_builds_on(machine: Machine, tmp_path: Path) -> None:
    """Upstream's lie in configs/*/ and build on configs/eval_base.yaml; others on one beside."""
    machine.docker()
    configs, mine = tmp_path.resolve() / "up stream/configs", tmp_path.resolve() / "mine"
    for file in (configs / "evals/gold.yaml", mine / "run.yaml", mine / "base.yaml"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    theirs = mounts(machine.docker_run("--config", str(configs / "evals/gold.yaml")))
    assert theirs[str(configs)] == "ro"
    own = mounts(machine.docker_run(f"--config={mine / 'run.yaml'}"))
    assert [own.get(str(mine / name)) for name in ("run.yaml", "base.yaml")] == ["ro", "ro"]
    assert str(mine) not in own


def test_docker_mounts_a_folder_once_and_writable_where_it_is_written(
    machine: Machine, tmp_path: Path
) -> None:
    machine.docker()
    folder = tmp_path.resolve() / "both"
    command = machine.docker_run("--input", str(folder), "--output-dir", str(folder))
    assert mounts(command)[str(folder)] == "rw"


@pytest.mark.parametrize("dataset", [".", "data", "outputs", "mine"])
def test_docker_leaves_writable_what_the_app_writes(machine: Machine, dataset: str) -> None:
    """Features are kept in data/features, runs in outputs, or where --output-dir says."""
    machine.docker()
    for name in ("data", "outputs", "mine"):
        (machine.cwd / name).mkdir()
    command = machine.docker_run("--dataset-dir", dataset, "--output-dir", "mine/run")
    cache = machine.home / ".cache/huggingface"
    assert mounts(command) == {str(machine.cwd): "rw", str(cache): "rw"}


def exported(folder: Path) -> Path:
    """What the scripts know an exported folder by."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    return folder


def test_jetson_command(machine: Machine, tmp_path: Path) -> None:
    """Its own image and runtime; the folder is writable, as its engines are kept in it."""
    machine.docker(runtimes=("runc", "nvidia"))
    make_executable(machine.bin / "getent", '#!/bin/sh\necho "$2:x:4$(printf %s "$2" | wc -c):"\n')
    outside = tmp_path.resolve() / "out side"
    folder = exported(outside / "model ü")
    for name in ("images", "words"):
        (outside / name).mkdir()
    arguments = [
        *("--threshold", "0.4", str(folder), "--input", f"{outside}/images/*.jpg"),
        *(f"--prompts={outside}/words", "--output", f"{outside}/found"),
    ]
    command = machine.docker_run(*arguments, "--jetson", script="infer.sh", GPUS="auto")
    options = command[: command.index("sam3-finetuning-jetson")]
    assert command[len(options) + 1 :] == arguments
    pairs = set(itertools.pairwise(options))
    assert {
        ("--runtime", "nvidia"),
        ("--group-add", "45"),
        ("--group-add", "46"),
        ("--user", f"{os.getuid()}:{os.getgid()}"),
        ("--workdir", str(machine.cwd)),
        ("-e", "SAM3_TRT_WORKSPACE"),
    } <= pairs
    assert not {"--gpus", "--device", "HF_TOKEN", "HF_HOME"} & set(options)
    assert mounts(command) == {
        str(machine.cwd): "rw",
        str(folder): "rw",
        str(outside / "images"): "ro",
        str(outside / "words"): "ro",
        str(outside / "found"): "rw",
    }
    assert (outside / "found").is_dir()


@pytest.mark.parametrize(
    ("given", "device"),
    [
        (["--input", "camera:0"], "/dev/video0"),
        (["--input=camera:12"], "/dev/video12"),
        (["--input", "camera:/dev/v4l/one"], "/dev/v4l/one"),
        (["--input", "camera:rtsp://there/0"], None),
        (["--input", "images"], None),
    ],
)
@pytest.mark.parametrize("words", [("--jetson", "DIR", "--loop"), ("--prompt", "a")])
def test_a_camera_is_taken_along(
    machine: Machine, words: tuple[str, ...], given: list[str], device: str | None
) -> None:
    machine.docker(runtimes=("runc", "nvidia"))
    command = machine.docker_run(*words, *given, script="infer.sh")
    assert command[-len(given) :] == given
    assert (command[command.index("--device") + 1] if "--device" in command else None) == device


@pytest.mark.parametrize(
    ("runtimes", "gpus", "said"),
    [
        (("runc",), "auto", "GPUs: none (Docker has no nvidia runtime: docs/jetson.md)"),
        (("runc", "nvidia"), "none", ""),
    ],
)
def test_jetson_without_a_gpu(
    machine: Machine, runtimes: tuple[str, ...], gpus: str, said: str
) -> None:
    machine.docker(runtimes=runtimes)
    done = machine.run("infer.sh", "--jetson", "DIR", "--dry-run", GPUS=gpus)
    assert done.returncode == 0
    assert "--runtime" not in done.stdout
    assert said in done.stderr
    assert words(done.stdout)[-2:] == ["sam3-finetuning-jetson", "DIR"]


def test_jetson_needs_its_image(machine: Machine) -> None:
    machine.docker(image=False)
    done = machine.run("infer.sh", "--jetson", "DIR")
    assert done.returncode == 2
    assert "the image sam3-finetuning-jetson is not built: ./build.sh --jetson" in done.stderr
    assert "--jetson runs in its image alone: docs/jetson.md" in done.stderr
    machine.docker()
    done = machine.run("infer.sh", "--jetson", "DIR", "--dry-run", SAM3_IMAGE="mine:1")
    assert words(done.stdout)[-2:] == ["mine:1", "DIR"]


@pytest.mark.parametrize(
    ("uri", "is_here"),
    [
        ("http://localhost:5000", True),
        ("https://me:secret@127.0.0.1/mlflow", True),
        ("http://[::1]:5000", True),
        ("http://localhost.example:5000", False),
        ("http://mlflow:5000", False),
        ("http://mlflow:5000/localhost", False),
        ("sqlite:///outputs/mlflow.db", False),
        ("", False),
    ],
)
def test_docker_reaches_a_tracking_server_on_this_machine(
    machine: Machine, uri: str, is_here: bool
) -> None:
    machine.docker()
    for words, environment in (
        ([], {"MLFLOW_TRACKING_URI": uri}),
        ([f"--mlflow={uri}"], {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}),
    ):
        command = machine.docker_run(*words, **environment)
        assert (("--network", "host") in set(itertools.pairwise(command))) == is_here
        assert uri not in command or not uri


@pytest.mark.parametrize("path", ["/no such folder/x", "/usr", "/opt/*.jpg"])
def test_docker_refuses_to_hide_the_containers_own_folders(machine: Machine, path: str) -> None:
    machine.docker()
    done = machine.run("train.sh", "--dry-run", "--input", path, SAM3_RUNTIME="docker")
    assert done.returncode == 2
    assert f"train.sh: {path}: it does not exist, or lies directly in /" in done.stderr


def test_unset_runtime_takes_docker_where_the_image_is_built(machine: Machine) -> None:
    machine.docker()
    done = machine.run("train.sh", "--dry-run", SAM3_IMAGE="mine:1", GPUS="none")
    assert done.stderr.splitlines() == ["train.sh: runtime: docker (image mine:1)"]
    assert words(done.stdout)[-2:] == ["mine:1", "train"]


def test_in_a_rootless_engine_root_is_the_caller(machine: Machine) -> None:
    machine.docker(security=("name=seccomp,profile=builtin", "name=rootless"))
    command = machine.docker_run()
    assert command[command.index("--user") + 1] == "0:0"


@pytest.mark.parametrize(
    ("gpus", "value"), [("auto", "all"), ("all", "all"), ("0,1", '"device=0,1"'), ("none", None)]
)
def test_gpus_where_there_are_some(machine: Machine, gpus: str, value: str | None) -> None:
    machine.docker(runtimes=("runc", "nvidia"))
    machine.gpu()
    command = machine.docker_run(GPUS=gpus)
    assert (command[command.index("--gpus") + 1] if "--gpus" in command else None) == value


@pytest.mark.parametrize(
    ("runtimes", "gpu", "reason"),
    [
        (("runc",), True, "Docker has no nvidia runtime"),
        (("runc", "nvidia"), False, "nvidia-smi finds no GPU"),
    ],
)
def test_gpus_where_there_are_none(
    machine: Machine, runtimes: tuple[str, ...], gpu: bool, reason: str
) -> None:
    machine.docker(runtimes=runtimes)
    if gpu:
        machine.gpu()
    auto = machine.run("train.sh", "--dry-run")
    assert auto.returncode == 0
    assert "--gpus" not in auto.stdout
    assert f"GPUs: none ({reason}" in auto.stderr
    for asked in ("all", "0"):
        refused = machine.run("train.sh", "--dry-run", GPUS=asked)
        assert refused.returncode == 2
        assert f"GPUS={asked}: {reason}" in refused.stderr


def test_bad_gpus_are_refused(machine: Machine) -> None:
    machine.docker()
    done = machine.run("train.sh", "--dry-run", GPUS="two")
    assert done.returncode == 2
    assert "GPUS=two: must be auto, none, all or a list such as 0,1" in done.stderr


# --- build.sh ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--tag", "sam3-finetuning"]),
        (
            ["--base-image", "py:3", "--tag", "a:b", "--no-cache", "--label", "x=y z"],
            ["--tag", "a:b", "--build-arg", "BASE_IMAGE=py:3", "--no-cache", "--label", "x=y z"],
        ),
        (["--tag=a:b", "--base-image=py:3"], ["--tag", "a:b", "--build-arg", "BASE_IMAGE=py:3"]),
        (["--jetson"], ["--tag", "sam3-finetuning-jetson", "--file", JETSON]),
        (["--tag", "a:b", "--jetson"], ["--tag", "a:b", "--file", JETSON]),
    ],
)
def test_build(machine: Machine, arguments: list[str], expected: list[str]) -> None:
    make_executable(machine.bin / "git", "#!/bin/sh\necho 0123abc\n")
    label = ["--label", "org.opencontainers.image.revision=0123abc"]
    command = ["build", "--network", "host", *expected, *label, str(REPOSITORY)]
    dry = machine.run("build.sh", "--dry-run", *arguments)
    assert dry.returncode == 0, dry.stderr
    assert words(dry.stdout) == ["env", "DOCKER_BUILDKIT=1", "docker", *command]
    machine.docker(image=False)
    assert machine.run("build.sh", *arguments).returncode == 0
    assert json.loads(machine.record.read_text()) == {"arguments": command, "buildkit": "1"}


def test_build_without_git_or_value(machine: Machine) -> None:
    make_executable(machine.bin / "git", "#!/bin/sh\nexit 128\n")
    assert "--label" not in machine.run("build.sh", "--dry-run").stdout
    assert machine.run("build.sh", "--dry-run", "--tag").returncode == 2


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.jetson"])
def test_the_dockerfile_asks_no_builder_for_more_than_all_can(name: str) -> None:
    """BuildKit, the classic builder and buildah: none but the first takes these."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert not [
        word for word in ("# syntax", "<<", "--network", "--mount", "--link") if word in text
    ]
