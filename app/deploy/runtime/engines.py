"""TensorRT engines: built on the device that runs them, one at a time, and cached in a folder.

An engine is made for one version of TensorRT, one kind of GPU and one ONNX file. It is code, so it
is loaded only where the note beside it says that it was built for these, and has its hash. The name
of the file alone would not show that an engine was changed or cut short.

The `tensorrt` module is passed in: nothing here imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.deploy.runtime.cuda import Gpu
from app.deploy.runtime.external_data import locations
from app.deploy.runtime.manifest import REMEDY, Manifest
from app.errors import UserError
from app.files import (
    SETTINGS_BYTES,
    atomic_path,
    hash_file,
    locked,
    read_json,
    short_hash,
    write_json,
)

log = logging.getLogger("app")

WORKSPACE = "SAM3_TRT_WORKSPACE"  # environment variable: MiB
MAX_WORKSPACE = 2 << 30  # bytes, in which TensorRT tries kernels, beside the weights
MIN_WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Identity:
    """The device and the ONNX file that an engine is made for.

    Attributes:
        onnx: sha256 of the ONNX file and of its external data.
        tensorrt: version of TensorRT.
        gpu: name and compute capability of the GPU.
    """

    graph: str
    precision: str
    onnx: str
    tensorrt: str
    gpu: str

    @property
    def name(self) -> str:
        """Return the name of the engine's file without its suffix."""
        return f"{self.graph}.{self.precision}.{_key(asdict(self))}"

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt}, {self.gpu}, ONNX {self.onnx[:12]}"


def _key(value: Any) -> str:
    """Return a hash for a file name."""
    return short_hash(json.dumps(value, sort_keys=True), 16)


def source_hash(folder: Path, manifest: Manifest, file: str) -> str:
    """Return the sha256 of an ONNX file and its external data, by the manifest.

    Raises:
        UserError: the file cannot be read, or has external data that the manifest does not name.
    """
    names = [file, *sorted(locations(folder / file))]
    if unknown := [name for name in names if name not in manifest.files]:
        raise UserError(f"{folder / file}: the manifest does not name its {unknown}. {REMEDY}")
    hashes = [manifest.files[name]["sha256"] for name in names]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def workspace_limit(free: int) -> int:
    """Return the bytes in which the builder may try kernels: at most a quarter of the free ones.

    Raises:
        UserError: $SAM3_TRT_WORKSPACE is no number of MiB.
    """
    asked = os.environ.get(WORKSPACE, "")
    if not asked:
        return max(MIN_WORKSPACE, min(MAX_WORKSPACE, free // 4))
    if not asked.isdecimal() or not 0 < int(asked) < 1 << 20:
        raise UserError(f"{WORKSPACE}={asked}: must be a whole number of MiB, such as 1024")
    return int(asked) << 20


class EngineCache:
    """A folder of engines, each with a note of its identity and hash, and of kernel timings.

    Args:
        trt: the module `tensorrt`.
        logger: of `make_logger`.
    """

    def __init__(self, folder: Path, trt: Any, gpu: Gpu, logger: Any) -> None:
        self.folder, self._trt, self._gpu, self._logger = folder, trt, gpu, logger

    def path(self, identity: Identity) -> Path:
        """Return the file of an engine."""
        return self.folder / f"{identity.name}.engine"

    def note(self, identity: Identity) -> Path:
        """Return the file of its note."""
        return self.folder / f"{identity.name}.json"

    def engine_hash(self, identity: Identity) -> str:
        """Return the hash of an engine that `ensure` has seen to, by its note."""
        return str(_read(self.note(identity))["sha256"])

    def ensure(self, identity: Identity, onnx: Path, check: Callable[[], None]) -> None:
        """Build the engine unless the folder has it whole.

        Args:
            check: called before a build; raises where the ONNX file must not be used.

        Raises:
            UserError: no engine can be built here, or the folder cannot be written to.
        """
        with self._locked():
            reason = self.fault(identity)
            if reason is not None:
                check()
                if reason:
                    log.warning("%s", reason)
                self.build(identity, onnx)

    def fault(self, identity: Identity) -> str | None:
        """Return why the engine must be built, as a message; None where it may be loaded.

        The message is "" where the folder has no engine of the graph. For engines made elsewhere it
        names what they were made for and what is here.
        """
        path, note = self.path(identity), self.note(identity)
        if not path.exists() and not note.exists():
            return self._others(identity)
        content = _read(note)
        here = asdict(identity)
        if not content:
            return f"{path}: has no note of what it was made for, or a broken one: built anew"
        if (made_for := content.get("identity")) != here:
            return f"{path}: was made for {_describe(made_for)}; here is {identity}: built anew"
        if not path.exists() or path.stat().st_size != content.get("bytes"):
            return f"{path}: is missing or cut short, not {content.get('bytes')} bytes: built anew"
        if hash_file(path) != content.get("sha256"):
            return f"{path}: is changed, its SHA-256 is not its note's: built anew"
        return None

    def _others(self, identity: Identity) -> str:
        """Return a message about engines of the same graph that were made elsewhere, or ""."""
        notes = sorted(self.folder.glob(f"{identity.graph}.{identity.precision}.*.json"))
        made_for = [_describe(_read(note).get("identity")) for note in notes]
        if not made_for:
            return ""
        there = "; ".join(dict.fromkeys(made_for))
        return (
            f"{self.folder}: the {identity.precision} engine of {identity.graph} there was made "
            f"for {there}; here is {identity}: built anew"
        )

    def build(self, identity: Identity, onnx: Path) -> None:
        """Build the engine and write it, whole or not at all.

        Raises:
            UserError: with the messages of TensorRT's parser or builder.
        """
        limit = workspace_limit(self._gpu.free_memory())
        log.warning(
            "building the engine of %s for %s by TensorRT %s, once, with %d MiB to try kernels "
            "in: minutes, on a Jetson up to an hour",
            *(onnx.name, identity.gpu, identity.tensorrt, limit >> 20),
        )
        started = time.monotonic()
        plan = self._plan(identity, onnx, limit)
        path = self.path(identity)
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.write(plan)
            size, digest = path.stat().st_size, hash_file(path)
            note = {"identity": asdict(identity), "bytes": size, "sha256": digest}
            seconds = round(time.monotonic() - started, 1)
            write_json(self.note(identity), {**note, "seconds": seconds, "workspace": limit})
        except OSError as error:
            raise self._unwritable(error) from None
        log.warning("built %s in %.0f s: %.0f MB", path.name, seconds, size / 1e6)

    def _plan(self, identity: Identity, onnx: Path, workspace: int) -> Any:
        """Return the serialized engine, a buffer."""
        trt, self._logger.errors[:] = self._trt, []
        builder = trt.Builder(self._logger)
        # TensorRT 11 has only strongly typed networks, and may drop the flag.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(onnx)):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            place = f"{onnx}: TensorRT {trt.__version__} cannot read it"
            raise UserError([f"{place}: {each}" for each in errors] or place)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if identity.precision == "fp32":
            config.clear_flag(
                trt.BuilderFlag.TF32
            )  # the safest precision must not round like a half
        timings = self.folder / f"timing.{_key([identity.tensorrt, identity.gpu])}.cache"
        self._use_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError(
                f"{onnx}: TensorRT {trt.__version__} built no engine: "
                f"{self._logger.last_errors()}. Where memory ran out, close what else uses it, "
                f"add swap (docs/jetson.md) or set {WORKSPACE} below {workspace >> 20} MiB"
            )
        self._save_timings(config, timings)
        return plan

    def _use_timings(self, config: Any, file: Path) -> None:
        """Give the builder the timings of earlier builds, or none where TensorRT refuses them."""
        saved = file.read_bytes() if file.exists() else b""
        for content in dict.fromkeys([saved, b""]):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return

    def _save_timings(self, config: Any, file: Path) -> None:
        """Save the timings for later builds."""
        cache = config.get_timing_cache()
        if cache is not None:
            with atomic_path(file) as temporary, temporary.open("wb") as target:
                target.write(cache.serialize())

    def load(self, identity: Identity, onnx: Path) -> Any:
        """Load an engine that `ensure` has seen to, an `ICudaEngine`.

        An engine that TensorRT refuses all the same is built anew, once.

        Raises:
            UserError: TensorRT refuses what it has just built.
        """
        for refused in (False, True):
            self._logger.errors.clear()
            runtime = self._trt.Runtime(self._logger)
            engine = runtime.deserialize_cuda_engine(self.path(identity).read_bytes())
            if engine is not None:
                return engine
            if refused:
                break
            log.warning("%s: TensorRT refuses it: built anew", self.path(identity))
            with self._locked():
                self.build(identity, onnx)
        raise UserError(
            f"{self.path(identity)}: TensorRT refuses what it built: "
            f"{self._logger.last_errors()}. Where memory ran out, close what else uses it, or "
            "export a smaller model"
        )

    def remove(self, identity: Identity) -> None:
        """Remove an engine and its note."""
        for file in (self.note(identity), self.path(identity)):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock: one build at a time, because a Jetson lacks memory for two."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise self._unwritable(error) from None
        with locked(self.folder / ".lock"):
            yield

    def _unwritable(self, error: OSError) -> UserError:
        """Return the error for a folder that cannot be written to."""
        return UserError(
            f"{self.folder}: engines are kept there, and it cannot be written to "
            f"({error.strerror}). Copy the exported folder to where you may write, or free some "
            "of the disk"
        )


def _read(note: Path) -> dict[str, Any]:
    """Return a note; empty where it is missing or broken."""
    try:
        content = read_json(note, most=SETTINGS_BYTES)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _describe(identity: Any) -> str:
    """Return the identity in a note as text; a note may hold anything."""
    try:
        return str(Identity(**identity))
    except (TypeError, KeyError):
        return "an unknown device"


def make_logger(trt: Any) -> Any:
    """Return a `trt.ILogger` that collects errors, for our own messages."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Collect an error, and drop all else."""
            grave = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if severity in grave:
                self.errors.append(message)

        def last_errors(self) -> str:
            """Return the last errors in a line."""
            return "; ".join(self.errors[-3:]) or "it gave no reason"

    return Logger()
