"""A run under way: epochs, validations, saves, and a good place to stop at any moment.

Every process has the same `RunState`; the first one validates and writes, and tells the others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from sam3.model.sam3_image import Sam3Image

from app.config.schema import Config
from app.console import progress
from app.datasets.coco import Dataset
from app.evaluation.evaluate import score_dataset as score
from app.evaluation.scoring import THRESHOLD
from app.evaluation.validate import Ranks
from app.inference.predictor import Predictor
from app.model import weights
from app.signals import Stopped, StopRequest
from app.tracking.files import Tracker
from app.training import checkpoints
from app.training.checkpoints import RunState
from app.training.fingerprint import Fingerprint
from app.training.loop import Loop
from app.training.metric import gain, metric_name
from app.training.random_state import random_state
from app.training.table import Table

log = logging.getLogger("app")
Figures = dict[str, float]


class Session:
    """Trains from where `state` is to the end.

    Args:
        model: the loop's, as upstream made it.
        valid: to validate on.
        header: of the weights that are saved.
        tracker: None in all processes but the first.
        stop: asked after each update, and after each image of a validation.
    """

    def __init__(
        self,
        config: Config,
        model: Sam3Image,
        loop: Loop,
        accelerator: Accelerator,
        *,
        valid: Dataset,
        header: weights.Header,
        fingerprint: Fingerprint,
        precision: torch.dtype,
        tracker: Tracker | None,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.model, self.loop, self.accelerator = model, loop, accelerator
        self.valid, self.header, self.fingerprint = valid, header, fingerprint
        self.precision = precision
        self.tracker = tracker
        self.stop = stop
        self.folder = Path(config.output_dir)
        self.state = RunState()
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the same run, whose weights the model has already."""
        self.state = checkpoints.restore(checkpoint, self.loop, self.accelerator.process_index)
        validated = [row for row in self.state.rows if THRESHOLD in row]
        self._keep_threshold(validated[-1] if validated else {})

    def run(self) -> None:
        """Train all epochs that are left, or until it no longer gets better.

        Raises:
            Stopped: by a signal; the state is saved.
            FloatingPointError: a loss or gradient is not finite; the state before is saved.
            UserError: the disk is full; the last checkpoint is whole.
        """
        self._table = Table(self.config.training.epochs, self.state.epoch)
        with self.stop.deferred():
            try:
                self._score_start()
                metric_name(self.state.baseline, self.config.evaluation.metric)  # one that there is
                while not self._is_finished():
                    self._train_epoch()
                    self._end_epoch()
            except Stopped:
                self.save()
                log.info("stopped %s", self._where())
                raise
            except FloatingPointError as error:
                self.save()
                raise FloatingPointError(f"{error} Stopped {self._where()}") from None

    def save(self) -> None:
        """A checkpoint of where the run is, with the random states of all processes."""
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            with checkpoints.disk_errors(self.folder):
                checkpoints.save(
                    self.folder / "checkpoints",
                    self.state,
                    self.model,
                    self.header,
                    self.loop,
                    fingerprint=self.fingerprint,
                    random_states=random_states,
                )
        self._saved_at = time.monotonic()

    def _is_finished(self) -> bool:
        return self._is_stale() or self.state.epoch >= self.config.training.epochs

    def _is_stale(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.state.stale >= patience

    def _where(self) -> str:
        state = self.state
        return (
            f"after update {state.updates}, in epoch {state.epoch + 1}; saved in "
            f"{self.folder / 'checkpoints'}; go on with the same command and --resume"
        )

    def _score_start(self) -> None:
        if self.state.baseline:
            return
        self.state.baseline = self._score("before training")
        log.info("%s", self._table.row(0, self.state.baseline))
        if self.config.training.warm_start.method != "none":
            self.save()

    def _train_epoch(self) -> None:
        """The updates of the epoch under way that are left."""
        state, loop = self.state, self.loop
        epochs = self.config.training.epochs
        title, total = f"epoch {state.epoch + 1}/{epochs}: update", loop.updates_per_epoch * epochs
        first = state.updates - state.epoch * loop.updates_per_epoch
        with progress(title, total, state.updates) as advance:
            begun = time.monotonic()
            for step in loop.run_epoch(state.epoch, first):
                state.updates += 1
                for name, value in step.losses.items():
                    state.losses[name] = state.losses.get(name, 0.0) + value
                state.images += step.images
                state.seconds += time.monotonic() - begun
                advance(state.updates, f"loss {step.loss:.3g}")
                self._pause()
                begun = time.monotonic()

    def _pause(self) -> None:
        """Between updates: stop where any process was asked to, save where it is time."""
        minutes = self.config.training.save_minutes
        is_due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        asked = torch.tensor([self.stop.asked, is_due], dtype=torch.int32)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked.to(self.accelerator.device), "sum")
        if asked[0]:
            raise Stopped
        if asked[1]:
            self.save()

    def _end_epoch(self) -> None:
        """Validate, keep the best, write the figures, save: as is due."""
        state = self.state
        row = self._row()
        if self._is_due(self.config.evaluation.every):
            figures = self._score(f"epoch {state.epoch + 1}")
            row |= figures
            self._keep_threshold(figures)
            self._keep_best(figures)
        state.rows.append(row)
        state.epoch += 1
        state.losses, state.images, state.seconds = {}, 0, 0.0
        log.info("%s", self._table.row(state.epoch, row))
        if self._is_stale():
            log.info("no better in %d validations (training.patience): the end", state.stale)
        if self.tracker is not None:
            with checkpoints.disk_errors(self.folder):
                self.tracker.log_epoch(state.rows)
        if self._is_finished() or state.epoch % self.config.training.save_every == 0:
            self._save_weights("last")
            self.save()

    def _row(self) -> Figures:
        state = self.state
        updates = self.loop.updates_per_epoch
        return {
            "epoch": state.epoch + 1,
            **{f"train/{name}": value / updates for name, value in state.losses.items()},
            "train/learning_rate": self.loop.learning_rate,
            "train/seconds_per_update": state.seconds / updates,
            "train/images_per_second": state.images / state.seconds,
        }

    def _is_due(self, every: int) -> bool:
        epoch = self.state.epoch + 1
        return epoch % every == 0 or epoch == self.config.training.epochs

    def _score(self, title: str) -> Figures:
        """Figures of the weights as they are now, each process on its share of the images.

        Raises:
            Stopped, UserError: in all processes, whichever of them met it.
        """
        ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes, gather_object)
        with self._kept_weights():
            predictor = Predictor(self.model, self.config.model, self.precision)
            scored = score(
                predictor, self.valid, self.config, title, check=self.stop.check, ranks=ranks
            )
        return scored.figures

    def _kept_weights(self) -> contextlib.AbstractContextManager[None]:
        """The weights that are validated and kept: the average, where there is one."""
        average = self.loop.average
        return average.in_place() if average is not None else contextlib.nullcontext()

    def _keep_threshold(self, row: Figures) -> None:
        """The score at which F1 is highest goes with the weights."""
        self.header = self.header.model_copy(update={"threshold": row.get(THRESHOLD)})

    def _keep_best(self, figures: Figures) -> None:
        """Save `weights/best` when the chosen figure improves; at equal figures the later stays."""
        name = metric_name(figures, self.config.evaluation.metric)
        better = gain(name, figures[name], self.state.best)
        self.state.stale = 0 if better > 0 else self.state.stale + 1
        if better >= 0:
            self.state.best = figures[name]
            self._save_weights("best")

    def _save_weights(self, name: str) -> None:
        if self.accelerator.is_main_process:
            with self._kept_weights(), checkpoints.disk_errors(self.folder):
                weights.save(self.model, self.folder / "weights" / name, self.header)
