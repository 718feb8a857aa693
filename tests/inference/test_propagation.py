"""SAM 3's own tracker by transformers, of random weights: what it forgets, nothing reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Sam3VideoModel, Sam3VideoProcessor

from app.datasets.synthetic.films import draw_film
from app.deploy import transformers_folder
from app.evaluation.tracks import read_films
from app.inference.masks import to_rle
from app.inference.propagation import Propagator, _AsTrained, _found_before, load
from app.inference.settings import Settings
from app.inference.tracks import NEW
from app.model import weights
from app.model.build import build_model
from tests.model.published import SMALL, build_small, write_sam3

PROMPTS = ("circle", "cross")
THRESHOLD = 0.1  # which random weights reach
FRAMES = 20  # more than the tracker's memory reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam3")
    with pytest.MonkeyPatch.context() as patch:
        build_small(patch)
        write_sam3(folder / "sam3.pt")
        model = build_model(SMALL)
        weights.load_into(model, folder / "sam3.pt", merge=False)
        base = weights.origin(folder / "sam3.pt")
        header = weights.Header(model=SMALL, prompts=list(PROMPTS), threshold=0.25, base=base)
        weights.save(model, folder / "tuned", header)
        transformers_folder.export(folder / "tuned", folder / "hf", video=True)
    return folder / "hf"


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    film = draw_film((0, 5), width=96, height=72)
    return [Image.fromarray(film.frame(number / 20)[0]) for number in range(FRAMES)]


def few(model: Any) -> Any:
    """Two objects at most, and as many conditioning frames as there can be."""
    model.max_num_objects, model.recondition_every_nth_frame = 2, 2
    model.high_conf_thresh = model.high_iou_thresh = 0.0
    return model


@pytest.mark.slow
@torch.inference_mode()
def test_it_forgets_and_answers_as_transformers_does(
    folder: Path, frames: list[Image.Image]
) -> None:
    """Object for object and mask for mask, beside a session that keeps everything."""
    settings = Settings(str(folder), threshold=THRESHOLD, device="cpu")
    model, processor = load(settings)
    propagator: Propagator[int] = Propagator(few(model), processor, PROMPTS)
    told = [each for n, frame in enumerate(frames) for each in propagator.update(n, frame)]
    told += propagator.finish()
    assert [number for number, _ in told] == list(range(FRAMES))

    whole = few(Sam3VideoModel.from_pretrained(folder).eval())
    whole.detector_model = _AsTrained(whole.detector_model)
    whole.new_det_thresh, whole.score_threshold_detection = THRESHOLD, THRESHOLD / NEW
    theirs: Any = Sam3VideoProcessor.from_pretrained(folder)
    session = theirs.init_video_session()
    theirs.add_text_prompt(session, list(PROMPTS))
    outputs = []
    for frame in frames:
        pixels = theirs(images=frame, return_tensors="pt")["pixel_values"]
        outputs.append(whole(session, frame=pixels))
        session.hotstart_removed_obj_ids.update(outputs[-1].removed_obj_ids)
    seen = 0
    for (_, sightings), output in zip(told, outputs, strict=True):
        expected = theirs.postprocess_outputs(session, output, [[72, 96]])
        pairs = zip(expected["object_ids"].tolist(), expected["masks"], strict=True)
        assert {s.track - 1: s.mask for s in sightings} == {n: to_rle(m.numpy()) for n, m in pairs}
        assert [s.score for s in sightings] == pytest.approx(expected["scores"].tolist())
        seen += len(sightings)
    assert seen >= FRAMES

    ours = propagator._session
    assert len(ours.processed_frames or ()) == 1 < len(session.processed_frames or ()) == FRAMES
    reach = max(model.tracker_model.num_maskmem, 16)
    for index, kept in ours.output_dict_per_obj.items():
        assert len(kept["non_cond_frame_outputs"]) <= reach + 1
        given = kept["cond_frame_outputs"]
        heavy = [frame for frame, output in given.items() if "maskmem_features" in output]
        assert len(heavy) < len(given) or len(given) <= 8
        assert len(ours.mask_inputs_per_obj[index]) <= 1


def test_each_thing_is_named_once() -> None:
    logits = torch.tensor([0.1, 2.0, 1.0, -1.0])
    masks = torch.full((4, 10, 10), -5.0)
    masks[0, :5] = masks[1, :6] = 5.0  # of one place: the second scores more
    masks[2, 8:] = masks[3, 6:8] = 5.0
    assert _found_before(logits, masks).tolist() == [True, False, False, False]
    masks[3, 6:] = 5.0
    assert _found_before(logits, masks).tolist() == [True, False, False, True]


@pytest.mark.slow
def test_the_command(command, folder: Path, frames: list[Image.Image], tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames[:3]):
        frame.save(tmp_path / "frames" / f"{number}.png")
    words = ("infer", "--engine", "hf", "--checkpoint", folder, "--input", tmp_path / "frames")
    out = ("--output-dir", tmp_path / "out", "--device", "cpu", "--save", "coco")
    done = command(*words, "--track", *out, "--prompt", "circle", "--threshold", 0.12)
    assert done.code == 0, done.err
    assert len(read_films(tmp_path / "out" / "tracks.json").films[1]) == 3


def test_what_it_does_not_read(command, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = ("infer", "--input", tmp_path, "--checkpoint", tmp_path, "--prompt", "circle")
    assert "--engine sam2: there is own" in command(*words, "--engine", "sam2").err
    assert "is for films" in command(*words, "--engine", "hf").err
    done = command(*words, "--engine", "hf", "--track", "--nms", 0.5, "--fill-gaps")
    assert done.code == 2
    assert done.err.count("--engine hf does not read it") == 2
    from app.errors import UserError

    with pytest.raises(UserError, match="is no folder for Sam3VideoModel"):
        load(Settings(str(tmp_path)))
