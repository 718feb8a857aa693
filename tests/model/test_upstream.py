"""The pin, and the fixes that other tests do not meet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from sam3.model.decoder import TransformerDecoder
from sam3.model.model_misc import MultiheadAttentionWrapper
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.text_encoder_ve import ResidualAttentionBlock
from sam3.train.loss import loss_fns

from app.config.compose import load_model_config
from app.errors import UserError
from app.model.build import build_model
from app.model.upstream import fixes, pin
from tests.helpers import REPOSITORY


@pytest.fixture(scope="module")
def copy_of_sam3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "sam3"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(pin.package_folder("sam3"), folder, ignore=ignore)
    return folder


@pytest.fixture(autouse=True)
def mended() -> None:
    fixes.apply_fixes()


def test_the_installed_package_is_the_pinned_commit(copy_of_sam3: Path) -> None:
    pin.prove_pin()
    pin.prove_pin(copy_of_sam3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "model/vitdet.py").write_text("x = 1\n"), "sam3/model/vitdet.py differs"),
        (lambda f: (f / "model/necks.py").unlink(), "sam3/model/necks.py is missing"),
        (lambda f: (f / "model/new.py").touch(), "sam3/model/new.py does not belong"),
        (lambda f: (f / "__init__.py").write_text("x = 1\n"), "sam3/__init__.py differs"),
    ],
)
def test_any_other_package_is_refused(tmp_path: Path, copy_of_sam3: Path, change, said) -> None:
    folder = tmp_path / "sam3"
    shutil.copytree(copy_of_sam3, folder)
    change(folder)
    with pytest.raises(UserError, match=said) as caught:
        pin.prove_pin(folder)
    assert "pip install --no-deps sam3==0.1.4" in str(caught.value)


def test_a_blob_id_is_what_git_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")  # known: git hash-object of "hello\n"
    blob = pin._git_blob_id(tmp_path / "file")
    assert blob == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_importing_prints_no_warning() -> None:
    code = "import app, app.model.build, app.training.step, app.inference.predictor"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_what_upstream_leaves_uninitialised_is_initialised(monkeypatch) -> None:
    """With `torch.empty` giving NaN, as it may, every parameter is finite all the same."""
    empty = torch.empty

    def nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with torch.device("cpu"):  # torch lists its constructors once, and keeps the list
        empty(0)
    monkeypatch.setattr(torch, "empty", nan)
    model = build_model(load_model_config("nano"))
    wrong = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    assert not wrong
    encoder = model.backbone.language_backbone.encoder
    assert encoder.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)
    assert encoder.text_projection.std().item() == pytest.approx(encoder.width**-0.5, rel=0.1)


def test_position_encoding_follows_the_device() -> None:
    encoding = PositionEmbeddingSine(num_pos_feats=8, precompute_resolution=64)
    first = encoding(torch.zeros(1, 8, 4, 4))
    assert first.device.type == "cpu"
    assert encoding(torch.zeros(1, 8, 4, 4, device="meta")).device.type == "meta"


def test_decoder_coordinates_do_not_pile_up() -> None:
    decoder: TransformerDecoder = build_model(load_model_config("nano")).transformer.decoder.eval()
    boxes = torch.rand(16, 1, 4)
    for height, width in ((4, 4), (6, 4), (4, 4)):
        size = (torch.tensor(height), torch.tensor(width))
        assert decoder._get_rpb_matrix(boxes, size).shape == (1, 4, 16, height * width)
    assert decoder.coord_cache == {}


def test_focal_loss_on_a_cpu_is_its_formula() -> None:
    logits, targets = torch.randn(5, 7), (torch.rand(5, 7) > 0.5).float()
    loss = loss_fns.sigmoid_focal_loss(logits, targets, num_boxes=5.0, alpha=0.25, gamma=2)
    p = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid()).double()
    alpha = torch.where(targets > 0, 0.25, 0.75).double()
    assert loss.item() == pytest.approx((-alpha * (1 - p) ** 2 * p.log()).mean(1).sum().item() / 5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_f1_score_that_upstream_logs_is_scikit_learns(share: float) -> None:
    torch.manual_seed(0)
    scores = torch.rand(40)
    labels = (torch.rand(40) < share).long()
    f1 = loss_fns.torchmetrics.functional.f1_score(scores, target=labels, task="binary")
    expected = sklearn.metrics.f1_score(labels, scores > 0.5, zero_division=0)
    assert f1.item() == pytest.approx(expected)
    none = loss_fns.torchmetrics.functional.f1_score(scores * 0, target=labels * 0, task="binary")
    assert none == 0


def test_frozen_words_are_not_copied_for_each_token() -> None:
    torch.manual_seed(0)
    plain = torch.nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(False)
    block = ResidualAttentionBlock(16, 2).requires_grad_(False)
    block.attn.load_state_dict(plain.state_dict())
    words, mask = torch.randn(3, 5, 16), torch.full((5, 5), -torch.inf).triu(1)
    with torch.profiler.profile(record_shapes=True) as profile:
        found = block.attention(words, attn_mask=mask)
    expected = plain(words, words, words, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(found, expected)
    multiplied = [
        e.input_shapes for e in profile.events() if e.name in ("aten::bmm", "aten::addmm")
    ]
    assert multiplied
    assert [5, 16, 48] not in [shape for shapes in multiplied for shape in shapes]


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_copies_no_weight_for_each_token_where_no_gradient_is_kept(batch_first) -> None:
    torch.manual_seed(0)
    attention = MultiheadAttentionWrapper(16, 2, batch_first=batch_first).requires_grad_(False)
    query, value = torch.randn(2, 3, 5, 16)
    key = value + 1
    padding = torch.arange(5).expand(3, 5) > 3
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    with torch.profiler.profile(record_shapes=True) as profile:
        found = attention(*given[:2], value=given[2], key_padding_mask=padding)[0]
    expected = torch.nn.MultiheadAttention.forward(
        attention, *given, key_padding_mask=padding, need_weights=False
    )[0]
    torch.testing.assert_close(found, expected)
    shapes = [shape for event in profile.events() for shape in event.input_shapes or []]
    assert [15, 16] in shapes  # all tokens of three prompts, in one product
    assert [5, 16, 16] not in shapes  # a copy of the weight for each of five


def test_the_vocabulary_is_clips() -> None:
    assert pin.bpe_path().name == "bpe_simple_vocab_16e6.txt.gz"
