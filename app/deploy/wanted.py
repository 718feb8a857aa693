"""The content of an export, as the flags of `export --format onnx` ask for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.deploy.operators import OPSETS
from app.deploy.runtime.manifest import PRECISIONS
from app.errors import UserError, nearest
from app.inference.inputs import check_prompts
from app.inference.predictor import pairs_per_pass
from app.model import weights
from app.model.device import choose_device
from app.model.vocabulary import unknown_words


@dataclass(frozen=True)
class Wanted:
    """The content of an export.

    Attributes:
        precisions: of `PRECISIONS`; `check_wanted` adds fp32.
        prompts: the prompts that can be asked for; () for the classes of the weights; None for any
            words.
        prompts_per_pass: prompts that the ground graph answers at once; None for all of them, but
            at most `pairs_per_pass`, and one where any words can be asked for.
        top: number of queries for each prompt that get masks; None for all.
        resolution: pixels of a side; None for that of the weights.
        target: TensorRT and device that it is meant for, noted in the manifest.
    """

    precisions: tuple[str, ...] = ("fp32",)
    prompts: tuple[str, ...] | None = ()
    prompts_per_pass: int | None = None
    top: int | None = None
    resolution: int | None = None
    target: dict[str, str] | None = None


def check_wanted(wanted: Wanted, header: weights.Header, *, has_images: bool) -> Wanted:
    """Return what is wanted with its defaults filled in; raise UserError with every problem."""
    problems = [
        f"--precision {name}: give some of {', '.join(PRECISIONS)}.{nearest(name, PRECISIONS)}"
        for name in wanted.precisions
        if name not in PRECISIONS
    ]
    version = (wanted.target or {}).get("tensorrt")
    if version is not None and version not in OPSETS:
        problems.append(f"--tensorrt {version}: graphs are made for {' and '.join(OPSETS)}")
    if "int8" in wanted.precisions and not has_images:
        problems.append(
            "--precision int8: is calibrated on your images: give --images DIR (without labels) or "
            "--dataset-dir DIR (with)"
        )
    for flag, value in (("--prompts-a-pass", wanted.prompts_per_pass), ("--top", wanted.top)):
        if value is not None and value < 1:
            problems.append(f"{flag} {value}: must be 1 or more")
    prompts = wanted.prompts
    if prompts is None:
        if header.model.vocabulary is not None:
            problems.append(
                "--open-vocabulary: these weights answer a stored vocabulary alone; export those "
                "that they were made from"
            )
    else:
        prompts = tuple(dict.fromkeys(prompts or header.prompts))
        if prompts:
            prompts = check_prompts(prompts)
            problems += [
                f"--prompt {line}" for line in unknown_words(header.model.vocabulary, prompts)
            ]
        else:
            problems.append(
                "Which prompts are to be answered? These weights name none: give --prompt 'a noun "
                "phrase', --prompts FILE, or --open-vocabulary"
            )
    if problems:
        raise UserError(problems)
    count = 1 if prompts is None else len(prompts)
    most = wanted.prompts_per_pass or pairs_per_pass(header.model, choose_device("cpu"))
    ordered = tuple(name for name in PRECISIONS if name in {*wanted.precisions, "fp32"})
    return replace(
        wanted,
        precisions=ordered,
        prompts=prompts,
        prompts_per_pass=min(most, count) if prompts else wanted.prompts_per_pass or 1,
    )
