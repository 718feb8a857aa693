"""The README.md beside a run's weights, in the form that huggingface.co reads.

What they are, what they can do and where that ends: model cards as Mitchell et al. propose them
(arXiv 1810.03993).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from app.config import Config
from app.evaluation.report_page import HEADLINE, KIND, ONCE, number
from app.files import read_json, write_text
from app.model import weights
from app.model.carried import NANO
from app.progress import duration

CARD = "README.md"
COLUMNS = {"baseline/": "before training", "": "these weights"}
_TASKS = {"bbox": "object-detection", "segm": "image-segmentation"}
_CODE = "SAM 3's code, which they need, is under the SAM License."
SHOWN_PROMPTS = 60


def write_card(config: Config, start: Path | None) -> Path:
    """Write `weights/best/README.md` of a finished run; returns its path.

    Args:
        start: the weights that training began with; None for random ones.
    """
    folder = Path(config.output_dir)
    best = folder / "weights" / "best"
    header = weights.describe(best)
    figures = read_json(folder / "metrics.json")
    by_command = folder / "environment.json"  # a run from Python has none
    environment = read_json(by_command) if by_command.is_file() else {}
    metas = start is not None and header.model.name == "sam3"
    data = ModelCardData(
        license="other" if metas else "apache-2.0",
        license_name="sam-license" if metas else None,
        license_link="https://github.com/facebookresearch/sam3/blob/main/LICENSE"
        if metas
        else None,
        base_model="facebook/sam3" if metas else None,
        library_name="sam3-finetuning",
        pipeline_tag="image-segmentation",
        tags=["sam3", "open-vocabulary", "object-detection", "instance-segmentation"],
        model_name=folder.resolve().name,
        eval_results=_results(figures, folder.resolve().name),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.resolve().name}",
        _what(header, config, start),
        "## What it finds",
        _prompts(header),
        "## Figures",
        _figures(figures),
        "## Training",
        _training(config, environment, figures, header),
        "## Limits",
        _limits(header),
        "## Use",
        _use(header),
        "## Licence",
        f"The weights come from Meta's and are under the SAM License. {_CODE}"
        if metas
        else f"The weights are under Apache-2.0. {_CODE}",
    ]
    file = best / CARD
    write_text(file, "\n\n".join(parts) + "\n")
    return file


def _results(figures: Mapping[str, Any], name: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type="coco",
            dataset_name=f"the validation images of {name}",
            metric_type="mean_average_precision",
            metric_name=f"{KIND[kind]} AP",
            metric_value=round(figures[f"{kind}/AP"], 4),
        )
        for kind, task in _TASKS.items()
        if f"{kind}/AP" in figures
    ]


def _what(header: weights.Header, config: Config, start: Path | None) -> str:
    model, method = header.model, config.method.name
    if start is None:
        began = "from random weights"
    elif start.parent == NANO:
        began = "from the nano that the project carries"
    else:
        began = f"from `{start.name}`"
    return (
        f"SAM 3 (Segment Anything with Concepts), size {model.name}, {model.resolution} px, "
        f"trained {began} by method `{method}`. Architecture: facebookresearch/sam3 at commit "
        f"`{header.pin}`."
    )


def _prompts(header: weights.Header) -> str:
    shown = ", ".join(f"“{prompt}”" for prompt in header.prompts[:SHOWN_PROMPTS])
    more = len(header.prompts) - SHOWN_PROMPTS
    return f"The prompts it was trained with: {shown}{f' and {more} more' if more > 0 else ''}."


def _figures(figures: Mapping[str, Any]) -> str:
    columns = {p: n for p, n in COLUMNS.items() if f"{p}bbox/AP" in figures}
    names = {
        f"{kind}/{name}": f"{KIND[kind]} {label}"
        for kind in KIND
        for name, label in HEADLINE.items()
    } | ONCE
    lines = [f"| on the validation images | {' | '.join(columns.values())} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, label in names.items():
        if name in figures:
            values = (figures.get(f"{prefix}{name}") for prefix in columns)
            lines.append(f"| {label} | {' | '.join(map(number, values))} |")
    return "\n".join(lines)


def _training(
    config: Config,
    environment: Mapping[str, Any],
    figures: Mapping[str, Any],
    header: weights.Header,
) -> str:
    command = machine = ""
    if environment:
        command = f"```bash\n./train.sh {shlex.join(environment['command'][1:])}\n```\n\n"
        machine = environment["gpu"] or f"{environment['cpus']} CPU threads"
        machine = f" on {machine}, torch {environment['packages']['torch']}"
    return (
        f"{command}{figures['epochs']} epochs of {config.training.batch_size} images a step, "
        f"learning rate {config.optim.lr:g} at most, seed {config.seed}; "
        f"{duration(figures['seconds'])}{machine}. Training data, by content: "
        f"`{header.data_hash}`."
    )


def _limits(header: weights.Header) -> str:
    return (
        "The figures hold for images like the validation images and for the prompts above. Other "
        "words may find nothing, or the wrong things: how often words for what is not there find "
        f"something is the off-prompt firing above. Images are seen at {header.model.resolution} × "
        f"{header.model.resolution} pixels: what is small there is better looked for in tiles."
    )


def _use(header: weights.Header) -> str:
    prompt = header.prompts[0] if header.prompts else "a noun phrase"
    return (
        f"```bash\n./infer.sh --checkpoint THIS_FOLDER --input IMAGES "
        f"--prompt {shlex.quote(prompt)} --output-dir found\n```\n\n"
        "```python\nfrom app.inference import Predictor\n\n"
        f'found = Predictor.load("THIS_FOLDER").predict(image, prompts=[{prompt!r}])\n```'
    )
