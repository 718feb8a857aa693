"""What Dockerfile.jetson installs: wheels that a Jetson can use, for the Python of its JetPack."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.helpers import REPOSITORY

LOCK = REPOSITORY / "requirements-jetson.lock"
JETPACKS = {"3.10": 35, "3.12": 39}  # Python of JetPack 6.2 and 7.2 → glibc 2.x
NO_INDEX = ("NewConnectionError", "ConnectTimeout", "ProxyError", "Name or service not known")


def locked(python: str) -> dict[Requirement, list[str]]:
    """What the lock asks for on a Jetson, without markers → its hashes."""
    environment: dict[str, Any] = {
        **default_environment(),
        **{"python_version": python, "python_full_version": f"{python}.0"},
        **{"sys_platform": "linux", "platform_machine": "aarch64"},
    }
    found = {}
    lines = [line for line in LOCK.read_text().splitlines() if not line.lstrip().startswith("#")]
    for entry in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement = Requirement(entry.partition("--hash")[0])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            found[requirement] = re.findall(r"--hash=(sha256:[0-9a-f]{64})", entry)
    return found


@pytest.mark.parametrize("python", JETPACKS)
def test_all_is_pinned_once_with_hashes(python: str) -> None:
    requirements = locked(python)
    names = [requirement.name for requirement in requirements]
    assert {"numpy", "onnxruntime", "pillow", "cuda-bindings", "tokenizers"} <= set(names)
    assert not {"torch", "tensorrt", "opencv-python", "huggingface-hub"} & set(names)
    assert len(names) == len(set(names))
    for requirement, hashes in requirements.items():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes, requirement


@pytest.mark.parametrize(("python", "cuda"), [("3.10", "11.8"), ("3.12", "13.0")])
def test_no_cuda_is_newer_than_the_devices_driver(python: str, cuda: str) -> None:
    """JetPack 6.2 has CUDA 12.6, JetPack 7.2 has 13.2."""
    (bindings,) = (r for r in locked(python) if r.name == "cuda-bindings")
    assert str(bindings.specifier).startswith(f"=={cuda}.")


@pytest.mark.system
@pytest.mark.parametrize("python", JETPACKS)
def test_each_has_a_wheel_for_a_jetson(python: str, tmp_path: Path) -> None:
    requirements = locked(python)
    asked = tmp_path / "requirements.txt"
    asked.write_text(
        "\n".join(
            f"{requirement} {' '.join(f'--hash={value}' for value in hashes)}"
            for requirement, hashes in requirements.items()
        )
    )
    platforms = [
        f"--platform=manylinux_2_{glibc}_aarch64" for glibc in range(JETPACKS[python], 16, -1)
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
            *("--no-deps", "--require-hashes", "--only-binary=:all:", "--implementation=cp"),
            "--ignore-requires-python",  # pip compares it with its own Python: see below
            *(f"--python-version={python}", *platforms, "--platform=manylinux2014_aarch64"),
            *(f"--target={tmp_path / 'none'}", f"--report={tmp_path / 'report.json'}"),
            *("--requirement", str(asked), "--retries=0", "--timeout=60"),
        ],
        capture_output=True,
        text=True,
    )
    if any(word in done.stderr for word in NO_INDEX):
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    wheels = [each["download_info"]["url"].rpartition("/")[2] for each in report["install"]]
    assert len(wheels) == len(requirements)
    assert all(re.search(r"(aarch64|-any)\.whl$", wheel) for wheel in wheels), wheels
    for each in report["install"]:
        metadata = each["metadata"]
        assert f"{python}.4" in SpecifierSet(metadata.get("requires_python", "")), metadata["name"]
    assert sum("aarch64" in wheel for wheel in wheels) >= 6
