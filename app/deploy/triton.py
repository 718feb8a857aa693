"""`python -m app export --format triton`: ONNX graphs as a model repository of Triton's.

A model for each graph, and `sam3`, an ensemble that sends an image and a text through both in one
request. `text.npz` holds the text of each class for the client; with an open vocabulary
`sam3_text` encodes the tokens of `tokenizer.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from app.deploy.export import export as export_graphs
from app.deploy.output import RECORD, TRITON, check_output
from app.deploy.runtime.manifest import Manifest
from app.deploy.wanted import Wanted
from app.errors import UserError
from app.files import atomic_folder, write_json, write_text
from app.model import weights

# onnx's type → Triton's (triton-inference-server/common, model_config.proto, DataType).
TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.UINT8: "TYPE_UINT8",
}
CLIENT = ("text.npz", "tokenizer.json")  # files that a client reads
VERSION = "1"
ENSEMBLE = "sam3"
Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name → Triton's type, shape


def export(path: Path, folder: Path, wanted: Wanted, *, overwrite: bool, **options: Any) -> None:
    """Write weights as a model repository, whole or not at all, each graph compared as in ONNX.

    Args:
        path: weights.
        folder: of the repository.
        wanted: one precision alone, since a model of a repository has one file.
        overwrite: replace an earlier export.
        options: as of `app.deploy.export.export`.

    Raises:
        UserError: more than one precision, or what cannot be exported.
    """
    if len(wanted.precisions) != 1:
        raise UserError(
            f"--precision {','.join(wanted.precisions)}: a model of Triton's has one; export twice."
        )
    check_output(folder, weights.find_file(path), overwrite=overwrite)
    with atomic_folder(folder, replace=folder.exists()) as temporary:
        graphs = temporary / "graphs"
        manifest = export_graphs(path, graphs, wanted, **options)
        write_repository(graphs, manifest, wanted.precisions[0], temporary)
        shutil.rmtree(graphs)


def write_repository(exported: Path, manifest: Manifest, precision: str, folder: Path) -> None:
    """Move the graphs of an exported folder into a model repository.

    Args:
        exported: where `export` has written; left without the graphs.
        precision: of the graphs; a graph that has none of it is taken in fp32.
        folder: of the repository.
    """
    signatures: dict[str, tuple[Tensors, Tensors]] = {}
    for graph, files in manifest.graphs.items():
        name = files.get(precision, files["fp32"])
        signatures[graph] = signature(exported / name)
        version = folder / model_name(graph) / VERSION
        version.mkdir(parents=True)
        for part in exported.glob(f"{name}.*"):  # external data, which the graph names
            part.rename(version / part.name)
        (exported / name).rename(version / "model.onnx")
        config = model_config(model_name(graph), *signatures[graph])
        write_text(version.parent / "config.pbtxt", config)
    (folder / ENSEMBLE / VERSION).mkdir(parents=True)  # empty: Triton asks for a version
    config = ensemble_config(signatures["image"], signatures["ground"])
    write_text(folder / ENSEMBLE / "config.pbtxt", config)
    for name in CLIENT:
        if (exported / name).is_file():
            shutil.move(exported / name, folder / name)
    parts = (f"*/{VERSION}/*", "*/config.pbtxt", *CLIENT)
    left = sorted(file for part in parts for file in folder.glob(part))
    record = {
        "format": TRITON,
        "size": manifest.size,
        "resolution": manifest.resolution,
        "prompts": manifest.prompts,
        "classes": manifest.classes,
        "prompts_a_pass": manifest.prompts_a_pass,
        "threshold": manifest.threshold,
        "precision": precision,
        "parity": manifest.parity,
        "source": manifest.source,
        "files": {f"{file.relative_to(folder)}": {"bytes": file.stat().st_size} for file in left},
    }
    write_json(folder / RECORD, record)


def model_name(graph: str) -> str:
    return f"{ENSEMBLE}_{graph}"


def signature(file: Path) -> tuple[Tensors, Tensors]:
    """Return the inputs and the outputs of a graph."""
    graph = onnx.load(file, load_external_data=False).graph
    inputs, outputs = (
        {
            value.name: (
                TYPES[value.type.tensor_type.elem_type],
                [dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def model_config(name: str, inputs: Tensors, outputs: Tensors) -> str:
    """Return `config.pbtxt` of a graph; its shapes are whole, so that Triton adds no batch."""
    return "\n".join(
        [
            f'name: "{name}"',
            'platform: "onnxruntime_onnx"',
            "max_batch_size: 0",
            _tensors("input", inputs),
            _tensors("output", outputs),
            "",
        ]
    )


def ensemble_config(image: tuple[Tensors, Tensors], ground: tuple[Tensors, Tensors]) -> str:
    """Return `config.pbtxt` of both graphs in one: the features stay within the server."""
    features = image[1]
    asked = {name: value for name, value in ground[0].items() if name not in features}
    steps = [
        _step(model_name("image"), image),
        _step(model_name("ground"), ground),
    ]
    return "\n".join(
        [
            f'name: "{ENSEMBLE}"',
            'platform: "ensemble"',
            "max_batch_size: 0",
            _tensors("input", {**image[0], **asked}),
            _tensors("output", ground[1]),
            "ensemble_scheduling {",
            *steps,
            "}",
            "",
        ]
    )


def _tensors(kind: str, tensors: Tensors) -> str:
    lines = [
        f'{kind} {{ name: "{name}" data_type: {dtype} dims: [ {", ".join(map(str, shape))} ] }}'
        for name, (dtype, shape) in tensors.items()
    ]
    return "\n".join(lines)


def _step(name: str, tensors: tuple[Tensors, Tensors]) -> str:
    """Return a step of an ensemble: a tensor of the same name is the same tensor."""
    maps = [
        f'    {kind} {{ key: "{key}" value: "{key}" }}'
        for kind, each in zip(("input_map", "output_map"), tensors, strict=True)
        for key in each
    ]
    head = [f'    model_name: "{name}"', "    model_version: -1"]
    return "\n".join(["  step {", *head, *maps, "  }"])
