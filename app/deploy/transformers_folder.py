"""`python -m app export --format hf`: write a folder that transformers' `Sam3Model` loads."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app.config.schema import ModelConfig
from app.config.shapes import Thing
from app.datasets.synthetic.drawing import draw_image
from app.deploy.base_file import Base, check_fit, find_base
from app.deploy.output import check_output
from app.deploy.tokenizer import make_tokenizer
from app.errors import UserError
from app.evaluation.model_card import SHOWN_PROMPTS, code, escaped, licence, licence_text
from app.files import atomic_folder, atomic_path, write_json, write_text
from app.inference.postprocess import THRESHOLD
from app.inference.predictor import Predictor, query_scores
from app.model import weights
from app.model.transformers.config import CONFIG, TOKENS, to_config, to_video_config
from app.model.transformers.state import DETECTOR, TRACKER, to_transformers
from app.model.transformers.tracker import to_transformers as tracker_to_transformers

log = logging.getLogger("app")
CARD = "README.md"
# Largest differences from our own model in float32: boxes as shares of the image's side.
TOLERANCES = {"boxes": 1e-5, "scores": 1e-5, "mask logits": 1e-3}
# transformers clamps presence logits; upstream drops what its clamp returns (decoder.py:588).
PRESENCE = 10.0
PADDING = -10  # label of a box that is only padding


def export(
    path: Path,
    folder: Path,
    *,
    video: bool = False,
    base_file: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights, config, processor and model card to `folder`, whole or not at all.

    An adapter is merged into its base. transformers' own model, loaded from what was written, is
    compared with ours on a drawn image before the folder takes its place.

    Args:
        path: weights of any layout.
        video: write for `Sam3VideoModel`, with the tracker of the published file that the weights
            began as; `Sam3Model` loads such a folder too.
        base_file: that file, where the weights do not tell where it is.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        UserError: weights that transformers cannot represent, a folder that holds something else,
            no tracker or that of other weights, or a model whose outputs differ there; names each.
    """
    source = weights.find_file(path)
    check_output(folder, source, overwrite=overwrite)
    header = weights.describe(path)
    config = to_config(header.model)
    base = _find_tracker(source, base_file) if video else None
    if base is not None:
        config = to_video_config(header.model)
    with atomic_folder(folder, replace=folder.exists()) as temporary:
        model, header = weights.load(path, merge=True)
        write_json(temporary / CONFIG, config)
        content = to_transformers(weights.to_state(model))
        if base is not None:
            check_fit(model.state_dict(), base)
            content = {f"{DETECTOR}{key}": value for key, value in content.items()}
            content |= _tracker(base)
            header = header.model_copy(update={"base": base.origin})
        with atomic_path(temporary / weights.FILE) as file:  # save_file alone lets only us read it
            save_file(content, file, {"format": "pt", **weights.to_metadata(header)})
        del content
        processor = write_processor(temporary, header.model, video=video)
        tokens: Any = model.backbone.language_backbone.tokenizer
        respelt = _tokenized_otherwise(header.prompts, tokens, processor.tokenizer)
        write_text(temporary / CARD, _card(header, respelt, video=video))
        same = [prompt for prompt in header.prompts if prompt not in respelt]
        image, prompt = draw_test_image(), [*same, "circle"][0]
        ours = our_outputs(model, header.model, image, prompt)
        del model  # because at full size memory does not hold both
        gc.collect()
        measured = differences(ours, their_outputs(temporary, image, prompt))
        if problems := _misses(measured, folder):
            raise UserError(problems)
        if video:
            _load_video_model(temporary)
    agreement = ", ".join(f"{name} to {value:.1g}" for name, value in measured.items())
    log.info("transformers' Sam3Model agrees: %s", agreement)
    if video:
        log.info(
            "transformers' Sam3VideoModel loads it, with nothing missing and nothing left over"
        )
    return folder


def _find_tracker(source: Path, base_file: Path | None) -> Base:
    """Return the published file that weights began as; raise UserError where there is none."""
    base = find_base(source, base_file)
    if base is None:
        raise UserError(
            f"{source}: nothing says which published file these weights began as, and a tracker is "
            "in that alone. Name it: --base FILE; or leave out --video, for the image part."
        )
    if base.origin.layout == "3.1":
        raise UserError(
            f"{base.file}: is SAM 3.1, and transformers' Sam3VideoModel has no place for its "
            "tracker. Leave out --video, or use --format sam3."
        )
    return base


def _tracker(base: Base) -> dict[str, Tensor]:
    """Return the tracker and its neck by transformers' names, each tensor with its own memory."""
    if base.origin.layout == "transformers":
        found = {key: value for key, value in base.tensors.items() if key.startswith(TRACKER)}
    else:
        found = tracker_to_transformers(base.written)
    return {key: value.contiguous() for key, value in found.items()}


def _load_video_model(folder: Path) -> None:
    """Raise UserError where `Sam3VideoModel` misses tensors, or finds some that it has not."""
    from transformers import Sam3VideoConfig, Sam3VideoModel

    with torch.device("meta"):
        expected = Sam3VideoModel(Sam3VideoConfig.from_pretrained(folder)).state_dict()
    with safe_open(folder / weights.FILE, framework="pt") as content:
        shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
    wanted = {key: list(value.shape) for key, value in expected.items()}
    if wrong := sorted({key for key, _ in _pairs(shapes) ^ _pairs(wanted)}):
        raise UserError(
            f"{weights.FILE}: is not written: it does not fit transformers' Sam3VideoModel: "
            f"{wrong[0]}, of {len(wrong)}"
        )


def _pairs(shapes: Mapping[str, Sequence[int]]) -> set[tuple[str, tuple[int, ...]]]:
    return {(key, tuple(shape)) for key, shape in shapes.items()}


def write_processor(folder: Path, config: ModelConfig, *, video: bool = False) -> Any:
    """Write the files that `Sam3Processor.from_pretrained` reads; return the processor.

    Args:
        video: write what `Sam3VideoProcessor` reads as well.
    """
    from transformers import Sam3ImageProcessor, Sam3Processor

    side, mask = config.resolution, 4 * (config.resolution // config.vision.patch_size)
    pixels = Sam3ImageProcessor(
        size={"height": side, "width": side},
        mask_size={"height": mask, "width": mask},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = Sam3Processor(image_processor=pixels, tokenizer=make_tokenizer())
    if video:
        from transformers import Sam2VideoVideoProcessor, Sam3VideoProcessor

        frames = Sam2VideoVideoProcessor(
            size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        Sam3VideoProcessor(pixels, frames, make_tokenizer(), target_size=side).save_pretrained(
            folder
        )
    else:
        processor.save_pretrained(folder)
    return processor


def our_outputs(
    model: Sam3Image, config: ModelConfig, image: Image.Image, prompt: str
) -> dict[str, Tensor]:
    """Return the outputs of our model for one prompt, before any threshold.

    Returns:
        `boxes` (Q, 4) xyxy, 0..1; `scores` (Q,), 0..1; `mask logits` (Q, h, w); all float32.
    """
    _, outputs = Predictor(model, config).answers(image, [prompt])
    presence = outputs["presence_logit_dec"].clamp(-PRESENCE, PRESENCE)
    return {
        "boxes": outputs["pred_boxes_xyxy"][0],
        "scores": query_scores({**outputs, "presence_logit_dec": presence})[0],
        "mask logits": outputs["pred_masks"][0],
    }


@torch.inference_mode()
def their_outputs(folder: Path, image: Image.Image, prompt: str) -> dict[str, Tensor]:
    """Return the outputs of transformers' model in `folder`, as `our_outputs` does."""
    from transformers import Sam3Model, Sam3Processor
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = Sam3Model.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = Sam3Processor.from_pretrained(folder, local_files_only=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    outputs = model(
        pixel_values=inputs["pixel_values"],
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        # Upstream's box encoder runs without boxes as well, and adds its class token to the words.
        input_boxes=torch.zeros(1, 1, 4),
        input_boxes_labels=torch.full((1, 1), PADDING),
    )
    return {
        "boxes": outputs.pred_boxes[0],
        "scores": outputs.pred_logits[0].sigmoid() * outputs.presence_logits[0].sigmoid(),
        "mask logits": outputs.pred_masks[0],
    }


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest absolute difference of each output; NaN where an output has one."""
    return {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}


def _misses(measured: dict[str, float], folder: Path) -> list[str]:
    """Return a problem for each difference that is beyond its tolerance, or NaN."""
    return [
        f"{folder}: is not written: transformers' Sam3Model answers otherwise than these weights "
        f"do: {name} differ by {value:.2g} (at most {TOLERANCES[name]:g}). Install the version of "
        "requirements.lock; if it is that, please report it with the weights' size."
        for name, value in measured.items()
        if not value <= TOLERANCES[name]
    ]


def draw_test_image(seed: int = 0) -> Image.Image:
    """Return a red circle, a blue rectangle and a green triangle on a texture, 320 x 240."""
    things = [Thing("circle", "red"), Thing("rectangle", "blue"), Thing("triangle", "green")]
    pixels, _ = draw_image(
        things,
        width=320,
        height=240,
        background="texture",
        shun=("red", "green", "blue"),
        radius=(0.15, 0.3),
        turn=15,
        random=np.random.default_rng(seed),
    )
    return Image.fromarray(pixels)


def _tokenized_otherwise(prompts: Sequence[str], ours: Any, theirs: Any) -> dict[str, str | None]:
    """Return the prompts of which transformers makes other tokens, with a spelling that it reads.

    transformers does not clean text (HTML, broken Unicode). It does not cut a prompt that is longer
    than TOKENS either; there is no spelling for such a prompt: None.
    """

    def same(prompt: str, spelling: str) -> bool:
        tokens = ours([prompt], context_length=TOKENS)[0].tolist()
        other = theirs(spelling)["input_ids"]
        return other + [0] * (TOKENS - len(other)) == tokens

    cleaned = {prompt: ours.clean_fn(prompt) for prompt in prompts if not same(prompt, prompt)}
    return {prompt: text if same(prompt, text) else None for prompt, text in cleaned.items()}


def _card(header: weights.Header, respelt: dict[str, str | None], *, video: bool) -> str:
    """Return the model card."""
    metas = header.model.name != "nano"  # larger sizes begin with Meta's weights
    data = ModelCardData(
        **licence(metas=metas),
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["sam3", "open-vocabulary", "object-detection", "instance-segmentation"],
    )
    prompts = ", ".join(f"“{escaped(prompt)}”" for prompt in header.prompts[:SHOWN_PROMPTS])
    if (more := len(header.prompts) - SHOWN_PROMPTS) > 0:
        prompts += f" and {more} more"
    spellings = [
        f"- “{escaped(prompt)}”: "
        + (f"ask for “{escaped(text)}”" if text else f"longer than {TOKENS} tokens, cut it")
        for prompt, text in respelt.items()
    ]
    threshold = THRESHOLD if header.threshold is None else header.threshold
    prompt = next((p for p in header.prompts if p not in respelt), "circle")
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# SAM 3, fine-tuned",
        f"SAM 3 (Segment Anything with Concepts), size {escaped(header.model.name)}, "
        f"{header.model.resolution} px, for transformers' `Sam3Model`. Trained with "
        f"facebookresearch/sam3 at commit {code(header.pin)}.",
        f"The prompts it was trained with: {prompts}." if prompts else "",
        "transformers reads these prompts otherwise than training did:\n\n" + "\n".join(spellings)
        if spellings
        else "",
        "## Use",
        _SNIPPET.format(prompt=prompt, threshold=threshold, padding=PADDING),
        "SAM 3 adds a token to every prompt, with example boxes or without; `Sam3Model` adds it "
        "only where there are boxes. The box of padding in the snippet brings it back: without it "
        "scores and masks are others than those that training measured. With example boxes of "
        "your own it is not needed.",
        "The tracker of videos is as Meta published it: "
        "`Sam3VideoModel.from_pretrained` loads this folder as well."
        if video
        else "",
        f"Began as SAM {header.base.layout}, SHA-256 `{header.base.sha256}`."
        if header.base is not None
        else "",
        "Read back by sam3-finetuning with `--checkpoint THIS_FOLDER`.",
        "## Licence",
        licence_text(metas=metas),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SNIPPET = """```python
import torch
from PIL import Image
from transformers import Sam3Model, Sam3Processor

model = Sam3Model.from_pretrained("THIS_FOLDER").eval()
processor = Sam3Processor.from_pretrained("THIS_FOLDER")
image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=image, text={prompt!a}, return_tensors="pt")
inputs["input_boxes"] = torch.zeros(1, 1, 4)  # one box of padding: see below
inputs["input_boxes_labels"] = torch.full((1, 1), {padding})
with torch.no_grad():
    outputs = model(**inputs)
found = processor.post_process_instance_segmentation(
    outputs, threshold={threshold:.4g}, target_sizes=inputs["original_sizes"].tolist()
)[0]
print(found["scores"], found["boxes"], found["masks"].shape)  # boxes: x1, y1, x2, y2 in pixels
```"""
