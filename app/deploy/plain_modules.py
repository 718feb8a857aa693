"""Upstream's modules rewritten in operators that ONNX Runtime and TensorRT run well.

Attention is matrix products and a softmax, because fused attention breaks in TensorRT's half
precision. Rotary embedding is a cosine and a sine in real numbers, because ONNX has no complex
ones. Shapes are static.
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

MASKED_SCORE = -1e4  # attention score of a masked key: its exponential is 0, and fits in a half


def use_plain_modules(model: Sam3Image) -> Sam3Image:
    """Replace the modules of `model` by those of this file, in place; return it in eval mode."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ViT):
                setattr(parent, name, PlainTrunk(child))
            elif isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, PlainMultiheadAttention(child))
            elif isinstance(child, nn.ConvTranspose2d):
                setattr(parent, name, PlainConvTranspose(child))
            elif isinstance(child, nn.GELU):
                setattr(parent, name, PlainGelu())
            elif isinstance(child, TransformerDecoder):
                setattr(parent, name, PlainDecoder(child))
            elif isinstance(child, MaskPredictor):
                setattr(parent, name, PlainMaskPredictor(child))
    return model.eval().requires_grad_(False)


class PlainTrunk(nn.Module):
    """Upstream's ViT, with tokens kept in windows throughout where windows tile the image.

    Only the rotary embedding of global attention depends on the order of tokens, so the image is
    partitioned once and not in each block.

    Args:
        vit: `sam3.model.vitdet.ViT`.

    Attributes:
        side: of the image, in patches.
    """

    position: Tensor  # (1, side, side, C), the absolute position embedding

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.side = math.isqrt(len(vit.blocks[vit.full_attn_ids[0]].attn.freqs_cis))
        window = max(block.window_size for block in vit.blocks)
        self.window = 0 if window == 0 or self.side % window else window  # 0: row by row
        position = get_abs_pos(
            vit.pos_embed.detach(),
            vit.pretrain_use_cls_token,
            (self.side, self.side),
            False,
            tiling=True,
        )
        self.register_buffer("position", position)
        order = None
        if self.window:
            rows = torch.arange(self.side**2).view(1, self.side, self.side, 1)
            order = window_partition(rows, self.window)[0].flatten()
        self.patch_embed, self.ln_pre, self.ln_post = vit.patch_embed, vit.ln_pre, vit.ln_post
        self.blocks = nn.ModuleList(PlainBlock(block, order) for block in vit.blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode an image (1, 3, R, R) as a feature map (1, C, side, side)."""
        x = self.ln_pre(self.patch_embed(pixels) + self.position)
        if self.window:
            x, _ = window_partition(x, self.window)
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x)
        if self.window:
            size = self.side, self.side
            x = window_unpartition(x, self.window, size, size)
        return x.permute(0, 3, 1, 2)


class PlainBlock(nn.Module):
    """Upstream's ViT block.

    Args:
        block: `sam3.model.vitdet.Block`.
        order: (tokens,) the index in the image of each token, window by window; None where tokens
            lie row by row.
    """

    def __init__(self, block: Any, order: Tensor | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = PlainRotaryAttention(block.attn, None if block.window_size else order)
        self.window = block.window_size if order is None else 0

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (1, H, W, C), or windows of them (windows, window, window, C)."""
        attended = self.norm1(x)
        if self.window:
            windows, padded = window_partition(attended, self.window)
            attended = window_unpartition(self.attn(windows), self.window, padded, x.shape[1:3])
        else:
            attended = self.attn(attended)
        x = x + attended
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PlainRotaryAttention(nn.Module):
    """Upstream's ViT attention with its rotary embedding in real numbers.

    The units of queries and keys are reordered alike: the first units of all rotated pairs, then
    the second ones, because halves are cheaper to rotate than neighbors. The scale of `attend` is
    multiplied into their weights.

    Args:
        attention: `sam3.model.vitdet.Attention`.
        order: (tokens,) the index in the image of each token; None where tokens lie row by row.
    """

    cos: Tensor  # (tokens, head_dim / 2)
    sin: Tensor

    def __init__(self, attention: Any, order: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.qkv, self.proj = attention.qkv, attention.proj
        rotations: Tensor = attention.freqs_cis  # (tokens, head_dim / 2) complex
        if order is not None:
            rotations = rotations[order]
        self.register_buffer("cos", rotations.real.contiguous())
        self.register_buffer("sin", rotations.imag.contiguous())
        width = self.heads * self.head_dim
        units = torch.arange(width).view(self.heads, -1, 2).transpose(1, 2).flatten()
        units = torch.cat([units, width + units, 2 * width + torch.arange(width)])
        scale = torch.ones(3 * width, 1)
        scale[: 2 * width] = self.head_dim**-0.25
        with torch.no_grad():
            self.qkv.weight.copy_(self.qkv.weight[units] * scale)
            self.qkv.bias.copy_(self.qkv.bias[units] * scale[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Attend within groups of `len(self.cos)` tokens: the image, or a window; (…, C)."""
        qkv = self.qkv(x).view(-1, len(self.cos), 3 * self.heads, self.head_dim)
        query_key, value = qkv.transpose(1, 2).split([2 * self.heads, self.heads], dim=1)
        query, key = self._rotate(query_key).chunk(2, dim=1)  # (groups, heads, tokens, head_dim)
        attended = attend(query, key, value).transpose(1, 2)
        out: Tensor = self.proj(attended.reshape(*x.shape[:-1], -1))
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * self.cos - second * self.sin, first * self.sin + second * self.cos], dim=-1
        )


class PlainMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` as matrix products and a softmax, with the call that upstream uses.

    The bias of keys is dropped, because it adds the same to all scores of a query. The bias of
    values is added to that of the output, because the weights of a query sum to 1.
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
        """Attend, with tensors (tokens, B, C), or (B, tokens, C) where `batch_first`.

        Args:
            attn_mask: (B * heads, queries, keys) or (queries, keys) float32, added to the scores.
            key_padding_mask: (B, keys) bool, True where there is no key.

        Returns:
            The outputs, shaped as `query`, and None in place of the attention weights.
        """
        q, k, v = map(self._split_heads, (self.query(query), self.key(key), self.value(value)))
        batch, queries = q.shape[0], q.shape[2]
        mask = attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.view(batch, self.heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = key_padding_mask[:, None, None].to(q.dtype) * MASKED_SCORE
            mask = padding if mask is None else mask + padding
        attended = attend(q, k, v, mask)
        if self.batch_first:
            attended = attended.permute(0, 2, 1, 3).reshape(batch, queries, -1)
        else:
            attended = attended.permute(2, 0, 1, 3).reshape(queries, batch, -1)
        return self.out(attended), None

    def _split_heads(self, x: Tensor) -> Tensor:
        """Return (B, heads, tokens, head_dim)."""
        x = x.view(*x.shape[:2], self.heads, -1)
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a layer with these weights (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the scaled dot-product attention, (B, heads, queries, head_dim).

    Args:
        query, key: (B, heads, tokens, head_dim), each scaled by head_dim ** -0.25 beforehand,
            because sums of unscaled products overflow half precision.
        value: (B, heads, tokens, head_dim).
        mask: added to the scores (B, heads, queries, keys).
    """
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ value


class PlainConvTranspose(nn.Module):
    """A transposed convolution of 2 x 2 pixels with stride 2, as one matrix product.

    Each pixel makes four. ONNX Runtime has no transposed convolution in int8.
    """

    def __init__(self, convolution: nn.ConvTranspose2d) -> None:
        super().__init__()
        assert convolution.kernel_size == convolution.stride == (2, 2)
        assert convolution.bias is not None
        weight = convolution.weight.detach().permute(2, 3, 1, 0)  # (2, 2, out, in)
        bias = convolution.bias.detach().repeat(4)
        self.product = _linear(weight.flatten(0, 2).contiguous(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, in, H, W) to (B, out, 2H, 2W)."""
        batch, _, height, width = x.shape
        blocks = self.product(x.permute(0, 2, 3, 1)).view(batch, height, width, 2, 2, -1)
        # Two permutations: the first moves whole rows of channels, and ONNX Runtime removes the
        # second before a convolution in int8. A single one took five times as long.
        rows = blocks.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
        return rows.permute(0, 3, 1, 2)


class PlainGelu(nn.Module):
    """`nn.GELU`, written in the order that ONNX Runtime recognizes and fuses."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the GELU of each value."""
        return x * ((x / 2**0.5).erf() + 1) * 0.5


class PlainDecoder(nn.Module):
    """Upstream's DETR decoder without the outputs of its first layers, which only training needs.

    It differs in three orders, each for speed: the presence token stays before the queries
    throughout; the sines of boxes are not interleaved, and the weights that read them are reordered
    instead; and the position bias is permuted per axis, before its axes are added to a map.
    """

    frequencies: Tensor  # (D / 4,), of the sines of a coordinate, radians
    edges: Tensor  # (4, 4), a matrix: cxcywh → x0, x1, y0, y1

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
        self.position_head = decoder.ref_point_head
        self.bias_x, self.bias_y = decoder.boxRPB_embed_x, decoder.boxRPB_embed_y
        count = decoder.d_model // 4  # sines of a coordinate, and as many cosines
        steps = torch.arange(count, dtype=torch.float32) / count
        self.register_buffer("frequencies", 2 * torch.pi / 10000**steps)
        edges = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [-0.5, 0.5, 0, 0], [0, 0, -0.5, 0.5]])
        self.register_buffer("edges", edges)
        # Upstream's columns: y, x, w, h, each with sine and cosine in turn.
        columns = torch.arange(8 * count).view(4, count, 2)[[1, 0, 2, 3]]
        first = self.position_head.layers[0]
        with torch.no_grad():
            first.weight.copy_(first.weight[:, columns.transpose(1, 2).flatten()])

    def forward(
        self, memory: Tensor, position: Tensor, prompt: Tensor, mask: Tensor, side: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries of the last layer, their boxes and the presence of each prompt.

        Args:
            memory: (tokens, K, D), the encoded image for K prompts; tokens = side * side.
            position: (tokens, 1, D), the position embedding of the image.
            prompt: (L, K, D).
            mask: (K, L) bool, True where a prompt has no token.

        Returns:
            Queries (K, Q, D), their boxes (K, Q, 4) cxcywh, 0..1, and presence (K, 1), 0..1.
        """
        count, key = memory.shape[1], memory + position
        tokens = torch.cat([self.presence_token.weight, self.query_embed.weight])
        tokens = tokens[:, None].expand(-1, count, -1)  # (1 + Q, K, D)
        boxes = self.reference_points.weight.sigmoid()[:, None].expand(-1, count, -1)
        for layer in self.layers:
            where = self.position_head(self._sines(boxes))  # (Q, K, D)
            where = F.pad(where, (0, 0, 0, 0, 1, 0))  # the presence token has no position: zeros
            query = tokens + where
            tokens = layer.norm2(tokens + layer.self_attn(query, query, tokens)[0])
            text = layer.ca_text(tokens + where, prompt, prompt, key_padding_mask=mask)[0]
            tokens = layer.catext_norm(tokens + text)
            query, bias = tokens + where, self._position_bias(boxes, side)
            image = layer.cross_attn(query=query, key=key, value=memory, attn_mask=bias)[0]
            tokens = layer.forward_ffn(layer.norm1(tokens + image))
            queries = self.norm(tokens[1:])
            boxes = (self.box_head(queries) + inverse_sigmoid(boxes)).sigmoid()
        presence = self.presence_head(self.presence_norm(tokens[:1])).squeeze(-1).sigmoid()
        return queries.transpose(0, 1), boxes.transpose(0, 1), presence.transpose(0, 1)

    def _sines(self, boxes: Tensor) -> Tensor:
        """Return the sine embedding (Q, K, 2 D) of boxes (Q, K, 4) cxcywh."""
        angles = boxes[..., None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)

    def _position_bias(self, boxes: Tensor, side: int) -> Tensor:
        """Return what is added to scores for the distance of a token from the edges of a box.

        Args:
            boxes: (Q, K, 4) cxcywh, 0..1.

        Returns:
            (K, heads, 1 + Q, side * side), 0 for the presence token.
        """
        steps = torch.arange(side, dtype=torch.float32, device=boxes.device)[:, None] / side
        distances = 8 * (steps - (boxes @ self.edges)[:, :, None])  # (Q, K, side, 4)
        distances = distances.sign() * (distances.abs() + 1).log2() / 3
        heads = (self.bias_x, self.bias_y)
        bias_x, bias_y = (
            F.pad(head(axis).permute(1, 3, 0, 2), (0, 0, 1, 0))
            for head, axis in zip(heads, distances.chunk(2, dim=-1), strict=True)
        )  # (K, heads, 1 + Q, side)
        return (bias_y[..., None] + bias_x[..., None, :]).flatten(3)


class PlainMaskPredictor(nn.Module):
    """Upstream's `MaskPredictor` as one matrix product, in place of its einsum."""

    def __init__(self, predictor: Any) -> None:
        super().__init__()
        self.mask_embed = predictor.mask_embed

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """Return mask logits (K, Q, h, w) of queries (K, Q, D) and pixels (K, D, h, w)."""
        masks = self.mask_embed(queries) @ pixels.flatten(2)
        return masks.view(*masks.shape[:2], *pixels.shape[-2:])
