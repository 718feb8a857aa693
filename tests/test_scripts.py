"""The shell scripts, run for real.

No network and no engine: a stub `docker` on PATH answers as an engine would and records what it is
asked to run, so these tests prove the command that is built, not that an image runs it. Installs
are made in a tiny copy of the repository whose lock names no package.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ["train.sh", "infer.sh", "test.sh", "build.sh", ".ci/run"]
PASSED_ON = ["HF_TOKEN", "ROBOFLOW_API_KEY", "MLFLOW_TRACKING_URI", "SAM3_BASE"]


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


# --- local ---------------------------------------------------------------------------------------

AWKWARD = ["--input", "my images/ünï*.jpg", "a'b\"c", "$HOME `id`", "", "--x=y z", "lr=[1,2]"]


@pytest.mark.parametrize(("script", "command"), [("train.sh", "train"), ("infer.sh", "infer")])
def test_dry_run_prints_a_command_that_a_shell_reads_back(
    machine: Machine, script: str, command: str
) -> None:
    done = machine.run(script, "--dry-run", *AWKWARD, SAM3_RUNTIME="local")
    assert done.returncode == 0
    assert words(done.stdout) == [
        "env",
        f"PYTHONPATH={REPOSITORY}",
        "PYTHONSAFEPATH=1",
        f"{REPOSITORY}/.venv/bin/python",
        *("-m", "app", command),
        *AWKWARD,
    ]


def test_dry_run_without_arguments(machine: Machine) -> None:
    done = machine.run("train.sh", "--dry-run", SAM3_RUNTIME="local")
    assert words(done.stdout)[-3:] == ["-m", "app", "train"]


def test_bad_runtime_is_refused(machine: Machine) -> None:
    done = machine.run("train.sh", SAM3_RUNTIME="podman")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "train.sh: SAM3_RUNTIME=podman: must be docker or local, or unset to choose by itself"
    ]


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ({"engine": False}, "no Docker engine answers"),
        ({"info": "null null"}, "no Docker engine answers"),
        ({"image": False}, "the image sam3-finetuning is not built: ./build.sh"),
    ],
)
def test_without_engine_or_image_unset_is_local_and_docker_is_refused(
    machine: Machine, stub: dict[str, object], reason: str
) -> None:
    machine.docker(**stub)  # type: ignore[arg-type]
    chosen = machine.run("infer.sh", "--dry-run")
    assert chosen.returncode == 0
    assert chosen.stderr.splitlines() == [f"infer.sh: runtime: local ({reason})"]
    refused = machine.run("infer.sh", "--dry-run", SAM3_RUNTIME="docker")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert reason in refused.stderr


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
    for folder in ("images", "data", "weights", "linked"):
        (outside / folder).mkdir(parents=True)
    (outside / "my config.yaml").touch()
    (machine.cwd / "inside").mkdir()
    (machine.cwd / "link").symlink_to(outside / "linked")
    arguments = [
        *("--input", f"{outside}/images/*.jpg"),
        f"--dataset-dir={os.path.relpath(outside / 'data', machine.cwd)}",
        f"--checkpoint={outside}/weights",
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
        str(machine.home / ".cache/huggingface"): "rw",
        str(outside / "runs/new"): "rw",
        str(outside / "images"): "ro",
        str(outside / "data"): "ro",
        str(outside / "weights"): "ro",
        str(outside / "my config.yaml"): "ro",
        str(outside / "linked"): "ro",
    }
    assert (outside / "runs/new").is_dir()


def test_docker_mounts_a_folder_once_and_writable_where_it_is_written(
    machine: Machine, tmp_path: Path
) -> None:
    machine.docker()
    folder = tmp_path.resolve() / "both"
    command = machine.docker_run("--input", str(folder), "--output-dir", str(folder))
    assert mounts(command)[str(folder)] == "rw"


def test_docker_dry_run_prints_the_same_command_and_makes_nothing(
    machine: Machine, tmp_path: Path
) -> None:
    machine.docker()
    output = tmp_path.resolve() / "new/run"
    arguments = ["--output-dir", str(output)]
    dry = machine.run("train.sh", "--dry-run", *arguments, SAM3_RUNTIME="docker")
    assert dry.returncode == 0, dry.stderr
    assert not output.parent.exists()
    assert not (machine.home / ".cache").exists()
    assert not machine.record.exists()
    assert words(dry.stdout) == ["docker", *machine.docker_run(*arguments)]


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


def test_rootless_engine_needs_no_user(machine: Machine) -> None:
    machine.docker(security=("name=seccomp,profile=builtin", "name=rootless"))
    assert "--user" not in machine.docker_run()


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
    ],
)
def test_build(machine: Machine, arguments: list[str], expected: list[str]) -> None:
    command = ["build", "--network", "host", *expected, str(REPOSITORY)]
    dry = machine.run("build.sh", "--dry-run", *arguments)
    assert dry.returncode == 0, dry.stderr
    assert words(dry.stdout) == ["env", "DOCKER_BUILDKIT=1", "docker", *command]
    machine.docker(image=False)
    assert machine.run("build.sh", *arguments).returncode == 0
    assert json.loads(machine.record.read_text()) == {"arguments": command, "buildkit": "1"}


def test_build_without_engine_or_value(machine: Machine) -> None:
    without = machine.run("build.sh")
    assert without.returncode == 2
    assert "no Docker engine answers" in without.stderr
    assert machine.run("build.sh", "--dry-run", "--tag").returncode == 2
