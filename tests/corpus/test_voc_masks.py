"""VOC's masks without XML: of VOC itself, and CVAT's "Segmentation mask 1.1" (cvat-ai/cvat)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.formats.mask_files import rgb
from app.datasets.formats.voc_masks import color_of
from tests.corpus.making import (
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)
from tests.corpus.test_mask_folders import drawn

NUMBERS = {"circle": 1, "rectangle": 2}
# labelmap.txt as CVAT writes it
LABELMAP = (
    "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncircle:128,0,0::\nrectangle:0,128,0::\n"
)


def palette() -> list[int]:
    return [channel for index in range(256) for channel in rgb(color_of(index))]


def indexed(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels.astype(np.uint8), "P")
    picture.putpalette(palette())
    return picture


def painted(pixels: np.ndarray) -> Image.Image:
    return indexed(pixels).convert("RGB")


def outlined(pixels: np.ndarray) -> np.ndarray:
    """With VOC's border of void, of one pixel around each object."""
    edges = np.zeros(pixels.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            edges |= (np.roll(pixels, step, axis) != pixels) & (pixels == 0)
    return np.where(edges, 255, pixels)


def voc(
    folder: Path, save=indexed, numbers=NUMBERS, border=False, objects=True, names=LABELMAP, count=6
) -> dict[str, list[Thing]]:
    made = scenes(folder, count, "JPEGImages", "jpg")
    for image, things in made.items():
        stem = Path(image).stem
        order = {thing[0]: index for index, thing in enumerate(reversed(things), start=1)}
        for kind, drawing in (("Class", numbers), ("Object", order)):
            pixels = drawn(things, drawing)
            if kind == "Class" or objects:
                pixels = outlined(pixels) if border else pixels
                put(folder / f"Segmentation{kind}" / f"{stem}.png", save(pixels))
    if names:
        put(folder / "labelmap.txt", names)
    return made


def test_the_colormap_is_vocs():
    assert [rgb(color_of(i)) for i in (0, 1, 2, 3, 15, 20, 255)] == [
        *((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (192, 128, 128)),
        *((0, 64, 128), (224, 224, 192)),
    ]


@pytest.mark.parametrize("save", [indexed, painted, lambda p: Image.fromarray(p.astype(np.uint8))])
@pytest.mark.parametrize("border", [False, True])
def test_instances_and_their_classes(tmp_path, save, border):
    made = voc(tmp_path, save, border=border)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert mask_iou(found.train, made) == 1
    assert found.kinds.get("void", 0) == (6 if border else 0)
    assert "read as Pascal VOC's masks" in found.said


def test_vocs_own_classes(tmp_path):
    made = voc(tmp_path, names="", numbers={"circle": 15, "rectangle": 20})
    wanted = {"circle": "person", "rectangle": "tv monitor"}
    named = {n: [(wanted[t[0]], *t[1:]) for t in things] for n, things in made.items()}
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(named)
    assert "VOC's own numbers and colours" in found.said


def test_a_painted_mask_of_a_gray_class_alone(tmp_path):
    made = voc(tmp_path, painted, names="", numbers={"circle": 7, "rectangle": 7})
    named = {n: [("car", *t[1:]) for t in things] for n, things in made.items()}
    assert rgb(color_of(7)) == (128, 128, 128)
    assert things_of(read(tmp_path).train) == sorted_things(named)


def test_class_masks_alone_are_parted(tmp_path):
    made = voc(tmp_path, objects=False)
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_palettes_in_another_order_than_the_labelmap(tmp_path):
    def shuffled(pixels: np.ndarray) -> Image.Image:
        picture = Image.fromarray(np.choose(pixels, [0, 9, 4]).astype(np.uint8), "P")
        picture.putpalette([0] * 12 + [0, 128, 0] + [0] * 12 + [128, 0, 0])
        return picture

    made = voc(tmp_path, shuffled)
    order = {"circle": 2, "rectangle": 1}
    for image, things in made.items():
        path = tmp_path / "SegmentationObject" / f"{Path(image).stem}.png"
        put(path, indexed(drawn(things, order)))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_the_class_of_most_pixels(tmp_path):
    made = voc(tmp_path)
    for image, things in made.items():
        pixels = drawn(things, NUMBERS)
        for _, x, y, side in things:
            pixels[y : y + side // 3, x : x + side] = 0  # a third is background
            pixels[y + side - 2 : y + side, x : x + side] = 2
        put(tmp_path / "SegmentationClass" / f"{Path(image).stem}.png", indexed(pixels))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_lists_of_splits(tmp_path):
    made = voc(tmp_path, count=8)
    for split, names in (("train", range(4)), ("val", range(4, 6)), ("trainval", range(6))):
        lines = "".join(f"img_{index}\n" for index in names)
        put(tmp_path / f"ImageSets/Segmentation/{split}.txt", lines)
    found = read(tmp_path)
    assert {split: len(d.images) for split, d in found.splits.items()} == {"train": 4, "valid": 2}
    assert things_of(found.splits["valid"]).keys() == {"img_4.jpg", "img_5.jpg"}
    assert found.kinds["unlisted"] == 1
    assert len(made) == 8


def test_cvats_default_list(tmp_path):
    made = voc(tmp_path, painted)
    lines = "".join(f"{Path(name).stem}\n" for name in made)
    put(tmp_path / "ImageSets/Segmentation/default.txt", lines)
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_folders_of_splits(tmp_path):
    made = {split: voc(tmp_path / split) for split in ("train", "valid")}
    for path in (tmp_path / "valid/JPEGImages").iterdir():
        Image.new("RGB", (160, 120), (9, int(path.stem[-1]), 9)).save(path)
    found = read(tmp_path)
    assert found.splits.keys() == {"train", "valid"}
    assert things_of(found.train) == sorted_things(made["train"])


def test_partners_that_are_missing(tmp_path):
    voc(tmp_path)
    (tmp_path / "JPEGImages/img_0.jpg").unlink()
    assert "img_0': no such file in " in refusal(tmp_path)
    assert read(tmp_path, max_drop=0.2).kinds["orphan"] == 1
    (tmp_path / "SegmentationClass/img_0.png").unlink()
    assert "img_0.png': has no mask of its name in SegmentationClass/" in refusal(tmp_path)


def test_a_listed_image_without_a_mask_is_said(tmp_path):
    made = voc(tmp_path)
    lines = "".join(f"{Path(name).stem}\n" for name in made)
    put(tmp_path / "ImageSets/Segmentation/train.txt", lines)
    (tmp_path / "SegmentationClass/img_0.png").unlink()
    assert read(tmp_path).kinds["unlabelled"] == 1


def test_bad_masks_leave_their_image_out(tmp_path):
    voc(tmp_path)
    put(tmp_path / "SegmentationClass/img_0.png", indexed(np.full((120, 160), 77)))
    put(tmp_path / "SegmentationClass/img_1.png", indexed(np.full((20, 20), 1)))
    put(tmp_path / "SegmentationObject/img_2.png", b"no image")
    put(tmp_path / "SegmentationClass/img_3.png", Image.new("RGB", (160, 120), (1, 2, 3)))
    found = read(tmp_path, max_drop=0.7)
    assert len(found.train.images) == 2
    assert "has numbers that nothing names: 77" in found.said
    assert "has colours that nothing names: (1, 2, 3)" in found.said
    assert found.kinds["other size"] == 1


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a\0b", "x" * 5000])
def test_lists_that_lead_elsewhere(tmp_path, name):
    voc(tmp_path / "set")
    put(tmp_path / "secret.jpg", Image.new("RGB", (160, 120)))
    lines = "".join(f"img_{index}\n" for index in range(6)) + f"{name}\n"
    put(tmp_path / "set/ImageSets/Segmentation/train.txt", lines)
    found = read(tmp_path / "set", max_drop=0.2)
    assert len(found.train.images) == 6
    assert found.kinds["orphan"] == 1


def test_lists_that_are_no_text(tmp_path):
    voc(tmp_path)
    put(tmp_path / "ImageSets/Segmentation/train.txt", b"\xff\xfe\0")
    assert "must be a UTF-8 list of images" in refusal(tmp_path)


def test_void_is_255(tmp_path):
    voc(tmp_path)
    assert "void is 255 in VOC's masks" in refusal(tmp_path, void=3)


def test_trainval_is_the_training_list_where_there_is_no_other(tmp_path):
    made = voc(tmp_path)
    for name, stems in (("trainval", "img_0 img_1 img_2 img_3"), ("test", "img_4 img_5")):
        put(tmp_path / f"ImageSets/Segmentation/{name}.txt", stems.replace(" ", "\n"))
    found = read(tmp_path)
    assert {split: len(part.images) for split, part in found.splits.items()} == {
        **{"train": 4, "test": 2}
    }
    assert things_of(found.splits["test"]) == sorted_things(
        {f"img_{index}.jpg": made[f"img_{index}.jpg"] for index in (4, 5)}
    )
    put(tmp_path / "ImageSets/Segmentation/train.txt", "img_0\nimg_1")
    assert len(read(tmp_path).train.images) == 2
