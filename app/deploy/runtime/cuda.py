"""The GPU by `cuda-python`: what it is, memory on it, one stream.

Runs on Python 3.10; imports `cuda` only when a GPU is asked for.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from app.errors import UserError

NO_GPU = (35, 38, 100)  # cudaErrorInsufficientDriver, …DevicesUnavailable, …NoDevice
NO_MEMORY = 2  # cudaErrorMemoryAllocation
WITHOUT = "or do without a GPU: --backend onnxruntime"


class Gpu:
    """The first GPU and one stream on it.

    Attributes:
        name: as the driver has it.
        capability: (major, minor), of compute.
        integrated: whether it shares the memory of the CPU, as on Jetson.

    Raises:
        UserError: no `cuda-python`, or no GPU answers.
    """

    def __init__(self) -> None:
        self.runtime = _import_runtime()
        properties = self.call("cudaGetDeviceProperties", 0)
        self.name = bytes(properties.name).split(b"\0")[0].decode(errors="replace")
        self.capability = (int(properties.major), int(properties.minor))
        self.integrated = bool(properties.integrated)
        self.stream = self.call("cudaStreamCreate")

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the CUDA runtime; what it returns beside its error code.

        Raises:
            UserError: no GPU answers, or its memory is used up.
            RuntimeError: any other error.
        """
        try:
            code, *values = getattr(self.runtime, name)(*arguments)
        except RuntimeError as error:  # bindings of CUDA 11: no driver at all
            raise _no_gpu(str(error)) from None
        if int(code) in NO_GPU:
            raise _no_gpu(code.name)
        if int(code) == NO_MEMORY:
            raise UserError(
                f"CUDA: {code.name}: the GPU's memory is used up. Close what else uses it (on a "
                "Jetson the desktop as well: docs/jetson.md), or export a smaller model"
            )
        if int(code):
            raise RuntimeError(f"{name}: {code.name}")
        return values[0] if len(values) == 1 else values

    def copy(self, target: int, source: int, size: int, *, to_device: bool) -> None:
        """Queue a copy of `size` bytes between addresses of the CPU and of the GPU."""
        kinds = self.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for all that the stream was given."""
        self.call("cudaStreamSynchronize", self.stream)

    def free_memory(self) -> int:
        """Bytes that an engine may still take.

        On Jetson the driver counts what Linux caches as taken, which it gives back when asked.
        """
        free = int(self.call("cudaMemGetInfo")[0])
        return max(free, available_memory()) if self.integrated else free


def _no_gpu(reason: str) -> UserError:
    return UserError(
        f"CUDA: {reason}: no GPU that this CUDA can use. On a Jetson start the container with "
        f"--runtime nvidia, as ./infer.sh --jetson does; {WITHOUT}"
    )


def _import_runtime() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second until cuda-python 12.6
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError(
        "The package 'cuda-python' is missing. On a Jetson use its image: docs/jetson.md; "
        f"{WITHOUT}"
    )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory that Linux can give, caches included; 0 where it does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail")), 0)


class DeviceArray:
    """Room for a float32 array on the GPU, freed with the object.

    Attributes:
        address: for the GPU.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...]) -> None:
        self._gpu, self.shape = gpu, shape
        self.size = 4 * math.prod(shape)
        self.address = int(gpu.call("cudaMalloc", self.size))
        weakref.finalize(self, gpu.runtime.cudaFree, self.address)

    def numpy(self) -> NDArray[np.float32]:
        """What is there, as an array of its own."""
        array = np.empty(self.shape, np.float32)
        self._gpu.copy(array.ctypes.data, self.address, self.size, to_device=False)
        self._gpu.synchronize()
        return array


class SharedArray:
    """An array that CPU and GPU both reach: the same memory on Jetson, two copies elsewhere.

    Attributes:
        array: for the CPU; valid as long as this object lives.
        address: for the GPU.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._gpu = gpu
        self.size = math.prod(shape) * np.dtype(dtype).itemsize
        flags = gpu.runtime.cudaHostAllocMapped if gpu.integrated else 0
        self._host = int(gpu.call("cudaHostAlloc", self.size, flags))
        weakref.finalize(self, gpu.runtime.cudaFreeHost, self._host)
        raw = (ctypes.c_byte * self.size).from_address(self._host)
        self.array: NDArray[Any] = np.frombuffer(memoryview(raw), dtype).reshape(shape)
        if gpu.integrated:
            self.address = int(gpu.call("cudaHostGetDevicePointer", self._host, 0))
        else:
            self.address = int(gpu.call("cudaMalloc", self.size))
            weakref.finalize(self, gpu.runtime.cudaFree, self.address)

    def to_device(self) -> None:
        """Queue the copy, where there are two."""
        if not self._gpu.integrated:
            self._gpu.copy(self.address, self._host, self.size, to_device=True)

    def to_host(self) -> None:
        """Queue the copy, where there are two."""
        if not self._gpu.integrated:
            self._gpu.copy(self._host, self.address, self.size, to_device=False)
