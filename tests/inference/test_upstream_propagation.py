"""SAM 3's own tracker by upstream, of random weights: what it forgets, nothing reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sam3 import model_builder

from app.datasets.square import to_square
from app.datasets.synthetic.films import draw_film
from app.errors import UserError
from app.evaluation.tracks import read_films
from app.inference.masks import to_rle
from app.inference.predictor import normalise
from app.inference.settings import Settings
from app.inference.tracks import NEW
from app.inference.upstream_propagation import Propagator, load
from app.model.upstream import video
from tests.model.published import SMALL, build_small, fit_tracker, video_model, write_sam3

THRESHOLD = 0.1  # which random weights reach
FRAMES = 20  # more than the tracker's memory reads
PROMPT = "circle"


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sam3") / "sam3.pt"
    with pytest.MonkeyPatch.context() as patch:
        build_small(patch)
        write_sam3(file)
    return file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    build_small(monkeypatch)
    fit_tracker(monkeypatch)


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    film = draw_film((0, 5), width=96, height=72)
    return [Image.fromarray(film.frame(number / 20)[0]) for number in range(FRAMES)]


def busy(model: Any) -> Any:
    """Follow three objects of a prompt at most, and show the tracker one anew all the time."""
    associate = model._associate_det_trk

    def associated(**given: Any) -> Any:
        new, unmatched, matched, sure, empty = associate(**given)
        if len(given["trk_obj_ids"]) and len(given["det_masks"]):
            sure = {int(given["trk_obj_ids"][0]): 0}
        return new, unmatched, matched, sure, empty

    model._associate_det_trk = associated
    model.max_num_objects, model.recondition_every_nth_frame = 3, 2
    model.hotstart_unmatch_thresh = FRAMES  # those that are one thing go alone
    sure = model.tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    sure.data = sure.data + 5
    return model


def upstreams_own(file: Path, frames: list[Image.Image], prompt: str) -> list[dict[str, Any]]:
    """Return what upstream answers about a whole film."""
    model: Any = video_model()
    model.load_state_dict(torch.load(file))
    video._keep_state_on_device(model.tracker)
    busy(model.eval())
    model.new_det_thresh, model.score_threshold_detection = THRESHOLD, THRESHOLD / NEW
    state = model.init_state(frames, offload_video_to_cpu=True)
    pixels = [normalise(to_square(frame, SMALL.resolution)) for frame in frames]
    state["input_batch"].img_batch = torch.cat(pixels)
    # `add_prompt` sets these, and sees the first frame, which `propagate_in_video` sees again.
    state["text_prompt"] = state["input_batch"].find_text_batch[0] = prompt
    whole: Any = model_builder.Sam3VideoInferenceWithInstanceInteractivity.__base__
    with video.computing(torch.device("cpu")):
        return [found for _, found in whole.propagate_in_video(model, state, 0)]


@pytest.mark.slow
def test_it_forgets_and_answers_as_upstream_does(
    small: None, weights_file: Path, frames: list[Image.Image]
) -> None:
    """Object for object and mask for mask, beside upstream's own run that keeps everything."""
    model = busy(load(Settings(str(weights_file), threshold=THRESHOLD, device="cpu")))
    propagator: Propagator[int] = Propagator(model, [PROMPT])
    told = [each for n, frame in enumerate(frames) for each in propagator.update(n, frame)]
    assert [number for number, _ in told] == list(range(FRAMES + 1 - model.hotstart_delay))
    told += propagator.finish()
    assert [number for number, _ in told] == list(range(FRAMES))

    seen = 0
    own = upstreams_own(weights_file, frames, PROMPT)
    for (_, sightings), whole in zip(told, own, strict=True):
        assert [s.mask for s in sightings] == [to_rle(m) for m in whole["out_binary_masks"]]
        assert [s.score for s in sightings] == pytest.approx(whole["out_probs"].tolist())
        boxes = whole["out_boxes_xywh"] * np.array([96, 72, 96, 72])
        boxes[:, 2:] += boxes[:, :2]
        assert np.array([s.box_xyxy for s in sightings]).reshape(-1, 4) == pytest.approx(boxes)
        objects = {propagator._tracks[0, n] for n in whole["out_obj_ids"].tolist()}
        assert {s.track for s in sightings} == objects
        seen += len(sightings)
    assert seen >= FRAMES

    (session,) = propagator._sessions
    assert session._removed
    for objects in session._state["tracker_inference_states"]:
        assert len(objects["output_dict"]["non_cond_frame_outputs"]) <= 16
        assert len(objects["output_dict"]["cond_frame_outputs"]) == 5
        assert all(len(masks) <= 5 for masks in objects["mask_inputs_per_obj"].values())
    notes = session._state["tracker_metadata"]
    assert len(notes["obj_id_to_tracker_score_frame_wise"]) == 1


@pytest.mark.slow
def test_the_command(
    command, small: None, weights_file: Path, frames: list[Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames[:3]):
        frame.save(tmp_path / "frames" / f"{number}.png")
    words = ("infer", "--engine", "sam3", "--checkpoint", weights_file)
    where = ("--input", tmp_path / "frames", "--output-dir", tmp_path / "out", "--device", "cpu")
    asked = ("--prompt", "circle", "--prompt", "cross", "--threshold", THRESHOLD)
    done = command(*words, "--track", *where, *asked)
    assert done.code == 0, done.err
    films = read_films(tmp_path / "out" / "tracks.json")
    assert len(films.films[1]) == 3
    assert set(films.classes.values()) == {"circle", "cross"}


def test_what_it_does_not_take(small: None, weights_file: Path) -> None:
    with pytest.raises(UserError, match="holds no tracker of SAM 3"):
        load(Settings("app/assets/nano"))
    with pytest.raises(UserError, match="runs in bf16"):
        load(Settings(str(weights_file), precision="fp32"))
