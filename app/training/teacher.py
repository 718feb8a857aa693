"""Choose the weights that teach a run, and their size: `distill.*` of the configuration.

How a teacher teaches is in `compression/distillation.py`.
"""

from __future__ import annotations

from pathlib import Path

from app.config.compose import model_config
from app.config.schema import Config, ModelConfig
from app.model import weights


def teacher_file(config: Config) -> Path | None:
    """Return the file of the teacher's weights; None where the run has no teacher."""
    teacher = config.distill.teacher
    return None if teacher is None else weights.find_file(Path(teacher))


def teacher_size(config: Config) -> ModelConfig | None:
    """Return the teacher's size, at the resolution at which it sees images; None without teacher.

    That is `distill.resolution`, or else the student's, rounded to the teacher's patches.
    """
    file = teacher_file(config)
    if file is None:
        return None
    size = weights.describe(file).model
    patch = size.vision.patch_size
    fitting = max(4, round(config.model.resolution / patch)) * patch
    content = size.model_dump() | {"resolution": config.distill.resolution or fitting}
    return model_config(content, "distill.resolution")
