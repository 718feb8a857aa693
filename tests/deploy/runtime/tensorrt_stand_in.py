"""A stand-in for NVIDIA's `tensorrt` and `cuda.bindings.runtime`. It is neither.

Where no GPU is, it takes their place so that every line of ours that calls them runs. It is written
from the documentation of TensorRT 10; what the real libraries do on a real GPU it cannot say.

What it holds to, so that a mistake shows:
- numbers are real: an engine holds the ONNX and runs it in ONNX Runtime;
- the GPU's addresses are none of the CPU's: who mixes them up is told so;
- nothing happens until the stream is waited for;
- freed memory is gone;
- an engine is refused by another version or another GPU, as are timings.
Each call of the CUDA runtime is recorded in `cuda_calls`, and some of TensorRT's in `calls`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import load_external_data_for_model

ON_DEVICE = 1 << 60  # added to each address that is the GPU's: the CPU has none so high
STREAM = 7
MAGIC = b"stand-in engine\n"


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


class CopyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


DTYPES = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(int64)": np.int64}


@dataclass
class StandIn:
    """A device and its libraries.

    Attributes:
        integrated: whether GPU and CPU share memory.
        fails: function of the CUDA runtime → the error that it returns, or raises.
        builds: whether the builder finds the memory that it needs.
    """

    version: str = "10.3.0"
    name: str = "Orin"
    capability: tuple[int, int] = (8, 7)
    integrated: bool = True
    free: int = 6 << 30
    fails: Mapping[str, Error | RuntimeError] = field(default_factory=dict)
    builds: bool = True
    cuda_calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)  # the CPU's address → what lies there
    mapped: set[int] = field(default_factory=set)
    queue: list[Callable[[], None]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> StandIn:
        """Take the libraries' place."""
        monkeypatch.setitem(sys.modules, "tensorrt", self.tensorrt())
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda())
        return self

    def called(self, name: str) -> list[list[Any]]:
        """The arguments of each call."""
        return [arguments for known, *arguments in self.calls if known == name]

    # --- cuda.bindings.runtime ---

    def cuda(self) -> Any:
        functions = {name: self._recorded(name) for name in dir(self) if name.startswith("cuda")}
        functions.pop("cuda"), functions.pop("cuda_calls")
        return SimpleNamespace(
            **functions, cudaHostAllocMapped=2, cudaMemcpyKind=CopyKind, cudaError_t=Error
        )

    def _recorded(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.cuda_calls.append((name, arguments))
            match self.fails.get(name):
                case RuntimeError() as error:
                    raise error
                case Error() as code:
                    return code, None
            return (Error.cudaSuccess, *getattr(self, name)(*arguments))

        return call

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any]:
        assert device == 0
        major, minor = self.capability
        name = self.name.encode() + b"\0\0"
        return (
            SimpleNamespace(name=name, major=major, minor=minor, integrated=int(self.integrated)),
        )

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.free, 8 << 30

    def cudaStreamCreate(self) -> tuple[int]:
        return (STREAM,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[()]:
        assert stream == STREAM
        while self.queue:
            self.queue.pop(0)()
        return ()

    def cudaMalloc(self, size: int) -> tuple[int]:
        return (self._allocate(size) + ON_DEVICE,)

    def cudaFree(self, address: int) -> tuple[()]:
        del self.memory[address - ON_DEVICE]
        return ()

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int]:
        address = self._allocate(size)
        if flags == 2:
            self.mapped.add(address)
        return (address,)

    def cudaFreeHost(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def cudaHostGetDevicePointer(self, host: int, flags: int) -> tuple[int]:
        assert flags == 0
        assert host in self.mapped, "not allocated as mapped"
        return (host + ON_DEVICE,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: CopyKind, stream: int
    ) -> tuple[()]:
        assert stream == STREAM
        assert (target >= ON_DEVICE) == (kind == CopyKind.cudaMemcpyHostToDevice)
        assert (source >= ON_DEVICE) == (kind == CopyKind.cudaMemcpyDeviceToHost)
        on_device = max(target, source)

        def copy() -> None:
            assert ctypes.sizeof(self.memory[on_device - ON_DEVICE]) >= size
            ctypes.memmove(target % ON_DEVICE, source % ON_DEVICE, size)

        self.queue.append(copy)
        return ()

    def _allocate(self, size: int) -> int:
        content = (ctypes.c_byte * size)(*([0x5A] * min(size, 64)))  # nobody said zeros
        address = ctypes.addressof(content)
        self.memory[address] = content
        return address

    # --- tensorrt ---

    def tensorrt(self) -> Any:
        class ILogger:
            def __init__(self) -> None:
                pass

        ILogger.Severity = Severity  # type: ignore[attr-defined]
        return SimpleNamespace(
            __version__=self.version,
            __spec__=ModuleSpec("tensorrt", None),  # as installed packages have, for find_spec
            ILogger=ILogger,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            BuilderFlag=SimpleNamespace(TF32="tf32"),
            TensorIOMode=TensorIOMode,
            Builder=lambda logger: Builder(self, logger),
            OnnxParser=lambda network, logger: OnnxParser(self, network),
            Runtime=lambda logger: Runtime(self, logger),
            nptype=lambda dtype: DTYPES[dtype],
        )

    @property
    def header(self) -> bytes:
        return json.dumps([self.version, self.name, self.capability]).encode() + b"\n"


@dataclass
class Network:
    flags: int
    model: bytes = b""


class OnnxParser:
    def __init__(self, device: StandIn, network: Network) -> None:
        self._device, self._network = device, network
        self._errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> str:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        self._device.calls.append(("parse", path.rpartition("/")[2]))
        try:
            model = onnx.load(path, load_external_data=False)
            load_external_data_for_model(model, path.rpartition("/")[0])
            onnx.checker.check_model(model)
        except Exception as error:  # whatever onnx raises on a broken file
            self._errors.append(f"In node -1 (parse_from_file): {type(error).__name__}")
            return False
        self._network.model = model.SerializeToString()
        return True


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class BuilderConfig:
    def __init__(self, device: StandIn) -> None:
        self._device = device
        self._timings: TimingCache | None = None

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self._device.calls.append(("workspace", size))

    def clear_flag(self, flag: str) -> None:
        self._device.calls.append(("clear_flag", flag))

    def create_timing_cache(self, content: bytes) -> TimingCache:
        return TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        fits = not cache.content or cache.content.startswith(self._device.header)
        if fits:
            self._timings = cache
            self._device.calls.append(("timings", cache.content.count(b"measured")))
        return fits

    def get_timing_cache(self) -> TimingCache | None:
        return self._timings


class Builder:
    def __init__(self, device: StandIn, logger: Any) -> None:
        self._device, self._logger = device, logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self._device)

    def build_serialized_network(
        self, network: Network, config: BuilderConfig
    ) -> memoryview | None:
        """As `IHostMemory`: a buffer, and no bytes."""
        assert network.flags == 1 << 1, "not strongly typed: precision would be TensorRT's choice"
        if not self._device.builds:
            self._logger.log(Severity.WARNING, "a tactic was skipped")
            self._logger.log(Severity.ERROR, "Requested amount of GPU memory was not available")
            return None
        self._device.calls.append(("build",))
        cache = config.get_timing_cache()
        assert cache is not None
        cache.content = (cache.content or self._device.header) + b"measured\n"
        return memoryview(MAGIC + self._device.header + network.model)


class Runtime:
    def __init__(self, device: StandIn, logger: Any) -> None:
        self._device, self._logger = device, logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        expected = MAGIC + self._device.header
        try:
            assert bytes(content).startswith(expected), "another version or GPU"
            model = bytes(content)[len(expected) :]
            return Engine(self._device, onnxruntime.InferenceSession(model))
        except Exception as error:  # as TensorRT: a message to the logger, and nothing
            self._logger.log(Severity.ERROR, f"Serialization assertion failed: {error}")
            return None


class Engine:
    def __init__(self, device: StandIn, session: onnxruntime.InferenceSession) -> None:
        self.device, self.session = device, session
        self.tensors = {t.name: t for t in [*session.get_inputs(), *session.get_outputs()]}
        self.inputs = [t.name for t in session.get_inputs()]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        dtype: str = self.tensors[name].type
        return dtype

    def create_execution_context(self) -> ExecutionContext:
        return ExecutionContext(self)


class ExecutionContext:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine.tensors
        assert address >= ON_DEVICE, "an address of the CPU"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        if self._addresses.keys() != self._engine.tensors.keys():
            return False
        addresses = dict(self._addresses)
        self._engine.device.queue.append(lambda: self._run(addresses))
        return True

    def _run(self, addresses: dict[str, int]) -> None:
        places = {name: self._view(name, address) for name, address in addresses.items()}
        inputs = {name: places[name].copy() for name in self._engine.inputs}
        names = [name for name in places if name not in inputs]
        for name, value in zip(names, self._engine.session.run(names, inputs), strict=True):
            places[name][...] = value

    def _view(self, name: str, address: int) -> np.ndarray:
        shape = self._engine.get_tensor_shape(name)
        dtype = np.dtype(DTYPES[self._engine.get_tensor_dtype(name)])
        size = int(np.prod(shape)) * dtype.itemsize
        content = self._engine.device.memory[address - ON_DEVICE]
        assert ctypes.sizeof(content) == size, name
        return np.frombuffer(content, dtype).reshape(shape)
