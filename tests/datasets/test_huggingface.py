from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image
from pycocotools import mask as coco_mask

from app.config.reading import ReadingConfig
from app.config.schema import HuggingFaceConfig
from app.datasets.build import Splits, load_splits
from app.datasets.coco import Annotation
from app.datasets.coco import Dataset as Coco
from app.datasets.huggingface import fetch
from app.errors import UserError

WIDTH, HEIGHT = 40, 30
IMAGE = ImageFeature()
NUMBERS = List(Value("float32"))
PETS = ClassLabel(names=["cat", "dog"])
CAT = (10, 5, 20, 15)  # columns 10..19, rows 5..14
DOG = (25, 18, 40, 30)
COUNTS = [305, 10, 20, 10, 855]  # columns 10 and 11, rows 5..14


def encoded(pixels: np.ndarray | None = None, format: str = "PNG", **options: Any) -> dict:
    """An image as Parquet holds it; a plain photograph where no pixels are given."""
    if pixels is None:
        pixels = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def area(x1: int, y1: int, x2: int, y2: int, value: int = 1) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y1:y2, x1:x2] = value
    return mask


def outline(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def xywh(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, x2 - x1, y2 - y1]


def repository(folder: Path, rows: dict[str, list], features: dict | None = None) -> Path:
    """A set with the same rows to train and to validate on, as `push_to_hub` lays it out."""
    for split in ("train", "validation"):
        parquet(folder / f"data/{split}-00000-of-00001.parquet", rows, features)
    return folder


def parquet(path: Path, rows: dict[str, list], features: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, Features(features) if features else None).to_parquet(path)


def config(folder: Path | str, **choices: Any) -> HuggingFaceConfig:
    empty = {"config": None, "split": None, "columns": None, "streaming": "auto"}
    return HuggingFaceConfig(name=str(folder), **(empty | choices))


def read(folder: Path, columns: str | None = None, **choices: Any) -> Splits:
    data = folder.parent / "fetched"
    return load_splits(fetch(config(folder, columns=columns, **choices), data))


def problems(folder: Path, columns: str | None = None, **choices: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, columns, **choices)
    assert not [*(folder.parent / "fetched").glob("huggingface/[!.]*")], "left half a dataset"
    return "\n".join(caught.value.problems)


def pixels(annotation: Annotation) -> np.ndarray:
    return coco_mask.decode(annotation.segmentation)


def labels(dataset: Coco) -> list[list[tuple[str, tuple[float, ...]]]]:
    """Name and box of each object of each image."""
    names = {category.id: category.name for category in dataset.categories}
    return [
        [(names[o.category_id], tuple(round(n, 3) for n in o.bbox_xywh)) for o in objects]
        for objects in dataset.annotations_by_image.values()
    ]


BOTH = [("cat", (10, 5, 10, 10)), ("dog", (25, 18, 15, 12))]


@pytest.fixture
def told(caplog, monkeypatch):
    """What the run prints."""
    monkeypatch.setattr(logging.getLogger("app"), "propagate", True)  # the command line stops it
    caplog.set_level("INFO", "app")
    return caplog


# --- objects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_struct_of_lists_with_polygons_of_several_parts(tmp_path, streaming):
    fields = {"bbox": NUMBERS, "category": PETS, "segmentation": List(NUMBERS)}
    objects = {
        "bbox": [xywh(10, 5, 40, 30), xywh(*CAT)],
        "category": [1, 0],
        "segmentation": [[outline(*CAT), outline(*DOG)], [outline(*CAT)]],
    }
    none = {name: [] for name in fields}
    repository(
        tmp_path / "set",
        {"image": [encoded(), encoded()], "objects": [objects, none]},
        {"image": IMAGE, "objects": Sequence(fields)},
    )
    splits = read(tmp_path / "set", streaming=streaming)
    assert splits.train.class_names == ["cat", "dog"]
    assert labels(splits.train) == [[("dog", (10, 5, 30, 25)), ("cat", (10, 5, 10, 10))], []]
    assert np.array_equal(pixels(splits.train.annotations[0]), area(*CAT) | area(*DOG))
    assert len(splits.valid.images) == 2
    assert splits.test is None


SHAPES = {
    "flat": (NUMBERS, outline(*CAT)),
    "parts": (List(NUMBERS), [outline(*CAT)]),
    "pairs": (List(NUMBERS), np.reshape(outline(*CAT), (-1, 2)).tolist()),
    "parts of pairs": (List(List(NUMBERS)), [np.reshape(outline(*CAT), (-1, 2)).tolist()]),
    "x and y": ({"x": NUMBERS, "y": NUMBERS}, {"x": [10, 20, 20, 10], "y": [5, 5, 15, 15]}),
    "JSON text": (Value("string"), json.dumps([outline(*CAT)])),
    "a speck beside it": (List(NUMBERS), [outline(*CAT), [1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]),
    "pixels": (List(List(Value("uint8"))), area(*CAT).tolist()),
    "image": (IMAGE, encoded(area(*CAT, 255))),
    "shares": (NUMBERS, [0.25, 5 / 30, 0.5, 5 / 30, 0.5, 0.5, 0.25, 0.5]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_every_kind_in_a_list_of_structs(tmp_path, name):
    kind, shape = SHAPES[name]
    repository(
        tmp_path / "set",
        {"photo": [encoded()], "items": [[{"label": "cat", "mask": shape}]]},
        {"photo": IMAGE, "items": List({"label": Value("string"), "mask": kind})},
    )
    (annotation,) = read(tmp_path / "set").train.annotations
    assert np.array_equal(pixels(annotation), area(*CAT))
    assert annotation.area == 100


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        (COUNTS, List(Value("int64"))),
        (coco_mask.encode(np.asfortranarray(area(10, 5, 12, 15)))["counts"].decode(), None),
        (coco_mask.encode(np.asfortranarray(area(10, 5, 12, 15)))["counts"], Value("binary")),
    ],
)
def test_run_lengths(tmp_path, counts, kind):
    rle = {"size": [HEIGHT, WIDTH], "counts": counts}
    kinds = {"size": List(Value("int64")), "counts": kind or Value("string")}
    repository(
        tmp_path / "set",
        {
            "image": [encoded()],
            "objects": [
                [
                    {"label": label, "segmentation": rle, "iscrowd": crowd}
                    for crowd, label in enumerate(("cat", "dog"))
                ]
            ],
        },
        {
            "image": IMAGE,
            "objects": List(
                {"label": Value("string"), "segmentation": kinds, "iscrowd": Value("int8")}
            ),
        },
    )
    annotations = read(tmp_path / "set").train.annotations
    assert all(np.array_equal(pixels(one), area(10, 5, 12, 15)) for one in annotations)
    assert [one.iscrowd for one in annotations] == [False, True]


def test_lists_of_the_row_itself(tmp_path):
    masks = [encoded(area(*box, 255)) for box in (CAT, DOG)]
    repository(
        tmp_path / "set",
        {"image": [encoded()], "masks": [masks], "labels": [[0, 1]]},
        {"image": IMAGE, "masks": List(IMAGE), "labels": List(PETS)},
    )
    splits = read(tmp_path / "set")
    assert labels(splits.train) == [BOTH]
    assert np.array_equal(pixels(splits.train.annotations[1]), area(*DOG))


def test_categories_are_those_of_all_splits(tmp_path):
    kinds = {"image": IMAGE, "objects": List({"bbox": NUMBERS, "name": Value("string")})}
    for split, name in (("train", "dog"), ("val", "cat"), ("test", "ant"), ("extra", "bee")):
        objects = [{"bbox": xywh(*box), "name": name} for box in (CAT, DOG)]
        rows = {"image": [encoded()], "objects": [objects]}
        parquet(tmp_path / f"set/data/{split}-00000-of-00001.parquet", rows, kinds)
    card = {"config_name": "default", "data_files": []}
    card["data_files"] = [
        {"split": split, "path": f"data/{split}-*"} for split in ("train", "val", "test", "extra")
    ]
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: {json.dumps([card])}\n---\n")
    splits = read(tmp_path / "set")
    assert splits.train.class_names == ["ant", "cat", "dog"]
    assert splits.test is not None
    assert [name for name, _ in labels(splits.test)[0]] == ["ant", "ant"]
    assert {name for name, _ in labels(read(tmp_path / "set", split="extra").train)[0]} == {"bee"}
    with pytest.raises(UserError, match=r"no split 'tset'; .* Did you mean 'test'"):
        read(tmp_path / "set", split="tset")


# --- boxes ----------------------------------------------------------------------------------------


def many_boxes(convention: str, count: int = 40) -> list[list[float]]:
    """Boxes all over the image, in `convention`; the first is CAT."""
    random = np.random.default_rng(0)
    first = random.uniform(0, 0.6, (count, 2))
    corners = np.hstack([first, first + random.uniform(0.1, 0.4, (count, 2))])
    corners[0] = [10 / 40, 5 / 30, 20 / 40, 15 / 30]
    x1, y1, x2, y2 = corners.T
    columns = {
        "xyxy": (x1, y1, x2, y2),
        "xywh": (x1, y1, x2 - x1, y2 - y1),
        "cxcywh": ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
    }[convention.removesuffix("n")]
    scale = 1 if convention.endswith("n") else np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return (np.stack(columns, axis=1) * scale).tolist()


def boxes_set(folder: Path, boxes: list, field: str = "bbox") -> Path:
    rows = {"image": [encoded()], "objects": [[{field: box, "category": 0} for box in boxes]]}
    return repository(
        folder, rows, {"image": IMAGE, "objects": List({field: NUMBERS, "category": PETS})}
    )


@pytest.mark.parametrize("convention", ["xywh", "xyxy", "xywhn", "xyxyn", "cxcywhn"])
def test_conventions_are_told_from_the_boxes(tmp_path, told, convention):
    splits = read(boxes_set(tmp_path / "set", many_boxes(convention)))
    within = "100%" if convention.endswith("n") else "0%"
    truth = np.array(many_boxes("xywh"))
    found = np.array([annotation.bbox_xywh for annotation in splits.train.annotations])
    assert np.allclose(found, truth, atol=1e-4)
    assert f"boxes are read as {convention}: of 80 boxes {within} are within 0..1" in told.text
    assert f"100% fit {convention}" in told.text


def test_boxes_that_fit_two_conventions_are_not_guessed(tmp_path):
    boxes = [[5, 5, 10, 10], [2, 3, 12, 14]]
    said = problems(boxes_set(tmp_path / "set", boxes))
    assert "cannot tell what the four numbers of 'bbox' are: of 4 boxes 0% are within 0..1" in said
    assert "--columns boxes=xywh" in said
    by_hand = read(tmp_path / "set", "boxes=xyxy")
    assert labels(by_hand.train)[0] == [("cat", (5, 5, 5, 5)), ("cat", (2, 3, 10, 11))]
    by_hand = read(tmp_path / "set", "boxes=cxcywh")
    assert labels(by_hand.train)[0] == [("cat", (0, 0, 10, 10)), ("cat", (0, 0, 8, 10))]
    by_name = read(boxes_set(tmp_path / "other", boxes, "bbox_xywh"))
    assert labels(by_name.train)[0] == [("cat", (5, 5, 10, 10)), ("cat", (2, 3, 12, 14))]


# --- maps -----------------------------------------------------------------------------------------


def maps_set(folder: Path, name: str, pixels: np.ndarray, format: str = "PNG") -> Path:
    rows = {"image": [encoded()], name: [encoded(pixels, format)]}
    return repository(folder, rows, {"image": IMAGE, name: IMAGE})


def test_mask_of_one_class_by_connected_parts(tmp_path):
    cat = area(*CAT, 255) | area(20, 15, 22, 17, 255)  # they touch at a corner
    folder = maps_set(tmp_path / "set", "mask", cat | area(*DOG, 255))
    assert "nothing names the class of its objects" in problems(folder)
    splits = read(folder, "name=crack")
    assert labels(splits.train) == [[("crack", (10, 5, 12, 12)), ("crack", BOTH[1][1])]]
    assert np.array_equal(pixels(splits.train.annotations[0]), cat > 0)


def test_lossy_mask_has_no_ghosts(tmp_path):
    both = area(*CAT, 255) | area(*DOG, 255)
    folder = maps_set(tmp_path / "set", "label", np.stack([both] * 3, 2), "JPEG")
    one, two = read(folder, "name=crack").train.annotations
    assert (pixels(one) != area(*CAT)).sum() <= 4
    assert (pixels(two) != area(*DOG)).sum() <= 4


def test_instance_map(tmp_path):
    numbers = area(*CAT) + area(*DOG, 2) + area(0, 0, 3, 3, 2)
    splits = read(maps_set(tmp_path / "set", "instance_map", numbers), "name=pet")
    assert labels(splits.train) == [[("pet", (10, 5, 10, 10)), ("pet", (0, 0, 40, 30))]]
    assert np.array_equal(pixels(splits.train.annotations[1]), area(*DOG) | area(0, 0, 3, 3))


@pytest.mark.parametrize("palette", [False, True])
def test_semantic_map_by_connected_parts(tmp_path, palette):
    numbers = area(*CAT, 3) + area(*DOG, 7) + area(0, 0, 3, 3, 3) + area(0, 20, 5, 25, 255)
    folder = maps_set(tmp_path / "set", "label", numbers)
    if palette:
        picture = Image.fromarray(numbers)
        picture.putpalette([value for n in range(256) for value in (n, 255 - n, 7)])
        file = io.BytesIO()
        picture.save(file, "PNG")
        rows = {"image": [encoded()], "label": [{"bytes": file.getvalue(), "path": None}]}
        repository(folder, rows, {"image": IMAGE, "label": IMAGE})
    assert "cannot tell what 'label' holds: 0, 3, 7, 255" in problems(folder)
    assert "3: is a number that nothing names" in problems(folder, "semantic=label,names=7:dog")
    (folder / "id2label.json").write_text('{"0": "background", "3": "cat", "7": "dog"}')
    splits = read(folder)
    assert splits.train.class_names == ["cat", "dog"]
    assert labels(splits.train) == [[("cat", (0, 0, 3, 3)), *BOTH]]
    folder.joinpath("id2label.json").unlink()
    assert labels(read(folder, "names=3:cat;7:dog").train) == labels(splits.train)


def test_class_and_object_in_one_image(tmp_path):
    classes, numbers = area(*CAT, 1) + area(*DOG, 2), area(*CAT, 8) + area(*DOG, 9)
    both = np.stack([classes, numbers, np.zeros_like(classes)], 2)
    folder = maps_set(tmp_path / "set", "annotation", both)
    columns = "instances=annotation,semantic=annotation,names=wall;cat;dog"
    assert labels(read(folder, columns).train) == [BOTH]


def test_colours_are_no_numbers(tmp_path):
    colours = np.stack([area(*CAT, 200), area(*CAT, 9), area(*DOG, 90)], 2)
    folder = maps_set(tmp_path / "set", "mask", colours)
    assert "holds colours" in problems(folder, "semantic=mask,names=a;b")


# --- image folders --------------------------------------------------------------------------------


def image_folder(folder: Path, rows: list[dict]) -> Path:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for row in rows:
            for name in (value for key, value in row.items() if key.endswith("file_name")):
                pixels = area(*CAT, 255) if "mask" in name else area(*DOG, 90)
                Image.fromarray(pixels).save(folder / split / name)
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / split / "metadata.jsonl").write_text(text)
    return folder


def test_image_folder_with_objects(tmp_path):
    objects = [{"segmentation": [outline(*box)], "label": name} for name, box in PAIR.items()]
    folder = image_folder(tmp_path / "set", [{"file_name": "a.jpg", "objects": objects}])
    splits = read(folder)
    assert splits.test is not None
    assert labels(splits.test) == [BOTH]
    (image,) = splits.test.images
    assert image.path.read_bytes() == (folder / "test/a.jpg").read_bytes()


PAIR = {"cat": CAT, "dog": DOG}


def test_image_folder_with_masks(tmp_path):
    rows = [{"file_name": "a.png", "mask_file_name": "a_mask.png"}]
    splits = read(image_folder(tmp_path / "set", rows), "name=pet")
    assert splits.test is not None
    assert labels(splits.test) == [[("pet", (10, 5, 10, 10))]]


# --- images ---------------------------------------------------------------------------------------


def test_images_keep_their_bytes_or_become_png(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    images = [
        encoded(plain, "JPEG"),
        encoded(plain, "BMP"),
        encoded(plain, "JPEG", exif=turned),
    ]
    objects = [[{"polygon": outline(*CAT), "label": "cat"}]] * 3
    kinds = {"polygon": NUMBERS, "label": Value("string")}
    rows = {"image": images, "objects": objects}
    repository(tmp_path / "set", rows, {"image": IMAGE, "objects": List(kinds)})
    jpeg, png, upright = read(tmp_path / "set").train.images
    assert jpeg.path.read_bytes() == images[0]["bytes"]
    assert png.path.suffix == ".png"
    assert np.array_equal(np.asarray(Image.open(png.path)), plain)
    assert (upright.width, upright.height) == (HEIGHT, WIDTH)


def test_images_outside_the_dataset_are_not_read(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "private.png")
    outside = {"bytes": None, "path": str(tmp_path / "private.png")}
    objects = [[{"polygon": outline(*CAT), "label": "cat"}]]
    kinds = {"polygon": NUMBERS, "label": Value("string")}
    path = tmp_path / "set/data/train-00000-of-00001.parquet"
    features = {"image": {"bytes": Value("binary"), "path": Value("string")}}
    parquet(path, {"image": [outside], "objects": objects}, features | {"objects": List(kinds)})
    card = "dataset_info: {features: [{name: image, dtype: image}, {name: objects, list: ["
    card += "{name: polygon, sequence: float32}, {name: label, dtype: string}]}]}"
    (tmp_path / "set/README.md").write_text(f"---\n{card}\n---\n")
    assert "names a file outside the dataset" in problems(tmp_path / "set")


# --- faults ---------------------------------------------------------------------------------------


def test_a_few_faulty_objects_are_left_out_and_told(tmp_path, told):
    sound = [
        {"segmentation": [outline(x, y, 10, 10)], "category": 0}
        for x in range(10)
        for y in range(10)
    ]
    broken = [[float("nan")] * 6, [1, 2, 3, 4], [1e30] * 6]
    objects = [*sound[:97], *({**sound[0], "segmentation": [shape]} for shape in broken)]
    kinds = {"segmentation": List(NUMBERS), "category": PETS}
    rows = {"image": [encoded()], "objects": [objects]}
    repository(tmp_path / "set", rows, {"image": IMAGE, "objects": List(kinds)})
    assert len(read(tmp_path / "set").train.annotations) == 97
    assert "6 of 200 objects are left out" in told.text
    assert "train row 0, object 98" in told.text
    assert "has a polygon of 4 numbers" in told.text


def test_a_damaged_image_is_left_out_and_told(tmp_path, told):
    shape = [{"polygon": outline(*CAT), "category": 1}]
    broken = {"bytes": encoded()["bytes"][:60], "path": None}
    rows = {"image": [*[encoded()] * 24, broken], "objects": [shape] * 25}
    kinds = {"polygon": NUMBERS, "category": ClassLabel(names=["cat", "other"])}
    repository(tmp_path / "set", rows, {"image": IMAGE, "objects": List(kinds)})
    splits = read(tmp_path / "set")
    assert labels(splits.train) == [[("other", (10, 5, 10, 10))]] * 24
    assert "2 of 50 images are left out" in told.text
    assert "train row 24, image" in told.text


def test_many_faulty_objects_are_an_error(tmp_path):
    kinds = {"segmentation": List(NUMBERS), "category": PETS}
    objects = [{"segmentation": [[1, 2, 3, 4]], "category": 0}]
    rows = {"image": [encoded()], "objects": [objects]}
    repository(tmp_path / "set", rows, {"image": IMAGE, "objects": List(kinds)})
    said = problems(tmp_path / "set")
    assert "2 of 2 objects cannot be used" in said
    assert "validation row 0" not in said  # the split by our name, which the folder has
    assert "valid row 0, object 0" in said


def objects_set(folder: Path, kind: Any, value: Any) -> Path:
    rows = {"image": [encoded()], "objects": [[{"polygon": outline(*CAT), "category": value}]]}
    kinds = {"polygon": NUMBERS, "category": kind}
    return repository(folder, rows, {"image": IMAGE, "objects": List(kinds)})


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (Value("int64"), 1, "'category' holds numbers without names"),
        (ClassLabel(names=["0", "1"]), 1, "its classes are called 0, 1: numbers are no prompts"),
        (Value("string"), "1", "is a number that nothing names"),
    ],
)
def test_numbers_are_no_names(tmp_path, kind, value, said):
    folder = objects_set(tmp_path / "set", kind, value)
    assert said in problems(folder)
    assert labels(read(folder, "names=ant;bee").train) == [[("bee", (10, 5, 10, 10))]]


def test_what_cannot_be_told_lists_the_columns(tmp_path):
    rows = {"image": [encoded()], "caption": ["a"], "thumb": [encoded()]}
    kinds = {"image": IMAGE, "caption": Value("string"), "thumb": IMAGE}
    said = problems(repository(tmp_path / "set", rows, kinds))
    assert "cannot tell which column holds the labels" in said
    assert "'image': Image; 'caption': string; 'thumb': Image" in said
    assert "--columns image=A,objects=B" in said


def test_columns_by_hand(tmp_path, told):
    shape = [{"outline": outline(*CAT), "what": "cat"}]
    rows = {"one": [encoded()], "two": [encoded()], "found": [shape]}
    kinds = {"outline": NUMBERS, "what": Value("string")}
    kinds = {"one": IMAGE, "two": IMAGE, "found": List(kinds)}
    folder = repository(tmp_path / "set", rows, kinds)
    columns = "image=two,objects=found,segmentation=outline,category=what"
    assert labels(read(folder, columns).train) == [[("cat", (10, 5, 10, 10))]]
    assert "image=two,objects=found,category=what,segmentation=outline" in told.text
    with pytest.raises(UserError, match=r"objects=fond: there is no such.*Did you mean 'found'"):
        read(folder, "image=two,objects=fond")
    with pytest.raises(UserError, match=r"'imge=two' must be.*Did you mean 'image'"):
        read(folder, "imge=two")


# --- the cache ------------------------------------------------------------------------------------


def test_fetched_once_and_anew_when_it_changed(tmp_path):
    folder = objects_set(tmp_path / "set", PETS, 1)
    first = fetch(config(folder), tmp_path / "data")
    info = json.loads((first / "train/_annotations.coco.json").read_text())["info"]
    assert first.parent == tmp_path / "data/huggingface"
    assert first.name == f"set@{info['revision'][:12]}"
    written = (first / "train/_annotations.coco.json").stat().st_mtime_ns
    assert fetch(config(folder), tmp_path / "data") == first
    assert (first / "train/_annotations.coco.json").stat().st_mtime_ns == written
    assert fetch(config(folder, columns="name=pet"), tmp_path / "data") != first
    objects_set(folder, ClassLabel(names=["a", "b", "c"]), 2)
    second = fetch(config(folder), tmp_path / "data")
    assert second != first
    assert load_splits(second).train.class_names == ["a", "b", "c"]


def test_a_column_is_kept_that_says_what_images_belong_with(tmp_path):
    """Of 12 images of four patients: no patient is both trained and validated on."""
    pictures = [np.full((HEIGHT, WIDTH, 3), 20 * n, dtype=np.uint8) for n in range(12)]
    patients = [f"p{n % 4}" for n in range(12)]
    parquet(
        tmp_path / "set/data/train-00000-of-00001.parquet",
        {
            "image": [encoded(picture) for picture in pictures],
            "objects": [{"bbox": [xywh(*CAT)], "category": [0]}] * 12,
            "patient": patients,
            "id": patients,
        },
        {
            "image": IMAGE,
            "objects": {"bbox": List(NUMBERS), "category": List(PETS)},
            "patient": Value("string"),
            "id": Value("string"),
        },
    )
    plain = fetch(config(tmp_path / "set"), tmp_path / "data")
    folder = fetch(config(tmp_path / "set"), tmp_path / "data", "patient")
    assert folder != plain
    assert fetch(config(tmp_path / "set"), tmp_path / "data", "patient") == folder
    splits = load_splits(folder, reading=ReadingConfig(group_column="patient"), folds=4)
    for number in range(4):
        groups = {patients[int(i.path.stem)] for i in splits.fold(number).valid.images}
        assert len(groups) == 1
    with pytest.raises(UserError, match=r"--group-column patien: there is no .* 'patient'"):
        fetch(config(tmp_path / "set"), tmp_path / "data", "patien")
    with pytest.raises(UserError, match=r"--group-column id: COCO keeps something else"):
        fetch(config(tmp_path / "set"), tmp_path / "data", "id")


def test_several_configurations(tmp_path):
    for name in ("big", "tiny"):
        objects_set(tmp_path / "set" / name, ClassLabel(names=[name]), 0)
    files = [{"config_name": n, "data_dir": n} for n in ("big", "tiny")]
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: {json.dumps(files)}\n---\n")
    assert "several configurations: big, tiny; choose with --hf-config" in problems(
        tmp_path / "set"
    )
    assert read(tmp_path / "set", config="tiny").train.class_names == ["tiny"]
    with pytest.raises(UserError, match=r"has no configuration 'tny'; .* Did you mean 'tiny'"):
        read(tmp_path / "set", config="tny")


def test_scripts_are_never_run(tmp_path):
    folder = objects_set(tmp_path / "set", PETS, 1)
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "is read by a script, set.py" in problems(folder)
    assert not (tmp_path / "ran").exists()
