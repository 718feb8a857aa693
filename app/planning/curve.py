"""A learning curve: runs on few and on more of the images, and what further labels would bring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from app.console import command, counted, duration
from app.errors import UserError
from app.evaluation import charts
from app.evaluation.learning_curve import fit
from app.evaluation.run_files import read_figures
from app.files import write_csv, write_json, write_text
from app.page import drawing, page, table, text
from app.planning.plan import Planner, measure
from app.training.prepare import Prepared, Request, prepare

log = logging.getLogger("app")
STEPS = (1, 3)  # times powers of ten: the numbers of images that are tried
VALID_FRACTION = 0.3  # of sets without a validation split: few images would say nothing
NAMES = {"bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class Wanted:
    """Hold the words of a command.

    Attributes:
        overrides, size: as of `Request`.
        images: numbers of training images; none: 1, 3, 10, 30, … and all.
        seeds: runs of each number.
        more: labels whose gain is foretold.
    """

    overrides: tuple[str, ...]
    size: str
    images: tuple[int, ...]
    seeds: int
    more: int
    folder: Path


@dataclass(frozen=True)
class Cell:
    """Hold one run: on so many images, drawn by the seed."""

    images: int
    seed: int
    folder: Path


def draw_curve(wanted: Wanted, train: Callable[[Request], None] | None) -> None:
    """Train what is left of the runs, fit the curve, write it and say what it foretells.

    Args:
        train: makes an ordinary run; None: say what the runs would take, and do not train.

    Raises:
        UserError: whatever the user must mend; or too few runs ended for a curve.
    """
    whole = prepare(_request(wanted, Cell(0, 0, wanted.folder), []))
    total = len(whole.splits.train.images)
    cells = _cells(wanted, total)
    if train is None:
        _show_cost(wanted, cells, total)
        return
    problems: dict[Cell, str] = {}
    for number, cell in enumerate(cells, 1):
        if read_figures(cell.folder):
            continue
        log.info("run %d of %d: %s, seed %d", number, len(cells), _images(cell), cell.seed)
        request = _request(wanted, cell, [f"dataset.limit={cell.images}"])
        problem = _problem(train, request)
        if problem is not None:
            problems[cell] = problem
            log.warning("note: %s, seed %d: %s", _images(cell), cell.seed, problem)
    _write(wanted, cells, problems, total)


def _images(cell: Cell) -> str:
    return counted(cell.images, "image")


def _cells(wanted: Wanted, total: int) -> list[Cell]:
    """Return the runs, the small ones first; refuse numbers of images that there are not."""
    if beyond := [size for size in wanted.images if size > total]:
        raise UserError(f"--sizes {beyond[0]}: there are {total} images to train on")
    powers = range(len(str(total)))
    usual = sorted({step * 10**power for power in powers for step in STEPS} | {total})
    sizes = sorted(set(wanted.images)) or [size for size in usual if size <= total]
    if len(sizes) < 2:
        raise UserError("a curve takes two numbers of images; label more of them, or give --sizes")
    width = len(str(total))
    return [
        Cell(size, seed, wanted.folder / f"images{size:0{width}}-seed{seed}")
        for size in sizes
        for seed in range(wanted.seeds)
    ]


def _request(wanted: Wanted, cell: Cell, more: Sequence[str]) -> Request:
    """Return the words of an ordinary run, whose seed also says which images are set aside."""
    overrides = [
        "dataset.folds=none",
        f"dataset.valid_fraction={VALID_FRACTION}",
        "dataset.test_fraction=0",
        *wanted.overrides,
        f"seed={cell.seed}",
        f"output_dir={cell.folder}",
        *more,
    ]
    return Request(overrides, size=wanted.size, recipe="auto", resume="auto")


def _problem(train: Callable[[Request], None], request: Request) -> str | None:
    """Train a run; return why it was refused, or None."""
    try:
        train(request)
    except (UserError, FloatingPointError) as error:
        return " ".join(str(error).split())
    return None


def _show_cost(wanted: Wanted, cells: Sequence[Cell], total: int) -> None:
    """Say how long the runs take, by a few updates of the largest."""

    def prepared(cell: Cell) -> Prepared:
        return prepare(_request(wanted, cell, [f"dataset.limit={cell.images}"]))

    times = measure(prepared(max(cells, key=lambda cell: cell.images)))
    seconds = 0.0
    for size in dict.fromkeys(cell.images for cell in cells):
        one = prepared(Cell(size, 0, wanted.folder / "plan"))
        each = times.total(Planner(one).plan(one.config), one.splits)
        log.info("%-11s %s each", f"{size} of {total}", duration(each))
        seconds += wanted.seeds * each
    log.info("%-11s %s: %s", "time", counted(len(cells), "run"), duration(seconds))


def _write(wanted: Wanted, cells: Sequence[Cell], problems: dict[Cell, str], total: int) -> None:
    """Write curve.csv, curve.json and curve.html; log what the curve foretells."""
    figures = {cell: read_figures(cell.folder) for cell in cells}
    ended = [cell for cell in cells if figures[cell]]
    if not ended:
        raise UserError("no run ended: nothing to draw a curve of")
    # What decides which weights are best; a run of few images may have learnt by boxes alone.
    has_masks = all("segm/AP" in figures[cell] for cell in ended)
    name = "segm/AP" if has_masks else "bbox/AP"
    rows = [
        {
            "images": cell.images,
            "seed": cell.seed,
            name: figures[cell].get(name, ""),
            "seconds": figures[cell].get("seconds", ""),
            "problem": problems.get(cell, ""),
            "again": command("./train.sh", *_words(wanted, cell)),
        }
        for cell in cells
    ]
    write_csv(wanted.folder / "curve.csv", list(rows[0]), rows)
    values = [float(figures[cell][name]) for cell in ended]
    sizes = [cell.images for cell in ended]
    if len(set(sizes)) < 2:
        raise UserError(f"{wanted.folder}: runs of one number of images ended; a curve takes two")
    fitted = fit(sizes, values)
    gain, spread = fitted.gain(total, wanted.more)
    called = NAMES.get(name, name)
    sentence = f"{wanted.more} more labels: {gain:+.2f} ± {spread:.2f} {called} (95 %)"
    law = {"top": fitted.law.top, "fall": fitted.law.fall, "power": fitted.law.power}
    foretold = {"images": total, "more": wanted.more, "gain": gain, "spread": spread}
    write_json(wanted.folder / "curve.json", {"figure": name, "law": law, "foretold": foretold})
    shown = [
        [str(size), *(f"{value:.3f}" for value in (np.mean(of), min(of), max(of)))]
        for size in dict.fromkeys(sizes)
        for of in [[value for s, value in zip(sizes, values, strict=True) if s == size]]
    ]
    drawn = charts.learning_curve(sizes, values, fitted, total + wanted.more, called)
    told = [f"<p>{text(f'{_images(c)}, seed {c.seed}: {why}')}</p>" for c, why in problems.items()]
    parts = [
        f"<p>{text(sentence)}</p>",
        drawing(drawn, f"{called} over training images; band: 95 % of the curve"),
        table(["training images", "mean", "least", "most"], shown),
        *told,
    ]
    file = wanted.folder / "curve.html"
    write_text(file, page("Learning curve", parts))
    for row in shown:
        log.info("%6s images: %s %s (%s to %s)", row[0], called, *row[1:])
    log.info("%s", sentence)
    log.info("curve: %s", file)


def _words(wanted: Wanted, cell: Cell) -> list[str]:
    """Return the words by which a run can be done again."""
    request = _request(wanted, replace(cell, folder=cell.folder), [])
    size = [] if wanted.size == "auto" else ["--model", wanted.size]
    return ["--recipe", "auto", *size, "--limit", str(cell.images), *request.overrides]
