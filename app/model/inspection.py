"""What a checkpoint is: told by names, shapes and headers, without its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from app.config.compose import load_model_config, model_names
from app.errors import UserError
from app.files import SETTINGS_BYTES, read_json
from app.model import adapters, published, weights
from app.model.build import build_model
from app.model.transformers.state import TRACKER, from_transformers, is_layout
from app.model.weight_files import ADAPTER, FILE, shards

ONNX = "manifest.json"
SHOWN = 4  # names
Shapes = Mapping[str, tuple[int, ...]]
UPSTREAM = "upstream's build_sam3_image_model"
VIDEO = "upstream's build_sam3_video_model"
TOOLS = "ultralytics, ComfyUI, samgeo, X-AnyLabeling"


@dataclass
class Report:
    """What a checkpoint is, in words.

    Attributes:
        kind: what wrote it, and what it holds.
        facts: name → value, in the order to show.
        loads: what loads it as it is.
        notes: what is missing, unexpected or set aside.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report, a line a fact."""
        lines = [f"what: {self.kind}"]
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        lines += [f"loaded by: {'; '.join(self.loads) or 'nothing that is known here'}"]
        return lines + [f"note: {note}" for note in self.notes]


def inspect(path: Path) -> Report:
    """Return what a file or folder of weights is.

    Nothing in it is run, and no numbers are read: of a zip of torch's its index, of a safetensors
    file its header.

    Raises:
        UserError: no such file, one that is cut, or one that cannot be read safely.
    """
    if path.is_dir() and (path / ONNX).is_file() and not (path / FILE).is_file():
        return _onnx(path)
    named = path / "sam3.safetensors"
    file = named if named.is_file() else weights.find_file(path)
    if file.name == ADAPTER:
        return _adapter(file)
    shapes, extra = _shapes(file)
    report = _layout(file, shapes, extra)
    report.facts = {"file": f"{file}, {file.stat().st_size / 1e6:,.0f} MB", **report.facts}
    report.facts["tensors"] = f"{len(shapes)}"
    return report


def _shapes(file: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the names and shapes of a file's tensors, and what else it holds."""
    if file.suffix == ".json":
        parts = [_shapes(part)[0] for part in shards(file)]
        return {key: shape for part in parts for key, shape in part.items()}, []
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as content:
                names = content.keys()
                return {key: tuple(content.get_slice(key).get_shape()) for key in names}, []
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None
    tensors, extra = weights.read_index(file)
    return {key: tuple(value.shape) for key, value in tensors.items()}, extra


def _layout(file: Path, shapes: Shapes, extra: list[str]) -> Report:
    """Return which layout the names are of, and what of it is missing or unexpected."""
    header = weights.read_header(file) if file.suffix == ".safetensors" else None
    bare = _bare(shapes)
    size, problems = _size(bare, header)
    report = Report("", {"size": size or "none of the known ones"})
    if header is not None:
        report.facts |= _header_facts(header)
    if is_layout(shapes):
        has_tracker = any(key.startswith(TRACKER) for key in shapes)
        report.kind = "transformers' Sam3VideoModel" if has_tracker else "transformers' Sam3Model"
        report.loads = ["transformers' Sam3Model", *(["Sam3VideoModel"] if has_tracker else [])]
        if header is not None:
            report.kind += ", exported from here"
    elif published.is_layout(shapes):
        _describe_published(report, shapes, exported=header is not None)
        if file.suffix == ".safetensors":
            report.kind += ", in safetensors as ComfyUI keeps it"
            report.loads = ["ComfyUI"] if size == "sam3" else []
        elif size != "sam3":
            report.loads = []
    elif header is not None:
        report.kind = "weights of ours"
    elif "optimizer" in extra:
        report.kind = "a trainer's full state, its model under bare names"
        report.notes.append(f"beside the model: {', '.join(sorted(extra))}")
        report.notes.append(
            "upstream's loader takes none of these names, and says so in a print alone: "
            "--format sam3 writes what it takes"
        )
    else:
        report.kind = "bare tensors of an image model" if size else "no SAM 3 that is known here"
    if size:
        report.loads.append("sam3-finetuning (--checkpoint)")
    else:
        report.notes += problems
    return report


def _describe_published(report: Report, shapes: Shapes, *, exported: bool) -> None:
    release = published.release(shapes)
    beside = [key for key in shapes if published.image_name(key) is None]
    tables = [key for key in beside if key.endswith(published.COMPUTED)]
    if release is None:
        report.kind = "the image part of SAM 3 in Meta's layout, without a tracker"
        report.loads = [UPSTREAM, f"{TOOLS} (images)"]
        return
    report.kind = f"SAM {release.removesuffix('.0')} in Meta's layout, with its tracker"
    report.notes.append(
        f"{len(beside) - len(tables)} tensors of the tracker and its necks are set aside where the "
        "image model alone is loaded"
    )
    if release == "3.0":
        report.loads = [UPSTREAM, VIDEO, TOOLS]
    else:
        report.loads = [f"{UPSTREAM} (images)", "later mains of upstream", TOOLS]
        if any("interactive_sam_" in key for key in shapes):
            report.notes.append("its head for points is called interactive_sam_…, as 3.1 has it")
    if exported:
        report.kind += ", exported from here"


def _adapter(file: Path) -> Report:
    base = adapters.read_base(file.parent)
    header = weights.read_header(file)
    report = Report("a LoRA: an adapter of weights that it needs beside it")
    report.facts["file"] = f"{file}, {file.stat().st_size / 1e6:,.1f} MB"
    if header is not None:
        report.facts |= {"size": header.model.name, **_header_facts(header)}
    report.facts["adapts"] = f"{base.reference}, SHA-256 {base.sha256[:16]}…"
    report.loads = ["sam3-finetuning (--checkpoint)", "PEFT, onto the same base"]
    report.notes.append(
        "export --format sam3 or hf merges it for other tools, as merge does for ours"
    )
    return report


def _onnx(folder: Path) -> Report:
    content = read_json(folder / ONNX, most=SETTINGS_BYTES)
    if not isinstance(content, dict) or "graphs" not in content:
        raise UserError(f"{folder / ONNX}: is of no export that is known here")
    report = Report("ONNX graphs, exported from here")
    classes = content.get("classes") or content.get("prompts") or []
    report.facts = {
        "file": str(folder),
        "size": f"{content.get('size')}, {content.get('resolution')} px",
        "classes": _listed([str(name) for name in classes]),
        "precisions": ", ".join(content.get("tolerances", {})),
        "made of": json.dumps(content.get("source", {})),
    }
    report.loads = ["./infer.sh, python -m app.deploy.runtime", "ONNX Runtime", "TensorRT"]
    return report


def _header_facts(header: weights.Header) -> dict[str, str]:
    facts = {
        "resolution": f"{header.model.resolution} px",
        "classes": _listed(header.prompts),
        "threshold": "none" if header.threshold is None else f"{header.threshold:.3g}",
        "pin": header.pin[:12],
    }
    if header.base is not None:
        layout, sha256 = header.base.layout, header.base.sha256[:16]
        facts["base"] = f"{header.base.reference} ({layout}), SHA-256 {sha256}…"
    return facts


def _bare(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the image model's names and shapes, whatever the layout."""
    import torch

    seen = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if published.is_layout(shapes):
        seen = published.image_part(seen)
    elif is_layout(shapes):
        seen = from_transformers(seen)
    return {
        key: tuple(value.shape)
        for key, value in seen.items()
        if not key.endswith(published.COMPUTED)
    }


def _size(bare: Shapes, header: weights.Header | None) -> tuple[str | None, list[str]]:
    """Return the size that names and shapes fit, or None and what differs from the nearest."""
    has_masks = any(key.startswith("segmentation_head.") for key in bare)
    differing: list[tuple[int, list[str]]] = []
    for config in [header.model] if header else map(load_model_config, model_names()):
        sized = config.model_copy(update={"segmentation": has_masks})
        expected = {
            key: tuple(value.shape)
            for key, value in build_model(sized, device="meta").state_dict().items()
            if not key.endswith(published.COMPUTED)
        }
        parts = {
            "missing": expected.keys() - bare.keys(),
            "unexpected": bare.keys() - expected.keys(),
            "of another shape": {
                key for key in expected.keys() & bare.keys() if expected[key] != bare[key]
            },
        }
        found = [
            f"{len(keys)} {what} for size '{config.name}': {_listed(sorted(keys))}"
            for what, keys in parts.items()
            if keys
        ]
        if not found:
            return config.name, []
        differing.append((sum(map(len, parts.values())), found))
    return None, min(differing)[1]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none named"
