"""The tracker of SAM 3, by transformers' `Sam3VideoModel`: frames one by one, memory bounded.

Masks are carried from frame to frame by SAM 3's own memory, not by the overlap of detections. A
folder of `export --format hf --video` holds the tuned detector beside the published tracker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Sam3VideoModel, Sam3VideoProcessor
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

from app.errors import UserError
from app.files import read_json
from app.inference.masks import to_rle
from app.inference.postprocess import THRESHOLD
from app.inference.settings import Settings
from app.inference.tracks import NEW, Sighting
from app.model.device import choose_device

Item = TypeVar("Item")
CONFIG = "config.json"
PADDING = -10  # label of a box that is only padding
NMS = 0.1  # IoU of masks above which the lower score goes, as upstream has it
NEVER = -100.0  # logit of what is found before
HEAVY = ("maskmem_features", "maskmem_pos_enc", "pred_masks")  # of a frame that was remembered


class Session(Sam3VideoInferenceSession):
    """A session that forgets what no later frame reads (transformers#44617).

    transformers keeps each frame's pixels, and each object's memory of every frame.
    """

    seen = 0  # frames so far

    @property
    def num_frames(self) -> int:
        """Return how many frames there were, of which one is kept."""
        return self.seen

    def forget(self, frame: int, memories: int, pointers: int, conditions: int) -> None:
        """Drop what frames after `frame` do not read.

        Args:
            memories, pointers, conditions: frames whose features, object pointers and conditioning
                the tracker reads.
        """
        _drop_before(self.processed_frames, frame)
        for by_frame in (self.suppressed_obj_ids, self.obj_id_to_tracker_score_frame_wise):
            _drop_before(by_frame, frame)
        for index, outputs in self.output_dict_per_obj.items():
            _drop_before(outputs["non_cond_frame_outputs"], frame - max(memories, pointers))
            given = outputs["cond_frame_outputs"]
            for number in sorted(given)[:-conditions]:
                if number < frame - memories:  # its pointer is read for ever
                    for name in HEAVY:
                        given[number].pop(name, None)
            for by_frame in (self.mask_inputs_per_obj[index], self.frames_tracked_per_obj[index]):
                _drop_before(by_frame, frame)


def _drop_before(by_frame: Any, frame: int) -> None:
    for number in [number for number in by_frame if number < frame]:
        del by_frame[number]


class _AsTrained(nn.Module):
    """A detector that answers as it was trained, and names each thing once.

    SAM 3 adds a token to every prompt, with boxes or without; transformers adds it with boxes only,
    so a box of padding is given. transformers leaves out the NMS where its kernels are not
    installed, as on a CPU: here it runs everywhere.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.detector, name)

    def forward(self, *, text_embeds: Any, **given: Any) -> Any:
        device = next(self.detector.parameters()).device
        boxes = torch.zeros(1, 1, 4, device=device)
        labels = torch.full((1, 1), PADDING, device=device)
        found = self.detector(
            text_embeds=text_embeds, input_boxes=boxes, input_boxes_labels=labels, **given
        )
        again = _found_before(found.pred_logits[0], found.pred_masks[0])
        found.pred_logits[0, again] = NEVER
        return found


def propagating(settings: Settings) -> Callable[[], Propagator[Any]]:
    """Return what makes a propagator for each film, of one model.

    Args:
        settings: whose checkpoint is a folder of `export --format hf --video`.

    Raises:
        UserError: another kind of folder.
    """
    model, processor = load(settings)
    return lambda: Propagator(model, processor, settings.prompts)


def load(settings: Settings) -> tuple[Any, Any]:
    """Return model and processor of a folder; a new object must reach the settings' threshold."""
    folder = Path(settings.checkpoint)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if not isinstance(config, dict) or config.get("model_type") != "sam3_video":
        raise UserError(
            f"--engine hf: {folder} is no folder for Sam3VideoModel. Make one of weights that "
            f"began as Meta's: python -m app export {folder} --format hf --video --output "
            "outputs/hf, and give --checkpoint outputs/hf"
        )
    device = choose_device(settings.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        settings.precision, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    model: Any = Sam3VideoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.detector_model = _AsTrained(model.detector_model)
    threshold = THRESHOLD if settings.threshold is None else settings.threshold
    model.new_det_thresh, model.score_threshold_detection = threshold, threshold / NEW
    processor = Sam3VideoProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor


class Propagator(Generic[Item]):
    """Follows prompts through frames, as `tracks.Tracker` follows detections.

    Args:
        model, processor: as `load` returns them; several films may share them.
        prompts: noun phrases.
    """

    def __init__(self, model: Any, processor: Any, prompts: Sequence[str]) -> None:
        self.labels: dict[int, int] = {}  # of each object that was told: its prompt
        self._model, self._processor = model, processor
        places = ("inference_device", "inference_state_device", "video_storage_device")
        self._session = Session(dtype=model.dtype, **dict.fromkeys(places, model.device))
        processor.add_text_prompt(self._session, list(prompts))
        self._waiting: deque[tuple[Item, Any, tuple[int, int]]] = deque()

    @torch.inference_mode()
    def update(self, item: Item, image: Image.Image) -> list[tuple[Item, list[Sighting]]]:
        """Take the next frame; return the frame that is known by now, if one is."""
        session, tracker = self._session, self._model.tracker_model
        number, session.seen = session.seen, session.seen + 1
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
        outputs = self._model(session, frame=pixels.to(self._model.device), frame_idx=number)
        session.hotstart_removed_obj_ids.update(outputs.removed_obj_ids)
        session.forget(
            number,
            tracker.num_maskmem,
            tracker.config.max_object_pointers_in_encoder,
            tracker.config.max_cond_frame_num,
        )
        self._waiting.append((item, outputs, (image.height, image.width)))
        return [self._tell()] if len(self._waiting) > self._model.hotstart_delay else []

    def finish(self) -> list[tuple[Item, list[Sighting]]]:
        """Return the frames that are left: there are no more."""
        return [self._tell() for _ in range(len(self._waiting))]

    def _tell(self) -> tuple[Item, list[Sighting]]:
        item, outputs, size = self._waiting.popleft()
        found = self._processor.postprocess_outputs(self._session, outputs, [list(size)])
        sightings = []
        for id, score, box, mask in zip(
            found["object_ids"].tolist(),
            found["scores"].tolist(),
            found["boxes"].tolist(),
            found["masks"],
            strict=True,
        ):
            label = self._session.obj_id_to_prompt_id[id]
            self.labels[id + 1] = label
            sightings.append(Sighting(id + 1, label, tuple(box), score, to_rle(mask.cpu().numpy())))
        return item, sightings


def _found_before(logits: Tensor, masks: Tensor) -> Tensor:
    """Return which queries (Q,) show what one of a higher score shows.

    Args:
        logits: (Q,).
        masks: (Q, H, W) logits.
    """
    order = logits.argsort(descending=True)
    shown = (masks[order] > 0).flatten(1).float()
    common = shown @ shown.T
    areas = shown.sum(dim=1)
    overlap = common / (areas[:, None] + areas - common).clamp(min=1)
    again = torch.zeros(len(order), dtype=torch.bool, device=logits.device)
    for rank, row in enumerate((overlap > NMS).tolist()):
        if any(row[other] and not again[other] for other in range(rank)):
            again[rank] = True
    result = torch.zeros_like(again)
    result[order] = again
    return result
