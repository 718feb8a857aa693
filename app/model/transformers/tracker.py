"""The tracker of videos and its neck: upstream's names → those of `Sam3VideoModel`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from app.model import published
from app.model.transformers.names import TO_THEIRS, rename_key

_POINTS = "tracker.sam_prompt_encoder.point_embeddings."
_POSITIONS = "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_ENCODER = "maskmem_backbone.mask_downsampler.encoder"
_DOWNSAMPLER = "memory_encoder.mask_downsampler"


def _inside(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in names.items()}


def _mlp(ours: str, theirs: str) -> dict[str, str]:
    names = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}
    return _inside(ours, theirs, names)


def _attention(*names: str) -> dict[str, str]:
    same = {f"{name}.{part}_proj": f"{name}.{part}_proj" for name in names for part in "qkv"}
    return same | {f"{name}.out_proj": f"{name}.o_proj" for name in names}


def _norms(count: int) -> dict[str, str]:
    return {f"norm{n}": f"layer_norm{n}" for n in range(1, count + 1)}


_MASKS = {
    **{name: name for name in ("iou_token", "mask_tokens", "obj_score_token")},
    **{name: name for name in ("conv_s0", "conv_s1")},
    **_mlp("output_hypernetworks_mlps.*", "output_hypernetworks_mlps.*"),
    **_mlp("iou_prediction_head", "iou_prediction_head"),
    **_mlp("pred_obj_score_head", "pred_obj_score_head"),
    "output_upscaling.0": "upscale_conv1",
    "output_upscaling.1": "upscale_layer_norm",
    "output_upscaling.3": "upscale_conv2",
    "transformer.norm_final_attn": "transformer.layer_norm_final_attn",
    **_inside("transformer", "transformer", _attention("final_attn_token_to_image")),
    **_inside(
        "transformer.layers.*",
        "transformer.layers.*",
        {
            **_attention("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"),
            **_norms(4),
            "mlp.lin1": "mlp.proj_in",
            "mlp.lin2": "mlp.proj_out",
        },
    ),
}
_PROMPTS = {
    "not_a_point_embed": "not_a_point_embed",
    "no_mask_embed": "no_mask_embed",
    "mask_downscaling.0": "mask_embed.conv1",
    "mask_downscaling.1": "mask_embed.layer_norm1",
    "mask_downscaling.3": "mask_embed.conv2",
    "mask_downscaling.4": "mask_embed.layer_norm2",
    "mask_downscaling.6": "mask_embed.conv3",
}
_MEMORY = {
    **_attention("self_attn", "cross_attn_image"),
    **_norms(3),
    "linear1": "linear1",
    "linear2": "linear2",
}
_NAMES = {
    "maskmem_tpos_enc": "memory_temporal_positional_encoding",
    "no_mem_embed": "no_memory_embedding",
    "no_mem_pos_enc": "no_memory_positional_encoding",
    "no_obj_ptr": "no_object_pointer",
    "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    "mask_downsample": "mask_downsample",
    "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
    **_mlp("obj_ptr_proj", "object_pointer_proj"),
    **_inside("transformer.encoder.layers.*", "memory_attention.layers.*", _MEMORY),
    "transformer.encoder.norm": "memory_attention.layer_norm",
    **{
        f"{_ENCODER}.{3 * n + at}": f"{_DOWNSAMPLER}.layers.{n}.{name}"
        for n in range(4)
        for at, name in enumerate(("conv", "layer_norm"))
    },
    f"{_ENCODER}.12": f"{_DOWNSAMPLER}.final_conv",
    "maskmem_backbone.pix_feat_proj": "memory_encoder.feature_projection",
    "maskmem_backbone.out_proj": "memory_encoder.projection",
    **_inside(
        "maskmem_backbone.fuser.layers.*",
        "memory_encoder.memory_fuser.layers.*",
        {
            "gamma": "scale",
            "dwconv": "depthwise_conv",
            "norm": "layer_norm",
            "pwconv1": "pointwise_conv1",
            "pwconv2": "pointwise_conv2",
        },
    ),
    **_inside("sam_prompt_encoder", "prompt_encoder", _PROMPTS),
    **_inside("sam_mask_decoder", "mask_decoder", _MASKS),
}
_TO_THEIRS = _inside("tracker", "tracker_model", _NAMES)


def to_transformers(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tracker and its neck of Meta's `sam3.pt`, as transformers' converter does.

    (huggingface/transformers, convert_sam3_video_to_hf.py.) A key of neither is passed over; one
    of the tracker that has no name there keeps its own, for whoever loads strictly to name.
    """
    result = {}
    neck = published.tracker_neck("3.0")[0]
    points = {}
    for key, value in base.items():
        if key.startswith(neck):
            own = f"backbone.vision_backbone.convs.{key.removeprefix(neck)}"
            name = rename_key(own, TO_THEIRS) or own
            result[name.replace("vision_encoder.neck.", "tracker_neck.")] = value
        elif key == _POSITIONS:
            result["tracker_model.shared_image_embedding.positional_embedding"] = value
            shared = "tracker_model.prompt_encoder.shared_embedding.positional_embedding"
            result[shared] = value.clone()
        elif key.startswith(_POINTS):
            points[key] = value  # of each kind of point, (1, width)
        elif key.startswith("tracker."):
            result[rename_key(key, _TO_THEIRS) or key] = value
    if points:
        joined = torch.cat([points[key] for key in sorted(points)])
        result["tracker_model.prompt_encoder.point_embed.weight"] = joined
    return result
