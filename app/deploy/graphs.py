"""The model as three graphs of plain operators: image, text and ground.

Attention is written out, as fused attention breaks in TensorRT's half precision, and rotary
embedding turns pairs by a cosine and a sine, not by complex numbers. Shapes are static.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sam3.model.decoder import TransformerDecoder
from sam3.model.maskformer_segmentation import MaskPredictor
from sam3.model.model_misc import inverse_sigmoid
from sam3.model.sam3_image import Sam3Image
from sam3.model.vitdet import ViT, get_abs_pos, window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

FPN = ("fpn0", "fpn1", "fpn2")  # finest first: four, two and one feature a patch's side
FEATURES = (*FPN, "position")  # of an image
HIDDEN = -1e4  # an attention's score of what is masked: its exponential is 0, and fits in a half


class Trunk(nn.Module):
    """Upstream's ViT, through which tokens go window by window, where windows tile the image.

    Nothing but the rotary embedding of global attention asks where a token lies, so windows are
    made once and not in each block.

    Args:
        vit: `sam3.model.vitdet.ViT`.

    Attributes:
        side: of the image, in patches.
    """

    places: Tensor  # (1, side, side, C)

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.side = math.isqrt(len(vit.blocks[vit.full_attn_ids[0]].attn.freqs_cis))
        window = max(block.window_size for block in vit.blocks)
        self.window = 0 if window == 0 or self.side % window else window  # 0: tokens stay in rows
        places = get_abs_pos(
            vit.pos_embed.detach(),
            vit.pretrain_use_cls_token,
            (self.side, self.side),
            False,
            tiling=True,
        )
        self.register_buffer("places", places)
        order = None
        if self.window:
            rows = torch.arange(self.side**2).view(1, self.side, self.side, 1)
            order = window_partition(rows, self.window)[0].flatten()
        self.patch_embed, self.ln_pre, self.ln_post = vit.patch_embed, vit.ln_pre, vit.ln_post
        self.blocks = nn.ModuleList(Block(block, order) for block in vit.blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """(1, 3, R, R) → (1, C, side, side)."""
        x = self.ln_pre(self.patch_embed(pixels) + self.places)
        if self.window:
            x, _ = window_partition(x, self.window)
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x)
        if self.window:
            whole = self.side, self.side
            x = window_unpartition(x, self.window, whole, whole)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Upstream's ViT block.

    Args:
        block: `sam3.model.vitdet.Block`.
        order: (tokens,) which of the image's tokens lies where, window by window; None: in rows.
    """

    def __init__(self, block: Any, order: Tensor | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = RotaryAttention(block.attn, None if block.window_size else order)
        self.window = block.window_size if order is None else 0

    def forward(self, x: Tensor) -> Tensor:
        """(1, H, W, C), or window by window (windows, window, window, C) → the same."""
        seen = self.norm1(x)
        if self.window:
            parts, padded = window_partition(seen, self.window)
            seen = window_unpartition(self.attn(parts), self.window, padded, x.shape[1:3])
        else:
            seen = self.attn(seen)
        x = x + seen
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class RotaryAttention(nn.Module):
    """Upstream's ViT attention, its rotary embedding in real numbers.

    The units of queries and keys are put in another order, the same in both: the first of each
    rotated pair before all the second ones, so that halves are turned and not neighbours. Their
    weights take up the scale of `attend`.

    Args:
        attention: `sam3.model.vitdet.Attention`.
        order: (tokens,) which of the image's tokens lies where; None: they lie in rows.
    """

    cos: Tensor  # (tokens, head_dim / 2)
    sin: Tensor

    def __init__(self, attention: Any, order: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.proj = attention.qkv, attention.proj
        turns: Tensor = attention.freqs_cis  # (tokens, head_dim / 2) complex
        if order is not None:
            turns = turns[order]
        self.register_buffer("cos", turns.real.contiguous())
        self.register_buffer("sin", turns.imag.contiguous())
        width = self.heads * self.head_dim
        units = torch.arange(width).view(self.heads, -1, 2).transpose(1, 2).flatten()
        units = torch.cat([units, width + units, 2 * width + torch.arange(width)])
        scale = torch.ones(3 * width, 1)
        scale[: 2 * width] = self.head_dim**-0.25
        with torch.no_grad():
            self.qkv.weight.copy_(self.qkv.weight[units] * scale)
            self.qkv.bias.copy_(self.qkv.bias[units] * scale[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → the same. As many tokens as there are turns see each other."""
        parts = self.qkv(x).view(-1, len(self.cos), 3 * self.heads, self.head_dim)
        turned, value = parts.transpose(1, 2).split([2 * self.heads, self.heads], dim=1)
        query, key = self._turn(turned).chunk(2, dim=1)  # (groups, heads, tokens, head_dim)
        found = attend(query, key, value).transpose(1, 2)
        out: Tensor = self.proj(found.reshape(*x.shape[:-1], -1))
        return out

    def _turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * self.cos - second * self.sin, first * self.sin + second * self.cos], dim=-1
        )


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` as matrix products and a softmax, called as upstream calls it.

    Keys need no bias, which adds the same to all scores of a query, and that of values goes through
    as it is, since the shares of a query come to 1: it is added to the output's.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        assert attention.in_proj_weight is not None
        query, key, value = attention.in_proj_weight.detach().chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.detach().chunk(3)
        out, scale = attention.out_proj, attention.head_dim**-0.25
        out_bias = out.bias.detach() + out.weight.detach() @ value_bias
        self.query = _linear(query * scale, query_bias * scale)
        self.key, self.value = _linear(key * scale), _linear(value)
        self.out = _linear(out.weight.detach(), out_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Tokens first, or the batch where `batch_first` says so.

        Args:
            attn_mask: (B * heads, queries, keys) or (queries, keys) float32, added to the scores.
            key_padding_mask: (B, keys) bool, True where there is no key.
        """
        q, k, v = (
            self._split(made) for made in (self.query(query), self.key(key), self.value(value))
        )
        batch, queries = q.shape[0], q.shape[2]
        mask = attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.view(batch, self.heads, *mask.shape[1:])
        if key_padding_mask is not None:
            hidden = key_padding_mask[:, None, None].to(q.dtype) * HIDDEN
            mask = hidden if mask is None else mask + hidden
        found = attend(q, k, v, mask)
        if self.batch_first:
            found = found.permute(0, 2, 1, 3).reshape(batch, queries, -1)
        else:
            found = found.permute(2, 0, 1, 3).reshape(queries, batch, -1)
        return self.out(found), None

    def _split(self, x: Tensor) -> Tensor:
        """→ (B, heads, tokens, head_dim)."""
        x = x.view(*x.shape[:2], self.heads, -1)
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of weights (out, in) that are there."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the keys that fit a query best hold.

    Args:
        query, key: (B, heads, tokens, head_dim), each scaled by head_dim ** -0.25: their product is
            as it should be, and none of its sums leaves half precision.
        value: (B, heads, tokens, head_dim).
        mask: added to the scores.
    """
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ value


def write_out(model: Sam3Image) -> Sam3Image:
    """The model with its attentions and its masks written out, in place, in evaluation mode."""

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ViT):
                setattr(parent, name, Trunk(child))
            elif isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, PlainAttention(child))
            elif isinstance(child, nn.ConvTranspose2d):
                setattr(parent, name, Doubling(child))
            elif isinstance(child, nn.GELU):
                setattr(parent, name, Gelu())
            elif isinstance(child, TransformerDecoder):
                setattr(parent, name, Decoder(child))
            elif isinstance(child, MaskPredictor):
                setattr(parent, name, MaskProduct(child))
    return model.eval().requires_grad_(False)


class Doubling(nn.Module):
    """A transposed convolution of 2 x 2 pixels with stride 2, as a product: each pixel makes four.

    ONNX Runtime has no transposed convolution in int8.
    """

    def __init__(self, convolution: nn.ConvTranspose2d) -> None:
        super().__init__()
        assert convolution.kernel_size == convolution.stride == (2, 2)
        assert convolution.bias is not None
        weight = convolution.weight.detach().permute(2, 3, 1, 0)  # (2, 2, out, in)
        bias = convolution.bias.detach().repeat(4)
        self.product = _linear(weight.flatten(0, 2).contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, 2H, 2W)."""
        batch, _, height, width = x.shape
        made = self.product(x.permute(0, 2, 3, 1)).view(batch, height, width, 2, 2, -1)
        # In two steps, of which the first moves whole rows of channels, and the second is what ONNX
        # Runtime takes away before a convolution in int8: together they took five times as long.
        rows = made.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
        return rows.permute(0, 3, 1, 2)


class Gelu(nn.Module):
    """`nn.GELU` in the order in which ONNX Runtime knows it, and computes it at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x * ((x / 2**0.5).erf() + 1) * 0.5


class Decoder(nn.Module):
    """Upstream's DETR decoder, of which only what its last layer says is computed.

    The presence token stays before the queries throughout, the sines of boxes are not interleaved
    (the weights that read them are put in that order), and what places add to an attention's scores
    is put in its order before its two axes are added to a map.
    """

    frequencies: Tensor  # (D / 4,) of a box's numbers, radians
    edges: Tensor  # (4, 4) cxcywh → x0, x1, y0, y1

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        assert decoder.boxRPB == "log"
        assert decoder.use_normed_output_consistently
        self.layers, self.norm, self.box_head = decoder.layers, decoder.norm, decoder.bbox_embed
        self.query_embed, self.reference_points = decoder.query_embed, decoder.reference_points
        self.presence_token, self.presence_norm = (
            decoder.presence_token,
            decoder.presence_token_out_norm,
        )
        self.presence_head = decoder.presence_token_head
        self.place_head = decoder.ref_point_head
        self.bias_x, self.bias_y = decoder.boxRPB_embed_x, decoder.boxRPB_embed_y
        count = decoder.d_model // 4  # sines of a number, and as many cosines
        steps = torch.arange(count, dtype=torch.float32) / count
        self.register_buffer("frequencies", 2 * torch.pi / 10000**steps)
        half = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [-0.5, 0.5, 0, 0], [0, 0, -0.5, 0.5]])
        self.register_buffer("edges", half)
        theirs = torch.arange(8 * count).view(4, count, 2)[[1, 0, 2, 3]]  # of y, x, w, h
        first = self.place_head.layers[0]
        with torch.no_grad():
            first.weight.copy_(first.weight[:, theirs.transpose(1, 2).flatten()])

    def forward(
        self, memory: Tensor, places: Tensor, prompt: Tensor, mask: Tensor, side: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the queries find.

        Args:
            memory: (tokens, K, D), of side × side.
            places: (tokens, 1, D).
            prompt, mask: (L, K, D), and (K, L), True where there is no token.

        Returns:
            Queries (K, Q, D), their boxes (K, Q, 4) cxcywh, 0..1, and presence (K, 1), 0..1.
        """
        count, key = memory.shape[1], memory + places
        tokens = torch.cat([self.presence_token.weight, self.query_embed.weight])
        tokens = tokens[:, None].expand(-1, count, -1)  # (1 + Q, K, D)
        boxes = self.reference_points.weight.sigmoid()[:, None].expand(-1, count, -1)
        for layer in self.layers:
            where = self.place_head(self._sines(boxes))
            where = F.pad(where, (0, 0, 0, 0, 1, 0))  # presence is nowhere
            turned = tokens + where
            tokens = layer.norm2(tokens + layer.self_attn(turned, turned, tokens)[0])
            words = layer.ca_text(tokens + where, prompt, prompt, key_padding_mask=mask)[0]
            tokens = layer.catext_norm(tokens + words)
            bias = self._bias(boxes, side)
            seen = layer.cross_attn(query=tokens + where, key=key, value=memory, attn_mask=bias)[0]
            tokens = layer.forward_ffn(layer.norm1(tokens + seen))
            queries = self.norm(tokens[1:])
            boxes = (self.box_head(queries) + inverse_sigmoid(boxes)).sigmoid()
        presence = self.presence_head(self.presence_norm(tokens[:1])).squeeze(-1).sigmoid()
        return queries.transpose(0, 1), boxes.transpose(0, 1), presence.transpose(0, 1)

    def _sines(self, boxes: Tensor) -> Tensor:
        """(Q, K, 4) cxcywh → (Q, K, 2 D)."""
        angles = boxes[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)

    def _bias(self, boxes: Tensor, side: int) -> Tensor:
        """(Q, K, 4) cxcywh → (K, heads, 1 + Q, side * side): by how far a token is from edges."""
        steps = torch.arange(side, dtype=torch.float32, device=boxes.device)[:, None] / side
        away = 8 * (steps - (boxes @ self.edges)[:, :, None])  # (Q, K, side, 4)
        away = away.sign() * (away.abs() + 1).log2() / 3
        across, down = (
            F.pad(head(part).permute(1, 3, 0, 2), (0, 0, 1, 0))
            for head, part in zip((self.bias_x, self.bias_y), away.chunk(2, dim=-1), strict=True)
        )  # (K, heads, 1 + Q, side)
        return (down[..., None] + across[..., None, :]).flatten(3)


class MaskProduct(nn.Module):
    """Upstream's `MaskPredictor` as one matrix product, in place of its einsum."""

    def __init__(self, predictor: Any) -> None:
        super().__init__()
        self.mask_embed = predictor.mask_embed

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """(K, Q, D), (K, D, h, w) → (K, Q, h, w)."""
        found = self.mask_embed(queries) @ pixels.flatten(2)
        return found.view(*found.shape[:2], *pixels.shape[-2:])


class ImageGraph(nn.Module):
    """Pixels → three FPN maps and the position map that goes with the coarsest."""

    map: Tensor  # (1, D, side, side)

    def __init__(self, model: Sam3Image) -> None:
        super().__init__()
        neck: Any = model.backbone.vision_backbone
        self.trunk, self.convs = neck.trunk, neck.convs[: len(FPN)]
        with torch.no_grad():
            whole = torch.empty(1, 1, self.trunk.side, self.trunk.side)
            self.register_buffer("map", neck.position_encoding(whole).clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(1, 3, R, R) float32 in -1..1 → fpn0, fpn1, fpn2 and position, (1, D, side, side)."""
        x = self.trunk(pixels)
        return *(conv(x) for conv in self.convs), self.map.clone()


class TextGraph(nn.Module):
    """Tokens → what is known of the words."""

    def __init__(self, model: Sam3Image) -> None:
        super().__init__()
        text: Any = model.backbone.language_backbone
        self.encoder, self.resizer = text.encoder, text.resizer

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(1, L) int64 → (1, L, D) float32, and (1, L) bool, True where there is no token."""
        _, memory = self.encoder(tokens)
        return self.resizer(memory), tokens == 0


class GroundGraph(nn.Module):
    """Features of an image and K prompts → scores, presence, boxes and masks.

    As upstream's `forward_grounding` without example boxes, whose encoder then says a single token
    about the image. It is the same for all prompts, and so is made once.

    Args:
        prompts: K.
        top: how many queries a prompt are answered for, the highest scores; None: all, in order.
    """

    def __init__(self, model: Sam3Image, prompts: int, top: int | None = None) -> None:
        super().__init__()
        self.geometry, self.transformer = model.geometry_encoder, model.transformer
        self.scoring, self.head = model.dot_prod_scoring, model.segmentation_head
        self.prompts, self.top = prompts, top

    def forward(
        self,
        fpn0: Tensor,
        fpn1: Tensor,
        fpn2: Tensor,
        position: Tensor,
        text: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `app.deploy.runtime.manifest` for shapes; a model without mask head has no masks."""
        count = self.prompts
        image = fpn2.flatten(2).permute(2, 0, 1)  # (tokens, 1, D)
        places = position.flatten(2).permute(2, 0, 1)
        token = self._image_token(image, places).expand(-1, count, -1)
        prompt = torch.cat([text.transpose(0, 1), token])  # (L + 1, K, D)
        mask = F.pad(text_mask, (0, 1))  # (K, L + 1)

        memory = image.transpose(0, 1).expand(count, -1, -1)  # (K, tokens, D)
        where = places.transpose(0, 1)
        for layer in self.transformer.encoder.layers:
            memory = layer(
                tgt=memory,
                memory=prompt.transpose(0, 1),
                memory_key_padding_mask=mask,
                query_pos=where,
            )
        memory = memory.transpose(0, 1)

        decoder = self.transformer.decoder
        queries, boxes, presence = decoder(memory, places, prompt, mask, fpn2.shape[-1])
        logits = self.scoring(queries[None], prompt, mask)[0].squeeze(-1)  # (K, Q)
        scores = logits.sigmoid() * presence
        if self.top is not None:
            scores, best = scores.topk(min(self.top, scores.shape[1]), dim=1)
            boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
            queries = queries.gather(1, best[..., None].expand(-1, -1, queries.shape[-1]))
        found = (scores, presence.squeeze(-1), boxes)
        if self.head is None:
            return found
        masks = self.head(
            backbone_feats=[fpn0, fpn1, fpn2],
            obj_queries=queries[None],
            image_ids=torch.zeros(count, dtype=torch.long, device=fpn2.device),
            encoder_hidden_states=memory,
            prompt=prompt,
            prompt_mask=mask,
        )["pred_masks"]
        return *found, masks

    def _image_token(self, image: Tensor, places: Tensor) -> Tensor:
        """(1, 1, D): what upstream's geometry encoder says of an image without boxes."""
        encoder = self.geometry
        token = encoder.norm(encoder.final_proj(encoder.cls_embed.weight[None]))
        for layer in encoder.encode:
            token = layer(tgt=token, memory=image, pos=places)
        out: Tensor = encoder.encode_norm(token)
        return out
