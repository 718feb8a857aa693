"""The output folder of a run: made ready, described, and pointed to at the end."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from app.config.schema import Config, Resume
from app.console import command
from app.errors import UserError
from app.files import (
    check_no_links,
    check_writable,
    claim,
    exists_problem,
    remove_unfinished,
    write_json,
    write_text,
)
from app.model.upstream.pin import COMMIT
from app.model.weight_files import ADAPTER, FILE

if TYPE_CHECKING:
    from app.datasets.build import Splits

# torch and OmegaConf are imported where they are used: `check_folder` is called before all else,
# so that a folder that is taken is told at once.

log = logging.getLogger("app")

# Files and folders of a run; --overwrite removes these and nothing else.
CONTENTS = (
    *("config.yaml", "config_resolved.yaml", "environment.json", "train.log", "metrics.csv"),
    *("metrics.json", "metrics_by_class.csv", "report.html", "weights", "checkpoints"),
    *("predictions", "plots", "tensorboard", "slurm", "dataset_report.html", "mlflow.json"),
    *("folds", "fingerprint.json"),
    *("dataset", "dumps", "logs"),  # of upstream's Trainer
)
RESOLVED = "config_resolved.yaml"
PACKAGES = ("torch", "torchvision", "sam3", "accelerate", "peft", "hotcoco", "numpy")


def check_folder(folder: Path, *, resume: Resume | None, overwrite: bool) -> list[str]:
    """Refuse an output folder that is taken: nothing is overwritten unasked.

    Returns:
        What of a run is in it.

    Raises:
        UserError: a run is there and neither `resume` nor `overwrite` is given, none is there and
            `resume` is, or the folder holds a link or cannot be written.
    """
    present = [name for name in CONTENTS if (folder / name).exists()]
    if resume in ("all", "weights") and not present:
        raise UserError(
            f"--resume: no run in {folder}. Give --output-dir of the run to resume, or leave out "
            "--resume to start one."
        )
    if present and not (resume or overwrite):
        state = f"holds a run already ({', '.join(present[:3])}, …)"
        raise UserError(exists_problem(folder, state, instead="Go on with --resume"))
    check_no_links(folder, [*CONTENTS, "weights/best", "weights/last"])
    check_writable(folder)
    return present


def prepare_folder(folder: Path, *, resume: Resume | None, overwrite: bool) -> None:
    """Make the output folder ready, for this process alone.

    Raises:
        UserError: as `check_folder`, or another process writes there.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        present = check_folder(folder, resume=resume, overwrite=overwrite)  # what came meanwhile
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in present if overwrite):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        written = [
            f"weights/{place}/{name}" for place in ("best", "last") for name in (FILE, ADAPTER)
        ]
        for name in (*CONTENTS, *written):
            remove_unfinished(folder / name)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror})") from None


def write_settings(
    folder: Path, config: Config, overrides: Sequence[str], splits: Splits, resume: Resume | None
) -> None:
    """Write config.yaml (what was asked for), config_resolved.yaml (all of it), environment.json.

    A resumed run keeps the files that it was started with: of these only config_resolved.yaml is
    written anew.
    """
    import torch
    from omegaconf import OmegaConf

    from app.config.compose import to_yaml
    from app.model.device import gpu_problem

    write_text(folder / RESOLVED, to_yaml(config))
    if resume in ("all", "auto") and (folder / "environment.json").is_file():
        return
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.from_dotlist(list(overrides))))
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_problem": gpu_problem(),
        "sam3_commit": COMMIT,
        "packages": {name: version(name) for name in PACKAGES},
        "git": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "data": {
            name: {"images": len(split.images), "sha256": split.content_hash()}
            for name in ("train", "valid", "test")
            if (split := getattr(splits, name)) is not None
        },
        "notes": list(splits.notes),
        "command": sys.argv[1:],
    }
    write_json(folder / "environment.json", environment)


def _git(*words: str) -> str | None:
    """Return git's answer about the program's own repository; None where it lies in none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def log_next_steps(weights_folder: Path, splits: Splits) -> None:
    """Print the weights' path and the command that uses them."""
    log.info("weights: %s", weights_folder)
    log.info(
        "use them: %s",
        command(
            *("./infer.sh", "--checkpoint", weights_folder),
            *("--input", splits.valid.images[0].path.parent),
            *("--prompt", splits.train.class_names[0]),
            *("--output-dir", weights_folder.parent.parent / "found"),
        ),
    )
