"""What prediction leaves out of upstream's passes, beside these."""

from __future__ import annotations

import functools

import pytest
import torch
from sam3.model.decoder import TransformerDecoder
from sam3.model.encoder import TransformerEncoder
from sam3.model.geometry_encoders import Prompt, SequenceGeometryEncoder
from torch.utils._python_dispatch import TorchDispatchMode

from app.config.compose import load_config
from app.inference.predictor import RAW, Predictor
from app.model.build import build_model
from app.model.device import autocast
from app.model.upstream import prediction
from tests.helpers import TINY

CONFIG = load_config(TINY).model
BOXES = torch.tensor([[[0.4, 0.5, 0.3, 0.2]] * 2]), torch.tensor([True])  # (1, 2, 4) of two images
NO_BOXES = torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.bool)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(1)
    return Predictor(build_model(CONFIG), CONFIG)


def _outputs(predictor: Predictor, boxes: tuple[torch.Tensor, torch.Tensor], precision=None):
    squares = torch.randint(
        255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    predictor._encoded = None
    in_precision = autocast(predictor.device, precision or torch.float32)
    with torch.inference_mode(), predictor._no_gradients(), in_precision:
        features = predictor._encode(squares)
        outputs = predictor._ground(features, ("red circle", "dog", "a"), *boxes)
    return {name: outputs[name] for name in RAW}


@pytest.fixture
def plain(monkeypatch) -> None:
    """Upstream's own passes."""
    for cls in (TransformerDecoder, TransformerEncoder, SequenceGeometryEncoder):
        monkeypatch.setattr(cls, "forward", cls.forward.__wrapped__)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boxes", [BOXES, NO_BOXES], ids=["boxes", "words"])
def test_upstreams_outputs_to_the_bit(predictor, boxes, precision, request) -> None:
    ours = _outputs(predictor, boxes, precision)
    request.getfixturevalue("plain")
    theirs = _outputs(predictor, boxes, precision)
    for name in RAW:
        assert torch.equal(ours[name], theirs[name]), name


class _Count(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_fewer_operations(predictor, request) -> None:
    counts = []
    for fixture in (None, "plain"):
        if fixture:
            request.getfixturevalue(fixture)
        with _Count() as done:
            _outputs(predictor, NO_BOXES)
        counts.append(done.count)
    assert counts[0] < 0.75 * counts[1]


def test_training_by_words_alone_is_upstreams() -> None:
    """On a GPU: what encodes boxes has gradients of 0, so that AdamW goes on as upstream's."""
    torch.manual_seed(0)
    geometry = build_model(CONFIG).geometry_encoder
    maps, places = torch.randn(2, 16, 3, CONFIG.d_model, requires_grad=True).unbind()
    asked = Prompt(
        box_embeddings=torch.zeros(0, 3, 4),
        box_mask=torch.zeros(3, 0, dtype=torch.bool),
        box_labels=torch.zeros(0, 3, dtype=torch.long),
    )
    forward, answers = SequenceGeometryEncoder.forward.__wrapped__, []
    for encode in (forward, functools.partial(prediction._encode_geometry, forward)):
        tokens, mask = encode(geometry, asked, [maps], [(4, 4)], [places])
        tokens.sin().sum().backward()
        named = {name: parameter.grad for name, parameter in geometry.named_parameters()}
        answers.append((tokens, mask, named))
        geometry.zero_grad()
    torch.testing.assert_close(*answers)
    assert sum(not gradient.any() for gradient in answers[0][2].values()) > 10
