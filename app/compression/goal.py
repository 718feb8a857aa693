"""The goal of a compaction: the parts that shall stay, as the flags of `compact` name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.compression.cut import DART, Cut, check_cut, count_layers
from app.compression.flags import CutFlags, WidthBy
from app.config.compose import load_model_config
from app.config.schema import ModelConfig
from app.errors import UserError
from app.files import exists_problem
from app.inference.inputs import check_prompts, read_prompts
from app.model import weights

CLASSES = "classes"  # as a vocabulary: the classes that the weights were trained on


@dataclass(frozen=True)
class Goal:
    """The parts of the weights that shall stay; None where all of them stay.

    Attributes:
        removed_blocks: blocks to remove; None where the `layers["blocks"]` most important stay.
        layers: kind of `cut.LAYERS`, or "queries" → how many stay, for those that lose some.
        mlp: 0..1, share of an MLP's units that stays.
        heads: attention heads that stay in each block.
        size: the named size that all of this makes.
        vocabulary: prompts to store in place of the text encoder.
        resolution: pixels, of a side of the square image.
    """

    removed_blocks: tuple[int, ...] | None = None
    layers: dict[str, int] = field(default_factory=dict)
    mlp: float | None = None
    heads: int | None = None
    size: ModelConfig | None = None
    vocabulary: tuple[str, ...] = ()
    resolution: int | None = None

    def needs_images(self, by: WidthBy) -> bool:
        """Return whether importance must be measured to choose what stays."""
        return bool(self.layers) or (self.mlp is not None and by != "svd") or self.heads is not None


def make_goal(header: weights.Header, flags: CutFlags) -> Goal:
    """Return the goal of the flags; each overrides what the size `to` says.

    Args:
        header: of the weights.

    Raises:
        UserError: a list of blocks or a file of prompts that cannot be read, more layers than the
            weights have, or nothing to remove.
    """
    source = header.model
    vocabulary = read_vocabulary(flags.vocabulary, header.prompts)
    to, blocks, remove_blocks = flags.to, flags.blocks, flags.remove_blocks
    mlp, heads, resolution = flags.mlp, flags.heads, flags.resolution
    size = None if to is None else load_model_config(to)
    wanted: dict[str, int] = {}
    if size is not None:
        wanted = count_layers(size)
        mlp = mlp or size.vision.mlp_units / source.vision.mlp_units
        heads = heads or size.vision.heads
        resolution = resolution or size.resolution
        if size.text.width != source.text.width:
            del wanted["text_layers"]  # the text encoder is replaced by a new one
    removed = None if remove_blocks is None else parse_blocks(remove_blocks, source.vision.depth)
    if removed is not None:
        wanted.pop("blocks", None)
    wanted |= flags.counts()
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
        vocabulary,
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
    """Return the indices of blocks such as `5,10,17-22`, or those that DART removes for `dart`.

    Raises:
        UserError: neither, or an index that is not below `depth`.
    """
    if text == "dart":
        return DART
    blocks: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"--remove-blocks {text}: give numbers, as in 5,10,17-22; or dart")
        blocks |= {*range(int(first), int(last or first) + 1)}
    if outside := sorted(blocks - {*range(depth)}):
        raise UserError(
            f"--remove-blocks {text}: these weights have blocks 0 to {depth - 1}, not "
            f"{', '.join(map(str, outside))}"
        )
    return tuple(sorted(blocks))


def read_vocabulary(words: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts to store.

    Args:
        words: prompts; names of files with prompts; or "classes".
        classes: what "classes" stands for: the classes of the weights.

    Raises:
        UserError: a prompt that is empty, or a file that cannot be read.
    """
    prompts: list[str] = []
    for word in words:
        if word == CLASSES:
            prompts += classes
        else:
            prompts += read_prompts(Path(word)) if Path(word).is_file() else [word]
    return check_prompts(prompts) if words else ()


def all_but(removed: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the indices below `count` that are not removed."""
    return tuple(index for index in range(count) if index not in removed)


def check_goal(
    goal: Goal,
    header: weights.Header,
    folder: Path,
    by: WidthBy,
    *,
    has_images: bool,
    overwrite: bool,
) -> None:
    """Raise UserError with all that can be refused before the weights are read."""
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
        check_cut(size, Cut(blocks=all_but(goal.removed_blocks, size.vision.depth)))
