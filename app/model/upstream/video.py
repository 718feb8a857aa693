"""Upstream's predictor of films, frame by frame: on any device, in memory that does not grow.

`Sam3VideoInference` reads a film whole before its first frame, keeps what every frame left behind
for corrections by hand, and moves tensors by `.cuda()`. Here it is given one frame after another,
and forgets what no later frame reads. Places are those of the pinned commit 84cc43b (`pin.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from app.model.upstream import fixes, pin

ENDLESS = 1 << 40  # frames of a film whose end is not known


def build(state: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return upstream's `Sam3VideoInference` of a published file's tensors.

    Raises:
        RuntimeError: names or shapes that are not its own, as `load_state_dict` tells them.
    """
    from sam3 import model_builder  # takes a second to import

    with fixes.using_builders():
        model: Any = model_builder.build_sam3_video_model(
            bpe_path=str(pin.bpe_path()), load_from_HF=False, device="cpu"
        )
    model.load_state_dict(fixes.to_assign(model, state), assign=True)
    _keep_state_on_device(model.tracker)
    _detect_no_frame_ahead(model.detector)
    return model.to(device).eval()


def _keep_state_on_device(tracker: Any) -> None:
    """Store memories where the model is: sam3_tracking_predictor.py:81 stores them on "cuda"."""
    original = tracker.init_state

    def init_state(**given: Any) -> Any:
        state = original(**given)
        state["storage_device"] = state["device"]
        return state

    tracker.init_state = init_state


def _detect_no_frame_ahead(detector: Any) -> None:
    """Take each frame for the last: sam3_image.py:768 would detect in the next one as well."""
    original = detector.forward_video_grounding_multigpu

    def detect(*, frame_idx: int, num_frames: int, **given: Any) -> Any:
        del num_frames
        return original(frame_idx=frame_idx, num_frames=frame_idx + 1, **given)

    detector.forward_video_grounding_multigpu = detect


class _OnDevice(TorchFunctionMode):
    """Move tensors to a device where upstream moves them by `.cuda()`, and pin none.

    So do sam3_tracker_base.py:657,664 and sam3_video_inference.py:467.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0].to(self.device)
        if func is Tensor.pin_memory:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Each:
    """A list of any length that holds one thing at every place, and takes no other."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __getitem__(self, _index: int) -> Any:
        return self.item

    def __setitem__(self, _index: int, _item: Any) -> None:
        pass


class Session:
    """One prompt in one film, each frame of which is given once, in order.

    Args:
        model: as `build` returns it; sessions may share it.
        prompt: noun phrase.
        height, width: of the film's frames, pixels.
    """

    def __init__(self, model: Any, prompt: str, height: int, width: int) -> None:
        words = [prompt, "visual"]  # as upstream encodes them: alone, the last bits differ
        self.model, self._key = model, tuple(words)
        self._frame = 0
        self._removed: set[int] = set()
        with torch.inference_mode(), computing(model.device):
            self._text = model.detector.backbone.forward_text(words, device=model.device)
            self._state: dict[str, Any] = {
                "image_size": model.image_size,
                "num_frames": 1,
                "orig_height": height,
                "orig_width": width,
                "constants": {},
                "tracker_inference_states": [],
                "tracker_metadata": {},
                "feature_cache": {},
                "cached_frame_outputs": {},
                "is_image_only": False,
            }
            model._construct_initial_input_batch(self._state, torch.zeros(1, device=model.device))
        batch = self._state["input_batch"]
        batch.find_text_batch, batch.find_inputs = words, _Each(batch.find_inputs[0])
        self._state |= {"text_prompt": prompt, "num_frames": ENDLESS}
        for name in ("previous_stages_out", "per_frame_geometric_prompt"):
            self._state[name] = _Each(None)

    @torch.inference_mode()
    def take(self, pixels: Tensor, features: Mapping[str, Any]) -> Any:
        """Return what the next frame shows, for `tell`.

        Args:
            pixels: (1, 3, R, R), normalised.
            features: of them, as `encode` returns them.
        """
        state, number = self._state, self._frame
        self._frame += 1
        state["input_batch"].img_batch = _Each(pixels[0])
        state["feature_cache"]["text"] = {self._key: {**self._text, **features}}
        with computing(self.model.device):
            found = self.model._run_single_frame_inference(state, number, reverse=False)
        self._removed.update(found["removed_obj_ids"])
        self._forget(number)
        return found

    @torch.inference_mode()
    def tell(self, found: Any) -> Mapping[str, Any]:
        """Return the objects of a frame, without those that later frames took back.

        Returns:
            `out_obj_ids` (N,), `out_probs` (N,), `out_boxes_xywh` (N, 4), 0..1, and
            `out_binary_masks` (N, height, width), bool; all of NumPy.
        """
        with computing(self.model.device):
            outputs: Mapping[str, Any] = self.model._postprocess_output(
                self._state, found, self._removed, found["suppressed_obj_ids"]
            )
        return outputs

    def _forget(self, frame: int) -> None:
        """Drop what no frame after `frame` reads."""
        state, model = self._state, self.model
        state["cached_frame_outputs"].clear()
        metadata = state["tracker_metadata"]
        notes = metadata["rank0_metadata"]
        for by_frame in (
            metadata["obj_id_to_tracker_score_frame_wise"],
            notes["suppressed_obj_ids"],
        ):
            _keep(by_frame, [frame])
        trial = {  # objects that can still be taken back
            n
            for n, first in notes["obj_first_frame_idx"].items()
            if first > frame - model.hotstart_delay
        }
        _keep(notes["unmatched_frame_inds"], trial)
        pairs = notes["overlap_pair_to_frame_inds"]
        _keep(pairs, [pair for pair in pairs if pair[1] in trial])
        for objects in state["tracker_inference_states"]:
            _forget_memories(model.tracker, objects, frame)


def _forget_memories(tracker: Any, objects: Mapping[str, Any], frame: int) -> None:
    """Drop the memories of objects that first appeared together that no later frame reads.

    The next frame reads the conditioning frames nearest to it, and those that
    `sam3_tracker_base.py:518` selects, the last among them. What it passes over now, it passes over
    for ever.
    """
    every = [objects["output_dict"], *objects["output_dict_per_obj"].values()]
    read = {frame}
    if tracker.use_memory_selection:
        r = tracker.memory_temporal_stride_for_eval
        read.update(tracker.frame_filter(every[0], False, frame + 1, ENDLESS, r))
    else:
        reach = max(tracker.num_maskmem, tracker.max_obj_ptrs_in_encoder)
        read.update(range(frame - reach, frame))
    # One more than is read: by their number, sam3_tracker_utils.py:285 chooses their order.
    given = sorted(every[0]["cond_frame_outputs"])[-tracker.max_cond_frames_in_attn - 1 :]
    for outputs in every:
        _keep(outputs["non_cond_frame_outputs"], read)
        _keep(outputs["cond_frame_outputs"], given)
    for by_frame in objects["mask_inputs_per_obj"].values():
        _keep(by_frame, given)
    objects["consolidated_frame_inds"]["cond_frame_outputs"].intersection_update(given)
    _keep(objects["frames_already_tracked"], [frame])


def _keep(things: MutableMapping[Any, Any], wanted: Iterable[Any]) -> None:
    kept = set(wanted)
    for key in [key for key in things if key not in kept]:
        del things[key]


@torch.inference_mode()
def encode(model: Any, pixels: Tensor) -> Mapping[str, Any]:
    """Return the feature maps that detector and tracker read, once for all prompts of a frame.

    Args:
        pixels: (1, 3, R, R), normalised.
    """
    with computing(model.device):
        features: Mapping[str, Any] = model.detector.backbone.forward_image(pixels)
    return features


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Compute as upstream's predictor does, in bfloat16, on the device of the model."""
    with torch.autocast(device.type, torch.bfloat16), _OnDevice(device):
        yield
