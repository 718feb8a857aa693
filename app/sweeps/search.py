"""Settings that Optuna chooses by what was found (Akiba et al., KDD 2019, arXiv 1907.10902).

Its journal is a file in the sweep's folder, so that processes on several machines share a study
over a common disk. Values of a trial lie beside it, so that a trial that was killed goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from app.evaluation.run_files import read_figures
from app.files import locked, read_json, write_json
from app.sweeps import run
from app.sweeps.plan import Cell, Plan, Range, Value, as_word, trial_name
from app.sweeps.table import figure_name

JOURNAL = "optuna.journal"  # in the sweep's folder
STEPS = 10_000  # epochs that a cell has at most, in the numbering of what a trial reports


class Study:
    """The study of a sweep, opened.

    Args:
        plan: whose search is optuna.
    """

    def __init__(self, plan: Plan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan = plan
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if plan.file.pruner == "asha":
            pruner = optuna.pruners.SuccessiveHalvingPruner()
        plan.folder.mkdir(parents=True, exist_ok=True)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(plan.folder / JOURNAL))),
            study_name="sweep",
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=plan.file.draw_seed),
            pruner=pruner,
            load_if_exists=True,
        )

    @contextlib.contextmanager
    def trial(self, number: int) -> Iterator[Sequence[Cell] | None]:
        """Yield the cells of a trial, drawn now or before; None where another process has it.

        When the block ends the study hears what was found, if all cells are done.
        """
        file = self.plan.trial_file(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".lock").touch()
        with locked(file.with_suffix(".lock"), wait=False) as mine:
            if mine is False:
                yield None
                return
            if not file.is_file():
                self._draw(file)
            content = read_json(file)
            values = self.plan.trial(number) or {}
            yield self.plan.of(trial_name(number), values)
            self._tell(int(content["id"]), self.plan.of(trial_name(number), values))

    def _draw(self, file: Path) -> None:
        """Let Optuna choose values, and keep them."""
        trial = self._study.ask()
        values: dict[str, Value] = {}
        for key, choice in self.plan.file.keys.items():
            if isinstance(choice, Range) and choice.whole:
                whole = int(choice.low), int(choice.high)
                values[key] = trial.suggest_int(key, *whole, log=choice.log)
            elif isinstance(choice, Range):
                drawn = trial.suggest_float(key, choice.low, choice.high, log=choice.log)
                values[key] = float(f"{drawn:.4g}")
            else:  # Optuna holds no lists
                named = {as_word(value): value for value in choice}
                values[key] = named[trial.suggest_categorical(key, list(named))]
        write_json(file, {"id": trial._trial_id, "values": values})

    def _tell(self, id: int, cells: Sequence[Cell]) -> None:
        trial = optuna.trial.Trial(self._study, id)
        known = {each._trial_id: each.state for each in self._study.get_trials(deepcopy=False)}
        if known.get(id) not in (TrialState.RUNNING, TrialState.WAITING):
            return
        if all(run.is_done(self.plan, cell) for cell in cells):
            figures = [read_figures(self.plan.figures_folder(cell)) for cell in cells]
            name = figure_name(self.plan, figures)
            self._study.tell(trial, sum(found[name] for found in figures) / len(figures))
            return
        reasons = [run.ended(self.plan, cell) for cell in cells]
        if any(reason is not None for reason in reasons):
            pruned = any(reason and reason.startswith("pruned") for reason in reasons)
            self._study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)


class Watched:
    """Reports the validations of a trial's cells, and says which is behind.

    Args:
        number: of the trial, from 0.
    """

    def __init__(self, study: Study, number: int) -> None:
        content = read_json(study.plan.trial_file(number))
        self._trial = optuna.trial.Trial(study._study, int(content["id"]))
        self._plan, values = study.plan, study.plan.trial(number) or {}
        self._cells = study.plan.of(trial_name(number), values)
        self._told: set[int] = set()

    def is_behind(self, cell: Cell, rows: Sequence[dict[str, float]]) -> bool:
        """Return whether a cell, of which these are the epochs so far, is to end early."""
        first = self._cells.index(cell) * STEPS
        for row in rows:
            step, name = first + int(row["epoch"]), figure_name(self._plan, [row])
            if name in row and step not in self._told:
                self._told.add(step)
                self._trial.report(row[name], step)
        return self._trial.should_prune()
