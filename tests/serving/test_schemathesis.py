"""Two thousand requests made from the description of the API: none makes the server fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.serving.loading import Source
from tests.helpers import PATIENCE
from tests.serving.servers import Loaded, serving

LEAST = 2000  # requests


@pytest.mark.slow
def test_the_server_holds_to_its_description(tiny_run: Path, tmp_path: Path) -> None:
    """Refused are also values that fit the description, such as bytes that are no image."""
    tiny = Loaded(*Source(tiny_run / "weights" / "best", "tiny", device="cpu").load())
    with serving(tiny.engine()) as client:
        words = [
            *("run", f"{client.base_url}/openapi.json", "--checks=all", "--max-examples=160"),
            *("--exclude-checks=positive_data_acceptance", "--seed=1", "--no-shrink"),
            *("--request-timeout=300", "--max-response-time=300"),  # a busy machine is no fault
            *("--continue-on-failure", "--report=ndjson", f"--report-dir={tmp_path}"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert client.get("/health").status_code == 200
    found = re.search(r"(\d[\d,]*) (?:test cases )?generated", done.stdout)
    assert found, done.stdout[-3000:]
    assert int(found[1].replace(",", "")) >= LEAST
