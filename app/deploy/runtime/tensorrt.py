"""The TensorRT backend: an exported folder on an NVIDIA GPU, a Jetson's among them.

Runs on Python 3.10; imports `tensorrt` and `cuda` only when a backend is made. What the image graph
finds stays on the GPU; inputs and results lie in memory that a Jetson's CPU and GPU share.
"""

from __future__ import annotations

import functools
import importlib
import json
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
from app.files import short_hash, write_json

log = logging.getLogger("app")

FASTEST = "fp16"  # int8 costs accuracy: only where it is asked for
LEAST_VERSION = 10


class Features(dict[str, DeviceArray]):
    """Output of the image graph → where it lies on the GPU: what it found in one image."""


class Graph:
    """One engine, ready to run: its inputs and outputs are in memory of its own.

    Args:
        shapes: input or output → shape, as the manifest has it.
        elsewhere: inputs and outputs that each call says the place of.
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
        """Run to the end.

        Args:
            places: of what lies elsewhere.

        Returns:
            Output → array of its own.
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

    The first time engines are built, minutes each, and what they answer is compared with what the
    exporter kept; where that misses, the next safer precision is built.

    Args:
        folder: as `manifest` describes it.
        precision: to begin with; None: fp16.
        cache: folder of engines; None: `engines` in `folder`.

    Attributes:
        precision: that is used.

    Raises:
        UserError: no TensorRT, no GPU, a precision that the folder lacks, a file that is not the
            manifest's, or no precision that gives what the exporter kept.
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
        self.precision = self._settle(levels)

    # --- which precision ---

    def _settle(self, levels: Mapping[str, Mapping[str, str]]) -> str:
        """Load the first level whose answers are the exporter's; its name."""
        missed: list[str] = []
        identities = {level: self._identities(variants) for level, variants in levels.items()}
        for level, variants in levels.items():
            if missed:
                log.warning("%s is used instead", level)
            missed = self._misses(level, variants, identities[level])
            if not missed:
                return level
            log.warning("%s misses what the exporter kept: %s", level, "; ".join(missed))
            kept = {i for other in identities if other != level for i in identities[other].values()}
            for identity in set(identities[level].values()) - kept:
                self._cache.remove(identity)
        raise UserError(
            f"{self._folder}: no precision here gives what the exporter kept; {level}: "
            f"{'; '.join(missed)}. Export it again, {WITHOUT}"
        )

    def _identities(self, variants: Mapping[str, str]) -> dict[str, Identity]:
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
        """Load a level; what it misses, which is found out once for each engine."""
        if GOLDEN not in self._manifest.files:
            raise UserError(f"{self._folder}: holds no {GOLDEN} to compare engines with. {REMEDY}")
        of = [self._manifest.files[GOLDEN]["sha256"], *(i.name for i in identities.values())]
        compared = short_hash("\n".join(of), 16)
        verdict = self._cache.folder / f"checked.{level}.{compared}.json"
        known = _verdict(verdict)
        if known and known["misses"]:
            return list(map(str, known["misses"]))
        self._load(variants, identities)
        engines = {g: self._cache.engine_hash(identity) for g, identity in identities.items()}
        if known and known["engines"] == engines:
            return []
        check_files(self._folder, self._manifest, [GOLDEN])
        with np.load(self._folder / GOLDEN, allow_pickle=False) as content:
            golden = dict(content)
        misses = golden_misses(self._manifest, level, golden, self._answers(golden))
        write_json(verdict, {"engines": engines, "misses": misses})
        return misses

    def _load(self, variants: Mapping[str, str], identities: Mapping[str, Identity]) -> None:
        """Build what is not there, one after the other, before anything is loaded beside it."""
        self._graphs: dict[str, Graph] = {}  # lets go of those of another precision
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

    def _answers(self, golden: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """What this device makes of what the exporter made its own of."""
        features = self.image(to_pixels(golden["pixels"]))
        found = {name: place.numpy() for name, place in features.items()}
        return {**found, **self.ground(features, golden["text"], golden["text_mask"])}

    # --- the graphs ---

    def image(self, pixels: NDArray[np.float32]) -> Features:
        """What the trunk finds in an image.

        Args:
            pixels: (1, 3, R, R), -1..1.
        """
        graph = self._graphs["image"]
        # As many places as images are looked at at the same time, each used again.
        places = self._spare.pop() if self._spare else self._new_places(graph)
        features = Features(places)
        weakref.finalize(features, self._spare.append, places)
        graph.run({"pixels": pixels}, features)
        return features

    def _new_places(self, graph: Graph) -> dict[str, DeviceArray]:
        shapes = {name: shape for name, shape in graph.shapes.items() if name not in graph.inputs}
        return {name: DeviceArray(self._gpu, shape) for name, shape in shapes.items()}

    def ground(
        self, features: Features, text: NDArray[np.float32], text_mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """What answers the prompts.

        Args:
            text: (K, L, D).
            text_mask: (K, L), True where there is no token.

        Returns:
            scores (K, Q), presence (K,), boxes (K, Q, 4) cxcywh 0..1, and, where the model has
            masks, masks (K, Q, h, w) logits.
        """
        return self._graphs["ground"].run({"text": text, "text_mask": text_mask}, features)

    def text(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Features of a prompt.

        Args:
            tokens: (1, L).

        Returns:
            (1, L, D), and (1, L), True where there is no token.
        """
        found = self._graphs["text"].run({"tokens": tokens})
        return found["text"], found["text_mask"]


def import_tensorrt() -> Any:
    """The module `tensorrt`.

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
    """The precisions to try, the asked one first, then ever safer ones.

    Args:
        precision: None: fp16.
        bf16: whether the GPU has it.

    Returns:
        Precision → graph → the variant that the folder has: that precision, or the next safer one.

    Raises:
        UserError: no such precision, or a graph has neither it nor a safer one.
    """
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"precision {precision}: must be one of {', '.join(PRECISIONS)}")
    levels: dict[str, dict[str, str]] = {}
    for level in safer(precision or FASTEST):
        variants = {}
        for graph in manifest.graphs:
            found = list_variants(manifest, graph, level, on_gpu=True)
            found = [p for p in found if bf16 or p != "bf16"]
            if found:
                variants[graph] = found[0]
        if len(variants) == len(manifest.graphs):
            # Named for the least safe one in it, which says what to expect of the whole.
            levels[next(p for p in safer(level) if p in variants.values())] = variants
    if not levels:
        raise UserError(
            f"precision {precision or FASTEST}: the folder has neither it nor a safer one of each "
            f"graph, but {manifest.precisions('image')} of image. {REMEDY}"
        )
    return levels


def _verdict(file: Path) -> dict[str, Any] | None:
    """What a comparison came to; None where there was none, or its file is broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"engines": dict(content["engines"]), "misses": list(content["misses"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
