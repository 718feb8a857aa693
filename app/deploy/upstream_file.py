"""`python -m app export --format sam3`: write `sam3.pt` as Meta's own code and its kin load it.

The image part is ours; the tracker of videos and its neck are those of the published file that the
weights began as.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from app.config.compose import load_model_config, model_names
from app.console import command
from app.deploy import upstream_proof as proof
from app.deploy.base_file import Base, check_fit, find_base
from app.deploy.output import RECORD, UPSTREAM, check_output
from app.deploy.transformers_folder import draw_test_image
from app.errors import UserError
from app.evaluation.model_card import CARD, SHOWN_PROMPTS, code, escaped, licence, licence_text
from app.files import atomic_folder, atomic_path, hash_file, write_json, write_text
from app.inference.postprocess import THRESHOLD
from app.inference.predictor import Predictor
from app.model import published, weights

log = logging.getLogger("app")
PT, SAFETENSORS = "sam3.pt", "sam3.safetensors"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GOLDEN = 2  # drawn images that answers are compared on


def export(
    path: Path,
    folder: Path,
    *,
    base_file: Path | None = None,
    precision: str = "fp32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `sam3.pt`, `sam3.safetensors` and a model card to `folder`, whole or not at all.

    An adapter is merged. What was written is compared tensor by tensor, loaded by upstream's own
    builders, and asked about drawn images, before the folder takes its place. Memory holds one copy
    of the image part at most; all else stays in files, mapped.

    Args:
        path: weights of any layout.
        base_file: the published file, where the weights do not tell where it is. None takes the one
            that they tell; where they tell none, the image part alone is written.
        precision: of the numbers in the files: fp32, bf16 or fp16.
        overwrite: replace an earlier export.

    Returns:
        What the folder's `export.json` holds: base, files, and what was proved.

    Raises:
        UserError: no such precision, another base than that of the weights, weights that have no
            place in the layout, or what does not load or answer as it must; names each.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: --format sam3 takes fp32, bf16 or fp16.")
    source = weights.find_file(path)
    check_output(folder, source, overwrite=overwrite)
    header = weights.describe(path)
    _check_size(header)
    resolution = load_model_config(header.model.name).resolution  # upstream knows no other
    base = find_base(source, base_file)
    if base is not None and base.origin.layout == "transformers":
        raise UserError(
            f"{base.file}: these weights began as transformers' copy of SAM 3, whose tracker has "
            "other names. Name the same weights as Meta published them: --base sam3.pt."
        )
    with atomic_folder(folder, replace=folder.exists()) as temporary:
        # The image part as it will be written, and what it answers.
        is_plain = not weights.is_adapter(path)  # what is merged would be held beside the map
        model, at_theirs = weights.load(path, resolution=resolution, merge=True, mapped=is_plain)
        if base is not None:
            check_fit(model.state_dict(), base)
        prompt = next(iter(header.prompts), "circle")
        images = [draw_test_image(seed) for seed in range(GOLDEN)]
        exact = None
        if precision != "fp32":
            exact = proof.our_answers(Predictor(model, at_theirs.model), images, prompt)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(PRECISIONS[precision]).float()
        ours = proof.our_answers(Predictor(model, at_theirs.model), images, prompt)

        # The files.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(PRECISIONS[precision])  # not held beside its halves
        content = _content(model.state_dict(), base, PRECISIONS[precision])
        own = header.model_copy(update={"base": None if base is None else base.origin})
        del model
        gc.collect()
        with atomic_path(temporary / PT) as file:
            torch.save(content, file)
        proof.check_tensors(temporary / PT, content)
        content = weights.read_tensors(temporary / PT)  # mapped: from here on they lie in the file
        with atomic_path(temporary / SAFETENSORS) as file:
            save_file(content, file, {"format": "pt", **weights.to_metadata(own)})
        proof.check_tensors(temporary / SAFETENSORS, content)

        # The proof.
        is_built = proof.is_built(content)
        if is_built:
            model = proof.load_image_model(temporary / PT, content)
        else:
            model, _ = weights.load(temporary / SAFETENSORS, resolution=resolution)
        count = len(content)
        del content
        measured = proof.differences(
            ours, proof.their_answers(model.eval(), resolution, images, prompt)
        )
        proof.check_answers(measured)
        if has_video := base is not None and base.release == "3.0":
            proof.load_video_model(temporary / PT)
        seen = None
        if base is not None:
            seen = proof.tracker_sees(model, base, resolution, images)
        del model
        record = {
            "format": UPSTREAM,
            "size": header.model.name,
            "precision": precision,
            "base": None if base is None else base.origin.model_dump(),
            "base_proved": base is not None and base.is_proved,
            "tensors": count,
            "build_sam3_image_model": is_built,
            "build_sam3_video_model": has_video,
            "answers_differ_by": measured,
            "rounding_moved": None if exact is None else proof.differences(exact, ours),
            "tracker_features_cosine": seen,
            "files": {
                name: {
                    "bytes": (temporary / name).stat().st_size,
                    "sha256": hash_file(temporary / name),
                }
                for name in (PT, SAFETENSORS)
            },
        }
        write_json(temporary / RECORD, record)
        write_text(temporary / CARD, _card(own, record, resolution))
    for line in told(record):
        log.info("%s", line)
    return record


def told(record: Mapping[str, Any]) -> list[str]:
    """Return what an export's record says, a line a fact."""
    answers = ", ".join(
        f"{name} {value:.1g}" for name, value in record["answers_differ_by"].items()
    )
    lines = [f"{record['tensors']} tensors in {PT} and {SAFETENSORS}: each read back to the bit"]
    if record["build_sam3_image_model"]:
        lines.append(f"upstream's build_sam3_image_model loads it; answers differ by: {answers}")
    else:
        lines.append(
            f"no builder of upstream's makes size '{record['size']}': sam3-finetuning reads it "
            f"(--checkpoint), and its answers differ by: {answers}"
        )
    if record["build_sam3_video_model"]:
        lines.append("upstream's build_sam3_video_model loads it, strictly")
    elif record["base"] is None:
        lines.append(
            "the image part alone: these weights name no published file as their base, and --base "
            "none; build_sam3_video_model, which wants a tracker, does not load it"
        )
    else:
        lines.append(
            "SAM 3.1's layout, with every other tensor as the base has it; the pinned upstream has "
            "no builder of 3.1's tracker to try it with"
        )
    if record["rounding_moved"]:
        moved = ", ".join(f"{name} {value:.1g}" for name, value in record["rounding_moved"].items())
        lines.append(f"rounding to {record['precision']} moved answers by: {moved}")
    seen = record["tracker_features_cosine"]
    if seen is not None:
        lines.append(
            f"the trunk was tuned, and the tracker reads it: its features have a cosine of "
            f"{seen:.4f} with those that it was trained on (least of {GOLDEN} drawn images)"
        )
    elif record["base"] is not None:
        lines.append("the trunk is the base's: the tracker sees what it was trained on")
    return lines


def _check_size(header: weights.Header) -> None:
    """Raise UserError where a size is none that other tools can be told of."""
    size, problems = header.model, []
    if size.vocabulary is not None:
        problems.append(
            f"vocabulary: {len(size.vocabulary)} prompts are stored in the text encoder's place, "
            "which no other tool knows. Export the weights that this vocabulary was made from, or "
            "use --format onnx."
        )
    if size.name not in model_names() or size.vision.heads not in (None, size.vision.num_heads):
        problems.append(
            f"size '{size.name}': was cut, and no other tool builds it. Export the weights that it "
            "was cut from, or use --format onnx."
        )
    if problems:
        raise UserError(problems)


def _content(
    state: Mapping[str, Tensor], base: Base | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return what to write by its names: the base's, with our tensors in place of its image part.

    Of weights without a mask head the base's own is kept. RoPE tables are the base's.
    """
    if base is None:
        merged = {published.PREFIX + key: value for key, value in state.items()}
    else:
        merged = {
            key: state.get(published.image_name(key) or "", value)
            for key, value in base.written.items()
        }
    return {key: _alone(value, dtype) for key, value in merged.items()}


def _alone(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor rounded, if it is of floats, and the only one of its storage.

    torch.save writes storages whole, and that of a safetensors file is all of it.
    """
    value = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _card(header: weights.Header, record: Mapping[str, Any], resolution: int) -> str:
    """Return the model card."""
    base = header.base
    metas = base is not None or header.model.name != "nano"  # larger sizes begin with Meta's
    data = ModelCardData(
        **licence(metas=metas),
        library_name="sam3",
        pipeline_tag="mask-generation",
        tags=["sam3", "open-vocabulary", "object-detection", "instance-segmentation"],
    )
    prompts = ", ".join(f"“{escaped(prompt)}”" for prompt in header.prompts[:SHOWN_PROMPTS])
    if (more := len(header.prompts) - SHOWN_PROMPTS) > 0:
        prompts += f" and {more} more"
    origin = "The weights name no published file that they began as."
    if base is not None:
        named = code(
            base.reference if base.reference == "/".join(weights.HUB) else Path(base.reference).name
        )
        version = f"SAM {base.layout.removesuffix('.0')}"
        origin = f"Began as {version}, {named}, SHA-256 `{base.sha256}`" + (
            "." if record["base_proved"] else ", as whoever exported it said."
        )
    tuned_at = ""
    if header.model.resolution != resolution:
        tuned_at = (
            f"Trained and measured at {header.model.resolution} px; upstream's code runs at "
            f"{resolution} px."
        )
    threshold = THRESHOLD if header.threshold is None else header.threshold
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# SAM 3, fine-tuned",
        f"SAM 3 (Segment Anything with Concepts), size {escaped(header.model.name)}, in the layout "
        f"of Meta's own `sam3.pt`, {record['precision']}. Trained with facebookresearch/sam3 at "
        f"commit {code(header.pin)}.",
        origin,
        f"The prompts it was trained with: {prompts}." if prompts else "",
        tuned_at,
        "## What was proved",
        "\n".join(f"- {escaped(line)}" for line in told(record)),
        "## Use",
        _SNIPPET.format(prompt=next(iter(header.prompts), "circle"), threshold=threshold)
        if record["build_sam3_image_model"]
        else f"`{command('./infer.sh', '--checkpoint', SAFETENSORS)} --input IMAGES`",
        "## Licence",
        licence_text(metas=metas),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SNIPPET = """```python
from PIL import Image
from sam3.model.sam3_image_processor import Sam3Processor
from sam3.model_builder import build_sam3_image_model

model = build_sam3_image_model(checkpoint_path="THIS_FOLDER/sam3.pt")
processor = Sam3Processor(model, confidence_threshold={threshold:.4g})
state = processor.set_image(Image.open("image.jpg").convert("RGB"))
found = processor.set_text_prompt({prompt!a}, state)
print(found["scores"], found["boxes"], found["masks"].shape)  # boxes: x1, y1, x2, y2 in pixels
```"""
