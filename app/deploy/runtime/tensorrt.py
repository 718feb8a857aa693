"""The TensorRT backend: an exported folder on an NVIDIA GPU, such as a Jetson's.

`tensorrt` and `cuda` are imported only when a backend is made. The features of an image stay on the
GPU; inputs and outputs lie in memory that CPU and GPU share on a Jetson.
"""

from __future__ import annotations

import functools
import importlib
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.deploy.runtime.cuda import WITHOUT, DeviceArray, Gpu, SharedArray
from app.deploy.runtime.engines import EngineCache, Identity, make_logger, source_hash
from app.deploy.runtime.golden import FILE as GOLDEN
from app.deploy.runtime.golden import golden_misses
from app.deploy.runtime.manifest import (
    PRECISIONS,
    REMEDY,
    Manifest,
    check_files,
    list_variants,
    safer,
)
from app.deploy.runtime.onnx_backend import check_graphs
from app.deploy.runtime.square import to_pixels
from app.errors import UserError
from app.files import SETTINGS_BYTES, read_json, short_hash, write_json

log = logging.getLogger("app")

FASTEST = "fp16"  # int8 is used only where it is asked for, because it costs accuracy
LEAST_VERSION = 10


class Features(dict[str, DeviceArray]):
    """The features of one image: output of the image graph → its memory on the GPU."""


class Graph:
    """An engine with memory for its inputs and outputs.

    Args:
        shapes: input or output → shape, by the manifest.
        elsewhere: inputs and outputs whose memory each call names.
    """

    def __init__(
        self,
        trt: Any,
        gpu: Gpu,
        engine: Any,
        shapes: Mapping[str, Any],
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        self._gpu, self._engine = gpu, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise UserError("TensorRT: the GPU's memory is used up: export a smaller model")
        self.inputs: dict[str, SharedArray] = {}
        self.outputs: dict[str, SharedArray] = {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        asked = {name: tuple(shape) for name, shape in shapes.items()}
        if self.shapes != asked or any(dtypes[name] != np.float32 for name in elsewhere & {*names}):
            raise UserError(
                f"an engine has other inputs and outputs than the manifest: {self.shapes}, not "
                f"{asked}. {REMEDY}"
            )
        for name in (name for name in names if name not in elsewhere):
            place = SharedArray(gpu, self.shapes[name], dtypes[name])
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = place
            self._context.set_tensor_address(name, place.address)

    def run(
        self, inputs: Mapping[str, NDArray[Any]], places: Mapping[str, DeviceArray] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run the engine and wait for its end.

        Args:
            inputs: input → array.
            places: memory of the inputs and outputs that lie elsewhere.

        Returns:
            Output → array, which later runs do not change.
        """
        for name, place in (places or {}).items():
            self._context.set_tensor_address(name, place.address)
        for name, shared in self.inputs.items():
            assert inputs[name].shape == shared.array.shape, (name, inputs[name].shape)
            np.copyto(shared.array, inputs[name])
            shared.to_device()
        if not self._context.execute_async_v3(int(self._gpu.stream)):
            raise RuntimeError("TensorRT: execute_async_v3 failed")
        for shared in self.outputs.values():
            shared.to_host()
        self._gpu.synchronize()
        return {name: shared.array.copy() for name, shared in self.outputs.items()}


class TensorRTBackend:
    """Runs an exported folder by TensorRT.

    The first time engines are built, which takes minutes each, and their outputs are compared with
    the exporter's; where they differ by more than the tolerance, the next safer precision is built.

    Args:
        folder: as `manifest` describes it.
        precision: the first to try; None for fp16.
        cache: folder of engines; None for `engines` in `folder`.

    Attributes:
        precision: the one that is used.

    Raises:
        UserError: no TensorRT, no GPU, a precision that the folder lacks, a file that is not what
            the manifest says, or no precision that gives the exporter's outputs.
    """

    name = "tensorrt"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        precision: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self._trt = import_tensorrt()
        self._gpu = Gpu()
        self._folder, self._manifest = folder, manifest
        logger = make_logger(self._trt)
        self._cache = EngineCache(cache or folder / "engines", self._trt, self._gpu, logger)
        self._spare: list[dict[str, DeviceArray]] = []
        levels = ladder(manifest, precision, bf16=self._gpu.capability >= (8, 0))
        self.precision = self._choose_level(levels)

    # --- the precision ---

    def _choose_level(self, levels: Mapping[str, Mapping[str, str]]) -> str:
        """Load the first level that gives the exporter's outputs; return its name.

        Engines of a level that does not are removed, but for those that other levels use.
        """
        missed: list[str] = []
        identities = {level: self._identities(variants) for level, variants in levels.items()}
        for level, variants in levels.items():
            if missed:
                log.warning("%s is used instead", level)
            missed = self._misses(level, variants, identities[level])
            if not missed:
                return level
            log.warning("%s differs from the exporter's outputs: %s", level, "; ".join(missed))
            others = {i for name in identities if name != level for i in identities[name].values()}
            for identity in set(identities[level].values()) - others:
                self._cache.remove(identity)
        raise UserError(
            f"{self._folder}: no precision here gives the exporter's outputs; {level}: "
            f"{'; '.join(missed)}. Export it again, {WITHOUT}"
        )

    def _identities(self, variants: Mapping[str, str]) -> dict[str, Identity]:
        """Return graph → the identity of its engine on this device."""
        return {
            graph: Identity(
                graph=graph,
                precision=variant,
                onnx=source_hash(
                    self._folder, self._manifest, self._manifest.graphs[graph][variant]
                ),
                tensorrt=self._trt.__version__,
                gpu=str(self._gpu),
            )
            for graph, variant in variants.items()
        }

    def _misses(
        self, level: str, variants: Mapping[str, str], identities: Mapping[str, Identity]
    ) -> list[str]:
        """Load a level; return what it misses of the exporter's outputs.

        The comparison is made once for each set of engines, and its result saved beside them.
        """
        if GOLDEN not in self._manifest.files:
            raise UserError(f"{self._folder}: holds no {GOLDEN} to compare engines with. {REMEDY}")
        of = [self._manifest.files[GOLDEN]["sha256"], *(i.name for i in identities.values())]
        compared = short_hash("\n".join(of), 16)
        verdict = self._cache.folder / f"checked.{level}.{compared}.json"
        before = _read_verdict(verdict)
        if before and before["misses"]:
            return list(map(str, before["misses"]))
        self._load(variants, identities)
        engines = {g: self._cache.engine_hash(identity) for g, identity in identities.items()}
        if before and before["engines"] == engines:
            return []
        check_files(self._folder, self._manifest, [GOLDEN])
        with np.load(self._folder / GOLDEN, allow_pickle=False) as content:
            golden = dict(content)
        features = self.image(to_pixels(golden["pixels"]))
        outputs = self.ground(features, golden["text"], golden["text_mask"])
        outputs |= {name: place.numpy() for name, place in features.items()}
        misses = golden_misses(self._manifest, level, golden, outputs)
        write_json(verdict, {"engines": engines, "misses": misses})
        return misses

    def _load(self, variants: Mapping[str, str], identities: Mapping[str, Identity]) -> None:
        """Build the engines that are missing, one after the other, and only then load them all."""
        self._graphs: dict[str, Graph] = {}  # frees those of another precision
        self._spare.clear()
        files = {g: self._manifest.graphs[g][variant] for g, variant in variants.items()}
        for graph, identity in identities.items():
            file = files[graph]
            check = functools.partial(check_graphs, self._folder, self._manifest, [file])
            self._cache.ensure(identity, self._folder / file, check)
        features = frozenset(self._manifest.shapes["image"]) - {"pixels"}
        for graph, identity in identities.items():
            engine = self._cache.load(identity, self._folder / files[graph])
            shapes = self._manifest.shapes[graph]
            elsewhere = features if graph in ("image", "ground") else frozenset()
            self._graphs[graph] = Graph(self._trt, self._gpu, engine, shapes, elsewhere)

    # --- the graphs ---

    def image(self, pixels: NDArray[np.float32]) -> Features:
        """Return the features of an image.

        Args:
            pixels: (1, 3, R, R), -1..1.
        """
        graph = self._graphs["image"]
        # Memory is used again once the features that lie in it are gone.
        places = self._spare.pop() if self._spare else self._new_places(graph)
        features = Features(places)
        weakref.finalize(features, self._spare.append, places)
        graph.run({"pixels": pixels}, features)
        return features

    def _new_places(self, graph: Graph) -> dict[str, DeviceArray]:
        """Return memory for the features of an image."""
        shapes = {name: shape for name, shape in graph.shapes.items() if name not in graph.inputs}
        return {name: DeviceArray(self._gpu, shape) for name, shape in shapes.items()}

    def ground(
        self, features: Features, text: NDArray[np.float32], text_mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs of K prompts.

        Args:
            text: (K, L, D).
            text_mask: (K, L), True where there is no token.

        Returns:
            scores (K, Q), presence (K,), boxes (K, Q, 4) cxcywh 0..1, and, where the model has
            masks, masks (K, Q, h, w) logits.
        """
        return self._graphs["ground"].run({"text": text, "text_mask": text_mask}, features)

    def text(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the features of a prompt (1, L, D), and (1, L), True where there is no token.

        Args:
            tokens: (1, L).
        """
        outputs = self._graphs["text"].run({"tokens": tokens})
        return outputs["text"], outputs["text_mask"]


def import_tensorrt() -> Any:
    """Return the module `tensorrt`.

    Raises:
        UserError: it is missing, lacks a library of its own, or is too old.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise UserError(
            f"TensorRT cannot be used here ({error}). On a Jetson use its image: docs/jetson.md; "
            f"{WITHOUT}"
        ) from None
    if int(trt.__version__.split(".")[0]) < LEAST_VERSION:
        raise UserError(
            f"TensorRT {trt.__version__}: must be {LEAST_VERSION} or newer (JetPack 6.2); {WITHOUT}"
        )
    return trt


def ladder(
    manifest: Manifest, precision: str | None = None, *, bf16: bool = True
) -> dict[str, dict[str, str]]:
    """Return the precisions to try: the one asked for, then ever safer ones.

    Args:
        precision: the first; None for fp16.
        bf16: whether the GPU supports it.

    Returns:
        Precision → graph → the precision of its file: the same, or the next safer one that the
        folder has.

    Raises:
        UserError: no such precision, or the folder has a graph in neither it nor a safer one.
    """
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"precision {precision}: must be one of {', '.join(PRECISIONS)}")
    levels: dict[str, dict[str, str]] = {}
    for level in safer(precision or FASTEST):
        variants = {}
        for graph in manifest.graphs:
            files = list_variants(manifest, graph, level, on_gpu=True)
            files = [p for p in files if bf16 or p != "bf16"]
            if files:
                variants[graph] = files[0]
        if len(variants) == len(manifest.graphs):
            # Label the set by its lowest precision: that bounds the accuracy.
            levels[next(p for p in safer(level) if p in variants.values())] = variants
    if not levels:
        raise UserError(
            f"precision {precision or FASTEST}: the folder has neither it nor a safer one of each "
            f"graph, but {manifest.precisions('image')} of image. {REMEDY}"
        )
    return levels


def _read_verdict(file: Path) -> dict[str, Any] | None:
    """Return the result of a comparison; None where there was none, or its file is broken."""
    try:
        content = read_json(file, most=SETTINGS_BYTES)
        return {"engines": dict(content["engines"]), "misses": list(content["misses"])}
    except (UserError, ValueError, KeyError, TypeError):
        return None
