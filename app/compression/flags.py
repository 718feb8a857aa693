"""The flags of `compact`, which are checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from app.errors import UserError

WidthBy = Literal["taylor", "activation", "svd"]


@dataclass(frozen=True)
class CutFlags:
    """The flags of `compact` that say what shall stay; None where one was not given.

    Attributes:
        to: name of a size in configs/model.
        blocks: of the trunk; the most important ones stay.
        remove_blocks: instead: the blocks that go, as `parse_blocks` reads them.
        mlp: 0..1, share of an MLP's units that stays.
        heads: attention heads that stay in each block.
        text_layers, encoder_layers, decoder_layers, queries: how many stay.
        vocabulary: prompts to store in place of the text encoder, as `read_vocabulary` reads them.
        resolution: pixels, of a side of the square image.
    """

    to: str | None = None
    blocks: int | None = None
    remove_blocks: str | None = None
    mlp: float | None = None
    heads: int | None = None
    text_layers: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    queries: int | None = None
    vocabulary: tuple[str, ...] = ()
    resolution: int | None = None

    def counts(self) -> dict[str, int]:
        """Return how many stay of each kind of `cut.LAYERS`, and of queries, that a flag names."""
        given = {
            "text_layers": self.text_layers,
            "encoder_layers": self.encoder_layers,
            "decoder_layers": self.decoder_layers,
            "queries": self.queries,
            "blocks": self.blocks,
        }
        return {name: count for name, count in given.items() if count is not None}


def check_width(name: str) -> WidthBy:
    """Return `name`; raise UserError where it is no way to choose MLP units and heads."""
    if name not in get_args(WidthBy):
        raise UserError(f"--width {name}: give one of {', '.join(get_args(WidthBy))}")
    return name  # type: ignore[return-value]
