"""A GPU that computes nothing, built for the tests, and the process in which torch sees it.

`null/` stands in for CUDA's runtime, its driver, cuBLAS and NCCL; `site/` for cuDNN and NVRTC. All
of torch that runs on the host is real: which device a tensor is on, what an allocation takes, which
kernels are launched, when the host waits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import REPOSITORY

HERE = Path(__file__).parent
LIBRARY = "libnullgpu.so"


def build(folder: Path) -> None:
    """Compile the null GPU into a new folder; skip where that cannot be."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which builds the null GPU")
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [*packages.glob("nvidia/cu*/include"), packages / "triton/backends/nvidia/include"]
    headers = [path for path in folders if (path / "cuda_runtime_api.h").is_file()]
    complete = any((path / "crt/host_defines.h").is_file() for path in headers)
    if not complete or not (packages / "torch/lib/libtorch_cuda.so").is_file():
        pytest.skip("this torch has no CUDA, or came without its headers")
    folder.mkdir()
    sources = sorted((HERE / "null").glob("*.c"))
    flags = ["-O1", "-std=gnu11", "-shared", "-fPIC", *(f"-I{path}" for path in headers)]
    subprocess.run(["gcc", *flags, *sources, "-o", folder / LIBRARY, "-lpthread"], check=True)
    (folder / "libcuda.so.1").symlink_to(LIBRARY)  # what Triton loads


def environment(library: Path, **settings: object) -> dict[str, str]:
    """Return the environment of a process that sees the null GPU of a folder.

    Args:
        settings: of null/runtime.c, by their names there in small letters, without NULLGPU_.
    """
    return os.environ | {
        "LD_PRELOAD": str(library / LIBRARY),
        "LD_LIBRARY_PATH": str(library),
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "site", REPOSITORY))),
        "TRITON_CACHE_DIR": str(library / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(library / "inductor"),
        **_variables(settings),
    }


def _variables(settings: dict[str, object]) -> dict[str, str]:
    return {f"NULLGPU_{name.upper()}": str(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Done:
    """What a call has left: an exit code, the value that was returned, all that was printed."""

    code: int
    value: Any
    output: str


class NullGpu:
    """A process that has imported the project, and forks itself for each call.

    So the imports, most of what a small run takes, are paid for once.

    Args:
        library: folder of the null GPU.
    """

    def __init__(self, library: Path) -> None:
        self.library = library
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.server"],
            cwd=REPOSITORY,
            env=environment(library),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def app(self, *words: object, **settings: object) -> Done:
        """Run `python -m app WORDS`, on GPUs of other settings where some are given."""
        return self._call("command", [str(word) for word in words], settings)

    def train(self, dataset: Path, folder: Path, *words: object, **settings: object) -> Done:
        """Run `python -m app train` on a dataset into a folder."""
        common = ["--dataset-dir", dataset, "--output-dir", folder, "evaluation.pictures=0"]
        return self.app("train", *common, *words, **settings)

    def probe(self, name: str, *arguments: Any, **settings: object) -> Any:
        """Return the value of a function of probes.py, which must not fail."""
        done = self._call(name, list(arguments), settings)
        assert done.code == 0, done.output
        return done.value

    def _call(self, name: str, arguments: list[Any], settings: dict[str, object]) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments, _variables(settings)]) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
