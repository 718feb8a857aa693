"""What a sweep has found so far: a row a setting, over its datasets and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from app.errors import UserError
from app.evaluation.run_files import read_figures
from app.files import write_csv
from app.sweeps.plan import Cell, Plan
from app.sweeps.run import ended, is_at_work

AUTO = ("segm/AP", "bbox/AP")  # figures that decide, the first that all cells have
CALLED = {"segm/AP": "mask AP", "bbox/AP": "box AP"}
DONE, FAILED, RUNNING, LEFT = "done", "failed", "at work", "left"
TABLE = "sweep.csv"
COST = ("seconds", "peak_memory_gb")  # figures of training, whatever split counts


@dataclass(frozen=True)
class Outcome:
    """Hold what became of a cell.

    Attributes:
        state: DONE, FAILED, RUNNING or LEFT.
        figures: of metrics.json; empty unless done.
        reason: why it failed.
    """

    cell: Cell
    state: str
    figures: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """Hold a setting's figures.

    Attributes:
        by_dataset: dataset → mean over its seeds, and half the width of its 95 % interval, which
            is None of one seed.
        mean: over the datasets that all settings have; None where there is none.
        rank: mean over these, 1 the best.
        seconds, memory: of a run, on average; GB at its peak.
        problems: cells that failed.
        cells: of the setting, done or not.
    """

    setting: str
    by_dataset: Mapping[str, tuple[float, float | None]]
    mean: float | None
    rank: float | None
    seconds: float | None
    memory: float | None
    problems: int
    cells: Sequence[Cell]


def outcomes(plan: Plan) -> list[Outcome]:
    """Return what became of each cell, by the sweep's folder."""
    return [_outcome(plan, cell) for cell in plan.cells()]


def _outcome(plan: Plan, cell: Cell) -> Outcome:
    try:
        trained = read_figures(plan.run_folder(cell))
        cost = {key: value for key, value in trained.items() if key in COST}
        figures = read_figures(plan.figures_folder(cell))
        figures = {**figures, **cost} if figures else {}
    except UserError as error:
        return Outcome(cell, FAILED, {}, str(error))
    if figures:
        return Outcome(cell, DONE, figures)
    if is_at_work(plan, cell):
        return Outcome(cell, RUNNING, {})
    reason = ended(plan, cell)
    return Outcome(cell, LEFT, {}) if reason is None else Outcome(cell, FAILED, {}, reason)


def figure_name(plan: Plan, figures: Sequence[Mapping[str, float]]) -> str:
    """Return the name of the figure that cells are judged by."""
    if plan.file.metric != "auto":
        return plan.file.metric
    return next((name for name in AUTO if all(name in each for each in figures)), AUTO[-1])


def name_of(plan: Plan, found: Sequence[Outcome]) -> str:
    """Return the name of the figure of all that is done.

    Raises:
        UserError: the figure that was asked for is none that the runs have.
    """
    done = [each.figures for each in found if each.state == DONE]
    name = figure_name(plan, done)
    if done and not any(name in each for each in done):
        known = sorted({key for each in done for key in each if "/" in key})
        raise UserError(f"metric: {name}: no run has it; they have {', '.join(known[:20])}")
    return name


def rows(plan: Plan, found: Sequence[Outcome]) -> list[Row]:
    """Return a row a setting, the best first."""
    name = name_of(plan, found)
    by_setting: dict[str, list[Outcome]] = {}
    for each in found:
        by_setting.setdefault(each.cell.setting, []).append(each)
    means = {setting: _by_dataset(of, name) for setting, of in by_setting.items()}
    have = {setting: set(of) for setting, of in means.items() if of}
    common = sorted(set.intersection(*have.values())) if have else []
    ranks = _ranks({setting: means[setting] for setting in have}, common)
    made = [
        Row(
            setting,
            means[setting],
            _mean([means[setting][dataset][0] for dataset in common if setting in have]),
            ranks.get(setting),
            _mean(_values(of, "seconds")),
            max(_values(of, "peak_memory_gb"), default=None),
            sum(each.state == FAILED for each in of),
            [each.cell for each in of],
        )
        for setting, of in by_setting.items()
    ]
    return sorted(made, key=lambda row: (_last(row.rank), -_first(row.mean)))


def _by_dataset(found: Iterable[Outcome], name: str) -> dict[str, tuple[float, float | None]]:
    values: dict[str, list[float]] = {}
    for each in found:
        if name in each.figures:
            values.setdefault(each.cell.dataset, []).append(each.figures[name])
    return {dataset: interval(of) for dataset, of in values.items()}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95 % interval by Student's t; None of one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


def _ranks(
    means: Mapping[str, Mapping[str, tuple[float, float | None]]], datasets: Sequence[str]
) -> dict[str, float]:
    """Return the mean rank of each setting over the datasets; those that are equal share one."""
    if not datasets:
        return {}
    settings = list(means)
    of_each = [
        stats.rankdata([-means[setting][dataset][0] for setting in settings])
        for dataset in datasets
    ]
    return {
        setting: float(statistics.fmean(ranks[number] for ranks in of_each))
        for number, setting in enumerate(settings)
    }


def _values(found: Iterable[Outcome], name: str) -> list[float]:
    return [each.figures[name] for each in found if name in each.figures]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _last(rank: float | None) -> float:
    return math.inf if rank is None else rank


def _first(mean: float | None) -> float:
    return -math.inf if mean is None else mean


def best(plan: Plan, found: Sequence[Outcome]) -> dict[str, Outcome]:
    """Return the best cell of each dataset."""
    name = name_of(plan, found)
    chosen: dict[str, Outcome] = {}
    for each in found:
        held = chosen.get(each.cell.dataset)
        if name in each.figures and (held is None or each.figures[name] > held.figures[name]):
            chosen[each.cell.dataset] = each
    return chosen


def shown(value: tuple[float, float | None] | None) -> str:
    """Return a mean with its interval, as a table has it."""
    if value is None:
        return ""
    mean, half = value
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def lines(plan: Plan, found: Sequence[Outcome]) -> list[list[str]]:
    """Return the table's cells as text, its head first: a line a setting."""
    datasets = list(plan.sources)
    head = ["setting", *datasets, *(["mean", "rank"] if len(datasets) > 1 else [])]
    table = [[*head, "seconds", "GB", "failed"]]
    for row in rows(plan, found):
        cells = [row.setting, *(shown(row.by_dataset.get(dataset)) for dataset in datasets)]
        if len(datasets) > 1:
            cells += [_number(row.mean, 3), _number(row.rank, 2)]
        table.append(
            [*cells, _number(row.seconds, 0), _number(row.memory, 2), str(row.problems or "")]
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write(plan: Plan, found: Sequence[Outcome]) -> None:
    """Write sweep.csv: a row a cell, with the command that makes it again."""
    keys = list(plan.file.keys)
    figures = sorted({key for each in found for key in each.figures if not key.startswith("last/")})
    made = [
        {
            "setting": each.cell.setting,
            **{key: each.cell.values.get(key, "") for key in keys},
            "dataset": each.cell.dataset,
            "seed": each.cell.seed,
            "state": each.state,
            **{key: each.figures.get(key, "") for key in figures},
            "reason": each.reason,
            "again": plan.command(each.cell),
        }
        for each in found
    ]
    columns = ["setting", *keys, "dataset", "seed", "state", *figures, "reason", "again"]
    write_csv(plan.folder / TABLE, columns, made)
