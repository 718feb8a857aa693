"""Score tracks against the truth of films: COCO-VID, or MOTChallenge's folders."""

from __future__ import annotations

import configparser
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.datasets.image_files import name_fault
from app.datasets.images import EXTENSIONS, ImageError, read_header
from app.datasets.synthetic.films import ANNOTATIONS
from app.errors import UserError
from app.evaluation.metrics import evaluate
from app.evaluation.results import read_truth
from app.evaluation.tracks import Films, read_films, score_tracks
from app.files import exists_problem, read_text, write_json
from app.inference.films import Film
from app.inference.following import Following, follow_films, read_frames
from app.inference.inputs import output_names
from app.inference.settings import Settings, with_defaults
from app.inference.track_files import TRACK_TABLES

log = logging.getLogger("app")
TRUTH, METRICS = "truth.json", "metrics.json"
TABLE = TRACK_TABLES["coco"][0]
PEDESTRIAN = "pedestrian"  # MOTChallenge's class 1, the only one that it scores
FIGURES = ("HOTA", "DetA", "AssA", "IDF1", "MOTA")


def score_video(
    truth: Path,
    output: Path,
    *,
    settings: Settings | None = None,
    tracks: Path | None = None,
    prompt: str | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Follow the films of a truth, or read tracks of them; write `metrics.json`.

    Args:
        truth: a COCO-VID JSON, a folder with one (`_annotations.coco.json`), or a folder of
            MOTChallenge's sequences.
        settings: of the weights that follow; their prompts are the classes of the truth.
        tracks: COCO-VID JSON of tracks from elsewhere, instead.
        prompt: what MOTChallenge's things are called, which has no words; pedestrian unless given.

    Returns:
        HOTA, DetA, AssA, IDF1, MOTA (0..1), switches, and with `settings` the AP of what is found
        in the frames, as "bbox/AP" and so on.

    Raises:
        UserError: files that are not so, or an output folder that is taken.
    """
    if (output / METRICS).exists() and not overwrite:
        raise UserError(exists_problem(output, f"holds {METRICS} already"))
    file = _truth_file(truth, output, prompt or PEDESTRIAN)
    known = read_films(file)
    if tracks is not None:
        figures = score_tracks(known, read_films(tracks))
    else:
        assert settings is not None
        root = truth if truth.is_dir() else truth.parent
        figures = _follow_and_score(known, root, file, output, settings, overwrite=overwrite)
    write_json(output / METRICS, figures)
    main = [f"{name} {figures[name]:.3f}" for name in FIGURES]
    main += [f"{int(figures['switches'])} identity switches"]
    main += [
        f"{words} {figures[key]:.3f}"
        for key, words in (("bbox/AP", "box AP"), ("segm/AP", "mask AP"))
        if key in figures
    ]
    log.info("%s", ", ".join(main))
    log.info("figures: %s", output / METRICS)
    return figures


def _follow_and_score(
    truth: Films, root: Path, file: Path, output: Path, settings: Settings, *, overwrite: bool
) -> dict[str, float]:
    from app.inference.worker import load_predictor  # torch, which scoring does not need

    ids = {name: id for id, name in truth.classes.items()}
    settings = replace(settings, prompts=tuple(truth.classes.values()), save=("coco",))
    settings = with_defaults(settings)
    if problems := [
        f"{file}: {name or 'a frame'}: file_name must be a path below the JSON's folder"
        for images in truth.images.values()
        for _, name in images
        if name_fault(name) or Path(name).is_absolute() or ".." in Path(name).parts
    ]:
        raise UserError(problems)
    names = output_names([re.sub(r"[^\w.-]+", "_", name) for name in truth.names.values()])
    films = [
        Film(
            truth.names[id],
            name=name,
            frames=tuple((root / file_name).absolute() for _, file_name in truth.images[id]),
            fps=truth.fps[id],
        )
        for id, name in zip(truth.films, names, strict=True)
    ]
    predictor = load_predictor(settings)
    predictor.check_length(settings.prompts)
    if problems := follow_films(films, output, settings, Following(overwrite=overwrite), predictor):
        raise UserError(problems)
    found = {}
    for id, film in zip(truth.films, films, strict=True):
        (found[id],) = read_films(output / film.name / TABLE).films.values()
    classes = dict(enumerate(settings.prompts, start=1))
    figures = score_tracks(truth, Films(found, classes))
    results = [
        {
            **{key: value for key, value in result.items() if key != "color"},
            "image_id": truth.images[id][int(entry["image"])][0],
            "category_id": ids[classes[result["category_id"]]],
        }
        for id, film in zip(truth.films, films, strict=True)
        for entry in read_frames(output / film.name)
        for result in entry["found"]
    ]
    return figures | evaluate(read_truth(file), results)


def _truth_file(truth: Path, output: Path, prompt: str) -> Path:
    """Return the COCO-VID JSON of a truth; MOTChallenge's is written to the output folder."""
    if truth.is_file():
        return truth
    if not truth.is_dir():
        raise UserError(f"--video {truth}: no such file or folder")
    if (truth / ANNOTATIONS).is_file():
        return truth / ANNOTATIONS
    sequences = sorted(path.parent.parent for path in truth.glob("*/gt/gt.txt"))
    if (truth / "gt" / "gt.txt").is_file():
        sequences = [truth]
    if not sequences:
        raise UserError(
            f"--video {truth}: holds neither {ANNOTATIONS} (COCO-VID) nor sequences of "
            "MOTChallenge (gt/gt.txt beside img1)"
        )
    document: dict[str, Any] = {"videos": [], "images": [], "annotations": []}
    document["categories"] = [{"id": 1, "name": prompt}]
    problems: list[str] = []
    for sequence in sequences:
        try:
            _add_sequence(document, sequence, truth)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    write_json(output / TRUTH, document)
    return output / TRUTH


def _add_sequence(document: dict[str, Any], sequence: Path, root: Path) -> None:
    """Add a sequence of MOTChallenge; what it marks as not to be scored is left out."""
    paths = sorted((sequence / "img1").glob("*"))
    frames = [path for path in paths if path.suffix.lower() in EXTENSIONS]
    if not frames:
        raise UserError(f"{sequence}: has no images in img1")
    try:
        width, height = read_header(frames[0]).size
    except ImageError as error:
        raise UserError(error.problems) from None
    video, first = len(document["videos"]) + 1, len(document["images"]) + 1
    size = {"width": width, "height": height}
    document["videos"].append(
        {
            "id": video,
            "name": sequence.name,
            "length": len(frames),
            "fps": _frame_rate(sequence / "seqinfo.ini"),
            **size,
        }
    )
    document["images"] += [
        {
            "id": first + number,
            "video_id": video,
            "frame_id": number,
            "file_name": frame.relative_to(root).as_posix(),
            **size,
        }
        for number, frame in enumerate(frames)
    ]
    for frame_number, track, box in _rows(sequence / "gt" / "gt.txt", len(frames)):
        left, top = max(box[0], 0.0), max(box[1], 0.0)
        right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
        if right <= left or bottom <= top:
            continue
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": first + frame_number,
                "video_id": video,
                "track_id": track,
                "category_id": 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
            }
        )


def _frame_rate(file: Path) -> float:
    if not file.is_file():
        return 25.0
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_text(file))
        return parser.getfloat("Sequence", "frameRate", fallback=25.0)
    except (configparser.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None


def _rows(file: Path, length: int) -> Iterator[tuple[int, int, Sequence[float]]]:
    """Yield frame (from 0), track and box (xywh) of each row that is scored."""
    problems = []
    for number, line in enumerate(read_text(file, most=1 << 30).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = [float(value) for value in line.replace(",", " ").split()]
            frame, track, *box = values[:6]
            if len(box) != 4 or not 1 <= frame <= length or int(track) != track:
                raise ValueError
        except ValueError:
            problems.append(
                f"{file}: line {number}: must be frame (1 to {length}),id,left,top,width,height,…"
            )
            continue
        counts = len(values) < 7 or values[6] != 0
        pedestrian = len(values) < 8 or values[7] in (1, -1)
        if counts and pedestrian:
            yield int(frame) - 1, int(track), box
    if problems:
        raise UserError(problems)
