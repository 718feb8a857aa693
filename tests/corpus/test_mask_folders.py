"""Folders of images and masks, as people name and draw them (FAULTS 5)."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from app.datasets.formats.mask_files import MAX_NUMBERS, MaskError, read_mask
from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    survey_of,
    things_of,
)

Numbers = Mapping[str, int]  # of each class, in a mask
OBJECTS = {"circle": 1, "rectangle": 2}
BINARY = {"circle": 255, "rectangle": 255}


def drawn(things: list[Thing], numbers: Numbers = OBJECTS, dtype: type = np.uint8) -> np.ndarray:
    """A (height, width) map of the squares of things."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype)
    for name, x, y, side in things:
        pixels[y : y + side, x : x + side] = numbers.get(name, 0)
    return pixels


def masked(
    folder: Path,
    draw: Callable[[list[Thing]], np.ndarray | Image.Image] = drawn,
    *,
    images: str = "images",
    masks: str = "masks",
    name: str = "{}.png",
    count: int = 6,
    start: int = 0,
    ending: str = "jpg",
) -> dict[str, list[Thing]]:
    made = scenes(folder, count, images, ending, start)
    for image, things in made.items():
        picture = draw(things)
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        put(folder / masks / name.format(Path(image).stem), picture)
    return made


def all_objects(made: dict[str, list[Thing]]) -> dict[str, list[Thing]]:
    """The things, where nothing tells their class."""
    return sorted_things({n: [("object", *t[1:]) for t in ts] for n, ts in made.items()})


def assert_found(found, made: dict[str, list[Thing]]) -> None:
    assert things_of(found.train) == all_objects(made)


def test_object_numbers(tmp_path):
    made = masked(tmp_path)
    found = read(tmp_path)
    assert_found(found, made)
    assert "numbers in masks are taken to count objects; --masks classes" in found.said
    assert "void" not in found.kinds


# Folder names of Kaggle's, Roboflow's and Supervisely's mask exports
@pytest.mark.parametrize(
    ("images", "masks", "name"),
    [
        ("images", "masks", "{}.png"),
        ("Images", "Masks", "{}.png"),
        ("image", "mask", "{}.png"),
        ("img", "gt", "{}.bmp"),
        ("imgs", "labels", "{}.tif"),
        ("images", "annotations", "{}.gif"),
        ("JPEGImages", "masks", "{}_mask.png"),
        ("images", "labels", "{}_label.png"),
        ("images", "ground_truth", "{}_gt.png"),
        ("images", "masks", "{}.jpg.png"),
        ("images", "masks", "mask_{}.png"),
    ],
)
def test_usual_names(tmp_path, images, masks, name):
    made = masked(tmp_path, images=images, masks=masks, name=name)
    assert_found(read(tmp_path), made)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}", "masks/{}"),
        ("{}/images", "{}/masks"),
        ("{}_images", "{}_masks"),
        ("{}", "{}_labels"),  # CamVid on Kaggle
        ("{}", "{}annot"),  # SegNet's CamVid
    ],
)
@pytest.mark.parametrize("valid", ["val", "valid", "dev"])
def test_splits_are_no_classes(tmp_path, images, masks, valid):
    made = {}
    for split, start in (("train", 0), (valid, 50), ("test", 90)):
        where = images.format(split), masks.format(split)
        made[split] = masked(tmp_path, images=where[0], masks=where[1], count=4, start=start)
    found = read(tmp_path)
    assert found.splits.keys() == {"train", "valid", "test"}
    assert things_of(found.splits["train"]) == all_objects(made["train"])
    assert things_of(found.splits["valid"]) == all_objects(made[valid])
    assert things_of(found.splits["test"]) == all_objects(made["test"])
    assert found.train.class_names == ["object"]


def test_splits_of_the_images_alone_or_of_the_masks_alone(tmp_path):
    for case in ("images", "masks"):
        folder = tmp_path / case
        made = {}
        for split, start in (("train", 0), ("val", 50)):
            for name, things in scenes(folder, 3, "made", start=start).items():
                where = f"images/{split}" if case == "images" else "images"
                (folder / where).mkdir(parents=True, exist_ok=True)
                target = folder / where / f"{split}_{name}"
                (folder / "made" / name).rename(target)
                where = f"masks/{split}" if case == "masks" else "masks"
                put(folder / where / target.name, Image.fromarray(drawn(things)))
                made[target.name] = things
        (folder / "made").rmdir()
        found = read(folder)
        assert things_of(found.train) == all_objects(
            {name: things for name, things in made.items() if name.startswith("train")}
        )
        assert len(found.splits["valid"].images) == 3
        assert not found.kinds.keys() & {"unlabelled", "orphan"}


def test_one_split_in_two_folders_is_refused(tmp_path):
    for split in ("val", "valid", "train"):
        masked(tmp_path, images=f"images/{split}", masks=f"masks/{split}", count=2)
    assert "has both val and valid folders" in refusal(tmp_path)


def test_folders_are_classes(tmp_path):
    made = scenes(tmp_path)
    for name in OBJECTS:
        for image, things in made.items():
            mask = drawn([thing for thing in things if thing[0] == name], BINARY)
            put(tmp_path / "masks" / name / image, Image.fromarray(mask))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.train.class_names == ["circle", "rectangle"]
    assert mask_iou(found.train, made) == 1


def test_folders_of_classes_within_splits(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 50)):
        made[split] = scenes(tmp_path, 4, f"images/{split}", start=start)
        for name in OBJECTS:
            for image, things in made[split].items():
                mask = drawn([thing for thing in things if thing[0] == name], BINARY)
                put(tmp_path / "masks" / split / name / image, Image.fromarray(mask))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])


def test_folders_that_images_have_too_are_no_classes(tmp_path):
    made = [
        masked(tmp_path, images=f"images/{day}", masks=f"masks/{day}", start=start)
        for day, start in (("monday", 0), ("tuesday", 50))
    ]  # img_0.jpg and so on in both
    found = read(tmp_path)
    assert found.train.class_names == ["object"]
    objects = {
        (image.path.parent.name, image.path.name): len(found.train.annotations_by_image[image.id])
        for image in found.train.images
    }
    assert objects == {(day, name): 2 for day in ("monday", "tuesday") for name in made[0]}


# BUSI (Breast Ultrasound Images): x.png, x_mask.png, and x_mask_1.png for a second object
def test_masks_beside_the_images(tmp_path):
    made = scenes(tmp_path, sub=".")
    for image, things in made.items():
        for index, thing in enumerate(things):
            name = f"{Path(image).stem}_mask{f'_{index}' if index else ''}.png"
            put(tmp_path / name, Image.fromarray(drawn([thing], BINARY)))
    found = read(tmp_path)
    assert_found(found, made)
    assert "orphan" not in found.kinds


# DeepGlobe: x_sat.jpg and x_mask.png
def test_images_with_a_suffix_of_their_own(tmp_path):
    made = scenes(tmp_path / "made", ending="jpg", sub=".")
    for image, things in made.items():
        stem = Path(image).stem
        for split in ("train", "valid"):
            put(tmp_path / split / f"{stem}_mask.png", Image.fromarray(drawn(things)))
            with Image.open(tmp_path / "made" / image) as picture:
                put(tmp_path / split / f"{stem}_sat.jpg", picture.copy())
    (found,) = {len(s.annotations) for s in survey_of(tmp_path).splits.values()}
    assert found == 12


# Data Science Bowl 2018: a folder of masks an image, one object each
def test_a_mask_for_each_object(tmp_path):
    made = scenes(tmp_path)
    for image, things in made.items():
        for index, thing in enumerate(things):
            mask = drawn([thing], BINARY)
            mask[0, index] = 255  # a speck apart: still one object
            put(tmp_path / "masks" / Path(image).stem / f"m{index}.png", Image.fromarray(mask))
    found = read(tmp_path)
    assert found.train.class_names == ["object"]
    assert len(found.train.annotations) == 12


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "gif"])
def test_two_values_are_parted(tmp_path, value, ending):
    numbers = dict.fromkeys(OBJECTS, value)
    made = masked(tmp_path, lambda things: drawn(things, numbers), name=f"{{}}.{ending}")
    found = read(tmp_path)
    assert_found(found, made)
    assert "each group of touching pixels is an object" in found.said
    whole = read(tmp_path, masks="objects")
    assert [len(whole.train.annotations_by_image[i.id]) for i in whole.train.images] == [1] * 6


def test_pieces_that_touch_at_a_corner_are_one(tmp_path):
    def corner(things: list[Thing]) -> np.ndarray:
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[10:20, 10:20] = pixels[20:30, 20:30] = pixels[60:70, 60:70] = 255
        return pixels

    masked(tmp_path, corner)
    boxes = {a.bbox_xywh for a in read(tmp_path).train.annotations}
    assert boxes == {(10, 10, 20, 20), (60, 60, 10, 10)}


def test_one_bit_and_mixed_scales(tmp_path):
    counter = iter(range(10))

    def draw(things: list[Thing]) -> np.ndarray:
        mask = drawn(things) > 0
        return mask if next(counter) % 2 else np.where(mask, 255, 0).astype(np.uint8)

    made = masked(tmp_path, draw)
    assert_found(read(tmp_path), made)


@pytest.mark.parametrize(("blur", "least"), [(0.7, 0.97), (1.5, 0.97), (3, 0.94)])
def test_smooth_edges_are_no_objects(tmp_path, blur, least):
    def draw(things: list[Thing]) -> Image.Image:
        return Image.fromarray(drawn(things, BINARY)).filter(ImageFilter.GaussianBlur(blur))

    made = masked(tmp_path, draw)
    found = read(tmp_path)
    assert_found(found, made)
    assert mask_iou_of_objects(found.train, made) > least


def mask_iou_of_objects(dataset, made: dict[str, list[Thing]]) -> float:
    """As `mask_iou`, by the nearest thing instead of by class."""
    worst = 1.0
    for image in dataset.images:
        for annotation in dataset.annotations_by_image[image.id]:
            mask = coco_mask.decode(annotation.segmentation).astype(bool)
            truths = [drawn([thing]) > 0 for thing in made[image.path.name]]
            worst = min(worst, max((mask & t).sum() / (mask | t).sum() for t in truths))
    return float(worst)


def test_antialiased_edges_and_noise_of_a_lossy_file(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        soft = np.asarray(
            Image.fromarray(drawn(things, BINARY)).filter(ImageFilter.GaussianBlur(1))
        ).copy()
        soft[100:110, :30] = np.maximum(soft[100:110, :30], 2)  # flat noise, as JPEG leaves it
        inside = soft == 255
        soft[inside & (np.indices(soft.shape)[0] > 40)] = 253
        return soft

    made = masked(tmp_path, draw)
    assert_found(read(tmp_path), made)


def test_jpeg_of_two_values_is_cut_at_half_and_said(tmp_path):
    made = masked(tmp_path, lambda things: drawn(things, BINARY), name="{}.jpg", ending="png")
    found = read(tmp_path)
    assert_found(found, made)
    assert found.kinds["lossy mask"] == 6
    assert mask_iou_of_objects(found.train, made) > 0.97


def test_jpeg_of_numbers_is_refused(tmp_path):
    masked(tmp_path, lambda things: drawn(things, {"circle": 60, "rectangle": 120}), name="{}.jpg")
    assert "export the masks as PNG" in refusal(tmp_path)


# Void: VOC's border, Cityscapes' and ADE20K's 255
@pytest.mark.parametrize(("dtype", "void"), [(np.uint8, 255), (np.uint16, 65535)])
def test_the_highest_value_beside_small_numbers_is_void(tmp_path, dtype, void):
    def draw(things: list[Thing]) -> np.ndarray:
        pixels = drawn(things, dtype=dtype)
        pixels[:3] = void
        return pixels

    made = masked(tmp_path, draw)
    found = read(tmp_path)
    assert found.kinds["void"] == 6
    assert f"{3 * WIDTH} pixels of {void} are no object" in found.said
    assert {len(found.train.annotations_by_image[i.id]) for i in found.train.images} == {2}
    assert len(made) == 6


def test_void_around_one_class(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        pixels = drawn(things, {"circle": 1, "rectangle": 1})
        pixels[:3] = 255
        return pixels

    masked(tmp_path, draw)
    found = read(tmp_path)
    assert len(found.train.annotations) == 12
    assert found.kinds["void"] == 6


def test_spread_numbers_have_no_void(tmp_path):
    made = masked(tmp_path, lambda things: drawn(things, {"circle": 127, "rectangle": 255}))
    found = read(tmp_path)
    assert_found(found, made)
    assert "void" not in found.kinds


def test_void_by_hand(tmp_path):
    made = masked(tmp_path)
    found = read(tmp_path, void=2)
    circles = {n: [t for t in ts if t[0] == "circle"] for n, ts in made.items()}
    assert_found(found, circles)
    assert found.kinds["void"] == 6
    said = refusal(tmp_path, void=9)
    assert "--void 9: no mask has it; there are 0, 1, 2" in said


def test_255_objects_have_no_void(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[::2, 1::5].flat[:255] = np.arange(1, 256)
        return pixels

    masked(tmp_path, draw, count=3)
    assert len(read(tmp_path).train.annotations) == 3 * 255


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ({"circle": 300, "rectangle": 65000}, np.uint16),
        ({"circle": 70_000, "rectangle": 2_000_000_000}, np.int32),
        ({"circle": 3, "rectangle": 16_000}, np.float32),
    ],
)
def test_numbers_of_16_and_32_bits(tmp_path, numbers, dtype):
    made = masked(tmp_path, lambda things: drawn(things, numbers, dtype), name="{}.tif")
    assert_found(read(tmp_path), made)


def test_palette_pngs_are_read_as_indices(tmp_path):
    def draw(things: list[Thing]) -> Image.Image:
        picture = Image.fromarray(drawn(things), "P")
        picture.putpalette([0, 0, 0, 200, 0, 0, 200, 0, 0])  # two numbers of one colour
        return picture

    made = masked(tmp_path, draw)
    assert_found(read(tmp_path), made)


def test_grays_of_colour_pngs_are_numbers(tmp_path):
    made = masked(tmp_path, lambda things: Image.fromarray(drawn(things)).convert("RGBA"))
    assert_found(read(tmp_path), made)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A gray PNG, which Pillow writes of 1, 8 and 16 bits alone."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def test_png_of_few_bits(tmp_path):
    rows = (b"\0" + bytes([0x12, 0x3F])) * 2  # 4 bits: 1, 2, 3, 15
    path = put(tmp_path / "few.png", png(4, 2, 4, rows))
    assert read_mask(path).numbers.tolist() == [[1, 2, 3, 15]] * 2


def test_masks_of_another_size_leave_their_images_out(tmp_path):
    made = masked(tmp_path)
    put(tmp_path / "masks/img_0.png", Image.new("L", (WIDTH // 2, HEIGHT // 2), 1))
    assert "img_0.png is 'img_0.png': has 80 x 60 pixels" in refusal(tmp_path)
    found = read(tmp_path, max_drop=0.2)
    assert found.kinds["other size"] == 1
    del made["img_0.jpg"]
    assert_found(found, made)


def test_partners_that_are_missing(tmp_path):
    made = masked(tmp_path)
    (tmp_path / "masks/img_0.png").unlink()
    found = read(tmp_path)
    assert found.kinds["unlabelled"] == 1
    assert "img_0.jpg: has no mask" not in found.said
    assert "has no mask: it is taken to show no object" in found.said
    made["img_0.jpg"] = []
    assert_found(found, made)
    put(tmp_path / "masks/other.png", Image.fromarray(drawn([("circle", 5, 5, 30)])))
    assert "other.png': has no image of its name in images" in refusal(tmp_path)
    assert read(tmp_path, max_drop=0.2).kinds["orphan"] == 1


def test_empty_masks_are_no_missing_ones(tmp_path):
    made = masked(tmp_path)
    put(tmp_path / "masks/img_0.png", Image.new("L", (WIDTH, HEIGHT)))
    found = read(tmp_path)
    made["img_0.jpg"] = []
    assert_found(found, made)
    assert "unlabelled" not in found.kinds


def test_images_of_one_name_are_refused(tmp_path):
    masked(tmp_path)
    scenes(tmp_path, 1, ending="png", start=70)
    assert "has the name of img_0.jpg, and so its masks" in refusal(tmp_path)


def test_masks_outside_the_folder_are_not_read(tmp_path):
    masked(tmp_path / "set")
    outside = put(tmp_path / "secret.png", Image.fromarray(drawn([("circle", 0, 0, 9)])))
    (tmp_path / "set/masks/img_0.png").unlink()
    (tmp_path / "set/masks/img_0.png").symlink_to(outside)
    assert "leads out of the dataset" in refusal(tmp_path / "set")


def test_a_pipe_in_the_place_of_a_mask_does_not_hang(tmp_path):
    masked(tmp_path)
    (tmp_path / "masks/img_0.png").unlink()
    os.mkfifo(tmp_path / "masks/img_0.png")
    assert len(read(tmp_path, max_drop=0.2).train.images) == 5


def test_archives_that_unpack_twice_as_deep(tmp_path):
    made = masked(tmp_path, masks="masks/masks")
    assert_found(read(tmp_path), made)


def test_class_folders_with_a_class_for_each_of_many_pieces(tmp_path):
    """What a class's folder has in one mask is parted; numbers in it count its objects."""
    made = scenes(tmp_path)
    for image, things in made.items():
        put(tmp_path / "masks/thing" / image, Image.fromarray(drawn(things)))
    wanted = {n: [("thing", *t[1:]) for t in ts] for n, ts in made.items()}
    assert things_of(read(tmp_path).train) == sorted_things(wanted)


def test_photographs_are_no_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    masked(tmp_path, lambda _: noise)
    assert "holds colours" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.full((4, 4), -1, np.int32), "below 0"),
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.full((4, 4), 2.5, np.float32), "fractions"),
        (np.full((4, 4), 1e12, np.float32), "31 bits"),
    ],
)
def test_pixels_that_are_no_numbers(tmp_path, content, said):
    path = put(tmp_path / "m.tif", Image.fromarray(content))
    with pytest.raises(MaskError, match=said):
        read_mask(path)


def test_shares_of_one_are_cut_at_half(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        soft = Image.fromarray(drawn(things, BINARY)).filter(ImageFilter.GaussianBlur(1))
        return np.asarray(soft, dtype=np.float32) / 255

    made = masked(tmp_path, draw, name="{}.tif")
    assert_found(read(tmp_path), made)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pages_and_bombs_and_rubbish(tmp_path):
    pages = [Image.new("L", (4, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(MaskError, match="has 2 pages"):
        read_mask(tmp_path / "pages.tif")
    for side in (12_000, 40_000):
        with pytest.raises(MaskError, match="has more pixels than an image has"):
            read_mask(put(tmp_path / "bomb.png", png(side, side, 1, b"")))
    for content in (b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        with pytest.raises(MaskError, match="cannot be read"):
            read_mask(put(tmp_path / "rubbish.png", content))


def test_a_depth_map_is_no_mask(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        return np.arange(300 * 300).reshape(300, 300).astype(np.int32)

    masked(tmp_path, draw, name="{}.tif", count=1)
    put(tmp_path / "images/img_0.jpg", Image.new("RGB", (300, 300)))
    assert MAX_NUMBERS < 300 * 300
    assert "different numbers: this is no mask" in refusal(tmp_path)


def test_hidden_files_are_passed_over(tmp_path):
    made = masked(tmp_path)
    put(tmp_path / "masks/._img_0.png", b"resource fork of a Mac")
    put(tmp_path / "masks/Thumbs.db", b"x")
    assert_found(read(tmp_path), made)


def test_photographs_of_people_with_masks_are_no_mask_set(tmp_path):
    for index in range(4):
        image = Image.new("RGB", (40, 30), (index * 50, 9, 9))
        ImageDraw.Draw(image).ellipse((5, 5, 20, 20), "white")
        put(tmp_path / f"person_{index}.jpg", image)
        put(tmp_path / f"face_{index}_mask.jpg", image)
    assert "no dataset found" in refusal(tmp_path)


# anomalib 2.7.0 has some hazelnuts of MVTec AD, whose own masks are called 000_mask.png
@pytest.mark.parametrize("mask", ["{}.png", "{}_mask.png"])
def test_mvtec_ad(tmp_path, mask):
    """The same names in each folder; masks of defects alone; good images of both parts."""
    made = {}
    for index, name in enumerate(("crack", "hole")):
        found = scenes(tmp_path, 4, f"test/{name}", "jpg", 10 * index)
        for image, things in found.items():
            picture = Image.fromarray(drawn(things[:1], BINARY))
            put(tmp_path / "ground_truth" / name / mask.format(Path(image).stem), picture)
            made[f"test/{name}/{image}"] = [(name, *things[0][1:])]
    for sub, start in (("test/good", 30), ("train/good", 40)):
        made.update({f"{sub}/{n}": [] for n in scenes(tmp_path, 2, sub, "jpg", start)})
    found = read(tmp_path)
    assert {c.name for c in found.train.categories} == {"crack", "hole"}
    for image in found.train.images:
        wanted = made.pop(str(image.path.relative_to(tmp_path.resolve())))
        objects = found.train.annotations_by_image[image.id]
        names = {c.id: c.name for c in found.train.categories}
        boxes = [(names[a.category_id], *map(round, a.bbox_xywh)) for a in objects]
        assert boxes == [(*thing, thing[-1]) for thing in wanted]
    assert not made
    assert not found.kinds
    assert "MVTec AD's layout" in found.said
