"""A real Label Studio on loopback, where one is installed: SAM3_LABEL_STUDIO=/path/of/it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers import until
from tests.loopback import free_port

TOKEN = "abcdef0123456789abcdef0123456789abcdef01"


@contextlib.contextmanager
def label_studio(tmp_path: Path) -> Iterator[httpx.Client]:
    """Yield a client of one with an empty database; skip the test where there is none."""
    found = os.environ.get("SAM3_LABEL_STUDIO") or shutil.which("label-studio")
    if found is None:
        pytest.skip("no Label Studio: pip install label-studio in an environment of its own")
    port = free_port()
    words = ["start", "--no-browser", "--port", str(port), "--username", "a@example.com"]
    words += ["--password", "secret-123", "--user-token", TOKEN]
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(tmp_path / "label-studio"),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "false",
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        "HOME": str(tmp_path),
    }
    (tmp_path / "label-studio").mkdir()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [found, *words], env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Token {TOKEN}"}
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=120) as client:

            def is_up() -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                with contextlib.suppress(httpx.HTTPError):
                    return client.get("/health").status_code == 200
                return False

            until(is_up, "Label Studio is up")
            yield client
    finally:
        process.kill()
        process.wait()
