"""Lines that are drawn around objects: outlines where their ends meet, else counted and left out.

yichun-hub/VIA-format-to-YOLOv7-seg, via_region_data.json: every manhole and handhole is a polyline
that ends where it began, or a pixel beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import test_cvat, test_datumaro, test_labelme, test_supervisely
from tests.corpus.making import CLASSES, Thing, mask_iou, put, read, refusal, scenes

Line = list[tuple[float, float]]


def around(thing: Thing, gap: float) -> Line:
    _, x, y, side = thing
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side), (x, y + gap)]


def via(folder: Path, made: dict[str, list[Thing]], gap: float) -> None:
    document = {}
    for name, things in made.items():
        regions = []
        for thing in things:
            xs, ys = zip(*around(thing, gap), strict=True)
            shape = {"name": "polyline", "all_points_x": [*xs], "all_points_y": [*ys]}
            regions.append({"shape_attributes": shape, "region_attributes": {"name": thing[0]}})
        document[f"{name}9"] = {"filename": name, "size": 9, "regions": regions}
    put(folder / "via_region_data.json", document)


def cvat(folder: Path, made: dict[str, list[Thing]], gap: float) -> None:
    entries = []
    for name, things in made.items():
        shapes = ""
        for thing in things:
            points = ";".join(f"{x},{y}" for x, y in around(thing, gap))
            shapes += f'<polyline label="{thing[0]}" points="{points}"/>'
        entries.append(test_cvat.entry(name, shapes))
    put(folder / "annotations.xml", test_cvat.xml(*entries))


def datumaro(folder: Path, made: dict[str, list[Thing]], gap: float) -> None:
    def line(thing: Thing) -> dict:
        flat = [side for point in around(thing, gap) for side in point]
        return test_datumaro.shape(thing, "polyline", points=flat)

    items = [test_datumaro.item(name, [line(t) for t in things]) for name, things in made.items()]
    put(folder / "annotations/default.json", test_datumaro.document(items))


def labelme(folder: Path, made: dict[str, list[Thing]], gap: float) -> None:
    for name, things in made.items():
        lines = [
            {**test_labelme.shape(thing, "linestrip"), "points": [*map(list, around(thing, gap))]}
            for thing in things
        ]
        document = test_labelme.document(f"images/{name}", lines)
        put(folder / f"{name}.json", document)


def supervisely(folder: Path, made: dict[str, list[Thing]], gap: float) -> None:
    for name, things in made.items():
        (folder / "ds1/img").mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).rename(folder / "ds1/img" / name)
        lines = []
        for thing in things:
            points = {"exterior": [*map(list, around(thing, gap))], "interior": []}
            lines.append(test_supervisely.entry(thing, "line", points=points))
        put(folder / "ds1/ann" / f"{name}.json", test_supervisely.document(lines))
    classes = [{"title": name, "shape": "line"} for name in CLASSES]
    put(folder / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})


@pytest.mark.parametrize("write", [via, cvat, datumaro, labelme, supervisely])
def test_lines(tmp_path, write):
    for gap in (0, 1):
        made = scenes(tmp_path / str(gap))
        write(tmp_path / str(gap), made, gap)
        found = read(tmp_path / str(gap))
        assert mask_iou(found.train, made) > 0.99
        assert len(found.train.annotations) == 12
    made = scenes(tmp_path / "open")
    write(tmp_path / "open", made, 20)
    assert "12 of 12 annotations would be left out" in refusal(tmp_path / "open")
