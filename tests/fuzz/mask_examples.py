"""The examples of `test_mask_fuzz`: `python -m tests.fuzz.mask_examples COUNT FOLDER`.

Ends with an error at the first example at which anything but a UserError comes out.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from app.config.reading import ReadingConfig
from app.datasets.build import survey
from app.errors import UserError
from tests.fuzz.strategies import spoiled

WIDTH, HEIGHT = 16, 12
MEMORY = 2**30  # bytes of address space that the examples may take beside the libraries
FOLDER = Path(sys.argv[2])
NAMES = ("a", "b", "c")
ran = Counter[str]()

TYPES = (np.uint8, np.uint16, np.int32, np.float32, bool)
values = st.sampled_from([0, 1, 2, 3, 7, 64, 127, 128, 200, 254, 255, 256, 65535, 2**31 - 1, -1])
rest = st.sampled_from([0.0, 0.5, 1.0, float("nan"), float("inf"), -1e20, 1e20])
endings = st.sampled_from(["png", "bmp", "tif", "gif", "jpg"])
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "circle\nrectangle\n",
            "background\ncircle\n",
            "1 circle\n2 rectangle\n",
            "name,r,g,b\ncircle,1,2,3\n",
            "circle:1,2,3::\n",
            '{"1": "circle"}',
            '["a", 3]',
            "1 2 3 circle\n",
        ]
    ),
)
lists = st.sampled_from(
    [
        *("classes.txt", "labelmap.txt", "class_dict.csv", "classes.json"),
        "ImageSets/Segmentation/val.txt",
    ]
)
decisions = st.builds(
    ReadingConfig,
    void=st.sampled_from([None, None, None, 0, 3, 255]),
    masks=st.sampled_from(["auto", "objects", "classes"]),
)


@st.composite
def pictures(draw: st.DrawFn) -> bytes | tuple[str, Image.Image]:
    """A file of a mask: of any type, size and values; or bytes that are none."""
    if draw(st.integers(0, 7)) == 0:
        return draw(st.binary(max_size=60))
    size = draw(st.sampled_from([(HEIGHT, WIDTH)] * 8 + [(WIDTH, HEIGHT), (1, 1)]))
    kind = draw(st.sampled_from([*TYPES, "rgb", "palette"]))
    chosen = draw(st.lists(rest if kind is np.float32 else values, min_size=1, max_size=5))
    chance = np.random.default_rng(draw(st.integers(0, 99)))
    blocks = chance.integers(0, len(chosen), (3, 4)).repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
    with np.errstate(invalid="ignore"):
        pixels = np.array(chosen)[blocks].astype(TYPES[0] if kind in ("rgb", "palette") else kind)
    if pixels.shape != size:
        pixels = np.resize(pixels, size)
    if kind == "rgb":
        pixels = np.stack([pixels, pixels // 2, chance.permutation(pixels)], axis=2)
        return "png", Image.fromarray(pixels)
    if kind == "palette":
        picture = Image.fromarray(pixels, "P")
        picture.putpalette(chance.integers(0, 256, draw(st.integers(1, 256)) * 3).tolist())
        return draw(st.sampled_from(["png", "gif", "bmp"])), picture
    ending = "png" if kind is np.uint16 else "tif"
    if kind in (np.uint8, bool):
        ending = draw(endings)
    return ending, Image.fromarray(pixels)


masks = st.lists(pictures(), min_size=1, max_size=4)


def reset(images: str) -> None:
    shutil.rmtree(FOLDER / "set", ignore_errors=True)
    for index, name in enumerate(NAMES):
        path = FOLDER / "set" / images.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (index, 9, 9)).save(path)


def save(name: str, content: bytes | tuple[str, Image.Image]) -> None:
    """Write a mask under a name without an ending."""
    ending, picture = ("png", content) if isinstance(content, bytes) else content
    path = FOLDER / "set" / f"{name}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    else:
        picture.save(path)


def write(name: str, content: Any) -> None:
    path = FOLDER / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def check(format: str, reading: ReadingConfig) -> None:
    """What is kept can be used; every fault can be said."""
    ran[format] += 1
    try:
        found = survey(FOLDER / "set", format, reading)
    except UserError:
        return
    assert all(str(fault) for fault in found.faults)
    for dataset in found.splits.values():
        json.dumps(dataset.to_json(), allow_nan=False)
        for annotation in dataset.annotations:
            x, y, w, h = annotation.bbox_xywh
            assert min(w, h) > 0
            assert 0 <= x <= x + w <= WIDTH
            assert 0 <= y <= y + h <= HEIGHT
            assert annotation.segmentation is not None
            mask = coco_mask.decode(annotation.segmentation)
            assert mask.shape == (HEIGHT, WIDTH)
            assert mask.sum() == annotation.area > 0


def check_folders(
    made: list[Any], place: str, list_name: str, text: str, reading: ReadingConfig
) -> None:
    reset("images/{}.png")
    for index, mask in enumerate(made):
        save(place.format((*NAMES, "d")[index]), mask)
    write(list_name, text)
    check("masks", reading)


def check_voc(
    classes: list[Any], objects: list[Any], list_name: str, text: str, reading: ReadingConfig
) -> None:
    reset("JPEGImages/{}.png")
    for folder, made in (("Class", classes), ("Object", objects)):
        for index, mask in enumerate(made):
            save(f"Segmentation{folder}/{(*NAMES, 'd')[index]}", mask)
    write(list_name, text)
    check("voc-masks", reading)


def panoptic_document() -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(NAMES)],
        "annotations": [
            {
                "image_id": i,
                "file_name": f"{name}.png",
                "segments_info": [
                    {"id": id, "category_id": id, "iscrowd": 0} for id in (1, 257, 2**24 - 1)
                ],
            }
            for i, name in enumerate(NAMES)
        ],
        "categories": [{"id": id, "name": str(id), "isthing": id % 2} for id in (1, 257)],
    }


def check_panoptic(document: Any, made: list[Any]) -> None:
    reset("images/{}.jpg")
    for index, mask in enumerate(made):
        save(f"panoptic_train/{(*NAMES, 'd')[index]}", mask)
    write("panoptic_train.json", document)
    check("panoptic", ReadingConfig())


def city_document() -> dict[str, Any]:
    square = [[1, 1], [9, 1], [9, 9], [1, 9]]
    labels = ("car", "road", "persongroup")
    objects = [{"label": label, "polygon": [list(point) for point in square]} for label in labels]
    return {"imgWidth": WIDTH, "imgHeight": HEIGHT, "objects": objects}


def check_cityscapes(document: Any, made: list[Any]) -> None:
    reset("leftImg8bit/train/x/{}_leftImg8bit.png")
    write("gtFine/train/x/a_gtFine_polygons.json", document)
    for index, mask in enumerate(made[:2]):
        if isinstance(mask, bytes) or mask[0] == "png":
            save(f"gtFine/train/x/{NAMES[index + 1]}_gtFine_instanceIds", mask)
    check("cityscapes", ReadingConfig())


def main() -> None:
    count = int(sys.argv[1])
    logging.disable()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    places = st.sampled_from(["masks/{}", "masks/cat/{}", "masks/{}_mask", "masks/train/{}"])
    shares: list[tuple[Any, tuple[st.SearchStrategy[Any], ...], float]] = [
        (check_folders, (masks, places, lists, texts, decisions), 0.4),
        (check_voc, (masks, masks, lists, texts, decisions), 0.2),
        (check_panoptic, (spoiled(panoptic_document()), masks), 0.2),
        (check_cityscapes, (spoiled(city_document()), masks), 0.2),
    ]
    for checked, strategies, share in shares:
        limits = settings(
            max_examples=round(count * share),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        limits(given(*strategies)(checked))()
    print(json.dumps(ran))


if __name__ == "__main__":
    main()
