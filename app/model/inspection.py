"""What a checkpoint is: told by names, shapes and headers, without its numbers."""

from __future__ import annotations

import json
from collections import Counter
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
from app.model.transformers.tracker import to_transformers
from app.model.weight_files import ADAPTER, FILE, shards

ONNX, EXPORT = "manifest.json", "export.json"
TRITON = Path("sam3", "config.pbtxt")
BEST = Path("weights", "best")  # of a run's folder
SHOWN = 4  # names
Shapes = Mapping[str, tuple[int, ...]]
UPSTREAM = "upstream's build_sam3_image_model"
VIDEO = "upstream's build_sam3_video_model"
TOOLS = "ultralytics, samgeo, X-AnyLabeling"
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"}


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
        runs = ["./infer.sh, python -m app.deploy.runtime", "ONNX Runtime", "TensorRT"]
        return _exported(path / ONNX, "ONNX graphs", runs)
    if (path / TRITON).is_file():
        return _exported(path / EXPORT, "a model repository of Triton's", ["tritonserver"])
    if (path / BEST).is_dir():
        path = path / BEST
    named = path / "sam3.safetensors"
    file = named if named.is_file() else weights.find_file(path)
    if file.name == ADAPTER:
        return _adapter(file)
    shapes, types, extra = _read(file)
    report = _layout(file, shapes, extra)
    size = sum(part.stat().st_size for part in (shards(file) if file.suffix == ".json" else [file]))
    report.facts = {"file": f"{file}, {size / 1e6:,.0f} MB", **report.facts}
    report.facts["tensors"] = f"{len(shapes)}"
    report.facts["types"] = ", ".join(f"{name} {count}" for name, count in types.most_common())
    return report


def _read(file: Path) -> tuple[dict[str, tuple[int, ...]], Counter[str], list[str]]:
    """Return the names and shapes of a file's tensors, their types, and what else it holds."""
    if file.suffix == ".json":
        parts = [_read(part) for part in shards(file)]
        shapes = {key: shape for part in parts for key, shape in part[0].items()}
        return shapes, sum((part[1] for part in parts), Counter()), []
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as content:
                slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
                names = [each.get_dtype() for each in slices.values()]
                shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None
        return shapes, Counter(TYPES.get(name, name) for name in names), []
    tensors, extra = weights.read_index(file)
    types = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    return {key: tuple(value.shape) for key, value in tensors.items()}, types, extra


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
        report.loads = ["transformers' Sam3Model"]
        if has_tracker and not _lacks_tracker(report, shapes):
            report.loads.append("Sam3VideoModel")
        if header is not None:
            report.kind += ", exported from here"
    elif published.is_layout(shapes):
        is_pt = file.suffix != ".safetensors"
        _describe_published(report, shapes, is_built=size == "sam3", is_pt=is_pt)
        if not is_pt:
            report.kind += ", in safetensors as ComfyUI keeps it"
        if header is not None:
            report.kind += ", exported from here"
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


def _describe_published(report: Report, shapes: Shapes, *, is_built: bool, is_pt: bool) -> None:
    """Tell a file in Meta's layout, and what loads it.

    Args:
        is_built: whether it is of the size that other tools build, and nothing of it is missing.
        is_pt: whether torch.load reads it.
    """
    release = published.release(shapes)
    beside = [key for key in shapes if published.image_name(key) is None]
    tables = [key for key in beside if key.endswith(published.COMPUTED)]
    if release is None:
        report.kind = "the image part of SAM 3 in Meta's layout, without a tracker"
        loads = [UPSTREAM, f"{TOOLS} (images)"] if is_pt else []
        report.loads = loads if is_built else []
        return
    report.kind = f"SAM {release.removesuffix('.0')} in Meta's layout, with its tracker"
    report.notes.append(
        f"{len(beside) - len(tables)} tensors of the tracker and its necks are set aside where the "
        "image model alone is loaded"
    )
    if release == "3.1":
        loads = [f"{UPSTREAM} (images)", "later mains of upstream", f"{TOOLS} (images)"]
        loads = loads if is_pt else ["ComfyUI"]
        if any("interactive_sam_" in key for key in shapes):
            report.notes.append("its head for points is called interactive_sam_…, as 3.1 has it")
    elif is_built and _lacks_tracker(report, shapes):
        loads = [UPSTREAM, f"{TOOLS} (images)"] if is_pt else []
    else:
        loads = [UPSTREAM, VIDEO, TOOLS, "Roboflow's inference"] if is_pt else ["ComfyUI"]
    report.loads = loads if is_built else []


def _lacks_tracker(report: Report, shapes: Shapes) -> bool:
    """Return whether a tracker is not the one of SAM 3's video model; note what differs."""
    wanted = published.video_part()
    if is_layout(shapes):
        wanted = to_transformers(wanted)
        found = {key for key in shapes if key.startswith(TRACKER)}
    else:
        found = {key for key in shapes if published.image_name(key) is None}
    problems = _differing(
        {key: tuple(value.shape) for key, value in wanted.items()},
        {key: shapes[key] for key in found},
        "SAM 3's video model",
    )
    report.notes += problems
    return bool(problems)


def _adapter(file: Path) -> Report:
    base = adapters.read_base(file.parent)
    header = weights.read_header(file)
    report = Report("a LoRA: an adapter of weights that it needs beside it")
    report.facts["file"] = f"{file}, {file.stat().st_size / 1e6:,.1f} MB"
    if header is not None:
        report.facts |= {"size": header.model.name, **_header_facts(header)}
    report.facts["adapts"] = f"{base.reference}, SHA-256 {base.sha256[:16]}…"
    if base.reference == "/".join(weights.HUB):
        is_there = weights.cached_sam3() is not None
    else:
        is_there = (file.parent / base.reference).is_file()
    if not is_there:
        report.notes.append(f"what it adapts is not there: set {weights.BASE}=FILE to it")
    report.loads = ["sam3-finetuning (--checkpoint)", "PEFT, onto the same base"]
    report.notes.append(
        "export --format sam3 or hf merges it for other tools, as merge does for ours"
    )
    return report


def _exported(record: Path, kind: str, loads: list[str]) -> Report:
    """Tell a folder of graphs by what its export noted of it, and which of its files are not so."""
    folder, content = record.parent, read_json(record, most=SETTINGS_BYTES)
    report = Report(f"{kind}, exported from here", loads=loads)
    try:
        report.facts = {
            "file": str(folder),
            "size": f"{content['size']}, {content['resolution']} px",
            "classes": _listed([str(name) for name in content["classes"] or []]),
            "precisions": content.get("precision") or ", ".join(content["tolerances"]),
            "made of": json.dumps(content["source"]),
        }
        files = {folder / name: int(kept["bytes"]) for name, kept in content["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{record}: is of no export that is known here") from None
    for file, size in files.items():
        if not file.is_file():
            report.notes.append(f"{file}: is not there")
        elif file.stat().st_size != size:
            report.notes.append(
                f"{file}: has {file.stat().st_size} bytes, and was left with {size}"
            )
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
        found = _differing(expected, bare, f"size '{config.name}'")
        if not found:
            return config.name, []
        differing.append((sum(int(line.split()[0]) for line in found), found))
    return None, min(differing)[1]


def _differing(expected: Shapes, found: Shapes, whose: str) -> list[str]:
    """Return a line, which begins with their number, for tensors missing, unexpected, and other."""
    parts = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {
            key for key in expected.keys() & found.keys() if expected[key] != found[key]
        },
    }
    return [
        f"{len(keys)} {what} for {whose}: {_listed(sorted(keys))}"
        for what, keys in parts.items()
        if keys
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none named"
