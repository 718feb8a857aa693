"""Score weights on a split of a dataset, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import set_seed

from app.config.schema import Config
from app.console import TimeLeft, progress
from app.datasets.build import Splits
from app.datasets.coco import Dataset
from app.errors import UserError
from app.evaluation import record, report
from app.evaluation.by_examples import score_by_examples
from app.evaluation.intervals import with_intervals
from app.evaluation.off_prompt import choose_nouns
from app.evaluation.record import Record
from app.evaluation.report_page import write_report
from app.evaluation.summary import BY_EXAMPLES, bounds
from app.evaluation.validate import ALONE, Ranks, Validation, validate
from app.files import write_json
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model
from app.model.device import choose_device, choose_precision, choose_threads
from app.model.halves import hold_all
from app.model.vocabulary import in_vocabulary

log = logging.getLogger("app")


def evaluate(config: Config, splits: Splits, pretrained_path: Path | None) -> dict[str, float]:
    """Score weights on the split `evaluation.split`; write figures, results and report.

    Args:
        config: the whole of it, checked; the files go to `output_dir`.
        pretrained_path: file or folder of the weights; None for random ones.

    Raises:
        UserError: the dataset has no such split, or an image cannot be read.
    """
    dataset = choose_split(config, splits)
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    choose_threads(device, config.model)
    set_seed(config.seed)
    model, header = build_model(config.model), None
    if pretrained_path is not None:
        weights.load_into(model, pretrained_path, merge=False)
        header = weights.read_header(pretrained_path)
    levels = None if header is None else header.levels
    hold_all(model, precision)
    predictor = Predictor(model.to(device), config.model, precision, levels=levels)
    validation = score_dataset(predictor, dataset, config, config.evaluation.split)
    by_examples = score_examples(predictor, splits.train, dataset, config)
    folder = Path(config.output_dir)
    scored = Record(config.evaluation.split, dataset, validation.results)
    write_predictions(folder, scored, config)
    figures = with_intervals(validation.figures, dataset, validation.results) | by_examples
    write_json(folder / "metrics.json", figures)
    log.info("%s", summary(figures))
    log.info("figures: %s; report: %s", folder / "metrics.json", write_report(folder, scored))
    return validation.figures


def choose_split(config: Config, splits: Splits) -> Dataset:
    """Return the split `evaluation.split`; raise UserError where the dataset has none."""
    name = config.evaluation.split
    dataset: Dataset | None = getattr(splits, name)
    if dataset is None:
        raise UserError(
            f"evaluation.split={name}: the dataset has no {name} split; there are train and valid"
        )
    return dataset


def score_dataset(
    predictor: Predictor,
    dataset: Dataset,
    config: Config,
    title: str,
    *,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    time_left: TimeLeft | None = None,
) -> Validation:
    """Validate with the configuration's limits and nouns, and show progress.

    Args:
        title: of the progress, such as "epoch 3".
        check: called after each batch; may raise Stopped, which then ends all ranks.
        ranks: the processes that share the images; each of them must make the same call.
        time_left: of the run that this validation is a part of.

    Raises:
        UserError, Stopped: as in `validate`, on every rank.
    """

    def on_images(done: int, _total: int) -> None:
        advance(done, "")
        check()

    # On a GPU as many images as a training step takes, which holds activations and gradients of
    # them besides: validation never needs more memory than training does.
    batch_size = 1 if predictor.device.type == "cpu" else config.training.batch_size
    nouns = choose_nouns(dataset, config.evaluation.off_prompts, config.seed)
    with progress(f"{title}: image", len(dataset.images), time_left=time_left) as advance:
        return validate(
            predictor,
            dataset,
            max_detections=config.evaluation.max_detections,
            threshold=config.prediction.threshold,
            nouns=in_vocabulary(predictor.config.vocabulary, nouns),
            batch_size=batch_size,
            ranks=ranks,
            on_images=on_images,
        )


def score_examples(
    predictor: Predictor, examples: Dataset, dataset: Dataset, config: Config
) -> dict[str, float]:
    """Return figures by example boxes, as far as `evaluation.prompts` names any.

    Args:
        examples: whose boxes stand for classes in the images of `dataset`.
    """
    kinds = [kind for kind in config.evaluation.prompts if kind != "words"]
    if not kinds:
        return {}
    return score_by_examples(
        predictor,
        examples,
        dataset,
        kinds,
        max_detections=config.evaluation.max_detections,
        seed=config.seed,
    )


def write_predictions(folder: Path, scored: Record, config: Config) -> None:
    """Write what figures were computed from: the results, the truth, and pictures of both."""
    record.write(folder, scored)
    report.draw_comparisons(
        scored.truth,
        scored.results,
        folder / "plots",
        count=config.evaluation.pictures,
        threshold=config.prediction.threshold,
    )


def summary(figures: dict[str, float]) -> str:
    """Return the main figures in a line, AP with its interval."""
    names = {
        "bbox/AP": "box AP",
        "bbox/AP50": "box AP50",
        "segm/AP": "mask AP",
        "segm/AP50": "mask AP50",
        "segm/cgF1": "cgF1",
        "off_prompt/firing": "off-prompt firing",
        **BY_EXAMPLES,
    }
    lines = [
        f"{name} {figures[key]:.3f}" + (f" ({found})" if (found := bounds(figures, key)) else "")
        for key, name in names.items()
        if key in figures
    ]
    return ", ".join(lines)
