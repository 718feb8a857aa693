"""DETR's attention on a GPU is torch's, to rounding, whatever the order of its tokens in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.model.upstream.attention import (
    added_to_scores,
    attend,
    is_usual,
    padding_as_mask,
    product_rectified,
    project_at_once,
    rectified,
)

PROMPTS, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 16, 2


def _attention(*, batch_first: bool) -> Any:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def _tokens(count: int, *, batch_first: bool, turned: bool) -> Tensor:
    """Return tokens; `turned`: their memory has another order than their dimensions."""
    shape = (PROMPTS, count, WIDTH) if batch_first is not turned else (count, PROMPTS, WIDTH)
    tokens = torch.randn(shape)
    return (tokens.transpose(0, 1) if turned else tokens).requires_grad_()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("same", ["all", "query and key", "key and value", "none"])
@pytest.mark.parametrize("mask", ["none", "padding", "numbers", "bias"])
def test_answers_and_gradients(batch_first: bool, turned: bool, same: str, mask: str) -> None:
    attention = _attention(batch_first=batch_first)
    order = {"batch_first": batch_first, "turned": turned}
    keys = QUERIES if same in ("all", "query and key") else KEYS
    query = _tokens(QUERIES, **order)
    key = query if keys == QUERIES else _tokens(keys, **order)
    value = key if same in ("all", "key and value") else _tokens(keys, **order)
    padding = torch.arange(keys).expand(PROMPTS, keys) >= torch.tensor([[keys], [2], [3]])
    masks: dict[str, Tensor | None] = {}
    if mask in ("padding", "numbers"):
        masks["key_padding_mask"] = padding
    elif mask == "bias":
        masks["attn_mask"] = torch.randn(PROMPTS * HEADS, QUERIES, keys)
    expected = attention(query, key, value, need_weights=False, **masks)[0]
    if mask == "numbers":
        masks["key_padding_mask"] = added_to_scores(padding, torch.float32)
    found = attend(attention, query, key, value, **masks)
    torch.testing.assert_close(found, expected)
    leaves = [*attention.parameters(), *{id(x): x for x in (query, key, value)}.values()]
    ours, theirs = (torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_in_a_half_it_is_what_autocast_makes_of_torchs() -> None:
    attention = _attention(batch_first=True)
    query, key = (_tokens(n, batch_first=True, turned=False) for n in (QUERIES, KEYS))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(attention, query, key, key)
        expected = attention(query, key, key, need_weights=False)[0]
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()


def test_scores_are_dropped_in_training_alone() -> None:
    attention = _attention(batch_first=True)
    attention.dropout = 0.5
    tokens = _tokens(QUERIES, batch_first=True, turned=False)
    first, second = (attend(attention, tokens, tokens, tokens) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attend(attention, tokens, tokens, tokens) for _ in range(2))
    assert torch.equal(first, second)


def test_a_cpu_and_what_is_asked_for_videos_are_left_to_torch() -> None:
    on_cpu = torch.zeros(1, 1, 1)
    assert not is_usual(on_cpu)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_padding_as_a_mask_changes_no_bit(batch_first: bool, numbers: bool) -> None:
    attention = _attention(batch_first=batch_first)
    query, key = (_tokens(n, batch_first=batch_first, turned=False) for n in (QUERIES, KEYS))
    padding = torch.arange(KEYS).expand(PROMPTS, KEYS) >= torch.tensor([[KEYS], [2], [3]])
    mask = added_to_scores(padding, torch.float32) if numbers else padding
    asked = padding_as_mask(attention, query, mask, need_weights=False)
    assert asked["attn_mask"].shape == (PROMPTS * HEADS, QUERIES, KEYS)
    found = attention(query, key, key, **asked)[0]
    expected = attention(query, key, key, key_padding_mask=padding, need_weights=False)[0]
    assert torch.equal(found, expected)
    leaves = [*attention.parameters(), query, key]
    for ours, theirs in zip(
        *(torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_padding_beside_a_mask_is_left_to_torch() -> None:
    attention, query = _attention(batch_first=True), torch.randn(PROMPTS, QUERIES, WIDTH)
    padding = torch.zeros(PROMPTS, QUERIES, dtype=torch.bool)
    asked = {"attn_mask": torch.zeros(QUERIES, QUERIES), "key_padding_mask": padding}
    assert padding_as_mask(attention, query, **asked) == asked


@pytest.mark.parametrize("keys", [1, 8, 33])
def test_a_mask_as_numbers(keys: int) -> None:
    mask = torch.arange(keys).expand(2, keys) > 4
    added = added_to_scores(mask, torch.bfloat16)
    assert torch.equal(added.exp() == 0, mask)
    assert added.dtype == torch.bfloat16


@pytest.mark.parametrize("same", [True, False])
def test_attentions_at_once_are_each_of_them(same: bool) -> None:
    attentions = [_attention(batch_first=False) for _ in range(3)]
    for number, attention in enumerate(attentions):
        for parameter in attention.parameters():
            parameter.data.add_(0.1 * number)
    query, key = (_tokens(n, batch_first=False, turned=False) for n in (QUERIES, KEYS))
    value = key if same else _tokens(KEYS, batch_first=False, turned=False)
    at_once = project_at_once(attentions, key, value)
    leaves = [query, key, value, *(p for each in attentions for p in each.parameters())]
    answers = []
    for one_by_one in (True, False):
        found = [
            attention(query, key, value, need_weights=False)[0]
            if one_by_one
            else attend(attention, query, projected)
            for attention, projected in zip(attentions, at_once, strict=True)
        ]
        total = sum((each.sin().sum() for each in found), torch.zeros(()))
        answers.append([*found, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(answers[1], answers[0])


def test_relu_within_the_product() -> None:
    layer, tokens = nn.Linear(WIDTH, 5), torch.randn(2, 3, WIDTH)
    expected = layer(tokens).relu()
    with torch.no_grad():
        torch.testing.assert_close(product_rectified(layer, tokens), expected)
        assert torch.equal(rectified(layer, tokens), expected)  # a CPU's
    assert 0 < (expected == 0).float().mean() < 1
