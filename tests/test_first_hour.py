"""A stranger's first hour: README's commands in their order, in a clone with nothing beside it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.helpers import REPOSITORY

pytestmark = pytest.mark.system
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
LOCAL = {**os.environ, "SAM3_RUNTIME": "local"}
LESS = ["--epochs", "1", "--limit", "4"]  # benchmarks/first_hour.py runs all of it


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clone what is committed, with this repository's .venv."""
    folder = tmp_path_factory.mktemp("alone") / "clone"
    source = ["git", "clone", "--quiet", "--depth", "1", f"file://{REPOSITORY}", str(folder)]
    done = subprocess.run(source, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no git repository: {done.stderr}")
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=LOCAL, capture_output=True, text=True)


def _serve(command: list[str], folder: Path) -> None:
    """Start a server, ask it whether it is ready, and stop it."""
    process = subprocess.Popen(
        [*command, "--port", "0"],
        cwd=folder,
        env=LOCAL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:  # it ends where the server does
            said.append(line)
            if address := re.search(r"serving: (http://\S+)", line):
                assert httpx.get(f"{address[1]}/ready", timeout=60).status_code == 200
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 143, "".join(said)
    finally:
        process.kill()


def test_the_first_hour(clone: Path) -> None:
    """Each ends with 0 and leaves its files; the second run finds its own folder."""
    assert COMMANDS[:3] == [
        "./train.sh",
        "./train.sh --dataset-dir examples/potholes",
        "./infer.sh --checkpoint last --input examples/potholes/test --prompt pothole",
    ]
    ends = []
    for line in COMMANDS:
        words = shlex.split(line.replace("YOUR_FOLDER", "examples/potholes"))
        if words[0] == "./test.sh":
            continue
        if words[0] == "./serve.sh":
            _serve(words, clone)
            continue
        more = {"./train.sh": LESS, "./build.sh": ["--dry-run"]}.get(words[0], [])
        begun = time.monotonic()
        done = _run([*words, *more], clone)
        print(f"{time.monotonic() - begun:6.1f} s  {line}")
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ends.append(done.stdout)
    for run in ("train", "train-2", "train-3"):
        assert (clone / "outputs" / run / "report.html").is_file()
        assert (clone / "outputs" / run / "weights" / "best" / "model.safetensors").is_file()
    assert "before training" in ends[0]
    assert "weights: outputs/train-2/weights/best (the newest run's)" in ends[2]
    names = sorted(path.stem for path in (clone / "examples/potholes/test").glob("*.jpg"))
    found = sorted(path.name for path in (clone / "outputs/infer").glob("*.png"))
    assert len(found) == len(names) == 8


def test_the_second_time_nothing_is_in_the_way(clone: Path) -> None:
    best = ["--checkpoint", "app/assets/nano", "--dataset-dir", "examples/potholes"]
    for number in ("", "-2"):
        done = _run([".venv/bin/python", "-m", "app", "evaluate", *best], clone)
        assert done.returncode == 0, done.stderr
        assert (clone / f"outputs/eval{number}" / "metrics.json").is_file()
