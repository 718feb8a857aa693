"""`python -m app export --format onnx`: write graphs of weights, each compared with the model."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from app.datasets.coco import Dataset
from app.datasets.depth import levels_of
from app.datasets.images import open_image
from app.datasets.square import to_square
from app.datasets.synthetic.shapes import make_shapes
from app.deploy.graphs import FEATURES, GroundGraph, ImageGraph, TextGraph
from app.deploy.operators import OPSET, check_operators
from app.deploy.output import check_output
from app.deploy.parity import (
    ROUNDED,
    TOLERANCES,
    graph_outputs,
    load_precision,
    measure,
    prompts_by_pass,
)
from app.deploy.plain_modules import use_plain_modules
from app.deploy.precision import TYPES, narrow, quantise, save
from app.deploy.runtime import manifest as manifests
from app.deploy.runtime.golden import FILE as GOLDEN
from app.deploy.runtime.golden import sample
from app.deploy.runtime.manifest import Manifest
from app.deploy.tokenizer import write_tokenizer
from app.deploy.wanted import Wanted, check_wanted
from app.files import atomic_folder, hash_file, write_json
from app.inference.postprocess import THRESHOLD
from app.inference.predictor import Predictor, normalise
from app.model import weights

log = logging.getLogger("app")
MEASURED = 20  # images that graphs are compared on, at most
DRAWN = 4  # images that are drawn where none are given
GROUND_OUTPUTS = ("scores", "presence", "boxes", "masks")


def export(
    path: Path,
    folder: Path,
    wanted: Wanted | None = None,
    *,
    images: Sequence[Path] | None = None,
    valid: Dataset | None = None,
    max_detections: int = 100,
    measure_on: int = MEASURED,
    overwrite: bool = False,
) -> Manifest:
    """Write graphs of the weights and their `manifest.json` to `folder`, whole or not at all.

    Each precision is run on a CPU and compared with the predictor on the same images. A half is
    computed in float32 on rounded numbers, because CPUs have no such kernels.

    Args:
        path: weights.
        wanted: precisions, prompts and sizes; None for the defaults of `Wanted`.
        images: files to compare on, and to calibrate int8 on.
        valid: labelled images; AP is compared on them.
        max_detections: detections of an image that AP counts.
        measure_on: the most images to compare on.

    Raises:
        UserError: what cannot be exported, or graphs beyond their tolerance; names each miss. A
            precision that misses is left out of the export where another that was asked for passes.
    """
    source = weights.find_file(path)
    check_output(folder, source, overwrite=overwrite)
    wanted = wanted or Wanted()
    asked = wanted.precisions
    header = weights.describe(source, resolution=wanted.resolution)
    wanted = check_wanted(wanted, header, has_images=images is not None or valid is not None)
    with (
        atomic_folder(folder, replace=folder.exists()) as temporary,
        _pictures(images, valid, measure_on) as pictures,
    ):
        _write_graphs(source, wanted, temporary)
        side = header.model.resolution
        predictor = Predictor.load(path, device="cpu", precision="fp32", resolution=side)
        if wanted.prompts is not None:
            text = _encode(predictor, wanted.prompts)
            np.savez(temporary / "text.npz", features=text["text"], mask=text["text_mask"])

        if "int8" in wanted.precisions:
            passes = prompts_by_pass(wanted.prompts or header.prompts, wanted.prompts_per_pass or 1)
            texts = [_encode(predictor, prompts) for prompts in passes[: len(pictures)]]
            pixels = (normalise(to_square(picture, side)).numpy() for picture in pictures)
            quantise(temporary, pixels, texts)
        for precision in TYPES:  # halves
            if precision in wanted.precisions:
                for graph in ("image", "ground"):
                    source_file = temporary / f"{graph}.onnx"
                    narrow(source_file, temporary / f"{graph}.{precision}.onnx", precision)
        for file in temporary.glob("*.onnx"):
            check_operators(file)

        manifest = _describe(temporary, header, wanted, source)
        parity = measure(predictor, temporary, manifest, asked, pictures, valid, max_detections)
        del predictor
        for file in temporary.glob(f"*{ROUNDED}.onnx*"):
            file.unlink()
        manifest = keep_precisions(manifest, list(parity), temporary)

        _write_golden(temporary, manifest, pictures[0])
        files = {**manifest.files, GOLDEN: manifests.identity(temporary / GOLDEN)}
        manifest = replace(manifest, parity=parity, files=files)
        write_json(temporary / manifests.FILE, manifest.to_json())
    return manifest


def _write_graphs(source: Path, wanted: Wanted, folder: Path) -> None:
    """Write the graphs in float32, and the tokenizer where any words can be asked for."""
    model, header = weights.load(source, resolution=wanted.resolution, merge=True)
    use_plain_modules(model)
    side, size = header.model.resolution, header.model
    image = ImageGraph(model)
    pixels = torch.zeros(1, 3, side, side)
    shapes = _to_onnx(image, {"pixels": pixels}, FEATURES, folder / "image.onnx")
    features = {name: torch.zeros(shapes[name]) for name in FEATURES}
    del image
    count, length = wanted.prompts_per_pass or 1, size.text.context_length
    texts = {
        "text": torch.zeros(count, length, size.d_model),
        "text_mask": torch.zeros(count, length, dtype=torch.bool),
    }
    ground = GroundGraph(model, count, wanted.top)
    outputs = GROUND_OUTPUTS if size.segmentation else GROUND_OUTPUTS[:-1]
    _to_onnx(ground, {**features, **texts}, outputs, folder / "ground.onnx")
    if wanted.prompts is None:
        tokens = torch.zeros(1, length, dtype=torch.long)
        _to_onnx(TextGraph(model), {"tokens": tokens}, ("text", "text_mask"), folder / "text.onnx")
        write_tokenizer(folder / "tokenizer.json")


def _to_onnx(
    graph: nn.Module, inputs: dict[str, torch.Tensor], outputs: Sequence[str], file: Path
) -> dict[str, tuple[int, ...]]:
    """Write one graph, without computing it; return the shapes of its outputs.

    Args:
        inputs: name → a tensor of the shape and type of the input.
        outputs: names.
    """
    log.info("writing %s", file.name)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None
    save(program.model, file)
    return {
        str(value.name): tuple(side for side in value.shape or () if isinstance(side, int))
        for value in program.model.graph.outputs
    }


def _encode(predictor: Predictor, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return `text` (K, L, D) and `text_mask` (K, L) of K prompts, inputs of the ground graph."""
    with torch.inference_mode():
        parts = [predictor._text((prompt,)) for prompt in prompts]
    return {
        "text": np.concatenate([p["language_features"].transpose(0, 1).numpy() for p in parts]),
        "text_mask": np.concatenate([p["language_mask"].numpy() for p in parts]),
    }


@contextlib.contextmanager
def _pictures(
    images: Sequence[Path] | None, valid: Dataset | None, most: int
) -> Iterator[list[Image.Image]]:
    """Yield the images to compare on: those given, those of the dataset, or drawn ones."""
    if images is not None:
        files, levels = list(images[:most]), None
    elif valid is not None:
        files = [image.path for image in valid.images[:most]]
        levels = levels_of(valid)
    else:
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "set"
            make_shapes(drawn, train=DRAWN, valid=0, fog=0)
            log.info("compared on %d drawn images; --images DIR takes yours", DRAWN)
            yield [open_image(file) for file in sorted((drawn / "train" / "images").iterdir())]
        return
    yield [open_image(file, levels) for file in files]


def _describe(folder: Path, header: weights.Header, wanted: Wanted, source: Path) -> Manifest:
    """Return the manifest of what the folder holds by now: all but parity and golden outputs."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    graphs = ["image", "ground", *(["text"] if wanted.prompts is None else [])]
    size = header.model
    threshold = THRESHOLD if header.threshold is None else header.threshold
    return Manifest(
        size=size.name,
        resolution=size.resolution,
        prompts=wanted.prompts,
        classes=tuple(
            prompt
            for prompt in header.prompts
            if wanted.prompts is None or prompt in wanted.prompts
        )
        or (wanted.prompts or ()),
        prompts_a_pass=wanted.prompts_per_pass or 1,
        context_length=size.text.context_length,
        masks=size.segmentation,
        top=None if wanted.top is None else min(wanted.top, size.num_queries),
        threshold=threshold,
        opset=OPSET,
        graphs={
            graph: {
                precision: name
                for precision in wanted.precisions
                if (name := manifests.graph_file(graph, precision)) in names
            }
            for graph in graphs
        },
        files={name: manifests.identity(folder / name) for name in names if name != manifests.FILE},
        shapes={graph: _shapes(folder / f"{graph}.onnx") for graph in graphs},
        tolerances={precision: TOLERANCES[precision] for precision in wanted.precisions},
        source={
            "weights": source.name,
            "sha256": hash_file(source),
            "pin": header.pin,
            "data_hash": header.data_hash,
        },
        target=wanted.target or {},
        levels=header.levels,
        scores=header.scores,
    )


def keep_precisions(manifest: Manifest, names: Sequence[str], folder: Path) -> Manifest:
    """Return the manifest with these precisions alone; remove the files of the others."""
    graphs = {
        graph: {precision: file for precision, file in files.items() if precision in names}
        for graph, files in manifest.graphs.items()
    }
    dropped = {file for files in manifest.graphs.values() for file in files.values()} - {
        file for files in graphs.values() for file in files.values()
    }
    gone = [name for name in manifest.files if name.startswith(tuple(dropped))]
    for name in gone:
        (folder / name).unlink()
    return replace(
        manifest,
        graphs=graphs,
        files={name: file for name, file in manifest.files.items() if name not in gone},
        tolerances={name: manifest.tolerances[name] for name in names},
    )


def _shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of a graph's inputs and outputs by name."""
    graph = onnx.load(file, load_external_data=False).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def _write_golden(folder: Path, manifest: Manifest, image: Image.Image) -> None:
    """Write an image and the outputs of the graphs in float32, for devices to compare with."""
    runtime = load_precision(folder, manifest, "fp32")
    prompts = prompts_by_pass(manifest.prompts or manifest.classes, manifest.prompts_a_pass)[0]
    text, mask = runtime.text(prompts)
    outputs = graph_outputs(runtime, image, prompts)
    golden: dict[str, Any] = {name: sample(value) for name, value in outputs.items()}
    golden |= {"pixels": to_square(image, manifest.resolution).numpy()}
    np.savez(folder / GOLDEN, **golden, text=text, text_mask=mask)
