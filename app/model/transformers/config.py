"""`config.json` of transformers' `Sam3Model` ↔ a size of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.config.compose import load_model_config, model_config, model_names
from app.config.schema import ModelConfig
from app.errors import UserError
from app.files import flatten, read_json

CONFIG = "config.json"
VOCABULARY = 49408  # words
TOKENS = 32  # that transformers' Sam3Processor fills each prompt up to
# Leaves of `config.json` that may be otherwise: published folders have epsilons that differ from
# those that the model was trained with.
_FREE = ("architectures", "model_type", "dtype", "layer_norm_eps", "dropout", "feature_sizes")


def to_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of `config.json` for a size of ours: all that decides what is computed.

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
                "intermediate_size": vision.mlp_units,
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


def to_video_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of `config.json` for `Sam3VideoModel`, whose tracker is as published.

    Raises:
        UserError: as `to_config` does.
    """
    detector = to_config(config)
    side, patch = config.resolution, config.vision.patch_size
    return {
        "architectures": ["Sam3VideoModel"],
        "model_type": "sam3_video",
        "dtype": "float32",
        "detector_config": detector,
        "tracker_config": {
            "model_type": "sam3_tracker_video",
            "image_size": side,  # sets the sizes of feature maps, by the patches below
            "vision_config": detector["vision_config"],
            "prompt_encoder_config": {"image_size": side, "patch_size": patch},
        },
        "low_res_mask_size": 4 * (side // patch),
    }


def read_config(folder: Path) -> ModelConfig:
    """Return the size of ours that a folder's `config.json` describes, at its resolution.

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


def _inexpressible(config: ModelConfig) -> list[str]:
    """Report what transformers' Sam3Model cannot be told, each with its remedy."""
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
