"""Score COCO results from elsewhere, without a model."""

from __future__ import annotations

import logging
from pathlib import Path

from app.errors import UserError
from app.evaluation import record
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
    evaluation = Record(results_file.stem, truth, results)
    record.write(output, evaluation)
    write_json(output / METRICS, figures)
    for name, value in figures.items():
        if "/AP/" not in name:
            log.info("%-24s %.4f", name, value)
    log.info("figures: %s; report: %s", output / METRICS, write_report(output, evaluation))
    return figures
