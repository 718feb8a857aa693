"""Updates without a run around them: what tests of a step are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from sam3.model.sam3_image import Sam3Image

from app.config.compose import load_config
from app.config.schema import Config
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset
from app.model.build import build_model
from app.model.device import choose_precision
from app.training.batches import Batches
from app.training.losses import LabelLosses
from app.training.step import Step, StepResult, build_accelerator
from tests.helpers import TINY


@dataclass(frozen=True)
class Updates:
    """A step and the batches that it takes."""

    step: Step
    batches: Batches

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[StepResult]:
        """Update the weights by every image once, but for those of updates that are done."""
        self.step.set_training()
        for batches in self.batches.epoch(epoch, first_update):
            yield self.step(batches, epoch)


def make_updates(
    config: Config,
    model: Sam3Image,
    data: QueryDataset,
    accelerator: Accelerator,
    lr_scale: float = 1.0,
) -> Updates:
    """Return what a run of the configuration updates the model by."""
    batches = Batches(config, data, accelerator)
    precision = choose_precision(config.training.precision, accelerator.device, config.model)
    losses = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), precision)
    return Updates(Step(config, model, losses, accelerator, batches, lr_scale=lr_scale), batches)


def tiny_updates(shapes: Path, *overrides: str) -> tuple[Updates, QueryDataset]:
    """Return updates of nano on few pixels, from random weights, and the images they take."""
    config = load_config([*TINY, *overrides])
    transforms = [instantiate(node) for node in config.transforms.train]
    data = QueryDataset(load_splits(shapes).train, transforms, seed=0)
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    accelerator = build_accelerator(torch.device("cpu"))
    return make_updates(config, model, data, accelerator, lr_scale=1.0), data
