"""Size → SAM 3, put together from upstream's own modules as upstream's `model_builder` does."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer
from sam3.model.geometry_encoders import SequenceGeometryEncoder
from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead
from sam3.model.model_misc import (
    MLP,
    DotProductScoring,
    MultiheadAttentionWrapper,
    TransformerWrapper,
)
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_image import Sam3Image
from sam3.model.text_encoder_ve import VETextEncoder
from sam3.model.tokenizer_ve import SimpleTokenizer
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from torch import nn

from app.config.schema import ModelConfig
from app.model.stored_text import StoredText
from app.model.upstream import fixes, pin


def build_model(
    config: ModelConfig, *, device: torch.device | str = "cpu", matcher: nn.Module | None = None
) -> Sam3Image:
    """Build a SAM 3 of the given size with freshly initialised weights, in training mode.

    Args:
        config: size and resolution; at size `sam3`, upstream's `build_sam3_image_model`.
        device: where to make the parameters; "meta" counts them without memory.
        matcher: upstream's Hungarian matcher, which training needs and prediction does not.
    """
    fixes.apply_fixes()
    device = torch.device(device)
    on_meta = device.type == "meta"
    with device, fixes.building_on_meta() if on_meta else contextlib.nullcontext():
        model = Sam3Image(
            backbone=SAM3VLBackbone(visual=_vision(config), text=_text(config), scalp=1),
            transformer=TransformerWrapper(
                encoder=_encoder(config), decoder=_decoder(config), d_model=config.d_model
            ),
            input_geometry_encoder=_geometry_encoder(config),
            segmentation_head=_segmentation_head(config) if config.segmentation else None,
            num_feature_levels=1,
            o2m_mask_predict=True,
            dot_prod_scoring=_scoring(config),
            use_instance_query=False,
            multimask_output=True,
            matcher=matcher,
        )
    module: Any
    for name, part in components(model).items():
        for module in part.modules():
            module.checkpoint_activations = _is_recomputed(config, name)
    return model


def _is_recomputed(config: ModelConfig, component: str) -> bool:
    asked = config.activation_checkpointing
    return component in asked if isinstance(asked, list) else bool(asked)  # auto, undecided: all


def components(model: Sam3Image) -> dict[str, nn.Module]:
    """Return the model's parts by name: vision, text, detector, geometry, masks (if any), scoring.

    Each parameter is in one of them.
    """
    parts: dict[str, nn.Module | None] = {
        "vision": model.backbone.vision_backbone,
        "text": model.backbone.language_backbone,
        "detector": model.transformer,
        "geometry": model.geometry_encoder,
        "masks": model.segmentation_head,
        "scoring": model.dot_prod_scoring,
    }
    return {name: part for name, part in parts.items() if part is not None}


def count_parameters(model: Sam3Image, *, trainable: bool = False) -> dict[str, int]:
    """Count the parameters, or the trainable ones alone, of each component, and the total."""
    return {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad or not trainable)
        for name, part in {**components(model), "total": model}.items()
    }


def padding_note(config: ModelConfig) -> str | None:
    """Return a note of what padding costs where windows do not tile the image; else None."""
    vision = config.vision
    side, window = config.resolution // vision.patch_size, vision.window_size
    padded = -(-side // window) * window
    if padded == side or len(vision.global_blocks) == vision.depth:
        return None
    step = window * vision.patch_size
    return (
        f"model.resolution {config.resolution}: its {side} patches a side do not tile windows of "
        f"{window}; blocks that have these compute {(padded / side) ** 2 - 1:.0%} more. Multiples "
        f"of {step} need no padding"
    )


def _position_encoding(config: ModelConfig) -> PositionEmbeddingSine:
    return PositionEmbeddingSine(
        num_pos_feats=config.d_model, normalize=True, scale=None, temperature=10000
    )


def _vision(config: ModelConfig) -> Sam3DualViTDetNeck:
    vision = config.vision
    trunk = ViT(
        img_size=config.resolution,
        pretrain_img_size=vision.window_size * vision.patch_size,
        patch_size=vision.patch_size,
        embed_dim=vision.embed_dim,
        depth=vision.depth,
        num_heads=vision.num_heads,
        # upstream rounds down what it makes of this, and may lose a unit
        mlp_ratio=(vision.mlp_units + 0.5) / vision.embed_dim,
        norm_layer="LayerNorm",
        drop_path_rate=vision.drop_path,
        qkv_bias=True,
        use_abs_pos=True,
        tile_abs_pos=True,
        global_att_blocks=tuple(vision.global_blocks),
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=vision.window_size,
        pretrain_use_cls_token=True,
        retain_cls_token=False,
        ln_pre=True,
        ln_post=False,
        return_interm_layers=False,
        bias_patch_embed=False,
        use_act_checkpoint=_is_recomputed(config, "vision"),
    )
    if vision.heads is not None:
        _leave_heads(trunk, vision.heads)
    return Sam3DualViTDetNeck(
        position_encoding=_position_encoding(config),
        d_model=config.d_model,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        trunk=trunk,
    )


def _leave_heads(trunk: ViT, heads: int) -> None:
    """Replace attention by fewer heads, as wide as before so that their rotary tables stay."""
    for block in trunk.blocks:
        attention = block.attn
        width, dim = heads * attention.head_dim, attention.qkv.in_features
        attention.qkv, attention.proj = nn.Linear(dim, 3 * width), nn.Linear(width, dim)
        attention.num_heads = heads
        attention.apply(trunk._init_weights)


def _text(config: ModelConfig) -> VETextEncoder | StoredText:
    text = config.text
    if config.vocabulary is not None:
        return StoredText(config.vocabulary, text.context_length, config.d_model)
    return VETextEncoder(
        tokenizer=tokenizer(),
        d_model=config.d_model,
        width=text.width,
        heads=text.num_heads,
        layers=text.depth,
        context_length=text.context_length,
        use_act_checkpoint=_is_recomputed(config, "text"),
    )


@functools.cache
def tokenizer() -> SimpleTokenizer:
    """Read once a process: that takes a third of the time in which a small model is built."""
    return SimpleTokenizer(bpe_path=str(pin.bpe_path()))


def _attention(config: ModelConfig, *, batch_first: bool = False) -> MultiheadAttentionWrapper:
    return MultiheadAttentionWrapper(
        num_heads=config.num_heads,
        dropout=config.dropout,
        embed_dim=config.d_model,
        batch_first=batch_first,
    )


def _encoder(config: ModelConfig) -> TransformerEncoderFusion:
    layer = TransformerEncoderLayer(
        activation="relu",
        d_model=config.d_model,
        dim_feedforward=config.feedforward,
        dropout=config.dropout,
        pos_enc_at_attn=True,
        pos_enc_at_cross_attn_keys=False,
        pos_enc_at_cross_attn_queries=False,
        pre_norm=True,
        self_attention=_attention(config, batch_first=True),
        cross_attention=_attention(config, batch_first=True),
    )
    return TransformerEncoderFusion(
        layer=layer,
        num_layers=config.encoder_layers,
        d_model=config.d_model,
        num_feature_levels=1,
        frozen=False,
        use_act_checkpoint=True,  # asserted; `checkpoint_activations` decides
        add_pooled_text_to_img_feat=False,
        pool_text_with_mask=True,
    )


def _decoder(config: ModelConfig) -> TransformerDecoder:
    layer = TransformerDecoderLayer(
        activation="relu",
        d_model=config.d_model,
        dim_feedforward=config.feedforward,
        dropout=config.dropout,
        cross_attention=_attention(config),
        n_heads=config.num_heads,
        use_text_cross_attention=True,
    )
    return TransformerDecoder(
        layer=layer,
        num_layers=config.decoder_layers,
        num_queries=config.num_queries,
        return_intermediate=True,
        box_refine=True,
        num_o2m_queries=0,
        dac=True,
        boxRPB="log",
        d_model=config.d_model,
        frozen=False,
        interaction_layer=None,
        dac_use_selfatt_ln=True,
        use_act_checkpoint=True,  # asserted; `checkpoint_activations` decides
        presence_token=True,
    )


def _geometry_encoder(config: ModelConfig) -> SequenceGeometryEncoder:
    layer = TransformerEncoderLayer(
        activation="relu",
        d_model=config.d_model,
        dim_feedforward=config.feedforward,
        dropout=config.dropout,
        pos_enc_at_attn=False,
        pre_norm=True,
        self_attention=_attention(config),
        pos_enc_at_cross_attn_queries=False,
        pos_enc_at_cross_attn_keys=True,
        cross_attention=_attention(config),
    )
    return SequenceGeometryEncoder(
        pos_enc=_position_encoding(config),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=config.d_model,
        num_layers=config.geometry_layers,
        layer=layer,
        use_act_ckpt=True,
        add_cls=True,
        add_post_encode_proj=True,
    )


def _segmentation_head(config: ModelConfig) -> UniversalSegmentationHead:
    return UniversalSegmentationHead(
        hidden_dim=config.d_model,
        upsampling_stages=3,
        aux_masks=False,
        presence_head=False,
        dot_product_scorer=None,
        act_ckpt=False,  # the whole head is recomputed; upstream recomputes its pixels twice
        cross_attend_prompt=MultiheadAttentionWrapper(
            num_heads=config.num_heads, dropout=0, embed_dim=config.d_model
        ),
        pixel_decoder=PixelDecoder(
            num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=config.d_model
        ),
    )


def _scoring(config: ModelConfig) -> DotProductScoring:
    prompt_mlp = MLP(
        input_dim=config.d_model,
        hidden_dim=config.feedforward,
        output_dim=config.d_model,
        num_layers=2,
        dropout=config.dropout,
        residual=True,
        out_norm=nn.LayerNorm(config.d_model),
    )
    return DotProductScoring(d_model=config.d_model, d_proj=config.d_model, prompt_mlp=prompt_mlp)
