"""The examples of the readers of labels: `python -m tests.fuzz.readers COUNT FOLDER`.

Each is a sound file of a format that is spoiled. Ends with an error at the first example at which
anything but a UserError comes out.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import resource
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from PIL import Image

from app.datasets.build import survey
from app.errors import UserError
from tests.datasets.conftest import noise
from tests.fuzz import strategies
from tests.fuzz.usable import assert_usable

MEMORY = 2**30  # bytes of address space that the examples may take beside the libraries
FOLDER = Path(sys.argv[2])
RLE = {"size": [30, 40], "counts": [600, 100, 500]}
SQUARE = [[5, 5], [20, 5], [20, 20], [5, 20]]
ran = Counter[str]()


def png(side: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side), 1).save(buffer, "PNG")
    return buffer.getvalue()


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- a sound document of each format, by the file that holds it

LABELME = {
    "version": "5.4.1",
    "imagePath": "a.png",
    "imageData": None,
    "imageWidth": 40,
    "imageHeight": 30,
    "shapes": [
        {"label": "dog", "points": SQUARE, "shape_type": "polygon", "group_id": 1},
        {"label": "dog", "points": SQUARE[::2], "shape_type": "rectangle", "group_id": 1},
        {"label": "cat", "points": SQUARE[:2], "shape_type": "circle", "group_id": None},
        {"label": "cat", "points": [*SQUARE, SQUARE[0]], "shape_type": "linestrip"},
        {
            **{"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "mask"},
            "mask": text64(png()),
        },
    ],
}
# 4,800 words of 8 bits, lengths of 13 bits; all of them 255
BRUSH = f"{4800:032b}{7:05b}" + f"{12:04b}" * 4 + f"100{4799:013b}{255:08b}" + "0" * 3
VALUES = [
    {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 10, "rectanglelabels": ["dog"]},
    {"points": [[5, 5], [80, 5], [80, 90]], "polygonlabels": ["cat"]},
    {"x": 50, "y": 50, "radiusX": 20, "radiusY": 30, "ellipselabels": ["cat"]},
    {
        "format": "rle",
        "rle": [int(BRUSH[at : at + 8], 2) for at in range(0, len(BRUSH), 8)],
        "brushlabels": ["dog"],
    },
    {"choices": ["x"]},
    {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 10, "choices": ["x"]},
]
SIDES = {"original_width": 40, "original_height": 30}
LABELSTUDIO = [
    {
        "data": {"image": name},
        "annotations": [
            {
                "updated_at": "2026-01-01",
                "result": [{"value": value, "to_name": "image", **SIDES} for value in VALUES],
            }
        ],
    }
    for name in ("a.png", "/data/upload/1/0a1b2c3d-b.png")
]
SUPERVISELY = {
    "size": {"width": 40, "height": 30},
    "tags": [{"name": "train"}],
    "objects": [
        {
            "classTitle": "dog",
            "geometryType": "polygon",
            "points": {"exterior": SQUARE, "interior": [[[9, 9], [12, 9], [12, 12]]]},
        },
        {"classTitle": "cat", "geometryType": "rectangle", "points": {"exterior": SQUARE[::2]}},
        {
            "classTitle": "cat",
            "geometryType": "line",
            "points": {"exterior": [*SQUARE, SQUARE[0]], "interior": []},
        },
        {
            "classTitle": "cat",
            "geometryType": "bitmap",
            "bitmap": {"data": text64(zlib.compress(png())), "origin": [3, 4]},
        },
    ],
}
SHAPES = [
    {"type": "bbox", "bbox": [1, 2, 10, 10]},
    {"type": "polygon", "points": [1, 2, 30, 2, 30, 20]},
    {"type": "mask", "rle": RLE},
    {"type": "ellipse", "points": [1, 2, 20, 20]},
    {"type": "polyline", "points": [1, 2, 20, 2, 20, 20, 1, 20, 1, 2]},
    {"type": "label"},
]
DATUMARO = {
    "categories": {"label": {"labels": [{"name": "dog"}, {"name": "cat"}]}},
    "items": [
        {
            "id": "a",
            "image": {"path": "a.png", "size": [30, 40]},
            "annotations": [
                {**shape, "label_id": index % 2, "group": index % 3}
                for index, shape in enumerate(SHAPES)
            ],
        }
    ],
}
CREATEML = [
    {
        "image": "a.png",
        "annotations": [
            {"label": "dog", "coordinates": {"x": 20, "y": 15, "width": 10, "height": 10}}
        ],
    }
]
LINES = [
    {"file_name": "a.png", "objects": {"bbox": [[1, 2, 10, 10], [3, 3, 9, 9]], "label": [0, "x"]}},
    {"file_name": "b.png", "objects": [{"bbox": [1, 2, 10, 10], "category": "dog"}]},
]
DOCUMENTS: dict[str, tuple[str, Any]] = {
    "labelme": ("a.json", LABELME),
    "labelstudio": ("export.json", LABELSTUDIO),
    "supervisely": ("ann/a.png.json", SUPERVISELY),
    "datumaro": ("annotations/default.json", DATUMARO),
    "createml": ("a.json", CREATEML),
    "imagefolder": ("metadata.jsonl", LINES),
}
VOC = (
    "<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size>"
    "<object><name>dog</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>20</ymax>"
    "</bndbox></object><object><name>cat</name><polygon><pt><x>1</x><y>2</y></pt><pt><x>20</x>"
    "<y>2</y></pt><pt><x>20</x><y>20</y></pt></polygon></object></annotation>"
)
CVAT = (
    '<annotations><image name="a.png" width="40" height="30" subset="train">'
    '<box label="dog" xtl="1" ytl="2" xbr="20" ybr="20" rotation="30" group_id="1"/>'
    '<polygon label="dog" points="1,2;20,2;20,20" group_id="1"/>'
    '<ellipse label="cat" cx="20" cy="15" rx="9" ry="5" rotation="9"/><tag label="x"/>'
    '<polyline label="cat" points="1,2;20,2;20,20;1,20;1,2"/>'
    '<mask label="cat" rle="1,2,2,4" left="6" top="7" width="3" height="3"/></image></annotations>'
)
TEXTS = {
    "voc": ("annotations/a.xml", VOC),
    "cvat": ("annotations.xml", CVAT),
    "kitti": ("label_2/a.txt", "Car 0.00 0 -1.58 5.0 5.0 20.0 20.0 1 1 3 -0 1 46 -1\n" * 2),
    "csv": (
        "train_labels.csv",
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,40,30,dog,1,2,20,20\n"
        "b.png,40,30,cat,.1,.2,.7,.8\n",
    ),
    "yolo": ("a.txt", "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.9 0.1 0.9 0.9\n"),
    "labelme": ("a.json", json.dumps(LABELME)),
    "labelstudio": ("export.json", json.dumps(LABELSTUDIO)),
    "imagefolder": ("metadata.jsonl", "".join(json.dumps(line) + "\n" for line in LINES)),
}


def check(key: str, name: str, content: str) -> None:
    """What is kept can be used, whatever is left out; every fault can be said."""
    ran[key] += 1
    (FOLDER / key / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    for format in (key, "auto"):
        try:
            surveyed = survey(FOLDER / key, format)
        except UserError:
            continue
        for dataset in surveyed.splits.values():
            assert_usable(dataset)
        assert all(str(fault) for fault in surveyed.faults)


def written(document: Any, name: str) -> str:
    lines = document if name.endswith(".jsonl") and isinstance(document, list) else [document]
    return "\n".join(map(json.dumps, lines))


def checked(key: str, name: str) -> Callable[[Any], None]:
    """Return the check of a reader with a spoiled document or text."""

    def run(value: Any) -> None:
        check(key, name, value if isinstance(value, str) else written(value, name))

    return run


def main() -> None:
    count = int(sys.argv[1])
    logging.disable()
    for key, (name, sound) in {**TEXTS, **DOCUMENTS}.items():
        (FOLDER / key / name).parent.mkdir(parents=True, exist_ok=True)
        images = FOLDER / key / {"kitti": "image_2", "supervisely": "img"}.get(key, ".")
        images.mkdir(exist_ok=True)
        for image in ("a.png", "b.png"):
            noise(image).save(images / image)
        (FOLDER / key / name).write_text(sound if isinstance(sound, str) else written(sound, name))
        if key == "yolo":
            (FOLDER / key / "classes.txt").write_text("dog\ncat\n")
        surveyed = survey(FOLDER / key)
        surveyed.require_sound(0)
        assert len(surveyed.splits["train"].annotations) > 0, key
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    checks = [(checked(k, n), strategies.spoiled(value)) for k, (n, value) in DOCUMENTS.items()]
    checks += [(checked(k, n), strategies.spoiled_text(text)) for k, (n, text) in TEXTS.items()]
    for run, strategy in checks:
        limits = settings(
            max_examples=-(-count // len(checks)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        limits(given(strategy)(run))()
    print(json.dumps(ran))


if __name__ == "__main__":
    main()
