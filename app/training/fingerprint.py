"""The fingerprint of a run: all that decides its weights, and must be the same to resume it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.config.schema import Config
from app.datasets.build import Splits
from app.datasets.coco import Dataset
from app.errors import UserError
from app.files import flatten, hash_file
from app.training.teacher import teacher_file

Fingerprint = dict[str, Any]

# Keys that say where, how fast or how often: another value gives the same weights, up to rounding
# where it says what is computed twice or compiled. The dataset itself stands for how it was found.
# Epochs and patience may be extended.
_HARMLESS = (
    *(
        "output_dir",
        "checkpoint",
        "prediction.",
        "evaluation.every",
        "evaluation.pictures",
        "evaluation.prompts",
    ),
    *("training.epochs", "training.patience", "training.num_gpus", "training.num_workers"),
    *("training.device", "training.save_every", "training.save_minutes", "training.check_finite"),
    *("training.warm_start.", "training.compile", "cluster.", "model.activation_checkpointing"),
    *("dataset.dir", "dataset.format", "dataset.huggingface.", "dataset.roboflow"),
    *("dataset.valid_fraction", "dataset.test_fraction", "dataset.max_drop", "dataset.limit"),
    *(
        "dataset.group",
        "dataset.reading.group_column",
        "dataset.folds",
        "training.last_epoch",
        "dataset.prompts",
        "dataset.bad_images",
        "dataset.shapes.",
        "distill.teacher",
    ),
)
# The flag by which a key is given, where there is one. `optim.lr_scale` is `--lr` over `optim.lr`.
_FLAGS = {
    **{"seed": "--seed", "transforms.train": "--augmentation", "model.name": "--model"},
    **{"model.resolution": "--resolution", "method.name": "--method", "method.freeze": "--freeze"},
    **{"training.batch_size": "--batch-size", "training.grad_accum": "--grad-accum"},
    **{"processes": "--num-gpus", "teacher": "--teacher", "optim.lr_scale": "--lr"},
}
# Without these alike, a figure from before cannot be compared with one of now.
_JUDGES = ("validation data", "model.", "evaluation.", "training.precision", "training.ema")


def fingerprint(config: Config, splits: Splits, processes: int) -> Fingerprint:
    """Return name -> value, as JSON has them; `processes` is the world size."""
    settings = flatten(config.model_dump(mode="json"))
    teacher = teacher_file(config)
    return {
        "training data": _identify(splits.train),
        "validation data": _identify(splits.valid),
        "teacher": None if teacher is None else hash_file(teacher),
        "processes": processes,
        **{key: value for key, value in settings.items() if not key.startswith(_HARMLESS)},
    }


def check_same(checkpoint: Path, then: Fingerprint, now: Fingerprint) -> None:
    """Refuse to go on with another run; names all that differs.

    Raises:
        UserError: each difference, with the value then and now.
    """
    changed = differences(then, now)
    if changed:
        raise UserError(
            [
                f"{checkpoint}: is of a run with other settings:",
                *[f"  {_difference(key, then, now)}" for key in changed],
                "Resume with what the run was started with; or take its weights alone and start "
                "the schedule anew from them: --resume=weights",
            ]
        )


def are_comparable(then: Fingerprint, now: Fingerprint) -> bool:
    """Return whether figures of validation mean the same in both."""
    return not any(key.startswith(_JUDGES) for key in differences(then, now))


def differences(then: Fingerprint, now: Fingerprint) -> list[str]:
    """Return the names whose values differ, or that only one of the two has.

    A fingerprint of before may hold keys that are harmless since.
    """
    told = [key for key in {**then, **now} if not key.startswith(_HARMLESS)]
    return [key for key in told if _say(then, key) != _say(now, key)]


def _difference(key: str, then: Fingerprint, now: Fingerprint) -> str:
    """Return "--lr: 0.0001 then, 0.0003 now", as the flag was typed; or by its key."""
    if key == "optim.lr_scale":
        told = [
            "not given" if run.get(key) is None else f"{run[key] * run['optim.lr']:.6g}"
            for run in (then, now)
        ]
    else:
        told = [_say(then, key), _say(now, key)]
    return f"{_FLAGS.get(key, key)}: {told[0]} then, {told[1]} now"


def _say(values: Fingerprint, key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"


def _identify(dataset: Dataset) -> str:
    prompts = [[category.name, *category.synonyms] for category in dataset.categories]
    words = "; ".join(", ".join(names) for names in prompts)
    return f"{len(dataset.images)} images of {words} ({dataset.content_hash()[:12]})"
