"""Known exports that are not read: what each is told by, and what to export instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.datasets.folders import FOLDERS
from app.datasets.formats.telling import few
from app.datasets.images import EXTENSIONS

HEAD = 2**16  # bytes in which a file shows what it is
WAYS = ("", "*/", "*/*/")  # how deep it is looked for
COCO = "export COCO JSON"


@dataclass(frozen=True)
class Unread:
    """An export that is known and not read.

    Attributes:
        files: patterns of its files' names.
        instead: what to do.
        holds: all that the first bytes of such a file match; nothing where the name is enough.
            Each takes time in proportion to the bytes, whatever they are.
    """

    name: str
    files: tuple[str, ...]
    instead: str
    holds: tuple[str, ...] = ()


JSONS, CSVS, TEXTS, LINES = ("*.json",), ("*.csv",), ("*.txt",), ("*.jsonl",)
AS_JSON = "export 'JSON' instead, with the images beside it"
MINE = r'"(annotation_id|annotator|lead_time)"'  # Label Studio's columns
UNREAD = (
    Unread("TFRecord", ("*.tfrecord", "*.tfrecords", "*.record", "*.tfrecord-*"), COCO),
    Unread("Label Studio's JSON_MIN", JSONS, AS_JSON, (r"\A\s*\[\s*\{", rf"{MINE}\s*:")),
    Unread(
        "Label Studio's CSV or TSV",
        ("*.csv", "*.tsv"),
        AS_JSON,
        (r"\A[^\n]*\b(annotation_id|annotator|lead_time)\b",),
    ),
    Unread(
        "Label Studio's brush masks as NumPy arrays or PNGs",
        ("task-*-annotation-*.npy", "task-*-annotation-*.png"),
        AS_JSON,
    ),
    Unread(
        "Labelbox's export", ("*.ndjson", *JSONS), COCO, (r'"(data_row|dataRow|Labeled Data)"\s*:',)
    ),
    Unread(
        "SuperAnnotate's JSON",
        JSONS,
        COCO,
        (r'"instances"\s*:', r'"(className|classId|pointLabels)"\s*:'),
    ),
    Unread(
        "V7's Darwin JSON",
        JSONS,
        "export COCO JSON, or convert it: darwin convert coco",
        (r'("schema_ref"\s*:\s*"[^"\n]*darwin|"slots"\s*:|"bounding_box"\s*:)',),
    ),
    Unread("VIA 3's project", JSONS, "export COCO JSON, or label with VIA 2", (r'"vid_list"\s*:',)),
    Unread("Encord's JSON", JSONS, COCO, (r'"(label_hash|data_units|objectHash)"\s*:',)),
    Unread("Kili's JSON", JSONS, COCO, (r'"jsonResponse"\s*:',)),
    Unread("Hasty's JSON", JSONS, COCO, (r'"export_format_version"\s*:',)),
    Unread(
        "BDD100K's or Scalabel's JSON",
        JSONS,
        "convert it: bdd100k.label.to_coco",
        (r'"(box2d|poly2d)"\s*:',),
    ),
    Unread(
        "VoTT's JSON", ("*.json", "*.vott"), "export Pascal VOC or CSV", (r'"boundingBox"\s*:',)
    ),
    Unread("IBM Cloud Annotations' JSON", JSONS, COCO, (r'"type"\s*:\s*"localization"',)),
    Unread(
        "Unity Perception's JSON",
        JSONS,
        "convert it: pysolotools' solo2coco",
        (r'"captures"\s*:', r'"(annotation_definition|instance_id|@type)"\s*:'),
    ),
    Unread("Scale AI's JSON", JSONS, COCO, (r'"task_id"\s*:', r'"(geometries|response)"\s*:')),
    Unread("Dataloop's JSON", JSONS, COCO, (r'"itemMetadata"\s*:',)),
    Unread("OpenLABEL's JSON", JSONS, COCO, (r'\A\s*\{\s*"openlabel"\s*:',)),
    Unread("ISAT's JSON", JSONS, COCO, (r'"description"\s*:\s*"ISAT"',)),
    Unread("COCO captions", JSONS, "take instances_*.json of that set", (r'"caption"\s*:',)),
    Unread(
        "an imagefolder without boxes",
        ("metadata.csv", "metadata.jsonl"),
        "write metadata.jsonl with objects: {bbox, category}, as huggingface.co has it",
        (r"\bfile_name\b",),
    ),
    Unread("SageMaker's manifest", ("*.manifest",), "convert it to COCO JSON", (r'"source-ref"',)),
    Unread(
        "Azure ML's or Vertex AI's JSON lines",
        LINES,
        COCO,
        (r'"(image_url|imageGcsUri|boundingBoxAnnotations)"\s*:',),
    ),
    Unread(
        "JSON lines for vision-language models", LINES, COCO, (r'"(prefix|suffix|messages)"\s*:',)
    ),
    Unread("OpenImages' CSV", CSVS, COCO, (r"\AImageID,", r"\A[^\n]*,(LabelName|XMin)\b")),
    Unread(
        "a table of classes (classification)",
        CSVS,
        "it has no places: label the images, or let weights do it (python -m app label)",
        (r"\A\W?(filename|image|image_id|id)\W?,", r"\A[^\n]*\n[^\n,]+(, ?[01])+\r?$"),
    ),
    Unread(
        "Google AutoML's CSV",
        CSVS,
        COCO,
        (r"\A(set|TRAIN|TRAINING|VALIDATION|VALIDATE|TEST|UNASSIGNED),[^\n,]+,[^\n,]*,[\d.]",),
    ),
    Unread(
        "CSV of boxes in one column, as Kaggle's wheat heads",
        CSVS,
        "write the columns filename,xmin,ymin,xmax,ymax,class",
        (r"\A[^\n]*\bbbox\b", r'"\[[\d., ]+\]"'),
    ),
    Unread(
        "DOTA's text files",
        TEXTS,
        "convert it: ultralytics' convert_dota_to_yolo_obb writes YOLO, which is read",
        (r"^(imagesource:|gsd:|(-?\d+(\.\d+)?[ \t]+){8}[A-Za-z]\S*[ \t]+[012]\r?$)",),
    ),
    Unread(
        "WIDER FACE's list",
        TEXTS,
        "convert it to COCO JSON",
        (r"\A\S+\.jpe?g\r?\n\d+\r?\n(-?\d+[ \t]+){9}",),
    ),
    Unread(
        "MOT's tracks",
        ("gt.txt",),
        "export the frames as images with COCO JSON",
        (r"^\d+,-?\d+(,-?\d+(\.\d+)?){4,8}\r?$",),  # after lines of comment, as some have
    ),
    Unread(
        "YOLO's text files without the names of their classes",
        TEXTS,
        "add data.yaml, or classes.txt with a name a line, in the order of the numbers",
        (r"\A\d+([ \t]+-?[\d.]+){4}",),
    ),
    Unread(
        "a parquet file",
        ("*.parquet",),
        "--hf-dataset reads it from huggingface.co; or save the images with a metadata.jsonl",
    ),
    Unread("LMDB or HDF5", ("data.mdb", "*.h5", "*.hdf5"), "export COCO JSON and image files"),
)


ENDINGS = (".json", ".jsonl", ".xml", ".csv", ".tsv", ".txt", ".yaml", ".yml")  # of labels
UNLABELLED = "Images alone have no labels: label them, or let weights do it (python -m app label)"


def name_unread(folder: Path) -> str | None:
    """Return what a folder holds that is known and not read, with what to do; None for nothing."""
    for known in UNREAD:
        patterns = tuple(f"{way}{pattern}" for way in WAYS for pattern in known.files)
        for path in few(folder, *patterns):
            head = _head(path) if known.holds else ""
            if all(re.search(pattern, head, re.MULTILINE) for pattern in known.holds):
                return f"{path} is {known.name}, which is not read: {known.instead}"
    return None


def labels_there(folder: Path) -> Iterator[Path]:
    """Yield the files that may be labels, whatever they hold."""
    return few(folder, *(f"{way}*{ending}" for way in WAYS for ending in ENDINGS))


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(HEAD).decode("utf-8-sig", "replace")
    except OSError:
        return ""


def name_classification(folder: Path) -> str | None:
    """Return that folders are named for classes and hold images alone, as for classification."""
    splits = (folder / name for names in FOLDERS.values() for name in names)
    top = next((path for path in splits if path.is_dir()), folder)
    classes = [path for path in sorted(top.iterdir()) if path.is_dir() and path.name[0] != "."]
    kinds = [{path.suffix.lower() for path in few(part, "*")} for part in classes]
    if len(classes) < 2 or not all(found and found <= set(EXTENSIONS) for found in kinds):
        return None
    names = ", ".join(path.name for path in classes[:3])
    return (
        f"{top} has folders of images by their class ({names}), as for classification: they have "
        "no places; label the images, or let weights do it (python -m app label)"
    )
