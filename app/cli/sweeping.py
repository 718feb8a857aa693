"""A sweep from the command's words: made here, handed to a cluster, or told of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import typer

from app.cli.options import SweepFlags
from app.console import counted
from app.launch import clusters, shards, slurm
from app.model.device import slots
from app.signals import StopRequest
from app.sweeps import page, run, table
from app.sweeps.plan import Cell, Plan, as_word, load_plan, read_plan, save_plan, to_request
from app.sweeps.words import Words
from app.tracking.state import mlflow_uri
from app.training.prepare import configure

log = logging.getLogger("app")
NOTHING = Words()


def start(
    what: Path,
    output_dir: Path | None,
    flags: SweepFlags,
    stop: StopRequest,
    *,
    base: Words = NOTHING,
    cell: str | None = None,
    cluster: str | None = None,
) -> None:
    """Make a sweep, what is left of one, a cell of it, or hand it to a cluster.

    Args:
        what: YAML, or the folder of a sweep that goes on.
        base: what `train` was asked for beside it.
        cell: number of the one that is made, or auto.

    Raises:
        UserError: whatever the user must mend; typer.Exit(3): some cells failed.
    """
    cluster = None if cluster == "none" else cluster
    clusters.check(cluster)
    if what.is_dir():
        plan = load_plan(what)
    else:
        folder = output_dir or Path("outputs") / what.stem
        plan = read_plan(what, base, folder)
        save_plan(plan)
    if cluster is not None:
        _hand_over(plan, flags, cluster, base)
        return
    tracking = configure(to_request(plan.base), told=True)[0].tracking
    is_tracked = mlflow_uri(tracking.mlflow) is not None
    more: dict[str, str] = {}
    if is_tracked:
        from app.tracking import mlflow

        if (parent := mlflow.open_parent(plan.folder, tracking)) is not None:
            more[mlflow.PARENT] = parent
    make = partial(
        run.make,
        plan,
        stop=stop,
        slots=[{}] if cell is not None else slots(flags.jobs),
        again=flags.retry,
        forwards=not slurm.is_inside(),  # whose signals reach the cells as well
        environment=more,
    )
    numbers: Sequence[int] = range(plan.units)
    if cell is not None:
        numbers = [shards.choose(cell, plan.units, "--cell")]
    if plan.is_drawn:
        failed = [each for number in numbers for each in _make_trial(plan, number, make)]
    else:
        cells = plan.cells()
        failed = make([cells[number] for number in numbers])
    if cell is None:
        tell(plan.folder, whole=True)
    if cell is None and is_tracked:
        mlflow.end_parent(plan.folder, tracking, _summary(plan))
    if failed:
        for each in failed:
            log.error("failed: %s: %s", each.name, run.ended(plan, each))
        raise typer.Exit(3)


def _summary(plan: Plan) -> dict[str, float]:
    """Return the best figure of each dataset, by its name."""
    found = table.outcomes(plan)
    name = table.name_of(plan, found)
    best = {dataset: each.figures[name] for dataset, each in table.best(plan, found).items()}
    return {f"best/{dataset}/{name}": value for dataset, value in best.items()}


def _make_trial(plan: Plan, number: int, make: Callable[..., list[Cell]]) -> list[Cell]:
    """Make all cells of a trial that Optuna draws, or has drawn."""
    from app.sweeps.search import Study, Watched

    study = Study(plan)
    with study.trial(number) as cells:
        if cells is None:
            log.info("trial %d is at work elsewhere", number)
            return []
        pruned = plan.file.pruner != "none"
        return make(cells, watch=Watched(study, number) if pruned else None)


def _hand_over(plan: Plan, flags: SweepFlags, cluster: str, base: Words) -> None:
    """Let a cluster make the cells, a job each."""
    words = ["sweep", str(plan.folder.resolve()), *(["--retry"] if flags.retry else [])]
    given = [f"cluster.{key}={as_word(value)}" for key, value in plan.file.cluster.items()]
    given += [text for text in base.overrides if text.startswith("cluster.")]
    config = configure(to_request([*plan.base, *given]), told=True)[0]
    clusters.hand_over(
        *(cluster, words, "--cell", config, plan.folder),
        count=plan.units,
        at_once=flags.at_once,
    )


def tell(folder: Path, *, whole: bool) -> None:
    """Print how far a sweep is; the whole table, and write its page, where that is asked for."""
    plan = load_plan(folder)
    found = table.outcomes(plan)
    counts = {
        state: sum(each.state == state for each in found)
        for state in (table.DONE, table.FAILED, table.RUNNING, table.LEFT)
    }
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    log.info("%s: %s", counted(len(found), "cell"), states)
    for each in found:
        if each.state == table.FAILED:
            log.info("failed: %s: %s", each.cell.name, each.reason.splitlines()[0])
    if not whole:
        return
    for line in _aligned(table.lines(plan, found)):
        log.info("%s", line)
    for name, value in plan.file.published.items():
        log.info("published: %s: %.3f", name, value)
    for dataset, each in table.best(plan, found).items():
        log.info("best of %s: %s", dataset, plan.command(each.cell))
    table.write(plan, found)
    page.write(plan, found)
    log.info("table: %s, page: %s", plan.folder / table.TABLE, plan.folder / page.PAGE)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
