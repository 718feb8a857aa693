"""Results from elsewhere scored, and two runs compared: what the command line says of them."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.errors import UserError
from app.evaluation import record
from app.evaluation.compare import compare
from app.evaluation.record import Record
from app.evaluation.report_page import write_report
from app.evaluation.results import read_results, read_truth
from app.evaluation.scoring import score
from app.files import exists_problem, write_json

log = logging.getLogger("app")
METRICS = "metrics.json"


def score_files(
    truth_file: Path, results_file: Path, output: Path, *, threshold: float, overwrite: bool
) -> dict[str, float]:
    """Score COCO results against a COCO truth, from anywhere; write figures and report.

    Raises:
        UserError: with every problem of the files, before anything is written.
    """
    if (output / METRICS).exists() and not overwrite:
        raise UserError(exists_problem(output, f"holds {METRICS} already"))
    truth = read_truth(truth_file)
    results = read_results(results_file, truth)
    figures = score(truth, results, threshold=threshold)
    record.write(output, Record(results_file.stem, truth, results))
    write_json(output / METRICS, figures)
    for name, value in figures.items():
        if "/AP/" not in name:
            log.info("%-24s %.4f", name, value)
    log.info("figures: %s; report: %s", output / METRICS, write_report(output))
    return figures


def show_comparison(one: Path, other: Path) -> None:
    """Print the figures of two runs side by side, and by class."""
    found = compare(one, other)
    table = Table()
    for heading in ("figure", str(one), str(other), "difference", "95 % of resamplings"):
        table.add_column(Text(heading), overflow="fold")
    for line in found.lines:
        interval = "" if line.interval is None else "{:+.3f}…{:+.3f}".format(*line.interval)
        sure = " *" if line.is_sure else ""
        cells = (line.name, f"{line.one:.3f}", f"{line.other:.3f}", f"{line.difference:+.3f}")
        table.add_row(*map(Text, (*cells, interval + sure)))
    Console(soft_wrap=True).print(table)
    log.info(
        "* the interval, from %d resamplings of the %d images, leaves out 0",
        found.resamplings,
        found.images,
    )
