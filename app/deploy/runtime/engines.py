"""TensorRT engines: built on the device that runs them, one at a time, and kept.

An engine is good for one TensorRT, one kind of GPU and one ONNX. It is code: what lies in the
folder is loaded only where its note says that it was made here for just this, and its hash holds.

Runs on Python 3.10 and is given the `tensorrt` module: it imports none.
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
from app.files import atomic_path, hash_file, locked, short_hash, write_json

log = logging.getLogger("app")

WORKSPACE = "SAM3_TRT_WORKSPACE"  # environment: MiB
MAX_WORKSPACE = 2 << 30  # bytes; what TensorRT tries kernels in, beside the weights
MIN_WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Identity:
    """What one engine is good for.

    Attributes:
        onnx: sha256 of the ONNX file and of the data beside it.
        tensorrt: version.
        gpu: name and compute capability.
    """

    graph: str
    precision: str
    onnx: str
    tensorrt: str
    gpu: str

    @property
    def name(self) -> str:
        """Of the engine's file, without what follows the last dot."""
        return f"{self.graph}.{self.precision}.{_key(asdict(self))}"

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt}, {self.gpu}, ONNX {self.onnx[:12]}"


def _key(value: Any) -> str:
    return short_hash(json.dumps(value, sort_keys=True), 16)


def source_hash(folder: Path, manifest: Manifest, file: str) -> str:
    """The sha256 of what an engine is made of, by the manifest: the ONNX, and its data beside it.

    Raises:
        UserError: it cannot be read, or keeps data where the manifest names none.
    """
    names = [file, *sorted(locations(folder / file))]
    if unknown := [name for name in names if name not in manifest.files]:
        raise UserError(f"{folder / file}: the manifest does not name its {unknown}. {REMEDY}")
    hashes = [manifest.files[name]["sha256"] for name in names]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def workspace_limit(free: int) -> int:
    """Bytes that the builder may try kernels in: at most a quarter of what is free.

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
    """A folder of engines, each with a note of what it is, and of the builder's timings.

    Args:
        trt: the module `tensorrt`.
        logger: of `make_logger`.
    """

    def __init__(self, folder: Path, trt: Any, gpu: Gpu, logger: Any) -> None:
        self.folder, self._trt, self._gpu, self._logger = folder, trt, gpu, logger

    def path(self, identity: Identity) -> Path:
        return self.folder / f"{identity.name}.engine"

    def note(self, identity: Identity) -> Path:
        return self.folder / f"{identity.name}.json"

    def engine_hash(self, identity: Identity) -> str:
        """Of a file that `ensure` has returned from, by its note."""
        return str(_read(self.note(identity))["sha256"])

    def ensure(self, identity: Identity, onnx: Path, check: Callable[[], None]) -> None:
        """Build the engine unless a whole one, made for just this, is there.

        Args:
            check: raises where the ONNX must not be built.

        Raises:
            UserError: the ONNX cannot be built here, or the folder not be written to.
        """
        with self._alone():
            reason = self.fault(identity)
            if reason is not None:
                check()
                if reason:
                    log.warning("%s", reason)
                self.build(identity, onnx)

    def fault(self, identity: Identity) -> str | None:
        """Why there is none to load: both versions where it is foreign; "" where there never was
        one; None where it may be loaded."""
        path, note = self.path(identity), self.note(identity)
        if not path.exists() and not note.exists():
            return self._others(identity)
        known = _read(note)
        here = asdict(identity)
        if not known:
            return f"{path}: has no note of what it was made for, or a broken one: built anew"
        if (made_for := known.get("identity")) != here:
            return f"{path}: was made for {_describe(made_for)}; here is {identity}: built anew"
        if not path.exists() or path.stat().st_size != known.get("bytes"):
            return f"{path}: is missing or cut short, not {known.get('bytes')} bytes: built anew"
        if hash_file(path) != known.get("sha256"):
            return f"{path}: is changed, its SHA-256 is not its note's: built anew"
        return None

    def _others(self, identity: Identity) -> str:
        """Engines of the same graph that are not for here."""
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
            UserError: with what the parser or the builder said.
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
        """The serialised engine: a buffer."""
        trt, self._logger.errors[:] = self._trt, []
        builder = trt.Builder(self._logger)
        # TensorRT 11 has strongly typed networks only, and may drop the flag.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(onnx)):
            said = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            place = f"{onnx}: TensorRT {trt.__version__} cannot read it"
            raise UserError([f"{place}: {each}" for each in said] or place)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if identity.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)  # the last resort must not round like a half
        timings = self.folder / f"timing.{_key([identity.tensorrt, identity.gpu])}.cache"
        self._use_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError(
                f"{onnx}: TensorRT {trt.__version__} built no engine: {self._logger.said()}. Where "
                f"memory ran out, close what else uses it, add swap (docs/jetson.md) or set "
                f"{WORKSPACE} below {workspace >> 20} MiB"
            )
        self._keep_timings(config, timings)
        return plan

    def _use_timings(self, config: Any, file: Path) -> None:
        """What earlier builds measured; a cache that TensorRT does not take is left."""
        known = file.read_bytes() if file.exists() else b""
        for content in dict.fromkeys([known, b""]):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
                return

    def _keep_timings(self, config: Any, file: Path) -> None:
        cache = config.get_timing_cache()
        if cache is not None:
            with atomic_path(file) as temporary, temporary.open("wb") as target:
                target.write(cache.serialize())

    def load(self, identity: Identity, onnx: Path) -> Any:
        """The engine that `ensure` has seen to: an `ICudaEngine`.

        One that TensorRT refuses all the same is built anew, once.

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
            with self._alone():
                self.build(identity, onnx)
        raise UserError(
            f"{self.path(identity)}: TensorRT refuses what it built: {self._logger.said()}. Where "
            "memory ran out, close what else uses it, or export a smaller model"
        )

    def remove(self, identity: Identity) -> None:
        for file in (self.note(identity), self.path(identity)):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One build at a time: two would not fit in a Jetson's memory."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
        except OSError as error:
            raise self._unwritable(error) from None
        with locked(self.folder / ".lock"):
            yield

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: engines are kept there, and it cannot be written to "
            f"({error.strerror}). Copy the exported folder to where you may write, or free some "
            "of the disk"
        )


def _read(note: Path) -> dict[str, Any]:
    """A note; empty where it is missing or broken."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _describe(identity: Any) -> str:
    """An identity as a note has it, from anywhere."""
    try:
        return str(Identity(**identity))
    except (TypeError, KeyError):
        return "nobody knows what"


def make_logger(trt: Any) -> Any:
    """A `trt.ILogger` that keeps what went wrong, for messages of ours."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            grave = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if severity in grave:
                self.errors.append(message)

        def said(self) -> str:
            return "; ".join(self.errors[-3:]) or "it did not say why"

    return Logger()
