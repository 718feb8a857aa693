"""Write report.html of a run or an evaluation: one page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.console import command, counted
from app.datasets.coco import Annotation, Image
from app.datasets.dataset_report import REPORT as DATASET_REPORT
from app.datasets.dataset_report import draw_sample
from app.errors import UserError
from app.evaluation import charts, record
from app.evaluation.calibration import outcomes
from app.evaluation.diagnosis import KINDS, Diagnosis, confusion, extremes
from app.evaluation.matching import Overlaps, overlaps
from app.evaluation.metrics import accumulate, by_class, iou_types
from app.evaluation.record import Record
from app.evaluation.run_files import FIGURES, SETTINGS, RunFiles, read_run
from app.evaluation.summary import BY_EXAMPLES, bounds, gain_in_words
from app.files import read_text, write_text
from app.page import drawing, page, picture, table, text

REPORT = "report.html"
EXTREMES = 12  # worst images, and best
SHOWN_CLASSES = 20  # in the table of confusions
SIZES = {"": "all", "_small": "under 32²", "_medium": "32² to 96²", "_large": "above 96²"}
KIND = {"bbox": "box", "segm": "mask"}
OTHERS = "of other such images, 95 %"  # the heading above intervals
HEADLINE = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AR_1": "AR at 1",
    "AR_10": "AR at 10",
    "AR_100": "AR at 100",
    "cgF1": "cgF1",
    "pmF1": "positive micro F1",
    "IL_MCC": "image-level MCC",
}
PARTS = {
    "train/loss_bbox": "boxes, L1",
    "train/loss_giou": "boxes, GIoU",
    "train/loss_ce": "class",
    "train/presence_loss": "presence",
    "train/loss_mask": "masks, focal",
    "train/loss_dice": "masks, dice",
    "train/loss_semantic_dice": "semantic, dice",
}
ONCE = {
    "off_prompt/firing": "off-prompt firing: false positives an image",
    "calibration/F1": "F1 at the best threshold",
    "calibration/precision": "precision there",
    "calibration/recall": "recall there",
    "calibration/threshold": "the best threshold",
    **BY_EXAMPLES,
}


@dataclass(frozen=True)
class Scored:
    """Hold a record, its figures, and the threshold above which its detections are shown."""

    record: Record
    figures: Mapping[str, Any]
    images: Sequence[Overlaps]
    iou_type: str
    threshold: float


def write_report(folder: Path, evaluation: Record | None = None) -> Path:
    """Write `report.html` of a folder; return its file.

    Args:
        evaluation: the folder's record, where it is at hand.

    Raises:
        UserError: the folder holds no evaluation, or files that are not as they were written.
    """
    file = folder / REPORT
    write_text(file, render(folder, evaluation))
    return file


def render(folder: Path, evaluation: Record | None = None) -> str:
    """Return the page of a run or of an evaluation; text from outside is escaped."""
    evaluation = evaluation or record.read(folder)
    files = read_run(folder)
    if not files.figures:
        raise UserError(f"{folder / FIGURES}: no figures; score the weights again")
    scored, rows = _scored(evaluation, files), files.rows
    parts = [
        _summary(scored, files),
        "<h2>Figures</h2>",
        _headline(scored.figures),
        *([f'<h2>Training</h2><div class="row">{_curves(rows)}</div>'] if rows else []),
        "<h2>Classes</h2>",
        _classes(scored),
        "<h2>Wrong or right</h2>",
        _precision(scored),
        _confusion(scored),
        *_pictures(scored),
        "<h2>Commands</h2>",
        _commands(folder, scored),
        _data(folder),
        _shown_settings(folder),
    ]
    return page(f"Report: {folder.resolve().name}", parts)


def _scored(evaluation: Record, files: RunFiles) -> Scored:
    iou_type = iou_types(evaluation.truth, evaluation.results)[-1]
    return Scored(
        record=evaluation,
        figures=files.figures,
        images=overlaps(evaluation.truth, evaluation.results, iou_type),
        iou_type=iou_type,
        threshold=files.figures.get("calibration/threshold", 0.5),
    )


def _summary(scored: Scored, files: RunFiles) -> str:
    """Tell what was scored, what training has brought, and what was said of the data before it."""
    truth = scored.record.truth
    sentence = (
        f"{counted(len(truth.images), 'image')} of the split “{scored.record.split}”, "
        f"{counted(len(truth.annotations), 'object')} of {counted(len(truth.categories), 'class')}."
    )
    if model := files.settings.model:
        sentence = f"SAM 3, size {model.name}, {model.resolution} px. {sentence}"
    gain = []
    before = {
        name.removeprefix("baseline/"): value
        for name, value in files.figures.items()
        if name.startswith("baseline/")
    }
    if before:
        gain = gain_in_words(before, files.figures, truth)
    notes = "".join(f"<li>{text(note)}</li>" for note in files.environment.notes)
    said = f"<p>Said of the data:</p><ul>{notes}</ul>" if notes else ""
    return "".join(f"<p>{text(line)}</p>" for line in (sentence, *gain)) + said


def _headline(figures: Mapping[str, Any]) -> str:
    """Tabulate the figures of the untouched model, the best weights and the last epoch."""
    columns = {"baseline/": "before training", "": "best weights", "last/": "last epoch"}
    there = {p: n for p, n in columns.items() if f"{p}bbox/AP" in figures}
    if list(there) == [""]:
        there = {"": "value"}
    names = {
        f"{iou_type}/{name}": f"{KIND[iou_type]} {label}"
        for iou_type in ("segm", "bbox")
        for name, label in HEADLINE.items()
    } | ONCE
    rows = [
        [
            *(text(label), *(number(figures.get(f"{prefix}{name}")) for prefix in there)),
            bounds(figures, name),
        ]
        for name, label in names.items()
        if name in figures
    ]
    sizes = [
        [f"{KIND[iou_type]} AP of objects {label} pixels", *values]
        for iou_type in ("segm", "bbox")
        for size, label in list(SIZES.items())[1:]
        if f"{iou_type}/AP{size}" in figures
        for values in [[number(figures.get(f"{p}{iou_type}/AP{size}")) for p in there]]
    ]
    heading = ["figure", *there.values(), OTHERS]
    return table(heading, [*rows, *([*size, ""] for size in sizes)])


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _curves(rows: Sequence[Mapping[str, float]]) -> str:
    seconds = {"train/seconds_per_update": "seconds"}
    aps = {f"{t}/AP{n}": f"{k} AP{n}" for t, k in KIND.items() for n in ("", "50")}
    drawn = {
        "training loss": charts.curves(rows, {"train/loss": "training loss"}, "loss"),
        "its parts, each as a share of its highest": charts.curves(_parts(rows), PARTS, "0 to 1"),
        "on the validation images": charts.curves(rows, aps, "0 to 1"),
        "learning rate": charts.curves(rows, {"train/learning_rate": "of the detector"}, "rate"),
        "seconds a step": charts.curves(rows, seconds, "s"),
    }
    return "".join(drawing(svg, caption) for caption, svg in drawn.items())


def _parts(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return each part of the loss divided by its maximum, because their scales differ."""
    highest = {key: max((row.get(key, 0.0) for row in rows), default=0.0) for key in PARTS}
    return [
        {
            "epoch": row["epoch"],
            **{k: row[k] / top for k, top in highest.items() if top and k in row},
        }
        for row in rows
    ]


def _classes(scored: Scored) -> str:
    """Tabulate the classes, with the untouched model's AP where there is one."""
    rows = by_class(scored.record.truth, scored.record.results)
    columns = [key for key in dict.fromkeys(k for row in rows for k in row) if "/" in key]
    before = [f"{t}/AP" for t in ("segm", "bbox") if f"baseline/{t}/AP" in scored.figures][:1]
    cells = [
        [
            text(row["class"]),
            str(row["objects"]),
            *(number(row.get(column)) for column in columns),
            *(number(scored.figures.get(f"baseline/{key}/{row['class']}")) for key in before),
        ]
        for row in rows
    ]
    heads = [f"{KIND[t]} {n}" for t, _, n in (column.partition("/") for column in columns)]
    heads += [f"{KIND[key.partition('/')[0]]} AP before training" for key in before]
    return table(["class", "objects", *(head.replace("_", " at ") for head in heads)], cells)


def _precision(scored: Scored) -> str:
    """Draw precision by recall, and how well the scores are calibrated."""
    truth, results = scored.record.truth, scored.record.results
    if not results:
        return "<p>Nothing was found.</p>"
    kind = KIND[scored.iou_type]
    evaluation = accumulate(truth, results, scored.iou_type)
    computed: Any = evaluation.eval
    precision = np.asarray(computed["precision"])[0, :, :, 0, -1]  # (recall, class), IoU 0.5
    names = {category.id: category.name for category in truth.categories}
    lines = {
        names[category_id]: precision[:, index]
        for index, category_id in enumerate(evaluation.params.cat_ids)
        if precision[0, index] > -1
    }
    more = len(lines) - charts.SHOWN_CLASSES
    cut = f" (the first {charts.SHOWN_CLASSES} of {len(lines)} classes)" if more > 0 else ""
    scores, hits = outcomes(scored.images)
    return (
        '<div class="row">'
        + drawing(charts.precision_recall(lines), f"precision by recall, {kind} IoU 0.5{cut}")
        + drawing(
            charts.reliability(scores, hits, scored.threshold),
            f"score and truth, {kind} IoU 0.5, with the number of detections; "
            f"dashed: the threshold {scored.threshold:.3f}",
        )
        + "</div>"
    )


def _confusion(scored: Scored) -> str:
    """Tabulate the classes of objects by those of their detections; of many, the most confused."""
    categories = scored.record.truth.categories
    counts = confusion(scored.images, [c.id for c in categories], scored.threshold)
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = sorted(np.argsort(-wrong[:-1], kind="stable")[:SHOWN_CLASSES].tolist())
    chosen = [*shown, len(categories)]
    names = [text(categories[index].name) for index in shown]
    rows = [
        [label, *(_shaded(counts[row, column], row == column) for column in chosen)]
        for row, label in zip(chosen, [*names, "<i>nothing</i>"], strict=True)
    ]
    cut = " The classes that are confused most." if len(shown) < len(categories) else ""
    heading = (
        f"<h3>Confusion</h3><p>Above the threshold {scored.threshold:.3f}, at "
        f"{KIND[scored.iou_type]} IoU 0.5: rows are objects, columns what they were found as.{cut}"
        "</p>"
    )
    return heading + table(["", *names, "<i>not found</i>"], rows)


def _shaded(count: int, right: bool) -> str:
    if not count:
        return "·"
    return f'<b class="{"mended" if right else "refused"}">{count}</b>'


def _pictures(scored: Scored) -> list[str]:
    worst, best = extremes(scored.images, scored.threshold, EXTREMES)
    kinds = "".join(f"<li>{kind}: {meaning}</li>" for kind, meaning in KINDS.items())
    legend = f"<details><summary>what the words mean</summary><ul>{kinds}</ul></details>"
    return [
        f"<h2>The worst images</h2>{legend}",
        *(_pair(diagnosis, scored) for diagnosis in worst),
        *(["<h2>The best images</h2>"] if best else []),
        *(_pair(diagnosis, scored) for diagnosis in best),
    ]


def _pair(diagnosis: Diagnosis, scored: Scored) -> str:
    """Draw truth beside prediction; only a caption where the image cannot be read."""
    truth = scored.record.truth
    image = next(image for image in truth.images if image.id == diagnosis.image_id)
    caption = f"{image.path.name}: {diagnosis} (quality {diagnosis.quality:.2f})"
    detections, scores = _predictions(scored, image)
    objects = truth.annotations_by_image[image.id]
    try:
        left = draw_sample(image, objects, truth)
        right = draw_sample(image, detections, truth, scores)
    except UserError:
        return f"<p>{text(caption)}</p>"
    return (
        f'<p>{text(caption)}</p><div class="row">{picture(left, f"truth: {len(objects)}")}'
        f"{picture(right, f'predicted: {len(detections)}')}</div>"
    )


def _predictions(scored: Scored, image: Image) -> tuple[list[Annotation], dict[int, float]]:
    """Return detections above the threshold as annotations, and the score of each by its id."""
    results = [
        result
        for result in scored.record.results
        if result["image_id"] == image.id and result["score"] > scored.threshold
    ]
    annotations = [
        Annotation(
            id=index,
            image_id=image.id,
            category_id=result["category_id"],
            bbox_xywh=tuple(result["bbox"]),
            segmentation=result.get("segmentation"),
            area=0.0,
            iscrowd=False,
        )
        for index, result in enumerate(results)
    ]
    return annotations, {index: result["score"] for index, result in enumerate(results)}


def _commands(folder: Path, scored: Scored) -> str:
    """List the commands that can be run next."""
    commands = [command("python", "-m", "app", "report", folder)]
    weights = folder / "weights" / "best"
    if weights.exists():
        run, truth = ("./train.sh", "--config", folder / SETTINGS), scored.record.truth
        evaluated, found = folder / "evaluation", folder / "found"
        images, prompt = truth.images[0].path.parent, truth.class_names[0]
        commands = [
            command(*run, "--output-dir", folder, "--resume"),
            command(*run, "--checkpoint", weights, "--eval-only", "--output-dir", evaluated),
            command(
                *("./infer.sh", "--checkpoint", weights, "--input", images),
                *("--prompt", prompt, "--output-dir", found),
            ),
            *commands,
        ]
    return f"<pre>{text(chr(10).join(commands))}</pre>"


def _data(folder: Path) -> str:
    """Link the page of the dataset, which a run writes beside this one."""
    if not (folder / DATASET_REPORT).is_file():
        return ""
    return f'<p><a href="{DATASET_REPORT}">The dataset: its classes, sizes and samples</a></p>'


def _shown_settings(folder: Path) -> str:
    file = folder / SETTINGS
    if not file.is_file():
        return ""
    settings = read_text(file)
    return f"<details><summary>All settings</summary><pre>{text(settings)}</pre></details>"
