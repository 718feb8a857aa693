"""Cut a SAM 3 down to a smaller one: what stays keeps its weights.

Blocks and layers are removed whole. MLP units and attention heads are removed within a block; the
smaller model then computes what the larger one does with the same units masked. Blocks of global
attention always stay, because a student with windowed weights in their places finds nothing (AP 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.config.compose import model_config
from app.config.schema import ModelConfig
from app.errors import UserError
from app.model.build import build_model
from app.model.stored_text import store
from app.model.weights import COMPUTED

# Blocks that DART removes from SAM 3 (mkturkcan/DART, arXiv 2603.11441): half of the 32.
DART = (5, 10, 12, 14, *range(17, 23), *range(24, 29), 30)
# Kind of layers → the module list that holds them.
LAYERS = {
    "blocks": "backbone.vision_backbone.trunk.blocks",
    "text_layers": "backbone.language_backbone.encoder.transformer.resblocks",
    "encoder_layers": "transformer.encoder.layers",
    "decoder_layers": "transformer.decoder.layers",
}
_QUERIES = ("transformer.decoder.query_embed.weight", "transformer.decoder.reference_points.weight")
Units = Tensor  # (K,) int64 indices of what stays, or (K, H) float32, a projection of H units


@dataclass(frozen=True)
class Cut:
    """The parts of a model that stay; None where all of them stay.

    Attributes:
        blocks, text_layers, encoder_layers, decoder_layers, queries: indices, ascending.
        hidden: for each block that stays, the units of its MLP: as many in each block.
        heads: for each block that stays, the indices of its heads: as many in each block.
    """

    blocks: tuple[int, ...] | None = None
    text_layers: tuple[int, ...] | None = None
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None
    queries: tuple[int, ...] | None = None
    hidden: tuple[Units, ...] | None = None
    heads: tuple[Units, ...] | None = None


def count_layers(config: ModelConfig) -> dict[str, int]:
    """Return how many of each kind of `LAYERS`, and of "queries", a size has."""
    return {
        "blocks": config.vision.depth,
        "text_layers": config.text.depth,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "queries": config.num_queries,
    }


def protected_blocks(config: ModelConfig) -> set[int]:
    """Return the blocks that must stay: those of global attention, and the first eighth."""
    return {*config.vision.global_blocks, *range(config.vision.depth // 8)}


def check_cut(config: ModelConfig, cut: Cut) -> None:
    """Refuse a cut that leaves a model that cannot work.

    Raises:
        UserError: names every block that must stay, and indices that do not exist.
    """
    problems = []
    for name, count in count_layers(config).items():
        kept = getattr(cut, name)
        if kept is not None and (not kept or [*kept] != sorted({*kept} & {*range(count)})):
            problems.append(
                f"{name}: what stays must be some of 0 to {count - 1}, ascending; it is "
                f"{', '.join(map(str, kept)) or 'nothing'}"
            )
    if cut.blocks is not None and not problems:
        lost = protected_blocks(config) - {*cut.blocks}
        if windowed := sorted(lost & {*config.vision.global_blocks}):
            problems.append(
                f"blocks {', '.join(map(str, windowed))}: have global attention and must stay; "
                "windowed blocks in their places would find nothing"
            )
        if first := sorted(lost - {*config.vision.global_blocks}):
            problems.append(
                f"blocks {', '.join(map(str, first))}: are of the first eighth, on which all "
                "others stand, and must stay"
            )
    if problems:
        raise UserError(problems)


def cut_config(config: ModelConfig, cut: Cut) -> ModelConfig:
    """Return the size that a cut leaves."""
    content = config.model_dump()
    vision = content["vision"]
    if cut.blocks is not None:
        new_index = {old: new for new, old in enumerate(cut.blocks)}
        vision["depth"] = len(cut.blocks)
        vision["global_blocks"] = [new_index[old] for old in config.vision.global_blocks]
    if cut.hidden is not None:
        vision["mlp_ratio"] = len(cut.hidden[0]) / config.vision.embed_dim
    if cut.heads is not None:
        vision["heads"] = len(cut.heads[0])
    if cut.text_layers is not None:
        content["text"]["depth"] = len(cut.text_layers)
    for name, key in (
        ("encoder_layers", "encoder_layers"),
        ("decoder_layers", "decoder_layers"),
        ("queries", "num_queries"),
    ):
        if (kept := getattr(cut, name)) is not None:
            content[key] = len(kept)
    return model_config(content, "the cut")


def cut_model(model: Sam3Image, config: ModelConfig, cut: Cut) -> tuple[Sam3Image, ModelConfig]:
    """Return a new model of what stays of `model`, on the same device, and its size.

    Raises:
        UserError: as `check_cut`.
    """
    check_cut(config, cut)
    state = dict(model.state_dict())
    for name, prefix in LAYERS.items():
        if (kept := getattr(cut, name)) is not None:
            state = _keep_layers(state, prefix, kept)
    for block, units in enumerate(cut.hidden or ()):
        _keep_hidden(state, f"{LAYERS['blocks']}.{block}.mlp", units)
    for block, heads in enumerate(cut.heads or ()):
        head_dim = config.vision.embed_dim // config.vision.num_heads
        _keep_heads(state, f"{LAYERS['blocks']}.{block}.attn", heads, head_dim)
    if cut.queries is not None:
        for key in _QUERIES:
            state[key] = state[key][list(cut.queries)]
    smaller = cut_config(config, cut)
    return build_from(smaller, state, next(model.parameters()).device), smaller


def build_from(config: ModelConfig, state: dict[str, Tensor], device: torch.device) -> Sam3Image:
    """Return a model with the weights of `state`, and position tables computed for its size."""
    model = build_model(config).to(device)
    tables = {key: value for key, value in model.state_dict().items() if key.endswith(COMPUTED)}
    model.load_state_dict({**state, **tables}, strict=True)
    return model


def store_vocabulary(
    model: Sam3Image, config: ModelConfig, prompts: Sequence[str]
) -> tuple[Sam3Image, ModelConfig]:
    """Replace the text encoder by the features of these prompts; return the model and its size.

    The model answers these prompts as before, and no others.
    """
    stored = store(model, prompts, config.text.context_length)
    size = config.model_copy(update={"vocabulary": list(stored.prompts)})
    model.backbone.language_backbone = stored
    return model, size


def replace_text(
    model: Sam3Image, config: ModelConfig, target: ModelConfig
) -> tuple[Sam3Image, ModelConfig]:
    """Replace the text encoder by one of the target's size, with random weights."""
    size = config.model_copy(update={"text": target.text})
    model.backbone.language_backbone = build_model(size).backbone.language_backbone
    return model.to(next(model.parameters()).device), size


def project_hidden(fc1: nn.Linear, units: int) -> Units:
    """Return the left singular vectors of an MLP's first layer with the largest singular values.

    A baseline: the activation between the two layers acts on units, not on their projections.

    Returns:
        (units, H) float32, orthonormal rows.
    """
    weight = fc1.weight.detach()
    joined = torch.cat([weight, fc1.bias.detach()[:, None]], dim=1)  # (H, d + 1)
    left = torch.linalg.svd(joined.double(), full_matrices=True).U  # (H, H)
    return left[:, :units].T.float().contiguous()


def _keep_layers(state: dict[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return the state with these layers of a module list alone, numbered anew."""
    new_index = {str(old): str(new) for new, old in enumerate(kept)}
    smaller = {}
    for key, value in state.items():
        if not key.startswith(f"{prefix}."):
            smaller[key] = value
            continue
        index, _, rest = key.removeprefix(f"{prefix}.").partition(".")
        if index in new_index:
            smaller[f"{prefix}.{new_index[index]}.{rest}"] = value
    return smaller


def _keep_hidden(state: dict[str, Tensor], mlp: str, units: Units) -> None:
    """Keep these hidden units of an MLP in the state, or project to them."""
    for name in ("fc1.weight", "fc1.bias"):
        value = state[f"{mlp}.{name}"]
        state[f"{mlp}.{name}"] = units.to(value) @ value if units.ndim == 2 else value[units]
    value = state[f"{mlp}.fc2.weight"]  # (d, H)
    state[f"{mlp}.fc2.weight"] = (
        value @ units.to(value).T if units.ndim == 2 else value[:, units].contiguous()
    )


def _keep_heads(state: dict[str, Tensor], attention: str, heads: Units, head_dim: int) -> None:
    """Keep these heads in the state; `qkv` is (3 * heads * head_dim, d): queries, keys, values."""
    for name in ("qkv.weight", "qkv.bias"):
        value = state[f"{attention}.{name}"]
        parts = value.unflatten(0, (3, -1, head_dim))[:, heads]
        state[f"{attention}.{name}"] = parts.flatten(0, 2)
    value = state[f"{attention}.proj.weight"]  # (d, heads * head_dim)
    state[f"{attention}.proj.weight"] = value.unflatten(1, (-1, head_dim))[:, heads].flatten(1)
