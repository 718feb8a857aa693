"""The page of a sweep: its table, what its settings did, how its runs went, what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.console import counted
from app.errors import UserError
from app.evaluation.charts import svg
from app.evaluation.run_files import read_rows
from app.files import write_text
from app.page import drawing, page, table, text
from app.sweeps import table as tables
from app.sweeps.plan import Plan, Value, as_word
from app.sweeps.table import DONE, FAILED, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "sweep.html"
MOST_LINES = 200  # in a drawing
MOST_AXES = 8
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}


def write(plan: Plan, found: Sequence[Outcome]) -> None:
    """Write sweep.html to the sweep's folder."""
    head, *lines = [[text(cell) for cell in line] for line in tables.lines(plan, found)]
    name = tables.name_of(plan, found)
    called = tables.CALLED.get(name, name)
    counts = {state: sum(each.state == state for each in found) for state in (DONE, FAILED)}
    done = [each for each in found if name in each.figures]
    parts = [
        f"<p>{counted(counts[DONE], 'run')} done of {len(found)}, {counts[FAILED]} failed. "
        f"{text(called)}, mean over seeds ± half of its 95 % interval (Student's t); rank: over "
        "the datasets that all settings have, 1 the best.</p>",
        table(head, lines),
    ]
    if plan.file.published:
        rows = [[text(key), f"{value:.3f}"] for key, value in plan.file.published.items()]
        parts += ["<h2>Published</h2>", table(["figure", "value"], rows)]
    if done:
        drawn = drawing(settings(plan, done, name), f"{called} by setting, a line a run")
        parts += ["<h2>Settings</h2>", drawn] if plan.file.keys else []
        parts += ["<h2>Runs</h2>", drawing(curves(plan, found, name), f"{called} by epoch")]
        bests = [
            [
                text(dataset),
                text(each.cell.setting),
                str(each.cell.seed),
                f"{each.figures[name]:.3f}",
                f"<code>{text(plan.command(each.cell))}</code>",
            ]
            for dataset, each in tables.best(plan, found).items()
        ]
        columns = ["dataset", "setting", "seed", text(called), "made again by"]
        parts += ["<h2>Best of each dataset</h2>", table(columns, bests, numbers=len(columns))]
    failed = [
        [text(each.cell.name), text(each.reason).replace("\n", "<br>")]
        for each in found
        if each.state == FAILED
    ]
    if failed:
        parts += ["<h2>Failures</h2>", table(["run", "reason"], failed, numbers=2)]
    write_text(plan.folder / PAGE, page("Sweep", parts))


def settings(plan: Plan, done: Sequence[Outcome], name: str) -> str:
    """Draw the figure by the values of one key, or a line a run over the axes of several."""
    keys = [key for key in plan.file.keys if len({as_word(e.cell.values[key]) for e in done}) > 1]
    keys = keys[:MOST_AXES] or list(plan.file.keys)[:1]
    values = np.array([each.figures[name] for each in done])
    places = {key: positions([each.cell.values[key] for each in done]) for key in keys}

    def scatter(axes: Axes) -> None:
        x, ticks = places[keys[0]]
        names = [each.cell.dataset for each in done]
        for dataset in dict.fromkeys(names):
            chosen = [n for n, each in enumerate(names) if each == dataset]
            axes.plot(x[chosen], values[chosen], "o", markersize=4, label=dataset)
        axes.set_xticks(list(ticks), labels=list(ticks.values()))
        axes.set(xlabel=keys[0], ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    def parallel(axes: Axes) -> None:
        from matplotlib import colormaps

        low, high = values.min(), values.max()
        shares = (values - low) / max(high - low, 1e-9)
        for n in np.argsort(values)[-MOST_LINES:]:
            line = [*(places[key][0][n] for key in keys), shares[n]]
            axes.plot(line, color=colormaps["viridis"](shares[n]), linewidth=1, alpha=0.8)
        for at, key in enumerate(keys):
            for place, label in places[key][1].items():
                axes.annotate(label, (at, place), fontsize=7, ha="center", bbox=LABEL)
        for share, value in ((0.0, low), (1.0, high)):
            end = (len(keys), share)
            axes.annotate(f"{value:.3f}", end, fontsize=7, ha="center", bbox=LABEL)
        axes.set_xticks(range(len(keys) + 1), labels=[*keys, name], fontsize=7)
        axes.set_yticks([])

    return svg(scatter if len(keys) == 1 else parallel)


def positions(values: Sequence[Value]) -> tuple[Any, Mapping[float, str]]:
    """Return where values lie on an axis, 0..1 in their order, and what is written there."""
    distinct = list({as_word(value): value for value in values}.values())
    numbers = [v for v in distinct if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(distinct):
        distinct.sort()
    place = {as_word(v): n / max(len(distinct) - 1, 1) for n, v in enumerate(distinct)}
    ticks = {place[as_word(v)]: as_word(v) for v in distinct[:: max(len(distinct) // 8, 1)]}
    return np.array([place[as_word(value)] for value in values]), ticks


def curves(plan: Plan, found: Sequence[Outcome], name: str) -> str:
    """Draw the figure of each run over its epochs."""
    lines: list[tuple[list[float], list[float], bool]] = []
    for each in found:
        try:
            rows = [row for row in read_rows(plan.run_folder(each.cell)) if name in row]
        except UserError:
            continue
        if rows:
            values = [row[name] for row in rows]
            lines.append(([row["epoch"] for row in rows], values, each.state == DONE))

    def draw_lines(axes: Axes) -> None:
        for epochs, values, is_done in lines[:MOST_LINES]:
            axes.plot(epochs, values, "-" if is_done else "--", linewidth=1, alpha=0.7)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)

    return svg(draw_lines)
