"""The one path of prediction, against upstream's own processor and a plain version."""

from __future__ import annotations

import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from sam3.model.sam3_image_processor import Sam3Processor
from torchvision.transforms import v2

from app.config.compose import load_config
from app.datasets.images import open_image
from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError
from app.inference import Detections, Predictor
from app.inference import predictor as predictor_module
from app.inference.finder import Finder
from app.inference.masks import place
from app.inference.outputs import coco_results
from app.inference.postprocess import threshold_below
from app.model import weights
from app.model.build import build_model
from tests.helpers import REPOSITORY, TINY

NANO = REPOSITORY / "app" / "assets" / "nano"
CONFIG = load_config(TINY).model


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(1)
    return Predictor(build_model(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=(200, 30, 30))
    return image


def _upstream(predictor: Predictor, image: Image.Image, threshold: float) -> Sam3Processor:
    return Sam3Processor(
        predictor.model, CONFIG.resolution, device="cpu", confidence_threshold=threshold
    )


def _same(ours, theirs) -> None:
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert len(ours) == len(order) > 0
    size = torch.tensor([ours.width, ours.height] * 2)
    boxes = torch.minimum(theirs["boxes"][order].clamp(min=0), size)
    assert np.allclose(ours.scores, theirs["scores"][order], atol=1e-6)
    assert np.allclose(ours.boxes_xyxy, boxes, atol=1e-4)
    for rle, mask in zip(ours.masks, theirs["masks"][order, 0].numpy(), strict=True):
        # A logit within rounding of 0 falls on either side of it by the order of a sum.
        assert (mask_utils.decode(rle).astype(bool) != mask).mean() <= 1e-3


def test_pixels_are_normalised_as_upstreams_processor_does() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    expected = v2.functional.normalize(scaled, [0.5] * 3, [0.5] * 3)
    assert torch.equal(predictor_module.normalise(pixels), expected[None])


def test_words_find_what_upstreams_processor_finds(predictor, image) -> None:
    ours = predictor.predict(image, ["red circle"], threshold=0.0)
    processor = _upstream(predictor, image, 0.0)
    theirs = processor.set_text_prompt("red circle", processor.set_image(image))
    _same(ours, theirs)


@pytest.mark.parametrize("words", [[], ["red circle"]])
def test_boxes_find_what_upstreams_processor_finds(predictor, image, words) -> None:
    ours = predictor.predict(image, words, boxes_xywh=[(20, 10, 40, 40)], threshold=0.0)
    processor = _upstream(predictor, image, 0.0)
    state = processor.set_image(image)
    if words:
        state = processor.set_text_prompt(words[0], state)
    box = [40 / 90, 30 / 60, 40 / 90, 40 / 60]  # cxcywh, 0..1
    theirs = processor.add_geometric_prompt(box, True, state)
    _same(ours, theirs)
    plain = predictor.predict(image, words or ["visual"], threshold=0.0)
    assert not np.allclose(plain.scores, ours.scores, atol=1e-4)


def test_negative_boxes_find_what_upstreams_processor_finds(predictor, image) -> None:
    boxes = {"boxes_xywh": [(20, 10, 40, 40)], "negative_boxes_xywh": [(0, 0, 9, 6)]}
    ours = predictor.predict(image, ["red circle"], threshold=0.0, **boxes)
    processor = _upstream(predictor, image, 0.0)
    state = processor.set_text_prompt("red circle", processor.set_image(image))
    processor.add_geometric_prompt([40 / 90, 30 / 60, 40 / 90, 40 / 60], True, state)
    theirs = processor.add_geometric_prompt([0.05, 0.05, 0.1, 0.1], False, state)
    _same(ours, theirs)
    boxes["boxes_xywh"] += boxes.pop("negative_boxes_xywh")
    positive = predictor.predict(image, ["red circle"], threshold=0.0, **boxes)
    assert not np.allclose(positive.scores, ours.scores, atol=1e-5)


def test_a_batch_finds_what_each_image_alone_does(predictor, image, monkeypatch) -> None:
    monkeypatch.setattr(predictor_module, "PAIRS_PER_PASS", 5)  # two prompts of two images
    images = [image, image.resize((50, 70)).rotate(90)]
    words = {"prompts": ["red circle", "dog", "cat"], "boxes_xywh": [(5, 6, 30, 20)]}
    together = predictor.predict_batch(images, **words, threshold=0.0, max_detections=40)
    for found, single in zip(together, images, strict=True):
        alone = predictor.predict(single, **words, threshold=0.0, max_detections=40)
        assert (found.width, found.height) == single.size
        assert len(found) == 40
        assert np.allclose(found.scores, alone.scores, atol=1e-5)
        assert np.allclose(found.boxes_xyxy, alone.boxes_xyxy, atol=1e-2)
        assert np.array_equal(found.prompt_ids, alone.prompt_ids)
    assert not np.allclose(together[0].scores, together[1].scores, atol=1e-4)


class _SmallGpu:
    """Lets memory run out where a pass holds more pairs of image and prompt than it has room for.

    Attributes:
        passes: pairs of those that fit.
    """

    def __init__(self, predictor: Predictor, room: int, images: int = 9) -> None:
        self.ground, self.room, self.images = predictor.model.forward_grounding, room, images
        self.encode = predictor.model.backbone.forward_image
        self.passes: list[int] = []

    def forward_grounding(self, *, find_input, **inputs):
        if (pairs := len(find_input.img_ids)) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.passes.append(pairs)
        return self.ground(find_input=find_input, **inputs)

    def forward_image(self, pixels):
        if len(pixels) > self.images:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.encode(pixels)


@pytest.mark.parametrize(
    ("room", "images", "passes"), [(4, 2, [2, 2, 2]), (1, 2, [1] * 6), (9, 1, [2, 1, 2, 1])]
)
def test_where_memory_runs_out_less_is_seen_at_once(
    image, monkeypatch, room, images, passes
) -> None:
    """First fewer prompts, then fewer images; what fitted is kept for the images that follow."""
    torch.manual_seed(1)
    predictor = Predictor(build_model(CONFIG), CONFIG)
    pair = [image, image.resize((50, 70)).rotate(90)]
    words = {"prompts": ["red circle", "dog", "cat"], "threshold": 0.0, "max_detections": 40}
    expected = predictor.predict_batch(pair, **words)
    gpu = _SmallGpu(predictor, room, images)
    monkeypatch.setattr(predictor.model, "forward_grounding", gpu.forward_grounding)
    monkeypatch.setattr(predictor.model.backbone, "forward_image", gpu.forward_image)
    for _ in range(2):
        gpu.passes.clear()
        predictor._encoded = None
        found = predictor.predict_batch(pair, **words)
        assert gpu.passes == passes
        for ours, theirs in zip(found, expected, strict=True):
            assert np.allclose(ours.scores, theirs.scores, atol=1e-5)
            assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)


def test_memory_that_holds_not_even_one_image_is_told(image, monkeypatch) -> None:
    predictor = Predictor(build_model(CONFIG), CONFIG)
    gpu = _SmallGpu(predictor, 0)
    monkeypatch.setattr(predictor.model, "forward_grounding", gpu.forward_grounding)
    with pytest.raises(UserError, match=r"CUDA out of memory\. It holds not even one .* 64 px"):
        predictor.predict_batch([image, image], ["red circle", "dog"])


def test_text_features_do_not_pile_up(predictor, image, monkeypatch) -> None:
    monkeypatch.setattr(predictor_module, "CACHED_TEXTS", 2)
    for prompt in ("a", "b", "c", "d"):
        predictor.predict(image, [prompt])
    assert len(predictor._text_features) <= 2


def test_the_python_interface(tiny_run, image) -> None:
    found = Predictor.load(tiny_run / "weights/best", device="cpu").predict(
        image, prompts=["circle"], threshold=0.0, max_detections=3
    )
    assert (found.boxes_xyxy.shape, found.boxes_xyxy.dtype) == ((3, 4), np.float32)
    masks = found.bool_masks()
    assert (masks.shape, masks.dtype) == ((3, 60, 90), bool)
    assert np.array_equal(masks[1], mask_utils.decode(found.masks[1]).astype(bool))
    assert found.select([2, 0]).scores.tolist() == found.scores[[2, 0]].tolist()


def test_a_text_is_one_prompt(predictor, image) -> None:
    found = predictor.predict(image, "red circle", threshold=0.0)
    assert found.prompts == ("red circle",)
    assert (
        found.scores.tolist()
        == predictor.predict(image, ["red circle"], threshold=0).scores.tolist()
    )


def test_a_file_and_an_array_are_images(predictor, image, tmp_path) -> None:
    image.save(tmp_path / "a.png")
    whole = predictor.predict(image, ["a"], threshold=0.0)
    for given in (str(tmp_path / "a.png"), tmp_path / "a.png", np.array(image)):
        assert (
            predictor.predict(given, ["a"], threshold=0.0).scores.tolist() == whole.scores.tolist()
        )
    grey = predictor.predict(image.convert("L"), ["a"], threshold=0.0)
    assert (grey.width, grey.height) == image.size
    with pytest.raises(UserError, match="cannot be read as an image"):
        predictor.predict("nowhere.png", ["a"])
    for array in (np.zeros((60, 90)), np.zeros((60, 90, 3)), np.zeros((60, 90, 4), np.uint8)):
        with pytest.raises(UserError, match=r"an array of shape \(60, 90.*give one of"):
            predictor.predict(array, ["a"])


def test_numbers_out_of_their_range_are_listed(predictor, image) -> None:
    with pytest.raises(UserError) as error:
        predictor.predict(image, ["a"], nms=7, threshold=-1, max_detections=0, tile=5, overlap=1)
    assert error.value.problems == [
        "threshold -1: must be 0 to 1",
        "max_detections 0: must be 1 or more",
        "nms 7: must be 0 to 1",
        "tile 5: must be 32 or more",
        "overlap 1: must be 0 to 0.9",
    ]


def test_detections_are_shown_in_a_line(predictor, image) -> None:
    found = predictor.predict(image, ["dog", "cat"], threshold=0.0, max_detections=9)
    first = f"{found.prompts[found.prompt_ids[0]]} {found.scores[0]:.2f}, "
    assert repr(found).startswith(f"9 detections of 90 x 60: {first}")
    assert repr(found).endswith(", …")
    assert len(repr(found)) < 120
    assert repr(found.select([])) == "0 detections of 90 x 60"
    assert repr(found.select([1])).startswith("1 detection of 90 x 60: ")


@pytest.mark.parametrize("tile", [None, 48])
def test_the_best_score_is_known_though_nothing_is_found(predictor, image, tile) -> None:
    everything = predictor.predict(image, ["a", "b"], threshold=0.0, tile=tile)
    nothing = predictor.predict(image, ["a", "b"], threshold=1.0, tile=tile)
    assert len(nothing) == 0
    assert nothing.best_score == pytest.approx(float(everything.scores.max()))
    assert nothing.best_score == everything.best_score
    shows = float(threshold_below(nothing.best_score))
    assert len(predictor.predict(image, ["a", "b"], threshold=shows, tile=tile)) > 0


@pytest.mark.parametrize(
    ("score", "below"), [(0.508, "0.5"), (0.9, "0.89"), (0.0312, "0.031"), (4e-5, "3.9e-05")]
)
def test_a_threshold_below_a_score(score: float, below: str) -> None:
    assert threshold_below(score) == below


def test_long_prompts_that_become_one_are_refused(predictor, image, caplog) -> None:
    long = " ".join(["very"] * 40)
    with pytest.raises(UserError, match="are one prompt to this model, which reads 30 tokens"):
        predictor.predict(image, [f"{long} old dog", f"{long} young cat"])
    with caplog.at_level("INFO", "app"):
        for _ in range(2):
            predictor.predict(image, [long])
    assert [m for m in caplog.messages if "40 tokens, of which this model reads the first 30" in m]
    assert len(caplog.messages) == 1


def test_the_command_finds_what_the_python_interface_finds(command, tmp_path) -> None:
    """With the classes and the threshold of the weights, and with each way of looking."""
    header = weights.read_header(NANO)
    make_shapes(tmp_path / "set", train=1, valid=0, fog=0, width=200, height=120)
    (file,) = (tmp_path / "set").rglob("*.png")
    loaded, seen = Predictor.load(NANO, device="cpu"), []
    ways = {"plain": {}, "nms": {"nms": 0.3}, "tile": {"tile": 128, "overlap": 0.4}}
    for way, options in ways.items():
        flags = [f"--{key}={value}" for key, value in options.items()]
        out = tmp_path / way
        done = command(
            *("infer", "--checkpoint", NANO, "--input", file, "--output-dir", out),
            *("--device", "cpu", *flags),
        )
        assert done.code == 0, done.err
        results = json.loads((out / "predictions.json").read_text())
        for result in results:
            del result["file_name"], result["prompt"]
        found = loaded.predict(open_image(file), **options)
        assert found.prompts == tuple(header.prompts)
        assert coco_results(found, 1, range(1, len(found.prompts) + 1)) == results
        assert len(results) > 0
        assert results not in seen
        seen.append(results)
        assert min(result["score"] for result in results) > header.threshold


def test_without_a_threshold_of_the_weights_it_is_one_half(predictor, image) -> None:
    everything = predictor.predict(image, ["a", "b"], threshold=0.0)
    assert len(predictor.predict(image, ["a", "b"])) == int((everything.scores > 0.5).sum())


def test_boxes_alone_do_not_ask_for_the_classes(image) -> None:
    loaded = Predictor.load(NANO, device="cpu")
    found = loaded.predict(image, boxes_xywh=[(20, 10, 40, 40)], threshold=0.0)
    assert found.prompts == ("visual",)
    with pytest.raises(UserError, match="a box lies in one tile"):
        loaded.predict(image, boxes_xywh=[(20, 10, 40, 40)], tile=32)


class RedFinder(Finder):
    """One that needs no training: it finds what is red."""

    prompts, threshold = ("red",), 0.5

    def _find(self, images, query) -> list[Detections]:
        return [self._red(np.array(image), query.prompts) for image in images]

    def _red(self, pixels: np.ndarray, prompts: tuple[str, ...]) -> Detections:
        height, width = pixels.shape[:2]
        count, labels = cv2.connectedComponents((pixels[..., 0] > 128).astype(np.uint8))
        masks = [place(labels == label, 0, 0, height, width) for label in range(1, count)]
        boxes = np.array([mask_utils.toBbox(mask) for mask in masks], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ones, zeros = np.ones(len(masks), np.float32), np.zeros(len(masks), np.int64)
        return Detections(boxes, ones, zeros, prompts, masks, width, height)


def test_tiles_find_what_the_whole_image_has() -> None:
    random = np.random.default_rng(0)
    canvas = np.zeros((700, 900, 3), dtype=np.uint8)
    for x, y in itertools.product(range(40, 900, 80), range(40, 700, 80)):
        radius = int(random.integers(4, 36))
        cv2.circle(canvas, (x, y), radius, (255, 0, 0), int(random.choice([-1, 3])))
    image = Image.fromarray(canvas)
    whole = RedFinder().predict(image)
    assert len(whole) == 11 * 9
    for side, overlap in ((300, 0.2), (256, 0.5), (1008, 0.2), (200, 0.4)):
        found = RedFinder().predict(image, tile=side, overlap=overlap)
        assert {m["counts"] for m in found.masks} == {m["counts"] for m in whole.masks}
        assert len(found) == len(whole)
        assert sorted(found.boxes_xyxy.tolist()) == sorted(whole.boxes_xyxy.tolist())


def test_an_image_that_is_changed_in_place_is_seen_anew(predictor, image) -> None:
    changed = image.copy()
    before = predictor.predict(changed, ["red circle"], threshold=0.0)
    ImageDraw.Draw(changed).rectangle((0, 0, 60, 59), fill=(0, 0, 250))
    found = predictor.predict(changed, ["red circle"], threshold=0.0)
    fresh = Predictor(predictor.model, CONFIG).predict(changed, ["red circle"], threshold=0.0)
    assert np.array_equal(found.boxes_xyxy, fresh.boxes_xyxy)
    assert np.array_equal(found.scores, fresh.scores)
    assert found.masks == fresh.masks
    assert not np.allclose(found.scores, before.scores, atol=1e-5)


def test_an_image_is_encoded_once(predictor, image, monkeypatch) -> None:
    """For more prompts than go through DETR together, and for a second call about it."""
    backbone, passes = predictor.model.backbone, []
    encode, ground = backbone.forward_image, predictor.model.forward_grounding
    monkeypatch.setattr(backbone, "forward_image", lambda x: passes.append("image") or encode(x))
    monkeypatch.setattr(
        predictor.model,
        "forward_grounding",
        lambda **inputs: passes.append("prompts") or ground(**inputs),
    )
    fresh = Predictor(predictor.model, CONFIG)
    fresh.predict(image, [f"thing {number}" for number in range(17)])
    assert passes == ["image", "prompts", "prompts"]
    fresh.predict(image.copy(), ["dog"])
    assert passes.count("image") == 1
    fresh.predict(image.rotate(180), ["dog"])
    assert passes.count("image") == 2


def test_many_prompts_find_what_each_finds_alone(predictor, image, monkeypatch) -> None:
    prompts = ["red circle", "dog", "a very long prompt of many words", "cat"]
    monkeypatch.setattr(predictor_module, "PAIRS_PER_PASS", 3)
    together = predictor.predict(image, prompts, threshold=0.0, max_detections=1000)
    assert together.prompts == tuple(prompts)
    for index, prompt in enumerate(prompts):
        alone = predictor.predict(image, [prompt], threshold=0.0)
        chosen = together.prompt_ids == index
        assert np.allclose(together.scores[chosen], alone.scores, atol=1e-5)
        assert np.allclose(together.boxes_xyxy[chosen], alone.boxes_xyxy, atol=1e-3)


def test_threshold_and_limit(predictor, image) -> None:
    everything = predictor.predict(image, ["a", "b"], threshold=0.0)
    middle = float(np.median(everything.scores))
    some = predictor.predict(image, ["a", "b"], threshold=middle)
    assert len(some) == int((everything.scores > middle).sum())
    few = predictor.predict(image, ["a", "b"], threshold=0.0, max_detections=3)
    assert np.array_equal(few.scores, np.sort(everything.scores)[::-1][:3])
    none = predictor.predict(image, ["a"], threshold=1.0)
    assert (len(none), none.masks, none.boxes_xyxy.shape) == (0, [], (0, 4))


def test_boxes_stay_in_the_image(predictor, image) -> None:
    found = predictor.predict(image, ["a"], threshold=0.0)
    assert found.boxes_xyxy.dtype == np.float32
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy[:, 2] <= 90).all()
    assert (found.boxes_xyxy[:, 3] <= 60).all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_halves_are_near_float32(predictor, image, precision) -> None:
    half = Predictor(predictor.model, CONFIG, precision)
    ours = half.predict(image, ["red circle"], threshold=0.0)
    exact = predictor.predict(image, ["red circle"], threshold=0.0)
    assert np.allclose(np.sort(ours.scores), np.sort(exact.scores), atol=0.03)


@pytest.mark.parametrize("prompts", [[""], ["  "], ["circle", "\t"], ["?!"]])
def test_a_prompt_of_no_words_is_refused(predictor, image, prompts) -> None:
    with pytest.raises(UserError, match="no words"):
        predictor.predict(image, prompts)


def test_nothing_to_find_is_refused(predictor, image) -> None:
    with pytest.raises(UserError, match="Nothing to find"):
        predictor.predict(image)


@pytest.mark.parametrize("box", [(95, 5, 10, 10), (5, 70, 10, 10), (-20, 0, 10, 10)])
def test_a_box_outside_the_image_is_refused(predictor, image, box) -> None:
    with pytest.raises(UserError, match="covers nothing"):
        predictor.predict(image, boxes_xywh=[box])
