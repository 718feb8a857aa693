"""The requests of docs/serving.md, sent to a server as they stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.helpers import REPOSITORY
from tests.inference.film_files import write
from tests.serving.servers import drawn

PAGE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
CURLS = re.findall(r"^curl .*?(?=  #|$)", PAGE, flags=re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(drawn(1, 300, 200, "JPEG"))
    write(tmp_path / "a.mp4", 3)
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_its_curls(client: httpx.Client, folder: Path) -> None:
    assert len(CURLS) >= 4
    session, answers = "", []
    for line in CURLS:
        line = line.replace("localhost:8000", client.base_url.netloc.decode())
        line = line.replace("sessions/ID", f"sessions/{session}")
        done = subprocess.run(
            ["bash", "-c", f"{line} --silent --show-error --fail-with-body"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if "/follow" in line:
            assert done.stdout.count("event: frame") == 2
            assert "event: end" in done.stdout
            continue
        answers.append(json.loads(done.stdout or "{}"))
        session = answers[-1].get("id", session)
    assert session
    assert any("results" in answer for answer in answers)
    assert any("detections" in answer for answer in answers)


def test_its_python(client: httpx.Client, folder: Path) -> None:
    (program,) = PYTHON
    program = program.replace("127.0.0.1:8000", client.base_url.netloc.decode())
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'results'" in done.stdout
