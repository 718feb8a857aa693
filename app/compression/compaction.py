"""`python -m app compact`: cut a large model down to a smaller one, and report each step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from hydra.utils import instantiate
from sam3.model.sam3_image import Sam3Image

from app.compression import importance
from app.compression.cut import (
    LAYERS,
    Cut,
    Units,
    count_layers,
    cut_model,
    project_hidden,
    replace_text,
    store_vocabulary,
)
from app.compression.flags import CutFlags, WidthBy
from app.compression.goal import Goal, all_but, check_goal, make_goal
from app.compression.importance import Measure, Width, choose_layers, choose_queries, most
from app.config.compose import load_config, model_config
from app.config.schema import Config, ModelConfig
from app.console import counted
from app.datasets import sources
from app.datasets.coco import Category, Dataset, Image
from app.datasets.images import open_image
from app.datasets.levels import Levels
from app.datasets.read_splits import read_splits
from app.evaluation.evaluate import score_dataset
from app.evaluation.scoring import THRESHOLD
from app.files import claim, remove_unfinished, write_json
from app.inference.flops import count_flops
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model, count_parameters, padding_note
from app.model.device import choose_device, choose_precision
from app.model.vocabulary import in_vocabulary

log = logging.getLogger("app")
LOSSES = sources.DATA / "importance"  # cache: losses of models without some of their layers
REPORT = "compact.json"


def unlabelled(
    images: Sequence[Path], prompts: Sequence[str], levels: Levels | None = None
) -> Dataset:
    """Return a dataset of images without annotations, whose classes are the prompts.

    Args:
        levels: of those of more than 8 bits, as the weights were trained with.
    """
    sizes = [open_image(path).size for path in images]
    numbered = enumerate(zip(images, sizes, strict=True), start=1)
    return Dataset(
        tuple(Image(id, path, *size, levels) for id, (path, size) in numbered),
        (),
        tuple(Category(id, name) for id, name in enumerate(prompts, start=1)),
    )


def compact(
    start: Path,
    folder: Path,
    flags: CutFlags,
    overrides: Sequence[str],
    *,
    by: WidthBy,
    images: Sequence[Path] | None = None,
    measure_on: int = 16,
    has_data: bool = False,
    overwrite: bool = False,
) -> Path:
    """Cut weights down to a goal; return the file of the smaller weights in `folder`.

    Args:
        start: weights to cut.
        flags: what shall stay.
        overrides: of the configuration: the dataset, and settings.
        by: how MLP units and heads are chosen.
        images: without labels, to measure importance on.
        measure_on: the most images to measure importance on.
        has_data: whether the overrides name a dataset. Importance is then measured on its training
            images, and each step is scored on its validation images.

    Raises:
        UserError: a goal that cannot be reached, or that needs images where there are none.
    """
    source = weights.find_file(start)
    header = weights.describe(source)
    goal = make_goal(header, flags)
    has_images = has_data or images is not None
    check_goal(goal, header, folder, by, has_images=has_images, overwrite=overwrite)
    # Without dropout and stochastic depth, because losses are compared.
    vision = header.model.vision.model_copy(update={"drop_path": 0.0})
    size = header.model.model_copy(update={"dropout": 0.0, "vision": vision})
    loss = [] if size.segmentation else ["loss=boxes"]
    config = load_config(["transforms=none", *loss, *overrides], None, size)
    splits = read_splits(config) if has_data else None
    set_seed(config.seed)
    model = build_model(size, matcher=instantiate(config.loss.matcher))
    weights.load_into(model, source, merge=True)
    device = choose_device(config.training.device)
    cutting = _Cutting(model.to(device), config, None if splits is None else splits.valid)
    cutting.report("whole", "")
    if goal.needs_images(by):
        if splits is not None:
            train = splits.train
            few = train.subset([image.id for image in train.images[:measure_on]])
        else:
            paths = list(images or ())[:measure_on]
            few = unlabelled(paths, header.prompts, header.levels)
        cutting.measure_on(few, importance.cache_file(LOSSES, source, few, config))
    cutting.cut(goal, by)

    figures = cutting.figures
    classes = in_vocabulary(cutting.size.vocabulary, header.prompts) or list(goal.vocabulary)
    header = header.model_copy(
        update={
            "model": _final_size(cutting.size, header.model, goal),
            "threshold": figures.get(THRESHOLD) if figures else header.threshold,
            "prompts": classes,
            "scores": None,  # of what was cut, as what follows
            "golden": None,
        }
    )
    if note := padding_note(header.model):
        log.info("note: %s", note)
    claim(folder)
    for name in (weights.FILE, REPORT):
        remove_unfinished(folder / name)
    file = weights.save(cutting.model, folder, header)
    write_json(folder / REPORT, {"source": str(source), "width": by, "steps": cutting.rows})
    return file


class _Cutting:
    """Cuts a model step by step, and reports each step.

    Args:
        model: the whole model, without dropout and stochastic depth.
        config: with the size of the model.
        valid: images to score on after each step; None scores nothing.

    Attributes:
        model, size: what is left.
        figures: of the last step, by their names in metrics.json; empty without `valid`.
        rows: one for each step, for compact.json.
    """

    def __init__(self, model: Sam3Image, config: Config, valid: Dataset | None) -> None:
        self.model, self.size, self.config, self.valid = model, config.model, config, valid
        device = next(model.parameters()).device
        self.precision = choose_precision(config.training.precision, device, config.model)
        self.measure: Measure | None = None
        self.figures: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def measure_on(self, images: Dataset, cache: Path) -> None:
        """Measure importance on these images; `cache` is the file of what was measured before."""
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.measure = Measure(self.config, self.model, images, self.precision, cache)
        by = "labels" if self.measure.labelled else "what the whole model answers"
        log.info("what matters is measured on %s, by %s", counted(len(images.images), "image"), by)

    def cut(self, goal: Goal, by: WidthBy) -> None:
        """Do all steps of a goal, each measured on what the steps before it left."""
        if goal.removed_blocks is not None:
            self._keep("blocks", all_but(goal.removed_blocks, self.size.vision.depth))
        for name in LAYERS:
            if name in goal.layers:
                count = goal.layers[name]
                self._keep(name, choose_layers(self.model, self.size, name, count, self._measure))
        if "queries" in goal.layers:
            count = goal.layers["queries"]
            self._keep("queries", choose_queries(self.model, count, self._measure))
        if goal.mlp is not None or goal.heads is not None:
            self._narrow(goal.mlp, goal.heads, by)
        if goal.size is not None and goal.size.text.width != self.size.text.width:
            self.model, self.size = replace_text(self.model, self.size, goal.size)
            self.report("text", "the text encoder; the one in its place is yet to learn")
        if goal.vocabulary:
            self.model, self.size = store_vocabulary(self.model, self.size, goal.vocabulary)
            self.report(
                "vocabulary", f"the text encoder; {len(goal.vocabulary)} prompts are stored"
            )

    @property
    def _measure(self) -> Measure:
        assert self.measure is not None  # `Goal.needs_images`
        return self.measure

    def _keep(self, name: str, kept: tuple[int, ...]) -> None:
        """Keep these layers, or queries, alone; `name` is a kind of `cut.LAYERS`, or "queries"."""
        removed = all_but(kept, count_layers(self.size)[name])
        self._cut(Cut(**{name: kept}))  # type: ignore[arg-type]
        self.report(name, ", ".join(map(str, removed)))

    def _narrow(self, mlp: float | None, heads: int | None, by: WidthBy) -> None:
        """Keep the most important MLP units (a share) and heads (a count) of each block."""
        blocks: Any = self.model.backbone.vision_backbone.trunk.blocks
        all_units, all_heads = self.size.vision.mlp_units, self.size.vision.num_heads
        units = None if mlp is None else max(1, round(all_units * mlp))
        hidden: tuple[Units, ...] | None = None
        kept_heads: tuple[Units, ...] | None = None
        if by == "svd" and units is not None:
            hidden = tuple(project_hidden(block.mlp.fc1, units) for block in blocks)
        else:
            width = Width(self.model, self._measure, by)
            if units is not None:
                hidden = tuple(most(importance, units) for importance in width.hidden)
            if heads is not None:
                kept_heads = tuple(most(importance, heads) for importance in width.heads)
        removed = []
        if units is not None:
            removed.append(f"{all_units - units} of {all_units} MLP units")
        if heads is not None:
            removed.append(f"{all_heads - heads} of {all_heads} heads")
        self._cut(Cut(hidden=hidden, heads=kept_heads))
        self.report(f"width ({by})", f"{' and '.join(removed)} in each block")

    def _cut(self, cut: Cut) -> None:
        matcher = self.model.matcher
        self.model, self.size = cut_model(self.model, self.size, cut)
        self.model.matcher = matcher

    def report(self, step: str, removed: str) -> None:
        """Log the size that is left after a step, and its figures."""
        counts = count_parameters(self.model)
        row: dict[str, Any] = {
            "step": step,
            "removed": removed,
            "parameters": counts,
            "flops": count_flops(self.size),
            "bytes": sum(p.nbytes for p in self.model.parameters()),
        }
        line = (
            f"{counts['total'] / 1e6:.2f} M parameters ({counts['text'] / 1e6:.2f} M text), "
            f"{row['flops'] / 1e9:.1f} GFLOP an image, {row['bytes'] / 1e6:.1f} MB"
        )
        if self.valid is not None:
            predictor = Predictor(self.model, self.size, self.precision)
            self.figures = score_dataset(predictor, self.valid, self.config, step).figures
            row["figures"] = self.figures
            names = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
            for key, name in names.items():
                line += f", {name} {self.figures[key]:.3f}" if key in self.figures else ""
        self.rows.append(row)
        log.info("%s: %s%s", step, f"without {removed}: " if removed else "", line)


def _final_size(size: ModelConfig, source: ModelConfig, goal: Goal) -> ModelConfig:
    """Return the size that is left, with a name, the resolution and the source's dropout."""
    content = size.model_dump() | {
        "name": goal.size.name if goal.size else f"{source.name.removesuffix('-cut')}-cut",
        "resolution": goal.resolution or source.resolution,
        "dropout": source.dropout,
    }
    content["vision"] |= {"drop_path": source.vision.drop_path}
    return model_config(content, "--resolution" if goal.resolution else "the cut")
