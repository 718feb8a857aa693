"""The ONNX Runtime backend: an exported folder on any CPU, or on an NVIDIA GPU by CUDA."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.deploy.runtime.external_data import locations
from app.deploy.runtime.manifest import PRECISIONS, REMEDY, Manifest, check_files, list_variants
from app.errors import UserError, nearest

log = logging.getLogger("app")
CUDA = "CUDAExecutionProvider"
FASTEST = {True: "fp16", False: "int8"}  # by whether there is CUDA
UNSUPPORTED_PRECISION = "bf16"  # ONNX Runtime has no kernels of most operators for it
# It fuses products with their biases before ONNX Runtime looks for int8 products, which then are
# computed in fp32.
DISABLED_OPTIMIZERS = ["MatMulAddFusion"]
Features = Mapping[str, Any]  # name → NDArray, or OrtValue where it lies on a GPU


class OnnxRuntimeBackend:
    """Runs an exported folder by ONNX Runtime.

    Args:
        folder: as `manifest` describes it.
        precision: None for fp16 on a GPU and int8 on a CPU. A graph that the folder lacks in this
            precision is taken in the next safer one.

    Attributes:
        precision: the lowest of the graphs' precisions.

    Raises:
        UserError: onnxruntime is missing, no such precision, a file that is missing or changed, or
            a graph with other inputs and outputs than the manifest says.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, manifest: Manifest, precision: str | None = None) -> None:
        self._ort = import_onnxruntime()
        self._on_gpu = CUDA in self._ort.get_available_providers()
        self._open_all(folder, manifest, precision)
        if self._on_gpu and not all(CUDA in s.get_providers() for s in self._sessions.values()):
            # What the package was built with, this machine need not have: a driver, CUDA, cuDNN.
            log.warning(
                "note: on the CPU: ONNX Runtime %s cannot load CUDA here, though it is built with "
                "it. Its own log says why: python -c 'import onnxruntime; "
                "onnxruntime.preload_dlls()'",
                self._ort.__version__,
            )
            self._on_gpu = False
            self._open_all(folder, manifest, precision)
        side = list(manifest.shapes["image"]["pixels"])[-1]
        if side != manifest.resolution:
            raise UserError(
                f"{folder}: the image graph takes {side} pixels, and the manifest says "
                f"{manifest.resolution}. {REMEDY}"
            )

    def _open_all(self, folder: Path, manifest: Manifest, precision: str | None) -> None:
        """Open a session of each graph, in the precision that is asked for or fastest."""
        chosen = choose_precisions(manifest, precision, on_gpu=self._on_gpu)
        files = {graph: manifest.graphs[graph][level] for graph, level in chosen.items()}
        check_graphs(folder, manifest, list(files.values()))
        self.precision = max(chosen.values(), key=PRECISIONS.index)
        self._sessions = {
            graph: self._open(folder / file, manifest.shapes[graph])
            for graph, file in files.items()
        }

    def _open(self, file: Path, shapes: Mapping[str, Any]) -> Any:
        """Return a session of a graph, whose inputs and outputs must have these shapes."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only, which are raised as well
        # Its threads would spin between runs, and the other graph and numpy would lack the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = [CUDA] if self._on_gpu else []
        try:
            session = self._ort.InferenceSession(
                str(file),
                options,
                providers=[*providers, "CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # because its errors have no common class
            raise UserError(
                f"{file}: ONNX Runtime {self._ort.__version__} cannot load it "
                f"({' '.join(str(error).split())}). {REMEDY}"
            ) from None
        actual = {
            value.name: tuple(value.shape)
            for value in (*session.get_inputs(), *session.get_outputs())
        }
        expected = {name: tuple(shape) for name, shape in shapes.items()}
        if actual != expected:
            raise UserError(
                f"{file}: has other inputs and outputs than the manifest: {actual}, not "
                f"{expected}. {REMEDY}"
            )
        return session

    def image(self, pixels: NDArray[np.float32]) -> Features:
        """Return the features of an image; see `app.deploy.runtime.runtime.Backend`."""
        return self._run("image", {"pixels": pixels}, on_device=True)

    def ground(
        self, features: Features, text: NDArray[np.float32], text_mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Return the outputs of K prompts; see `app.deploy.runtime.runtime.Backend`."""
        return self._run("ground", {**features, "text": text, "text_mask": text_mask})

    def text(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the features of a prompt; see `app.deploy.runtime.runtime.Backend`."""
        outputs = self._run("text", {"tokens": tokens})
        return outputs["text"], outputs["text_mask"]

    def _run(self, graph: str, inputs: Features, *, on_device: bool = False) -> dict[str, Any]:
        """Run a graph; return its outputs by name, as OrtValue on the GPU where `on_device`."""
        session = self._sessions[graph]
        names = [value.name for value in session.get_outputs()]
        if not self._on_gpu:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cuda" if on_device else "cpu")
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        values = outputs if on_device else [value.numpy() for value in outputs]
        return dict(zip(names, values, strict=True))


def import_onnxruntime() -> Any:
    """Return the module `onnxruntime`; raise UserError where it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            f"ONNX Runtime cannot be used here ({error}): pip install onnxruntime (or "
            "onnxruntime-gpu, with CUDA)"
        ) from None


def choose_precisions(
    manifest: Manifest, precision: str | None = None, *, on_gpu: bool = False
) -> dict[str, str]:
    """Return graph → precision: the one asked for, or the next safer one that the folder has.

    Raises:
        UserError: no such precision, one without kernels, or a graph that the folder has in neither
            this precision nor a safer one.
    """
    usable = [name for name in PRECISIONS if name != UNSUPPORTED_PRECISION]
    if precision is not None and precision not in usable:
        raise UserError(
            f"--precision {precision}: ONNX Runtime takes {', '.join(usable)}."
            f"{nearest(precision, usable)}"
        )
    wanted = precision or FASTEST[on_gpu]
    chosen, problems = {}, []
    for graph in manifest.graphs:
        variants = [
            level
            for level in list_variants(manifest, graph, wanted, on_gpu=on_gpu)
            # halves are slower than fp32 on a CPU: only where they are asked for
            if level != UNSUPPORTED_PRECISION and (on_gpu or level in (wanted, "fp32"))
        ]
        if variants:
            chosen[graph] = variants[0]
        else:
            problems.append(
                f"--precision {wanted}: the folder has of the {graph} graph only "
                f"{', '.join(manifest.precisions(graph)) or 'nothing'}. {REMEDY}"
            )
    if problems:
        raise UserError(problems)
    return chosen


def check_graphs(folder: Path, manifest: Manifest, files: list[str]) -> None:
    """Compare graphs and their external data with the manifest.

    Raises:
        UserError: a file that is missing or changed, or external data that the manifest does not
            name, which could lie outside of the folder.
    """
    check_files(folder, manifest, files)
    data = {name: locations(folder / name) for name in files}
    problems = [
        f"{folder / name}: keeps weights in '{place}', which the manifest does not name. {REMEDY}"
        for name, places in data.items()
        for place in sorted(places)
        if place not in manifest.files
    ]
    if problems:
        raise UserError(problems)
    check_files(folder, manifest, sorted(set().union(*data.values())))
