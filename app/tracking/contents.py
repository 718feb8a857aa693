"""What a tracker is sent of a run's folder, checked before anything of it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from app.errors import UserError
from app.evaluation.run_files import FIGURES, SETTINGS, read_run
from app.training.metric import metric_name

FILES = (
    *("report.html", "dataset_report.html", "config.yaml", "config_resolved.yaml"),
    *("environment.json", "metrics.csv", "metrics.json", "metrics_by_class.csv", "train.log"),
)
FOLDERS = ("plots", "predictions")
BEST = "weights/best"


def check_contents(folder: Path) -> None:
    """Refuse a folder whose run cannot be sent, before a tracker is asked.

    Raises:
        UserError: no run in the folder, or files that are not as a run wrote them.
    """
    if not (folder / SETTINGS).exists():
        raise UserError(f"{folder}: no run of this project (it has no {SETTINGS})")
    check_own(folder)
    run = read_run(folder)
    if not run.figures:  # it was stopped, and may be resumed one day
        return
    needed = ("epochs", metric_name(run.figures, run.settings.evaluation.metric))
    if lacking := [name for name in needed if name not in run.figures]:
        raise UserError(f"{folder / FIGURES}: lacks {', '.join(lacking)}")


def check_own(folder: Path) -> None:
    """Refuse links, which would send another file than the run's, pipes and devices.

    Raises:
        UserError: names each of them.
    """
    if problems := [problem for path in _sent(folder) if (problem := _problem(path))]:
        raise UserError(problems)


def _problem(path: Path) -> str | None:
    if path.is_symlink():
        return f"{path}: is a link, and what it leads to would be sent; put the file itself there"
    if path.exists() and not (path.is_file() or path.is_dir()):
        return f"{path}: is no regular file, but a pipe, socket or device; remove it"
    return None


def _sent(folder: Path) -> Iterator[Path]:
    """Yield all that is sent of a folder, and the folders in which that lies."""
    yield folder / "weights"
    for name in (*FILES, *FOLDERS, BEST):
        yield folder / name
        if not (folder / name).is_symlink():
            yield from (folder / name).rglob("*")
