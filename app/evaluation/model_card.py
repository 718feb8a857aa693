"""Write the README.md beside a run's weights, in the form that huggingface.co reads.

It tells what the weights are, what they can do and where they fail: a model card as Mitchell et
al. propose it (arXiv 1810.03993).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from app.config.schema import Config, DatasetConfig, Node
from app.console import command, counted, duration, plain
from app.datasets.build import Splits
from app.evaluation.report_page import HEADLINE, KIND, ONCE, OTHERS, number
from app.evaluation.run_files import Environment, read_environment, read_figures
from app.evaluation.summary import bounds
from app.files import read_text, remove_unfinished, write_text
from app.model import weights
from app.model.bundled import NANO

CARD = "README.md"
COLUMNS = {"baseline/": "before training", "": "these weights"}
_TASKS = {"bbox": "object-detection", "segm": "image-segmentation"}
_CODE = "SAM 3's code, which they need, is under the SAM License."
_TRAINING = "## Training"
SHOWN_PROMPTS = 60


def write_card(
    config: Config,
    pretrained_path: Path | None,
    splits: Splits,
    *,
    learning_rates: Mapping[str, float],
    processes: int,
    precision: torch.dtype,
) -> Path:
    """Write `weights/best/README.md` of a finished run; return its path.

    Args:
        pretrained_path: the weights that training started from; None for random ones.
        splits: the images that it trained and validated on.
        learning_rates: part of the model that was trained → its highest rate.
    """
    folder = Path(config.output_dir)
    best = folder / "weights" / "best"
    header = weights.describe(best)
    figures, environment = read_figures(folder), read_environment(folder)
    metas = pretrained_path is not None and not header.model.name.startswith("nano")
    data = ModelCardData(
        **licence(metas=metas),
        library_name="sam3-finetuning",
        pipeline_tag="image-segmentation",
        tags=["sam3", "open-vocabulary", "object-detection", "instance-segmentation"],
        model_name=folder.resolve().name,
        eval_results=_results(figures, folder.resolve().name),
    )
    facts = {
        "started from": _origin(pretrained_path),
        "images": f"{_images(splits, figures)}, from {_source(config.dataset)}",
        "training data, by content": code(header.data_hash),
        "precision": str(precision).removeprefix("torch."),
        **_settings(config, learning_rates, processes),
    }
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escaped(folder.resolve().name)}",
        f"SAM 3 (Segment Anything with Concepts), size {escaped(header.model.name)}, "
        f"{header.model.resolution} px. Architecture: facebookresearch/sam3 at commit "
        f"{code(header.pin)}.",
        "## What it finds",
        _prompts(header),
        "## Figures",
        _figures(figures),
        _TRAINING,
        _command(environment, figures),
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
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


def escaped(words: str) -> str:
    """Return foreign text so that Markdown and the HTML in it show it as it is, on one line."""
    line = " ".join(plain(words).split())
    return _MARKUP.sub(_spelt, line)


# What begins something in Markdown or HTML within a line; an underscore within a word does not.
_MARKUP = re.compile(r"[\\`*{}\[\]<>&|~$:@]|\b_|_\b|(?<=www)\.", re.IGNORECASE)


def _spelt(found: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}")


def code(words: object) -> str:
    """Return foreign text as Markdown's code on one line, which no backtick in it ends."""
    line = " ".join(plain(words).split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def write_merged_card(adapter: Path, folder: Path) -> Path:
    """Write the card of plain weights that a LoRA was merged into: that of the LoRA, and a line.

    A LoRA without a card gets one that says what its header knows.

    Args:
        adapter: folder of the LoRA.
        folder: of the merged weights, which this process has claimed.
    """
    merged = "These are plain weights: a LoRA, merged with the weights that it was trained on."
    card = adapter / CARD
    if card.is_file():
        text = read_text(card).replace(_TRAINING, f"{_TRAINING}\n\n{merged}", 1)
    else:
        header = weights.describe(folder)
        metas = not header.model.name.startswith("nano")
        data = ModelCardData(**licence(metas=metas), library_name="sam3-finetuning")
        parts = [f"---\n{data.to_yaml()}\n---", f"# {folder.resolve().name}", merged]
        parts += ["## What it finds", _prompts(header), "## Limits", _limits(header)]
        text = "\n\n".join([*parts, "## Use", _use(header)]) + "\n"
    remove_unfinished(folder / CARD)
    write_text(folder / CARD, text)
    return folder / CARD


def licence(*, metas: bool) -> dict[str, Any]:
    """Return a card's entries about the license; `metas`: the weights started as Meta's."""
    if not metas:
        return {"license": "apache-2.0"}
    return {
        "license": "other",
        "license_name": "sam-license",
        "license_link": "https://github.com/facebookresearch/sam3/blob/main/LICENSE",
        "base_model": "facebook/sam3",
    }


def licence_text(*, metas: bool) -> str:
    """Return what the card of an export says of the license; `metas`: as of `licence`."""
    if metas:
        return (
            "The weights come from Meta's SAM 3 and are under the SAM License, which goes "
            "with them."
        )
    return (
        "The weights are under Apache-2.0. SAM 3's code, which they were trained with, is "
        "under the SAM License."
    )


def _images(splits: Splits, figures: Mapping[str, Any]) -> str:
    """Return how many images were trained on, and how many scored."""
    count = len(splits.train.images)
    if "folds" in figures:
        return f"{count} to train on, each scored in one of {figures['folds']} folds without it"
    return f"{count} to train on and {len(splits.valid.images)} to validate on"


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


def _prompts(header: weights.Header) -> str:
    shown = ", ".join(f"“{escaped(prompt)}”" for prompt in header.prompts[:SHOWN_PROMPTS])
    more = len(header.prompts) - SHOWN_PROMPTS
    return f"The prompts it was trained with: {shown}{f' and {more} more' if more > 0 else ''}."


def _figures(figures: Mapping[str, Any]) -> str:
    columns = {p: n for p, n in COLUMNS.items() if f"{p}bbox/AP" in figures}
    names = {
        f"{kind}/{name}": f"{KIND[kind]} {label}"
        for kind in KIND
        for name, label in HEADLINE.items()
    } | ONCE
    lines = [f"| on the validation images | {' | '.join((*columns.values(), OTHERS))} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for name, label in names.items():
        if name in figures:
            values = [number(figures.get(f"{prefix}{name}")) for prefix in columns]
            lines.append(f"| {label} | {' | '.join((*values, bounds(figures, name)))} |")
    return "\n".join(lines)


def _command(environment: Environment, figures: Mapping[str, Any]) -> str:
    """Return the command of the run, and how long it took on which machine."""
    given = machine = ""
    if environment.command:  # a run from Python has none
        words = environment.command[1:]
        given = f"```bash\n{command('./train.sh', *words)}\n```\n\n"
        machine = environment.gpu or f"{environment.cpus} CPU threads"
        machine = f" on {machine}, torch {environment.packages.get('torch')}"
    epochs = counted(figures["epochs"], "epoch")
    return f"{given}{epochs} in {duration(figures['seconds'])}{machine}:"


def _origin(pretrained_path: Path | None) -> str:
    """Name the weights that training started from; of a path only its last parts."""
    if pretrained_path is None:
        return "random weights"
    base = weights.base_reference(pretrained_path)
    if pretrained_path.parent == NANO:
        name = "the nano that the project carries"
    elif base.reference == "/".join(weights.HUB):
        name = f"`{base.reference}` on huggingface.co"
    else:
        parts = Path(base.reference).parts[1:]
        of_run = parts[-3:-2] == ("weights",)  # RUN/weights/best/model.safetensors
        name = code("/".join(parts[-4:] if of_run else parts[-2:]))
    return f"{name}, SHA-256 `{base.sha256}`"


def _source(dataset: DatasetConfig) -> str:
    """Name the source of the images; of a path only the last part."""
    hub = dataset.huggingface
    local = Path(dataset.dir or hub.name or "").expanduser().resolve()
    if dataset.dir is not None or (hub.name is not None and local.is_dir()):
        return f"the {'zip' if local.is_file() else 'folder'} {code(local.name)}"
    if hub.name is not None:
        chosen = {"configuration": hub.config, "split": hub.split}
        more = "".join(f", {name} {code(value)}" for name, value in chosen.items() if value)
        return f"{code(hub.name)} on huggingface.co{more}"
    if dataset.roboflow is not None:
        return f"{code(dataset.roboflow)} on Roboflow"
    return "the project's own generator of synthetic shapes"


def _settings(
    config: Config, learning_rates: Mapping[str, float], processes: int
) -> dict[str, object]:
    """Return the parts of the configuration that decide the weights, by readable names."""
    training = config.training
    return {
        "method": code(config.method.name),
        "transforms": _transforms(config.transforms.train),
        "losses, with their weights": _losses(config.loss.criterion),
        "learning rates, at most": ", ".join(f"{k} {v:g}" for k, v in learning_rates.items()),
        "images an update": f"{training.batch_size} a step × "
        f"{counted(training.grad_accum, 'step')} × {counted(processes, 'process')}",
        "seed": config.seed,
    }


def _transforms(steps: Sequence[Node]) -> str:
    """List the steps by their names, with their numbers."""
    names = []
    for step in steps:
        given = [f"{k} {v}" for k, v in step.items() if not isinstance(v, (str, Mapping))]
        numbers = f" ({', '.join(given)})" if given else ""
        names.append(step["_target_"].rpartition(".")[2] + numbers)
    return escaped(", ".join(names))


def _losses(criterion: Node) -> str:
    """List upstream's names of the losses, and their weights."""
    parts = [*criterion.get("loss_fns_find", []), criterion.get("loss_fn_semantic_seg") or {}]
    return ", ".join(
        f"{escaped(k)} {v}" for part in parts for k, v in part.get("weight_dict", {}).items()
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
        f"```bash\n{command('./infer.sh', '--checkpoint', 'THIS_FOLDER', '--input', 'IMAGES')} "
        f"{command('--prompt', prompt, '--output-dir', 'found')}\n```\n\n"
        "```python\nfrom app.inference import Predictor\n\n"
        f'found = Predictor.load("THIS_FOLDER").predict(image, prompts=[{prompt!a}])\n```'
    )
