"""Faulty parts are left out up to `max_drop` in every format, and each advice works (FAULTS 11)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from app.datasets.formats.via import CSV_HEADER
from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    Thing,
    coco,
    put,
    read,
    refusal,
    scenes,
    square,
    yolo,
)

COUNT = 30  # images, and so twice as many objects


def in_coco(folder: Path, bad: int) -> None:
    document = coco(scenes(folder, COUNT))
    for annotation in document["annotations"][:bad]:
        annotation["bbox"] = [0, 0, 0, 5]
    put(folder / "annotations.json", document)


def in_yolo(folder: Path, bad: int) -> None:
    for index, (name, things) in enumerate(scenes(folder, COUNT).items()):
        line = "0 0.5 0.5 1.3 0.2\n" if index < bad else yolo(things[:1])
        put(folder / "labels" / f"{Path(name).stem}.txt", line + yolo(things[1:]))
    put(folder / "data.yaml", "train: images\nnames: [circle, rectangle]\n")


def in_voc(folder: Path, bad: int) -> None:
    for index, (name, things) in enumerate(scenes(folder, COUNT, "JPEGImages").items()):
        objects = "".join(voc_object(thing) for thing in things)
        if index < bad:
            objects = objects.replace("<xmin>", "<xmin>x", 1)
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        content = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        put(folder / "Annotations" / f"{Path(name).stem}.xml", content)


def voc_object(thing: Thing) -> str:
    name, x, y, side = thing
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + side, "ymax": y + side}
    box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def in_labelme(folder: Path, bad: int) -> None:
    for index, (name, things) in enumerate(scenes(folder, COUNT, ".").items()):
        shapes = [
            {"label": label, "points": pairs(square(x, y, side)), "shape_type": "polygon"}
            for label, x, y, side in things
        ]
        if index < bad:
            shapes[0] = {"label": "circle", "points": [[1, 1]], "shape_type": "point"}
        put(folder / f"{Path(name).stem}.json", {"imagePath": name, "shapes": shapes})


def pairs(flat: list[int]) -> list[list[int]]:
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def in_via(folder: Path, bad: int) -> None:
    entries = {}
    for index, (name, things) in enumerate(scenes(folder, COUNT).items()):
        regions = [
            {
                "shape_attributes": {"name": "rect", "x": x, "y": y, "width": s, "height": s},
                "region_attributes": {"kind": label},
            }
            for label, x, y, s in things
        ]
        if index < bad:
            regions[0]["shape_attributes"] = {"name": "point", "cx": 1, "cy": 1}
        entries[name] = {"filename": name, "regions": regions}
    put(folder / "via_region_data.json", entries)


FORMATS = [in_coco, in_yolo, in_voc, in_labelme, in_via]


@pytest.mark.parametrize("write", FORMATS)
def test_one_in_sixty_is_refused_with_an_advice_that_works(tmp_path, write: Callable):
    write(tmp_path, 1)
    said = refusal(tmp_path)
    advised = re.search(r"--max-drop (\d\.\d+) \(\./train.sh: dataset.max_drop=(\d\.\d+)\)", said)
    assert advised is not None, said
    assert advised[1] == advised[2]
    assert len(read(tmp_path, max_drop=float(advised[1])).train.annotations) == 2 * COUNT - 1


@pytest.mark.parametrize("write", FORMATS)
def test_where_nothing_would_remain_nothing_is_advised(tmp_path, write: Callable):
    write(tmp_path, COUNT)
    said = refusal(tmp_path, max_drop=0.4)
    assert "30 of 60 annotations would be left out (50 %)" in said
    advised = re.search(r"--max-drop (\d\.\d+)", said)
    assert advised is not None
    assert read(tmp_path, max_drop=float(advised[1])).train.annotations


def test_a_set_that_is_faulty_throughout_has_no_advice_to_drop_it(tmp_path):
    in_coco(tmp_path, 60)
    said = refusal(tmp_path, max_drop=1.0)
    assert "nothing would remain" in said
    assert "--max-drop" not in said


def test_an_image_whose_labels_cannot_be_read_is_left_out_and_teaches_nothing(tmp_path):
    in_yolo(tmp_path, 0)
    (tmp_path / "labels/img_3.txt").write_bytes(b"\xff\xfe0 0.5")
    found = read(tmp_path, max_drop=0.1)
    assert len(found.train.images) == COUNT - 1
    assert "img_3.png" not in {image.path.name for image in found.train.images}


def test_a_csv_with_a_bad_row(tmp_path):
    rows = [",".join(CSV_HEADER)]
    for name, things in scenes(tmp_path, COUNT).items():
        for label, x, y, s in things:
            shape = f'{{""name"":""rect"",""x"":{x},""y"":{y},""width"":{s},""height"":{s}}}'
            rows.append(f'{name},1,"{{}}",2,0,"{shape}","{{""kind"":""{label}""}}"')
    rows[5] = rows[5].replace("rect", "arrow")
    put(tmp_path / "labels.csv", "\n".join(rows))
    assert "arrow" in refusal(tmp_path)
    assert len(read(tmp_path, max_drop=0.05).train.annotations) == 59
