"""Known exports that are not read: each is named, with what to export instead."""

from __future__ import annotations

import json
import re
import time

import pytest

from app.datasets.formats.unread import HEAD, UNREAD
from tests.corpus.making import put, refusal, scenes

MIN = [{"image": "/data/upload/1/a.png", "id": 1, "label": [], "annotator": 1, "lead_time": 2.5}]
DARWIN = {
    "version": "2.0",
    "schema_ref": "https://example.org/darwin_json/2.0/schema.json",
    "item": {"name": "img_0.png", "slots": [{}]},
    "annotations": [{"bounding_box": {"h": 1, "w": 1, "x": 0, "y": 0}, "name": "car"}],
}
SUPER = {"metadata": {"name": "img_0.png"}, "instances": [{"type": "bbox", "className": "car"}]}
SITUATIONS = {
    "TFRecord": ("train/shapes.tfrecord", "x"),
    "Label Studio's JSON_MIN": ("project-1-at-2026.json", MIN),
    "Label Studio's CSV or TSV": ("project.csv", "image,id,label,annotator,lead_time\na,1,,,\n"),
    "Label Studio's brush masks as NumPy arrays or PNGs": (
        "task-1-annotation-2-by-1-tag-circle-0.npy",
        "x",
    ),
    "Labelbox's export": ("export.ndjson", '{"data_row": {"id": "x"}, "projects": {}}\n'),
    "SuperAnnotate's JSON": ("annotations/img_0.png.json", SUPER),
    "V7's Darwin JSON": ("releases/img_0.json", DARWIN),
    # NoelShin/PixelPick, via/via_debug_project.js
    "VIA 3's project": (
        "via_project.json",
        {
            "project": {"data_format_version": "3.1.1", "vid_list": ["1"]},
            "file": {},
            "metadata": {},
        },
    ),
    "Encord's JSON": ("encord.json", [{"label_hash": "x", "data_units": {}}]),
    "Kili's JSON": ("kili.json", [{"labels": [{"jsonResponse": {}}]}]),
    "Hasty's JSON": ("hasty.json", {"export_format_version": "1.1", "labels": []}),
    "BDD100K's or Scalabel's JSON": (
        "det_20/det_train.json",
        [{"name": "img_0.png", "labels": [{"category": "car", "box2d": {"x1": 1}}]}],
    ),
    "ISAT's JSON": ("img_0.json", {"info": {"description": "ISAT", "name": "a"}, "objects": []}),
    "COCO captions": (
        "annotations/captions_train2017.json",
        {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "A car."}]},
    ),
    "an imagefolder without boxes": (
        "train/metadata.jsonl",
        '{"file_name": "img_0.png", "text": "a circle"}\n',
    ),
    "SageMaker's manifest": ("output.manifest", '{"source-ref": "s3://b/img_0.png", "x": {}}\n'),
    "Azure ML's or Vertex AI's JSON lines": ("labels.jsonl", '{"image_url": "a", "label": []}\n'),
    "JSON lines for vision-language models": (
        "train/_annotations.train.jsonl",
        '{"image": "img_0.png", "prefix": "detect car", "suffix": "<loc0001>"}\n',
    ),
    "OpenImages' CSV": (
        "train-annotations-bbox.csv",
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n",
    ),
    "a table of classes (classification)": ("_classes.csv", "filename, cat, dog\na.png, 0, 1\n"),
    "Google AutoML's CSV": ("labels.csv", "TRAIN,gs://b/img_0.png,car,0.1,0.2,,,0.5,0.8,,\n"),
    "CSV of boxes in one column, as Kaggle's wheat heads": (
        "train.csv",
        'image_id,width,height,bbox,source\nimg_0,160,120,"[4.0, 2.0, 5.5, 6.0]",usask_1\n',
    ),
    # the shapes of these are those of the fixtures of panlabel 0.7.0
    "VoTT's JSON": (
        "shapes-export.json",
        {"assets": {"a": {"regions": [{"boundingBox": {"left": 1}, "tags": ["car"]}]}}},
    ),
    "IBM Cloud Annotations' JSON": (
        "_annotations.json",
        {"version": "1.0", "type": "localization", "labels": ["car"], "annotations": {}},
    ),
    "Unity Perception's JSON": (
        "sequence.0/step0.frame_data.json",
        {"frame": 2, "captures": [{"@type": "type.unity.com/unity.solo.RGBCamera"}]},
    ),
    "Scale AI's JSON": ("tasks.json", [{"task_id": "x", "response": {"annotations": []}}]),
    "Dataloop's JSON": ("json/img_0.json", {"filename": "/img_0.png", "itemMetadata": {}}),
    "OpenLABEL's JSON": ("labels.json", {"openlabel": {"metadata": {}, "objects": {}}}),
    "DOTA's text files": ("labelTxt/img_0.txt", "1.0 2.0 9.0 2.0 9.0 9.0 1.0 9.0 plane 0\n"),
    "WIDER FACE's list": (
        "wider_face_train_bbx_gt.txt",
        "0--Parade/0_Parade.jpg\n1\n449 330 122 149 0 0 0 0 0 0 \n",
    ),
    "MOT's tracks": (
        "MOT17-02/gt/gt.txt",
        "# by CVAT\n1,1,912,484,97,109,0,7,1\n1,2,9,4,97,109,0,7,1\n",
    ),
    "YOLO's text files without the names of their classes": (
        "labels/img_0.txt",
        "0 0.5 0.5 0.25 0.25\n",
    ),
    "a parquet file": ("data/train-00000-of-00001.parquet", "PAR1"),
    "LMDB or HDF5": ("set.h5", "x"),
}


@pytest.mark.parametrize("known", UNREAD, ids=lambda known: known.name)
def test_each_is_named_with_what_to_do(tmp_path, known):
    scenes(tmp_path, 2)
    name, content = SITUATIONS[known.name]
    put(tmp_path / name, content)
    said = refusal(tmp_path)
    assert said == f"{tmp_path / name} is {known.name}, which is not read: {known.instead}"


def test_folders_of_classes(tmp_path):
    for folder in (tmp_path / "plain", tmp_path / "splits/train"):
        for index, name in enumerate(("cats", "dogs")):
            scenes(folder, 2, name, start=10 * index)
    for folder in (tmp_path / "plain", tmp_path / "splits"):
        said = refusal(folder)
        assert "folders of images by their class (cats, dogs)" in said
        assert "python -m app label" in said


def test_images_alone_are_no_classes(tmp_path):
    scenes(tmp_path, 2)
    assert refusal(tmp_path).endswith("let weights do it (python -m app label)")
    put(tmp_path / "notes.txt", "x")
    assert refusal(tmp_path).endswith("There is: images, notes.txt")


def test_a_json_of_no_known_kind(tmp_path):
    scenes(tmp_path, 2)
    put(tmp_path / "labels.json", '{"images": [')
    assert "broken JSON" in refusal(tmp_path)
    put(tmp_path / "labels.json", {"images": [], "annotations": []})
    assert "'categories' is missing: must be a list, as COCO has it" in refusal(tmp_path)


# imgaug 0.4.0, imgaug/quokka_annotations.json: a JSON of its own
@pytest.mark.parametrize(
    ("document", "shown"),
    [
        ({"bounding_boxes": [{"x1": 148.0}], "keypoints": []}, "['bounding_boxes', 'keypoints']"),
        ({}, "[]"),
        ({f"key {n}\u001b[31m\n": n for n in range(500)}, "['key 0\\x1b[31m\\n', 'key 1"),
        ([[1, 2]], "[[1, 2]]"),
        ("null", "missing"),
        (3, "3"),
    ],
)
def test_a_json_of_nobody(tmp_path, document, shown):
    scenes(tmp_path, 2)
    put(tmp_path / "labels.json", json.dumps(document) if document == 3 else document)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / 'labels.json'}: its top level is {shown}")
    assert "no labels' file that is known" in said
    assert "LabelMe" in said
    assert "must be a list" not in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "[{",
        '"instances":',
        "1 ",
        "1",
        "ImageID,",
        ",",
        "1,",
        "a.",
        ", 0",
        " ",
        "\n",
        "-1.5\t",
        "\\W",
    ],
)
def test_no_text_holds_the_search_up(text):
    """Each expression is searched in time that grows with the bytes alone."""
    head = text * (HEAD // len(text))
    begun = time.process_time()
    for known in UNREAD:
        for pattern in known.holds:
            re.search(pattern, head, re.MULTILINE)
    assert time.process_time() - begun < 1
