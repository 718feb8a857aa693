"""The GPU by `cuda-python`: its properties, memory on it, one stream.

`cuda` is imported only when a `Gpu` is made.
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
        name: of the driver.
        capability: (major, minor), of compute.
        integrated: whether it shares the CPU's memory, as on a Jetson.

    Raises:
        UserError: `cuda-python` is missing, or there is no GPU.
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
        """Call a function of the CUDA runtime; return its values without the error code.

        Raises:
            UserError: there is no GPU, or its memory is used up.
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
        """Wait for all work in the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def free_memory(self) -> int:
        """Return the bytes that an engine may still take.

        On a Jetson the driver counts Linux's caches as used, which Linux gives back on demand.
        """
        free = int(self.call("cudaMemGetInfo")[0])
        return max(free, available_memory()) if self.integrated else free


def _no_gpu(reason: str) -> UserError:
    """Return the error for a machine without a GPU."""
    return UserError(
        f"CUDA: {reason}: no GPU that this CUDA can use. On a Jetson start the container with "
        f"--runtime nvidia, as ./infer.sh --jetson does; {WITHOUT}"
    )


def _import_runtime() -> Any:
    """Return cuda-python's module of the CUDA runtime; raise UserError where it is missing."""
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
    """Return the bytes of memory that Linux can give, caches included; 0 where that is unknown."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail")), 0)


class DeviceArray:
    """Memory for a float32 array on the GPU, freed with the object.

    Attributes:
        address: on the GPU.
    """

    def __init__(self, gpu: Gpu, shape: tuple[int, ...]) -> None:
        self._gpu, self.shape = gpu, shape
        self.size = 4 * math.prod(shape)
        self.address = int(gpu.call("cudaMalloc", self.size))
        weakref.finalize(self, gpu.runtime.cudaFree, self.address)

    def numpy(self) -> NDArray[np.float32]:
        """Return a copy of the array."""
        array = np.empty(self.shape, np.float32)
        self._gpu.copy(array.ctypes.data, self.address, self.size, to_device=False)
        self._gpu.synchronize()
        return array


class SharedArray:
    """An array for CPU and GPU: the same memory on a Jetson, two copies elsewhere.

    Attributes:
        array: on the CPU; valid as long as this object lives.
        address: on the GPU.
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
        """Queue the copy where there are two arrays."""
        if not self._gpu.integrated:
            self._gpu.copy(self.address, self._host, self.size, to_device=True)

    def to_host(self) -> None:
        """Queue the copy where there are two arrays."""
        if not self._gpu.integrated:
            self._gpu.copy(self._host, self.address, self.size, to_device=False)
