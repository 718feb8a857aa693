"""Names of modules and parameters, ours → those of transformers' `Sam3Model`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping


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
TO_THEIRS = {
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
TO_OURS = {theirs: ours for ours, theirs in TO_THEIRS.items()}


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """Return the other side's name of a module or parameter, whichever layer it is of."""
    if name in table:
        return table[name]
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    if number is None:
        return None
    other = table.get(f"{name[: number.start()]}*{name[number.end() :]}")
    return None if other is None else other.replace("*", number[0])


def rename_key(key: str, table: Mapping[str, str]) -> str | None:
    """Return the other side's key of a parameter that has a name of its own, or its module's."""
    module, _, parameter = key.rpartition(".")
    if whole := rename(key, table):
        return whole
    renamed = rename(module, table)
    return None if renamed is None else f"{renamed}.{parameter}"
