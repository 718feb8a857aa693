"""Between our weights and those of transformers' `Sam3Model`: keys and `config.json`, both ways.

The same tensors under other names, but for what the other side has no place
for: projections of point prompts, and the position of a class token that upstream drops as well
(vitdet.py:200). Neither is read by a prompt of words or boxes; both come back as zeros.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.config.compose import load_model_config, model_config, model_names
from app.config.schema import ModelConfig
from app.errors import UserError
from app.files import flatten, read_json
from app.model.build import mlp_units
from app.model.upstream.pin import bpe_path

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONFIG = "config.json"
VOCABULARY = 49408  # words
TOKENS = 32  # that transformers' Sam3Processor fills each prompt up to
# Of a published folder, which holds the detector beside the video's tracker (Sam3VideoModel).
_DETECTOR = "detector_model."
_TRACKER = ("tracker_model.", "tracker_neck.")
# Leaves of `config.json` that may be otherwise: published folders have epsilons that differ from
# those that the model was trained with.
_FREE = ("architectures", "model_type", "dtype", "layer_norm_eps", "dropout", "feature_sizes")
_POINTS = "geometry_encoder.points_"
_POSITIONS = "backbone.vision_backbone.trunk.pos_embed"  # (1, 1 + patches, width)
_PROJECTION = "backbone.language_backbone.encoder.text_projection"  # (width, 512); theirs turned


def _attention(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.out_proj": f"{theirs}.o_proj"}


def _inside(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in names.items()}


def _mlp(ours: str, theirs: str, layers: int) -> dict[str, str]:
    return {f"{ours}.layers.{n}": f"{theirs}.layer{n + 1}" for n in range(layers)}


_LAYER = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
_ENCODER_LAYER = {
    **_attention("self_attn", "self_attn"),
    **_attention("cross_attn_image", "cross_attn"),
    **_LAYER,
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "norm3": "layer_norm3",
}
# Module or parameter of ours → theirs; * is the number of a layer. Where ours packs queries, keys
# and values in one (`in_proj_*`, `qkv`), theirs are `q_proj`, `k_proj` and `v_proj` below the name.
_NAMES = {
    **_inside(
        "backbone.vision_backbone.trunk",
        "vision_encoder.backbone",
        {
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "ln_pre": "layer_norm",
            "blocks.*.norm1": "layers.*.layer_norm1",
            "blocks.*.norm2": "layers.*.layer_norm2",
            "blocks.*.attn.qkv": "layers.*.attention",
            "blocks.*.attn.proj": "layers.*.attention.o_proj",
            "blocks.*.mlp.fc1": "layers.*.mlp.fc1",
            "blocks.*.mlp.fc2": "layers.*.mlp.fc2",
        },
    ),
    **_inside(
        "backbone.vision_backbone.convs",
        "vision_encoder.neck.fpn_layers",
        {
            "0.dconv_2x2_0": "0.scale_layers.0",
            "0.dconv_2x2_1": "0.scale_layers.2",
            "1.dconv_2x2": "1.scale_layers.0",
            "*.conv_1x1": "*.proj1",
            "*.conv_3x3": "*.proj2",
        },
    ),
    **_inside(
        "backbone.language_backbone.encoder",
        "text_encoder",
        {
            "positional_embedding": "text_model.embeddings.position_embedding.weight",
            "token_embedding": "text_model.embeddings.token_embedding",
            "text_projection": "text_projection.weight",
            "ln_final": "text_model.final_layer_norm",
            **_inside(
                "transformer.resblocks.*",
                "text_model.encoder.layers.*",
                {
                    "attn": "self_attn",
                    "attn.out_proj": "self_attn.out_proj",
                    "ln_1": "layer_norm1",
                    "ln_2": "layer_norm2",
                    "mlp.c_fc": "mlp.fc1",
                    "mlp.c_proj": "mlp.fc2",
                },
            ),
        },
    ),
    "backbone.language_backbone.resizer": "text_projection",
    **_inside(
        "geometry_encoder",
        "geometry_encoder",
        {
            "norm": "prompt_layer_norm",
            "img_pre_norm": "vision_layer_norm",
            "encode_norm": "output_layer_norm",
            "label_embed": "label_embed",
            "cls_embed": "cls_embed",
            "final_proj": "final_proj",
            "boxes_direct_project": "boxes_direct_project",
            "boxes_pool_project": "boxes_pool_project",
            "boxes_pos_enc_project": "boxes_pos_enc_project",
        },
    ),
    **_inside("geometry_encoder.encode.*", "geometry_encoder.layers.*", _ENCODER_LAYER),
    **_inside("transformer.encoder.layers.*", "detr_encoder.layers.*", _ENCODER_LAYER),
    **_inside(
        "transformer.decoder",
        "detr_decoder",
        {
            "query_embed": "query_embed",
            "reference_points": "reference_points",
            "norm": "output_layer_norm",
            "presence_token": "presence_token",
            "presence_token_out_norm": "presence_layer_norm",
            **_mlp("presence_token_head", "presence_head", 3),
            **_mlp("bbox_embed", "box_head", 3),
            **_mlp("ref_point_head", "ref_point_head", 2),
            **_mlp("boxRPB_embed_x", "box_rpb_embed_x", 2),
            **_mlp("boxRPB_embed_y", "box_rpb_embed_y", 2),
            **_inside(
                "layers.*",
                "layers.*",
                {
                    **_attention("self_attn", "self_attn"),
                    **_attention("ca_text", "text_cross_attn"),
                    **_attention("cross_attn", "vision_cross_attn"),
                    **_LAYER,
                    "norm1": "vision_cross_attn_layer_norm",
                    "norm2": "self_attn_layer_norm",
                    "norm3": "mlp_layer_norm",
                    "catext_norm": "text_cross_attn_layer_norm",
                },
            ),
        },
    ),
    **_inside(
        "segmentation_head",
        "mask_decoder",
        {
            "pixel_decoder.conv_layers.*": "pixel_decoder.conv_layers.*",
            "pixel_decoder.norms.*": "pixel_decoder.norms.*",
            "mask_predictor.mask_embed.layers.*": "mask_embedder.layers.*",
            "instance_seg_head": "instance_projection",
            "semantic_seg_head": "semantic_projection",
            **_attention("cross_attend_prompt", "prompt_cross_attn"),
            "cross_attn_norm": "prompt_cross_attn_norm",
        },
    ),
    **_inside(
        "dot_prod_scoring",
        "dot_product_scoring",
        {
            **_mlp("prompt_mlp", "text_mlp", 2),
            "prompt_mlp.out_norm": "text_mlp_out_norm",
            "prompt_proj": "text_proj",
            "hs_proj": "query_proj",
        },
    ),
}
_BACK = {theirs: ours for ours, theirs in _NAMES.items()}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours → `Sam3Model`'s, of the same memory where that can be.

    Args:
        state: whole, without what is computed.

    Raises:
        KeyError: a key that no SAM 3 of ours has.
    """
    result = {}
    for key, value in state.items():
        if key.startswith(_POINTS):
            continue
        if key == _POSITIONS:
            value = value[:, 1:]
        elif key == _PROJECTION:
            value = value.T
        module, _, parameter = key.rpartition(".")
        packed = module.endswith(".qkv") or parameter.startswith("in_proj_")
        name = _rename(module, _NAMES) if packed else _rename_key(key, _NAMES)
        if name is None:
            raise KeyError(key)
        if packed:
            kind = parameter.removeprefix("in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{name}.{letter}_proj.{kind}"] = part
        else:
            result[name] = value
    return {key: value.contiguous() for key, value in result.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Sam3Model`'s state dict, or a published one with a tracker → ours.

    What has no name of ours, or parts that do not go together, keep their keys: the caller compares
    keys and shapes with the model's, and names those that do not fit.
    """
    found = dict(_detector(state))
    result = {}
    for key in list(found):
        match = re.fullmatch(r"(.+)\.q_proj\.(weight|bias)", key)
        module = _rename(match[1], _BACK) if match else None
        if match and module:
            names = [f"{match[1]}.{letter}_proj.{match[2]}" for letter in "qkv"]
            parts = [found[name] for name in names if name in found]
            shapes = {part.shape for part in parts}
            if len(parts) == 3 and len(shapes) == 1 and parts[0].dim():
                joint = "." if module.endswith(".qkv") else ".in_proj_"
                result[f"{module}{joint}{match[2]}"] = torch.cat(parts)
                for name in names:
                    del found[name]
    for key, value in found.items():
        result[_rename_key(key, _BACK) or key] = value
    return _complete(result)


def is_layout(keys: Iterable[str]) -> bool:
    """Whether keys are of transformers' Sam3Model or Sam3VideoModel."""
    return any(key.startswith(("vision_encoder.", _DETECTOR)) for key in keys)


def is_transformers(file: Path) -> bool:
    """Whether a weights file is of that layout; its folder then has the size in `config.json`."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as content:
            return is_layout(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None


def to_config(config: ModelConfig) -> dict[str, Any]:
    """A size of ours → the content of `config.json`, with all that decides what is computed.

    Raises:
        UserError: what transformers' model has no place for, all of it.
    """
    if problems := _inexpressible(config):
        raise UserError(problems)
    vision, text = config.vision, config.text
    side = config.resolution // vision.patch_size
    detr = {
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feedforward,
        "hidden_act": "relu",
        "dropout": config.dropout,
    }
    return {
        "architectures": ["Sam3Model"],
        "model_type": "sam3",
        "dtype": "float32",
        "vision_config": {
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": vision.embed_dim,
                "intermediate_size": mlp_units(config),
                "num_hidden_layers": vision.depth,
                "num_attention_heads": vision.num_heads,
                "num_channels": 3,
                "image_size": config.resolution,
                "patch_size": vision.patch_size,
                "window_size": vision.window_size,
                "global_attn_indexes": list(vision.global_blocks),
                "pretrain_image_size": vision.window_size * vision.patch_size,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,  # upstream's; Sam3ViTConfig's default is 1e-6
                "layer_scale_init_value": None,
            },
            "fpn_hidden_size": config.d_model,
            "backbone_feature_sizes": [[side * n, side * n] for n in (4, 2, 1)],
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": VOCABULARY,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "projection_dim": 512,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.context_length,
            "hidden_act": "gelu",
        },
        "geometry_encoder_config": {
            "model_type": "sam3_geometry_encoder",
            **detr,
            "num_layers": config.geometry_layers,
            "roi_size": 7,
        },
        "detr_encoder_config": {
            "model_type": "sam3_detr_encoder",
            **detr,
            "num_layers": config.encoder_layers,
        },
        "detr_decoder_config": {
            "model_type": "sam3_detr_decoder",
            **detr,
            "num_layers": config.decoder_layers,
            "num_queries": config.num_queries,
        },
        "mask_decoder_config": {
            "model_type": "sam3_mask_decoder",
            "hidden_size": config.d_model,
            "num_attention_heads": config.num_heads,
            "num_upsampling_stages": 3,
        },
    }


def read_config(folder: Path) -> ModelConfig:
    """The size of ours that a folder's `config.json` describes, at its resolution.

    Raises:
        UserError: no such file, not of a SAM 3, or another architecture than any of the sizes;
            names what differs from the nearest.
    """
    file = folder / CONFIG
    content = read_json(file)
    kind = content.get("model_type") if isinstance(content, dict) else None
    detector = content.get("detector_config") if kind == "sam3_video" else content
    if kind not in ("sam3", "sam3_video") or not isinstance(detector, dict):
        raise UserError(
            f"{file}: model_type is {kind!r}; weights of SAM 3 have 'sam3', or 'sam3_video' with "
            "a detector_config. Give a folder that Sam3Model.from_pretrained loads."
        )
    values = flatten(detector)
    resolution = values.get("vision_config.backbone_config.image_size")
    # What a folder leaves out is transformers' default, and that is the published model.
    default = flatten(to_config(load_model_config("sam3")))
    nearest: tuple[str, list[str]] | None = None
    for name in model_names():
        size = load_model_config(name)
        if isinstance(resolution, int) and resolution % size.vision.patch_size == 0:
            changed = size.model_dump() | {"resolution": resolution}
            size = model_config(changed, f"{file}: image_size")
        differences = [
            f"  {key}: {values.get(key, default[key])!r}, where '{name}' has {value!r}"
            for key, value in flatten(to_config(size)).items()
            if not key.endswith(_FREE) and values.get(key, default[key]) != value
        ]
        if not differences:
            return size
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = name, differences
    assert nearest is not None
    raise UserError(
        [
            f"{file}: is of none of the sizes {', '.join(model_names())}. Nearest is "
            f"'{nearest[0]}', from which {len(nearest[1])} differ:",
            *nearest[1][:6],
        ]
    )


def make_tokenizer() -> CLIPTokenizer:
    """Upstream's vocabulary (tokenizer_ve.py) as transformers' CLIP tokenizer."""
    from sam3.model.tokenizer_ve import bytes_to_unicode
    from transformers import CLIPTokenizer

    lines = gzip.decompress(bpe_path().read_bytes()).decode("utf-8").split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 * 256 - 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def write_tokenizer(file: Path) -> None:
    """Write `tokenizer.json`, which the tokenizers package reads."""
    make_tokenizer().backend_tokenizer.save(str(file))


def _inexpressible(config: ModelConfig) -> list[str]:
    """What transformers' Sam3Model cannot be told, each with its remedy."""
    vision, problems = config.vision, []
    if config.vocabulary is not None:
        problems.append(
            f"vocabulary: {len(config.vocabulary)} prompts are stored in the text encoder's place, "
            "which transformers' Sam3Model has no place for. Export the weights that this "
            "vocabulary was made from, or use --format onnx."
        )
    if vision.heads not in (None, vision.num_heads):
        problems.append(
            f"vision.heads: {vision.heads} of {vision.num_heads} heads are left, which "
            "transformers' ViT cannot be told. Export weights with all of their heads, or use "
            "--format onnx."
        )
    if not config.segmentation:
        problems.append(
            "segmentation: these weights have no mask head, and transformers' Sam3Model always "
            "has one. Export weights trained with masks, or use --format onnx."
        )
    if config.text.context_length != TOKENS:
        problems.append(
            f"text.context_length: {config.text.context_length} tokens, where transformers' "
            f"Sam3Processor makes {TOKENS} of each prompt. Export weights of {TOKENS} tokens, or "
            "use --format onnx."
        )
    return problems


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    """The other side's name of a module or parameter, whichever layer it is of."""
    if name in table:
        return table[name]
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    if number is None:
        return None
    other = table.get(f"{name[: number.start()]}*{name[number.end() :]}")
    return None if other is None else other.replace("*", number[0])


def _rename_key(key: str, table: Mapping[str, str]) -> str | None:
    """The other side's key of a parameter that has a name of its own, or its module's."""
    module, _, parameter = key.rpartition(".")
    if whole := _rename(key, table):
        return whole
    renamed = _rename(module, table)
    return None if renamed is None else f"{renamed}.{parameter}"


def _detector(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not key.startswith(_TRACKER):
            yield key.removeprefix(_DETECTOR), value


def _complete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours, with zeros for what the other side has no place for, where shapes are as they ought."""
    positions, projection = state.get(_POSITIONS), state.get(_PROJECTION)
    if positions is not None and positions.dim() == 3:
        state[_POSITIONS] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if projection is not None and projection.dim() == 2:
        state[_PROJECTION] = projection.T.contiguous()
    final = state.get("geometry_encoder.final_proj.weight")
    if final is not None and final.dim() == 2:
        width = len(final)
        for name, inputs in (("direct", 2), ("pool", width), ("pos_enc", width)):
            state[f"{_POINTS}{name}_project.weight"] = final.new_zeros(width, inputs)
            state[f"{_POINTS}{name}_project.bias"] = final.new_zeros(width)
    return state
