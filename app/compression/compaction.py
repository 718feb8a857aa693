"""`python -m app compact`: a large model → a smaller one, and what each step cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from accelerate.utils import set_seed
from hydra.utils import instantiate
from sam3.model.sam3_image import Sam3Image

from app.compression import importance
from app.compression.cut import (
    DART,
    LAYERS,
    Cut,
    Units,
    check_cut,
    count_layers,
    cut_model,
    project_hidden,
    replace_text,
    store_vocabulary,
)
from app.compression.importance import Measure, Width, WidthBy, choose_layers, choose_queries, most
from app.config.compose import load_config, load_model_config, model_config
from app.config.schema import Config, ModelConfig
from app.datasets import sources
from app.datasets.coco import Category, Dataset, Image
from app.datasets.images import open_image
from app.datasets.read_splits import read_splits
from app.errors import UserError
from app.evaluation.evaluate import score_dataset as score
from app.evaluation.scoring import THRESHOLD
from app.files import exists_problem, write_json
from app.inference.flops import count_flops
from app.inference.inputs import check_prompts, find_images, read_prompts
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model, count_parameters, padding_note
from app.model.device import choose_device, choose_precision
from app.model.vocabulary import in_vocabulary

log = logging.getLogger("app")
MEASURED = sources.DATA / "importance"  # losses of models without some of their layers
REPORT = "compact.json"
CLASSES = "classes"  # as a vocabulary: those of the weights


@dataclass(frozen=True)
class Goal:
    """What is to be left; None: all of it.

    Attributes:
        removed_blocks: a given list; None: `layers["blocks"]` stay, those that matter most.
        layers: how many stay, of those of `LAYERS` and "queries" from which some go.
        mlp: 0..1, share of an MLP's units that stays.
        heads: of attention, in each block.
        size: the size that all of this makes, where it was asked for by name.
        vocabulary: prompts to store in the text encoder's place.
        resolution: pixels.
    """

    removed_blocks: tuple[int, ...] | None = None
    layers: dict[str, int] = field(default_factory=dict)
    mlp: float | None = None
    heads: int | None = None
    size: ModelConfig | None = None
    vocabulary: tuple[str, ...] = ()
    resolution: int | None = None

    def needs_images(self, by: WidthBy) -> bool:
        """Whether what stays is to be measured."""
        return bool(self.layers) or (self.mlp is not None and by != "svd") or self.heads is not None


def make_goal(
    source: ModelConfig,
    *,
    to: str | None,
    blocks: int | None,
    remove_blocks: str | None,
    mlp: float | None,
    heads: int | None,
    layers: dict[str, int | None],
    vocabulary: Sequence[str],
    resolution: int | None,
) -> Goal:
    """The flags as one goal; each of them beats what the size `to` says.

    Raises:
        UserError: a list of blocks that is none, more than the source has, nothing to do.
    """
    size = None if to is None else load_model_config(to)
    wanted: dict[str, int] = {}
    if size is not None:
        wanted = count_layers(size)
        mlp = mlp or size.vision.mlp_units / source.vision.mlp_units
        heads = heads or size.vision.heads
        resolution = resolution or size.resolution
        if size.text.width != source.text.width:
            del wanted["text_layers"]  # a new one
    removed = None if remove_blocks is None else parse_blocks(remove_blocks, source.vision.depth)
    if removed is not None:
        wanted.pop("blocks", None)
    asked = {**layers, "blocks": blocks}
    wanted |= {name: count for name, count in asked.items() if count is not None}
    have = count_layers(source)
    problems = [
        f"--{name.replace('_', '-')} {count}: these weights have {have[name]}"
        for name, count in wanted.items()
        if not 1 <= count <= have[name]
    ]
    if mlp is not None and not 0 < mlp <= 1:
        problems.append(f"--mlp {mlp:g}: is the share of the units that stays, above 0 and up to 1")
    if heads is not None and not 1 <= heads <= source.vision.num_heads:
        problems.append(f"--heads {heads}: these weights have {source.vision.num_heads}")
    if removed is not None and blocks is not None:
        problems.append("--blocks and --remove-blocks: give one of them")
    if size is not None and (size.d_model, size.vision.embed_dim) != (
        source.d_model,
        source.vision.embed_dim,
    ):
        problems.append(f"--to {to}: has other widths than these weights; none can be cut to it")
    goal = Goal(
        removed,
        {name: count for name, count in wanted.items() if count < have[name]},
        None if mlp == 1 else mlp,
        None if heads == source.vision.num_heads else heads,
        size,
        tuple(vocabulary),
        resolution,
    )
    if not problems and goal == Goal():
        problems.append(
            "Nothing to remove: give --to small, or some of --blocks, --remove-blocks, --mlp, "
            "--heads, --queries, --decoder-layers, --vocabulary, …"
        )
    if problems:
        raise UserError(problems)
    return goal


def parse_blocks(text: str, depth: int) -> tuple[int, ...]:
    """`5,10,17-22` or `dart` → indices; raises UserError where it is neither."""
    if text == "dart":
        return DART
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"--remove-blocks {text}: give numbers, as in 5,10,17-22; or dart")
        found |= {*range(int(first), int(last or first) + 1)}
    if outside := sorted(found - {*range(depth)}):
        raise UserError(
            f"--remove-blocks {text}: these weights have blocks 0 to {depth - 1}, not "
            f"{', '.join(map(str, outside))}"
        )
    return tuple(sorted(found))


def read_vocabulary(words: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Prompts; those of a file where there is one of that name; "classes" for the weights' own."""
    found: list[str] = []
    for word in words:
        if word == CLASSES:
            found += classes
        else:
            found += read_prompts(Path(word)) if Path(word).is_file() else [word]
    return check_prompts(found) if words else ()


def check_width(name: str) -> WidthBy:
    if name not in get_args(WidthBy):
        raise UserError(f"--width {name}: give one of {', '.join(get_args(WidthBy))}")
    return name  # type: ignore[return-value]


def unlabelled(images: Sequence[Path], prompts: Sequence[str]) -> Dataset:
    """Images without annotations, each to be asked for all prompts."""
    found = []
    for id, path in enumerate(images, start=1):
        width, height = open_image(path).size
        found.append(Image(id, path, width, height))
    classes = tuple(Category(id, name) for id, name in enumerate(prompts, start=1))
    return Dataset(tuple(found), (), classes)


def compact(
    start: Path,
    folder: Path,
    goal_of: Callable[[weights.Header], Goal],
    overrides: Sequence[str],
    *,
    by: WidthBy,
    images: str | None = None,
    measure_on: int = 16,
    has_data: bool = False,
    overwrite: bool = False,
) -> Path:
    """Cut weights down to a goal and save what is left in `folder`; returns its file.

    Args:
        goal_of: what the weights are → what is to be left.
        overrides: of the configuration: where labelled images come from, and settings.
        by: how MLP units and heads are chosen.
        images: file, folder or glob of images without labels, to measure on.
        measure_on: most images to measure on.
        has_data: whether the overrides name a dataset; its validation images are then scored.

    Raises:
        UserError: a goal that cannot be, or that needs images where there are none.
    """
    source = weights.find_file(start)
    header = weights.describe(source)
    goal = goal_of(header)
    _check(goal, header, folder, by, has_images=has_data or images is not None, overwrite=overwrite)
    vision = header.model.vision.model_copy(update={"drop_path": 0.0})
    still = header.model.model_copy(update={"dropout": 0.0, "vision": vision})  # the same each time
    masks = [] if header.model.segmentation else ["loss=boxes"]
    config = load_config(["transforms=none", *masks, *overrides], None, still)
    splits = read_splits(config) if has_data else None
    set_seed(config.seed)
    model = build_model(still, matcher=instantiate(config.loss.matcher))
    weights.load_into(model, source, merge=True)
    device = choose_device(config.training.device)
    cutting = _Cutting(model.to(device), config, None if splits is None else splits.valid)
    cutting.tell("whole", "")
    if goal.needs_images(by):
        few = (
            _few(splits.train, measure_on)
            if splits is not None
            else unlabelled(find_images(str(images))[:measure_on], header.prompts)
        )
        cutting.measure_on(few, importance.cache_file(MEASURED, source, few, config))
    cutting.cut(goal, by)
    figures = cutting.figures
    classes = in_vocabulary(cutting.size.vocabulary, header.prompts) or list(goal.vocabulary)
    header = header.model_copy(
        update={
            "model": _named(cutting.size, header.model, goal),
            "threshold": figures.get(THRESHOLD) if figures else header.threshold,
            "prompts": classes,
        }
    )
    if note := padding_note(header.model):
        log.info("note: %s", note)
    file = weights.save(cutting.model, folder, header)
    write_json(folder / REPORT, {"source": str(source), "width": by, "steps": cutting.rows})
    return file


class _Cutting:
    """A model that grows smaller, and the story of it.

    Args:
        model: the whole one; in training mode neither dropout nor depth of it are random.
        config: with the model's size.
        valid: images to score on after each step; None: none.
    """

    def __init__(self, model: Sam3Image, config: Config, valid: Dataset | None) -> None:
        self.model, self.size, self.config, self.valid = model, config.model, config, valid
        device = next(model.parameters()).device
        self.precision = choose_precision(config.training.precision, device, config.model)
        self.measure: Measure | None = None
        self.figures: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def measure_on(self, images: Dataset, cache: Path) -> None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.measure = Measure(self.config, self.model, images, self.precision, cache)
        by = "labels" if self.measure.labelled else "what the whole model answers"
        log.info("what matters is measured on %d images, by %s", len(images.images), by)

    def cut(self, goal: Goal, by: WidthBy) -> None:
        """All steps, each measured on what the ones before it left."""
        if goal.removed_blocks is not None:
            self._keep("blocks", _without(goal.removed_blocks, self.size.vision.depth))
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
            self.tell("text", "the text encoder; the one in its place is yet to learn")
        if goal.vocabulary:
            self.model, self.size = store_vocabulary(self.model, self.size, goal.vocabulary)
            self.tell("vocabulary", f"the text encoder; {len(goal.vocabulary)} prompts are stored")

    @property
    def _measure(self) -> Measure:
        assert self.measure is not None  # `Goal.needs_images`
        return self.measure

    def _keep(self, name: str, kept: tuple[int, ...]) -> None:
        removed = _without(kept, count_layers(self.size)[name])
        self._cut(Cut(**{name: kept}))  # type: ignore[arg-type]
        self.tell(name, ", ".join(map(str, removed)))

    def _narrow(self, mlp: float | None, heads: int | None, by: WidthBy) -> None:
        blocks: Any = self.model.backbone.vision_backbone.trunk.blocks
        every = self.size.vision.mlp_units
        units = None if mlp is None else max(1, round(every * mlp))
        hidden: tuple[Units, ...] | None = None
        left: tuple[Units, ...] | None = None
        if by == "svd" and units is not None:
            hidden = tuple(project_hidden(block.mlp.fc1, units) for block in blocks)
        else:
            width = Width(self.model, self._measure, by)
            if units is not None:
                hidden = tuple(most(importance, units) for importance in width.hidden)
            if heads is not None:
                left = tuple(most(importance, heads) for importance in width.heads)
        said = []
        if units is not None:
            said.append(f"{every - units} of {every} MLP units")
        if heads is not None:
            said.append(
                f"{self.size.vision.num_heads - heads} of {self.size.vision.num_heads} heads"
            )
        self._cut(Cut(hidden=hidden, heads=left))
        self.tell(f"width ({by})", f"{' and '.join(said)} in each block")

    def _cut(self, cut: Cut) -> None:
        matcher = self.model.matcher
        self.model, self.size = cut_model(self.model, self.size, cut)
        self.model.matcher = matcher

    def tell(self, step: str, removed: str) -> None:
        """Say what is left after a step, and what it finds."""
        counts = count_parameters(self.model)
        row: dict[str, Any] = {
            "step": step,
            "removed": removed,
            "parameters": counts,
            "flops": count_flops(self.size),
            "bytes": sum(p.nbytes for p in self.model.parameters()),
        }
        said = (
            f"{counts['total'] / 1e6:.2f} M parameters ({counts['text'] / 1e6:.2f} M text), "
            f"{row['flops'] / 1e9:.1f} GFLOP an image, {row['bytes'] / 1e6:.1f} MB"
        )
        if self.valid is not None:
            predictor = Predictor(self.model, self.size, self.precision)
            self.figures = score(predictor, self.valid, self.config, step).figures
            row["figures"] = self.figures
            names = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
            for key, name in names.items():
                said += f", {name} {self.figures[key]:.3f}" if key in self.figures else ""
        self.rows.append(row)
        log.info("%s: %s%s", step, f"without {removed}: " if removed else "", said)


def _few(dataset: Dataset, count: int) -> Dataset:
    """The first images."""
    return dataset.subset([image.id for image in dataset.images[:count]])


def _without(removed: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(index for index in range(count) if index not in removed)


def _named(size: ModelConfig, source: ModelConfig, goal: Goal) -> ModelConfig:
    """The size that was cut, with its name and with what it trains with."""
    content = size.model_dump() | {
        "name": goal.size.name if goal.size else f"{source.name.removesuffix('-cut')}-cut",
        "resolution": goal.resolution or source.resolution,
        "dropout": source.dropout,
    }
    content["vision"] |= {"drop_path": source.vision.drop_path}
    return model_config(content, "--resolution" if goal.resolution else "the cut")


def _check(
    goal: Goal,
    header: weights.Header,
    folder: Path,
    by: WidthBy,
    *,
    has_images: bool,
    overwrite: bool,
) -> None:
    """What can be refused before anything is read."""
    size = header.model
    problems = []
    if size.vocabulary is not None:
        problems.append(
            "these weights answer a stored vocabulary alone; cut those that they were made from"
        )
    if (folder / weights.FILE).exists() and not overwrite:
        problems.append(exists_problem(folder, f"holds {weights.FILE} already"))
    if by == "svd" and goal.heads is not None:
        problems.append(
            "--width svd: heads cannot be projected, for rotary embedding turns pairs of their "
            "units; leave out --heads"
        )
    if goal.needs_images(by) and not has_images:
        problems.append(
            "What matters is measured on images: give --dataset-dir DIR (with labels) or --images "
            "DIR (without)"
        )
    if problems:
        raise UserError(problems)
    if goal.removed_blocks is not None:
        check_cut(size, Cut(blocks=_without(goal.removed_blocks, size.vision.depth)))
