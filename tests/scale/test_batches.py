"""Columns in, columns out: as the predictor finds, and as Ray Data asks for it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.synthetic.films import draw_film
from app.errors import UserError
from app.inference.predictor import Predictor
from app.scale.batches import COLUMNS, FindObjects
from app.scale.parts import row_of
from tests.helpers import REPOSITORY

NANO = str(REPOSITORY / "app" / "assets" / "nano")
PROMPTS = ("circle", "cross")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    film = draw_film((0, 5), width=192, height=144)
    return [Image.fromarray(film.frame(number / 5)[0]) for number in range(3)]


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["image", "bytes"])
def test_what_it_finds_is_the_predictors(kind: str, images: list[Image.Image]) -> None:
    find = FindObjects(NANO, PROMPTS, device="cpu", threshold=0.002)
    given = [np.asarray(i) for i in images] if kind == "image" else [encoded(i) for i in images]
    names = ["a.png", "b.png", "c.png"]
    out = find(
        {kind: np.array(given) if kind == "image" else given, "path": names, "id": [1, 2, 3]}
    )
    assert set(out) == {"path", "id", *COLUMNS}
    predictor = Predictor.load(NANO, device="cpu")
    expected = predictor.predict_batch(images, PROMPTS, threshold=0.002)
    assert sum(map(len, expected)) > 0
    for number, found in enumerate(expected):
        row = row_of(names[number], found)
        assert {key: out[key][number] for key in COLUMNS} == {key: row[key] for key in COLUMNS}


def test_an_image_that_cannot_be_read_costs_itself(images: list[Image.Image]) -> None:
    find = FindObjects(NANO, PROMPTS, device="cpu", threshold=0.002)
    out = find({"bytes": [b"no image", encoded(images[0])]})
    assert out["width"].tolist() == [None, 192]
    assert out["problem"][0]
    assert out["problem"][1] is None
    with pytest.raises(UserError, match="it needs image or bytes"):
        find({"pixels": []})


@pytest.mark.system
def test_ray_data_maps_batches_by_it(
    images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason="ray is no dependency: pip install 'ray[data]'")
    import ray

    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = ray.data.read_binary_files(str(tmp_path), include_paths=True).map_batches(
            FindObjects,
            fn_constructor_kwargs={"checkpoint": NANO, "prompts": PROMPTS, "threshold": 0.002},
            batch_size=2,
            concurrency=1,
        )
        rows = sorted(found.take_all(), key=lambda row: row["path"])
    finally:
        ray.shutdown()
    expected = Predictor.load(NANO).predict_batch(images, PROMPTS, threshold=0.002)
    assert [len(row["score"]) for row in rows] == [len(each) for each in expected]
    assert all(row["problem"] is None for row in rows)
