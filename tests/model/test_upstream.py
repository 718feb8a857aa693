"""The pin, and the fixes that other tests do not meet."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from sam3.model import box_ops, vitdet
from sam3.model.decoder import TransformerDecoder
from sam3.model.maskformer_segmentation import SegmentationHead
from sam3.model.model_misc import MultiheadAttentionWrapper
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.text_encoder_ve import ResidualAttentionBlock
from sam3.train.loss import loss_fns
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode

from app.config.compose import load_model_config
from app.errors import UserError
from app.model.build import build_model
from app.model.upstream import fixes, pin
from tests.helpers import MICRO, REPOSITORY


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


@pytest.mark.parametrize("logit", [-100.0, -20.0, 0.0, 16.7, 20.0])
def test_the_presence_loss_has_a_gradient_at_any_logit(logit: float) -> None:
    """Its gamma is 0; upstream's kernel for GPUs makes NaN of it from 16.7 on."""
    logits = torch.full((1, 2), logit, requires_grad=True)
    targets = torch.tensor([[0.0, 1.0]])
    loss_fns.sigmoid_focal_loss(logits, targets, num_boxes=1, alpha=0.5, gamma=0.0).backward()
    expected = (logits.detach().double().sigmoid() - targets) / 4
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_no_loss_calls_a_kernel_that_a_compiler_makes() -> None:
    """As on a GPU: fake tensors know their device, and no launcher of Triton's takes them."""
    with FakeTensorMode():
        logits, targets = torch.empty(2, 5, 7, device="cuda", dtype=torch.bfloat16).unbind()
        for reduce in (True, False):
            loss = loss_fns.sigmoid_focal_loss(logits, targets, num_boxes=5.0, reduce=reduce)
            assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)


def test_memory_that_runs_out_in_the_dice_loss_is_an_error() -> None:
    """Upstream would go on on the CPU, and again at the next step."""

    class OnFullDevice(torch.Tensor):
        def sigmoid(self) -> torch.Tensor:
            raise torch.OutOfMemoryError

        def cpu(self) -> torch.Tensor:
            return torch.zeros(2, 3)

    logits = torch.zeros(2, 3).as_subclass(OnFullDevice)
    with pytest.raises(torch.OutOfMemoryError):
        loss_fns.dice_loss(logits, torch.zeros(2, 3), 1.0)


def _boxes(count: int, least: float) -> torch.Tensor:
    start = torch.rand(count, 2)
    return torch.cat([start, start + least + torch.rand(count, 2) / 10], dim=1).requires_grad_()


@pytest.mark.parametrize("least", [0.0, 1.0])  # most are apart, with 0 for a side; or none is
@pytest.mark.parametrize("name", ["fast_diag_box_iou", "fast_diag_generalized_box_iou"])
def test_overlaps_and_gradients_are_upstreams_to_the_bit(name: str, least: float) -> None:
    spec = importlib.util.find_spec("sam3.model.box_ops")
    upstreams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstreams)
    torch.manual_seed(0)
    boxes, others = _boxes(200, least), _boxes(200, least)
    expected = getattr(upstreams, name)(boxes, others)
    expected.sum().backward()
    gradients = [boxes.grad.clone(), others.grad.clone()]
    boxes.grad = others.grad = None
    with torch.profiler.profile() as profile:
        found = getattr(box_ops, name)(boxes, others)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(boxes.grad, gradients[0])
    assert torch.equal(others.grad, gradients[1])
    assert not {"aten::prod", "aten::item"} & {event.name for event in profile.events()}


def test_overlaps_of_a_gpu_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    start = torch.rand(2, 30, 2)
    boxes, others = torch.cat([start, start + torch.rand(2, 30, 2)], -1).requires_grad_()
    found = fixes.generalized_box_iou_at_once(boxes, others)
    expected = box_ops.fast_diag_generalized_box_iou(boxes, others)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), [boxes, others]) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_nothing_is_scripted_where_torch_came_first() -> None:
    """PYTORCH_JIT=0 comes too late then; on a GPU scripted functions are compiled by NVRTC."""
    code = (
        "import torch\nfrom app.model.upstream.fixes import apply_fixes\napply_fixes()\n"
        "from sam3.model import box_ops\nfrom torch.jit import ScriptFunction\n"
        "print([n for n, f in vars(box_ops).items() if isinstance(f, ScriptFunction)])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_JIT"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("chosen", "found"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_threads_wait_asleep_unless_the_user_chose(chosen: dict[str, str], found: str) -> None:
    code = "import os, app\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=unset | chosen
    )
    assert done.stdout.split() == [found]


@pytest.mark.parametrize("image_ids", [[0], [0, 0, 0], [0, 0, 1, 1, 1]])
def test_the_first_attention_sees_an_image_once(image_ids: list[int]) -> None:
    """As upstream's, of an image for each prompt: to the bit but for what many rows round."""
    torch.manual_seed(0)
    size = load_model_config("nano", [*MICRO, "model.encoder_layers=2"])
    model = build_model(size).eval()
    images, rows = 1 + image_ids[-1], []
    encoder = model.transformer.encoder
    for layer in encoder.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    features = torch.randn(images, 16, 4, 4, requires_grad=True)
    seen = {"backbone_fpn": [features], "vision_pos_enc": [torch.randn(images, 16, 4, 4)]}
    prompt = torch.randn(3, len(image_ids), 16)
    mask = torch.zeros(len(image_ids), 3, dtype=torch.bool)
    asked = SimpleNamespace(img_ids=torch.tensor(image_ids))
    run, answers = type(model)._run_encoder, []
    for way in (run, run.__wrapped__):
        answer = way(model, seen, asked, prompt, mask)[1]["encoder_hidden_states"]
        answer.square().sum().backward()
        answers.append((answer, features.grad))
        features.grad = None
    torch.testing.assert_close(*answers)
    assert len(image_ids) > 1 or torch.equal(answers[0][0], answers[1][0])
    assert rows == [images, len(image_ids), len(image_ids), len(image_ids)]


def test_the_decoder_knows_the_feature_size_without_asking_the_device() -> None:
    encoder = build_model(load_model_config("nano"), device="meta").transformer.encoder
    features = torch.empty(1, 8, 4, 6, device="meta")
    size = encoder._prepare_multilevel_features([features], [None], [features])[-1]
    assert (size.device.type, size.tolist()) == ("cpu", [[4, 6]])


def test_zeros_of_losses_are_torchs() -> None:
    zero = loss_fns.torch.tensor(0.0, device="cpu")
    assert (zero.item(), zero.dtype, zero.shape) == (0.0, torch.float32, ())
    assert loss_fns.torch.zeros is torch.zeros


def test_the_mask_head_follows_the_model_to_another_device() -> None:
    model = build_model(load_model_config("nano"))
    assert model.segmentation_head.device.type == "cpu"
    assert model.to("meta").segmentation_head.device.type == "meta"


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


def test_attention_casts_its_packed_weights_once_to_the_same_bits() -> None:
    torch.manual_seed(0)
    attention = MultiheadAttentionWrapper(8, 2)
    query, key = torch.randn(3, 2, 8), torch.randn(5, 2, 8)
    found = []
    for forward in (MultiheadAttentionWrapper.forward, torch.nn.MultiheadAttention.forward):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            output, _ = forward(attention, query, key, key + 1, need_weights=False)
        output.float().square().sum().backward()
        casts = [event.name for event in profile.events()].count("aten::_to_copy")
        found.append((output, attention.in_proj_weight.grad, attention.in_proj_bias.grad, casts))
        attention.zero_grad()
    (*ours, casts), (*theirs, separate) = found
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    assert casts <= separate - 4


def test_the_vocabulary_is_clips() -> None:
    assert pin.bpe_path().name == "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.parametrize(("width", "side"), [(32, 8), (128, 9)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_of_the_trunk_is_upstreams(
    monkeypatch: pytest.MonkeyPatch, width: int, side: int, precision: torch.dtype
) -> None:
    """To the bit as written, and up to rounding in the real numbers of a compiled trunk."""
    spec = importlib.util.spec_from_file_location("sam3.model.unmended", vitdet.__file__)
    assert spec is not None
    assert spec.loader is not None
    unmended = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unmended)
    torch.manual_seed(0)
    theirs = unmended.Attention(width, 4, use_rope=True, input_size=(side, side))
    ours = vitdet.Attention(width, 4, use_rope=True, input_size=(side, side))
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, side, side, width)
    found = []
    for module, compiling in ((theirs, False), (ours, False), (ours, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=compiling: value)
        x = tokens.clone().requires_grad_()
        half = precision != torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = module(x)
        out.float().square().sum().backward()
        assert x.grad is not None
        found.append((out.detach(), x.grad))
    expected, as_written, in_real_numbers = found
    assert all(map(torch.equal, as_written, expected))
    for value, other in zip(in_real_numbers, expected, strict=True):
        assert torch.allclose(
            value, other, rtol=1e-2 if half else 1e-5, atol=1e-2 if half else 1e-6
        )


@pytest.mark.parametrize("prompts", [1, 8])
@pytest.mark.parametrize("name", ["semantic_seg_head", "instance_seg_head"])
def test_pointwise_convolutions_are_torchs(name: str, prompts: int) -> None:
    """To the bit; their gradients to rounding."""
    torch.manual_seed(0)
    convolution = getattr(build_model(load_model_config("nano")).segmentation_head, name)
    maps = torch.randn(prompts, 64, 32, 32, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = convolution(maps)
        expected = torch.nn.Conv2d.forward(convolution, maps)
        leaves = [maps, *convolution.parameters()]
        ours, theirs = (torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected))
    finally:
        torch.set_num_threads(threads)
    assert type(found.grad_fn) is not type(expected.grad_fn)
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("images", [1, 3])
def test_the_mask_heads_maps_are_upstreams(images: int) -> None:
    """To the bit; their gradients to rounding, and none of the map that is replaced."""
    torch.manual_seed(0)
    head = build_model(load_model_config("nano")).segmentation_head
    maps = [torch.randn(images, 64, side, side, requires_grad=True) for side in (16, 8, 4)]
    ids = torch.tensor([0, images - 1, images - 1])
    tokens = torch.randn(4 * 4 + 2, len(ids), 64, requires_grad=True)  # the last two are no cells
    found = head._embed_pixels(maps, ids, tokens)
    expected = SegmentationHead._embed_pixels.__wrapped__(head, maps, ids, tokens)
    leaves = [*maps[:2], tokens, *head.pixel_decoder.parameters()]
    ours, theirs = (
        [x for x in torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) if x is not None]
        for y in (found, expected)
    )
    assert torch.equal(found, expected)
    assert len(ours) > 6
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found = head._embed_pixels(maps, ids, tokens)
    assert torch.autograd.grad(found.sum(), maps[2], allow_unused=True) == (None,)


@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 1, 21, 33)])
def test_areas_of_connected_pixels_are_scipys(shape: tuple[int, ...]) -> None:
    from sam3.perflib.connected_components import connected_components

    masks = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.6
    labels, areas = connected_components(masks)
    assert areas.numel() == masks.numel()
    for mask, label, area in zip(
        *(each.reshape(-1, *shape[-2:]).numpy() for each in (masks, labels, areas)), strict=True
    ):
        parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        assert np.array_equal(area, sizes[parts])
        assert len(set(zip(label.ravel(), parts.ravel(), strict=True))) == count + 1


def test_no_mask_has_no_area() -> None:
    from sam3.perflib.connected_components import connected_components

    labels, areas = connected_components(torch.zeros(0, 1, 8, 8, dtype=torch.bool))
    assert labels.shape == areas.shape == (0, 1, 8, 8)
