"""A sweep from the command's words: made here, handed to a cluster, or told of."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import typer

from app.cli.options import SweepFlags
from app.console import counted
from app.errors import UserError
from app.launch import kubernetes, shards, slurm
from app.signals import StopRequest
from app.sweeps import page, run, table
from app.sweeps.plan import Cell, Plan, as_word, load_plan, read_plan, save_plan, to_request
from app.sweeps.words import Words
from app.training.prepare import configure

log = logging.getLogger("app")
CLUSTERS = ("slurm", "kubernetes")
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
    if cluster not in (None, "none", *CLUSTERS):
        raise UserError(f"--cluster {cluster}: there is {', '.join(CLUSTERS)}")
    if what.is_dir():
        plan = load_plan(what)
    else:
        folder = output_dir or Path("outputs") / what.stem
        plan = read_plan(what, base, folder)
        save_plan(plan)
    if cluster in CLUSTERS:
        _hand_over(plan, flags, cluster, base)
        return
    if cell is not None:
        failed = _make_unit(plan, _number(cell, plan), stop, flags)
    else:
        slots = run.gpus()[: flags.jobs] if flags.jobs else run.gpus()
        if flags.jobs and slots == [None]:
            slots = [None] * flags.jobs
        failed = _make_all(plan, stop, slots, flags)
    if cell is None:
        tell(plan.folder, whole=True)
    if failed:
        for each in failed:
            log.error("failed: %s: %s", each.name, run.ended(plan, each))
        raise typer.Exit(3)


def _number(cell: str, plan: Plan) -> int:
    number = shards.numbered() if cell == "auto" else None
    if cell != "auto" and re.fullmatch("[0-9]{1,9}", cell):
        number = int(cell)
    if number is None:
        raise UserError(
            f"--cell {cell}: must be a number; auto takes that of {' or '.join(shards.NUMBERS)}"
        )
    if number >= plan.units:
        raise UserError(f"--cell {number}: there are {plan.units}, from 0")
    return number


def _make_all(
    plan: Plan, stop: StopRequest, slots: Sequence[str | None], flags: SweepFlags
) -> list[Cell]:
    if not plan.is_drawn:
        forwards = not slurm.is_inside()
        return run.make(plan, plan.cells(), stop, slots=slots, again=flags.retry, forwards=forwards)
    failed: list[Cell] = []
    for number in range(plan.units):
        failed += _make_unit(plan, number, stop, flags, slots)
    return failed


def _make_unit(
    plan: Plan,
    number: int,
    stop: StopRequest,
    flags: SweepFlags,
    slots: Sequence[str | None] = (None,),
) -> list[Cell]:
    """Make a cell, or all cells of a trial of Optuna's."""
    forwards = not slurm.is_inside()
    if not plan.is_drawn:
        cell = plan.cells()[number]
        return run.make(plan, [cell], stop, again=flags.retry, forwards=forwards)
    from app.sweeps.search import Study, Watched

    study = Study(plan)
    with study.trial(number) as cells:
        if cells is None:
            log.info("trial %d is at work elsewhere", number)
            return []
        watch = Watched(study, number) if plan.file.pruner != "none" else None
        return run.make(
            *(plan, cells, stop),
            slots=slots,
            again=flags.retry,
            watch=watch,
            forwards=forwards,
        )


def _hand_over(plan: Plan, flags: SweepFlags, cluster: str, base: Words) -> None:
    """Let a cluster make the cells, a job each."""
    words = ["sweep", str(plan.folder.resolve()), *(["--retry"] if flags.retry else [])]
    given = [f"cluster.{key}={as_word(value)}" for key, value in plan.file.cluster.items()]
    given += [text for text in base.overrides if text.startswith("cluster.")]
    config = configure(to_request([*plan.base, *given]), told=True)[0]
    name = plan.folder.resolve().name
    if cluster == "slurm":
        slurm.submit_array(
            [[*words, "--cell", str(number)] for number in range(plan.units)],
            config,
            plan.folder,
            name,
            at_once=flags.at_once,
        )
        return
    kubernetes.submit(
        [*words, "--cell", "auto"],
        config,
        plan.folder,
        name,
        completions=plan.units,
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
