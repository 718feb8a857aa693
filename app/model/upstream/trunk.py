"""The trunk on a GPU, in fewer launches and copies.

Upstream's blocks (vitdet.py, `Block.forward`) convert, cut into windows, draw, scale, join and add
by an operation each, and by one more for each in the backward pass. Here a block's windows are made
in the half that they are multiplied in, what it finds is scaled and added to its tokens at once,
stochastic depth (arXiv:1603.09382) is drawn for all blocks at once, and queries and keys are turned
where the product has left them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sam3.model.vitdet import get_abs_pos
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from app.model.upstream.attention import multiplied_in

Factors = tuple[Tensor | None, Tensor | None]  # (B,) each: of an image's attention, of its MLP


def is_usual(trunk: Any, pixels: Tensor) -> bool:
    """Return whether `encode` shall map images: on a GPU, not compiled, windows without padding.

    The last block must be the one whose tokens are returned.
    """
    if not pixels.is_cuda or torch.compiler.is_compiling():
        return False
    if trunk.full_attn_ids[-1:] != [len(trunk.blocks) - 1]:
        return False
    sides = [side // trunk.patch_embed.proj.stride[0] for side in pixels.shape[2:]]
    windows = {block.window_size for block in trunk.blocks} - {0}
    return not any(side % window for side in sides for window in windows)


def encode(trunk: Any, pixels: Tensor) -> list[Tensor]:
    """Map images (B, 3, R, R) to the one feature map of `ViT.forward`, (B, D, g, g)."""
    patches = trunk.patch_embed(pixels)  # (B, g, g, D)
    places = _places(trunk, *patches.shape[1:3])
    tokens = trunk.ln_pre(patches + places)
    run: Callable[..., Tensor]
    for block, factors in zip(trunk.blocks, _depth(trunk, tokens), strict=True):
        recomputed = trunk.use_act_checkpoint and trunk.training
        run = functools.partial(checkpoint, block, use_reentrant=False) if recomputed else block
        tokens = run(tokens, factors)
    return [trunk.ln_post(tokens).permute(0, 3, 1, 2)]


def _places(trunk: Any, height: int, width: int) -> Tensor:
    """Return the position embedding (1, height, width, D), tiled without what would be cut off."""
    grid = trunk.pos_embed[:, 1:] if trunk.pretrain_use_cls_token else trunk.pos_embed
    side = math.isqrt(grid.shape[1])
    if trunk.tile_abs_pos and not (height % side or width % side):
        return grid.unflatten(1, (side, side)).repeat(1, height // side, width // side, 1)
    found: Tensor = get_abs_pos(
        trunk.pos_embed, trunk.pretrain_use_cls_token, (height, width), tiling=trunk.tile_abs_pos
    )
    return found


def _depth(trunk: Any, tokens: Tensor) -> list[Factors]:
    """Return the factors of each block: 0 where stochastic depth leaves it out; None: all are 1."""
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in trunk.blocks]
    if not trunk.training or not any(rates):
        return [(None, None)] * len(rates)
    kept = torch.tensor([1 - rate for rate in rates])
    kept = kept.to(tokens.device, non_blocking=True)[:, None, None]
    factors = torch.bernoulli(kept.expand(-1, 2, len(tokens))) / kept  # (blocks, 2, B)
    return [(first, second) for first, second in (each.unbind() for each in factors.unbind())]


def run_block(block: Any, tokens: Tensor, factors: Factors) -> Tensor:
    """Map tokens (B, g, g, D) as `Block.forward`, whose layer scale and dropout are not built."""
    of_attention, of_mlp = factors
    side = block.window_size
    seen = block.norm1(tokens)
    if side:
        seen = _Windows.apply(seen, side, multiplied_in(seen))
    tokens = _Sum.apply(tokens, _attend(block.attn, seen), of_attention, side)
    found: Tensor = _Sum.apply(tokens, block.mlp(block.norm2(tokens)), of_mlp, 0)
    return found


def _attend(attention: Any, tokens: Tensor) -> Tensor:
    """Let the tokens of (B, H, W, D) attend to one another, as `Attention.forward`."""
    packed = attention.qkv(tokens).flatten(1, 2).unflatten(-1, (3, attention.num_heads, -1))
    turned = _Turned.apply(packed, attention.freqs_cis)  # three of (B, tokens, heads, c)
    seen = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in turned))
    answer: Tensor = attention.proj(seen.transpose(1, 2).reshape(*tokens.shape[:3], -1))
    return answer


def _in_windows(tokens: Tensor, side: int) -> Tensor:
    """Return a view of tokens (B, H, W, D): (B, H / side, W / side, side, side, D), if any side."""
    if not side:
        return tokens
    return tokens.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


class _Windows(torch.autograd.Function):
    """Cuts tokens (B, H, W, D) into windows (B * windows, side, side, D) of another dtype."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, side: int, dtype: torch.dtype) -> Tensor:
        ctx.side, ctx.shape, ctx.dtype = side, tokens.shape, tokens.dtype
        view = _in_windows(tokens, side)
        windows = torch.empty(view.shape, dtype=dtype, device=tokens.device)
        return windows.copy_(view).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device)
        view = _in_windows(whole, ctx.side)
        view.copy_(gradient.reshape(view.shape))
        return whole, None, None


class _Sum(torch.autograd.Function):
    """Adds to tokens (B, H, W, D) what was found of them or their windows, times factors (B,)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, found: Tensor, factors: Tensor | None, side: int) -> Any:
        ctx.side, ctx.shape, ctx.dtype = side, found.shape, found.dtype
        view = _in_windows(tokens, side)
        found = found.view(view.shape)
        total = torch.empty_like(tokens)
        if factors is None:
            torch.add(view, found, out=_in_windows(total, side))
        else:
            factors = factors.view(-1, *[1] * (view.ndim - 1))
            torch.addcmul(view, found, factors, out=_in_windows(total, side))
        ctx.save_for_backward(factors)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (factors,) = ctx.saved_tensors
        view = _in_windows(gradient, ctx.side)
        of_found = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device)
        if factors is None:
            of_found.view(view.shape).copy_(view)
        else:
            torch.mul(view, factors, out=of_found.view(view.shape))
        return gradient, of_found, None, None


class _Turned(torch.autograd.Function):
    """Turns queries and keys of (B, tokens, 3, heads, c) by angles, (tokens, c / 2) complex."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(angles)
        numbers = packed[:, :, :2].to(torch.float32, memory_format=torch.contiguous_format)
        _in_pairs(numbers).mul_(angles[:, None, None])
        turned = numbers.to(packed.dtype)
        return turned[:, :, 0], turned[:, :, 1], packed[:, :, 2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        *of_both, of_value = gradients
        numbers = torch.empty(2, *of_value.shape, device=of_value.device)
        torch._foreach_copy_(list(numbers.unbind()), of_both)
        _in_pairs(numbers).div_(angles[:, None])  # of length 1: by their conjugates
        batch, tokens, heads, width = of_value.shape
        packed = of_value.new_empty(batch, tokens, 3, heads, width)
        packed[:, :, :2].copy_(numbers.permute(1, 2, 0, 3, 4))
        packed[:, :, 2].copy_(of_value)
        return packed, None


def _in_pairs(numbers: Tensor) -> Tensor:
    """Return a view of (…, c) float32 as (…, c / 2) complex."""
    return torch.view_as_complex(numbers.unflatten(-1, (-1, 2)))
