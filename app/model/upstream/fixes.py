"""Every fix that upstream SAM 3 needs, to train and to predict: the one place for its faults.

Places are those of the pinned commit 84cc43b (`pin.py`). No commit after it can train
(facebookresearch/sam3#509, #610), so each fix stays at least until one that can is pinned; its
docstring says what must be mended there for the fix to go. The fixes that upstream's own Trainer
alone needs are in `upstream_trainer/fixes.py`.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any


def building_on_meta() -> AbstractContextManager[None]:
    """Let a model be built on the meta device, and at once.

    vitdet.py:746 reads the drop-path rates back with `.item()`, which meta tensors cannot answer.
    Drawing values for a tensor without contents takes a third of the time, and is left out.

    Goes when upstream computes the rates without a tensor; what is not drawn is for speed alone.
    """
    import torch
    from torch import Tensor
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    drawing = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_}
    drawing |= {Tensor.clamp_, Tensor.fill_, Tensor.zero_, Tensor.triu_}
    drawing |= {init.normal_, init.uniform_, init.constant_, init.kaiming_uniform_}

    class Building(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func in drawing:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            if func is torch.linspace:
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    return Building()


@contextlib.contextmanager
def loading_mapped() -> Iterator[None]:
    """Let upstream's builders take a checkpoint's tensors from its file, without copies of them.

    model_builder.py:527,777 read the whole file into memory, beside the model that it is then
    copied into. Here the tensors stay in the file, and the model is made of them; what is strict
    there is strict here. It is for the main thread of a process that loads nothing else meanwhile.

    Goes when upstream maps the file and assigns its tensors.
    """
    import torch
    from torch import nn

    load, fill = torch.load, nn.Module.load_state_dict

    def mapped(file: Any, **options: Any) -> Any:
        return load(file.name, mmap=True, **options)

    def assigned(self: Any, state: Any, strict: bool = True) -> Any:
        own = self.state_dict()
        state = {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
        return fill(self, state, strict=strict, assign=True)

    torch.load, nn.Module.load_state_dict = mapped, assigned  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load, nn.Module.load_state_dict = load, fill  # type: ignore[method-assign]


@functools.cache
def apply_fixes() -> None:
    """Mend upstream in place, once a process.

    Each function below is one fix, with its reason and what would let it go.
    """
    for fix in (
        _initialise_text_encoder,
        _position_encoding_on_any_device,
        _decoder_coordinates_on_any_device,
        _decoder_feedforward_in_float32_on_any_device,
        _box_prompts_without_cuda,
        _activation_checkpointing_by_choice,
        _focal_loss_without_triton,
        _dice_loss_on_its_own_device,
        _zero_losses_without_waiting,
        _box_overlaps_without_waiting,
        _feature_size_on_the_host,
        _mask_head_on_any_device,
        _text_attention_on_contiguous_tokens,
        _attention_on_contiguous_tokens,
        _loss_normalisation_without_process_group,
        _mask_loss_without_objects,
        _adapted_attention_by_keyword,
        _rotary_angles_on_meta,
    ):
        fix()


def _initialise_text_encoder() -> None:
    """Initialize the parameters that text_encoder_ve.py:196,218 leave as `torch.empty` made them.

    A model built without a checkpoint then holds arbitrary memory: NaN at the first step, and
    "matrix contains invalid numeric entries" from the matcher. The values are drawn as CLIP draws
    them (openai/CLIP, model.py, initialize_parameters).

    Goes when upstream initializes them.
    """
    from sam3.model.text_encoder_ve import TextTransformer
    from torch import nn

    def initialise(self: Any) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.text_projection, nn.Parameter):
            nn.init.normal_(self.text_projection, std=self.width**-0.5)

    _run_after(TextTransformer, "__init__", initialise)


def _run_after(cls: type, method: str, then: Callable[[Any], None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    setattr(cls, method, wrapped)


def _position_encoding_on_any_device() -> None:
    """Keep the cache of position encodings on the device in use.

    position_encoding.py:47 fills the cache on "cuda" when asked to precompute. Here the cache fills
    itself at the first forward pass. It does not follow the module to another device either, so a
    tensor of another device is dropped.

    Goes when upstream fills the cache on the input's device.
    """
    from sam3.model.position_encoding import PositionEmbeddingSine

    original_init, original_forward = PositionEmbeddingSine.__init__, PositionEmbeddingSine.forward

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("precompute_resolution", None)
        original_init(self, *args, **kwargs)

    @functools.wraps(original_forward)
    def forward(self: Any, x: Any) -> Any:
        cached = self.cache.get(tuple(x.shape[-2:]))
        if cached is not None and cached.device != x.device:
            self.cache.clear()
        return original_forward(self, x)

    PositionEmbeddingSine.__init__, PositionEmbeddingSine.forward = init, forward


def _decoder_coordinates_on_any_device() -> None:
    """Keep one cache of the decoder's coordinates, of the size and device in use.

    decoder.py:281 makes its cache on "cuda", and keys a second one by tensors. Tensors hash by
    identity, so that the second cache never hits, and grows at each step whenever the resolution is
    not the one built for.

    Goes when upstream keys its cache by sizes and device.
    """
    from sam3.model.decoder import TransformerDecoder

    original_init = TransformerDecoder.__init__
    original_matrix = TransformerDecoder._get_rpb_matrix

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.update(resolution=None, stride=None)
        original_init(self, *args, **kwargs)

    @functools.wraps(original_matrix)
    def matrix(self: Any, reference_boxes: Any, feat_size: Any) -> Any:
        height, width = int(feat_size[0]), int(feat_size[1])
        cache = self.compilable_cord_cache
        stale = cache is None or cache[0].device != reference_boxes.device
        if stale or self.compilable_stored_size != (height, width):
            self.compilable_cord_cache = self._get_coords(height, width, reference_boxes.device)
            self.compilable_stored_size = (height, width)
        return original_matrix(self, reference_boxes, (height, width))

    TransformerDecoder.__init__, TransformerDecoder._get_rpb_matrix = init, matrix


def _decoder_feedforward_in_float32_on_any_device() -> None:
    """Run the decoder's feed-forward layers in float32 on any device.

    decoder.py:74 leaves autocast for these layers, but on "cuda" only. On a CPU under autocast they
    would run in bfloat16, another model than on CUDA.

    Goes when upstream names the tensor's device there.
    """
    import torch
    from sam3.model.decoder import TransformerDecoderLayer

    def forward_ffn(self: Any, tgt: Any) -> Any:
        with torch.autocast(tgt.device.type, enabled=False):
            tgt = tgt.float()
            hidden = self.linear2(self.dropout3(self.activation(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout4(hidden))

    TransformerDecoderLayer.forward_ffn = forward_ffn


def _box_prompts_without_cuda() -> None:
    """Encode box prompts without `pin_memory()`, which raises where there is no CUDA driver.

    It is called in geometry_encoders.py:659. Goes when upstream makes the sizes on the boxes'
    device.
    """
    from sam3.model.box_ops import box_cxcywh_to_xyxy
    from sam3.model.geometry_encoders import SequenceGeometryEncoder
    from torchvision.ops import roi_align

    def encode_boxes(
        self: Any, boxes: Any, boxes_mask: Any, boxes_labels: Any, img_feats: Any
    ) -> tuple[Any, Any]:
        """Encode boxes (N, B, 4) cxcywh 0..1, labels (N, B), img_feats (B, C, H, W): (N, B, C)."""
        count, batch = boxes.shape[:2]
        height, width = img_feats.shape[-2:]
        scale = boxes.new_tensor([width, height, width, height])
        corners = (box_cxcywh_to_xyxy(boxes) * scale).float()  # (N, B, 4) xyxy, in features
        pooled = roi_align(
            img_feats.float(), list(corners.transpose(0, 1).unbind(0)), self.roi_size
        )  # (B * N, C, roi, roi)
        pooled = self.boxes_pool_project(pooled.to(img_feats.dtype))
        encoded = self.pos_enc.encode_boxes(*(side.flatten() for side in boxes.unbind(-1)))
        embedding = (
            self.boxes_direct_project(boxes)
            + pooled.view(batch, count, self.d_model).transpose(0, 1)
            + self.boxes_pos_enc_project(encoded.view(count, batch, encoded.shape[-1]))
        )
        return self.label_embed(boxes_labels.long()) + embedding, boxes_mask

    SequenceGeometryEncoder._encode_boxes = encode_boxes


def _activation_checkpointing_by_choice() -> None:
    """Checkpoint activations where the configuration says so, and the mask head by prompt.

    encoder.py:440 and the decoder refuse to train without activation checkpointing. A small model
    has the memory and wants the speed: a module whose `checkpoint_activations` is False (set by
    `model/build.py`) is run plainly. The mask head is recomputed for one prompt at a time, not for
    all of a batch at once (sam3_image.py:389), because it holds maps a quarter as large as the
    image for each prompt: a step's memory grew with them.

    Goes when upstream has a switch for each module, and checkpoints the mask head by prompt.
    """
    from sam3.model import act_ckpt_utils, decoder, encoder, geometry_encoders, sam3_image
    from sam3.model.maskformer_segmentation import UniversalSegmentationHead
    from torch import nn

    original = act_ckpt_utils.activation_ckpt_wrapper

    def wrapper(module: Any) -> Any:
        if isinstance(module, nn.Module) and not getattr(module, "checkpoint_activations", True):

            def plain(*args: Any, act_ckpt_enable: bool = True, **kwargs: Any) -> Any:
                del act_ckpt_enable
                return module(*args, **kwargs)

            return plain
        if isinstance(module, UniversalSegmentationHead):
            return functools.partial(_one_prompt_at_a_time, original(module))
        return original(module)

    for user in (decoder, encoder, geometry_encoders, sam3_image):
        user.activation_ckpt_wrapper = wrapper


def _one_prompt_at_a_time(head: Any, **inputs: Any) -> dict[str, Any]:
    """Return the mask head's outputs for N prompts, with each prompt checkpointed by itself."""
    import torch

    if not inputs["act_ckpt_enable"]:
        return dict(head(**inputs))

    def of_prompt(index: int) -> dict[str, Any]:
        one = slice(index, index + 1)
        second = ("obj_queries", "encoder_hidden_states", "prompt")  # axis of the prompts
        first = ("image_ids", "prompt_mask")
        return (
            inputs
            | {key: inputs[key][:, one] for key in second}
            | {key: inputs[key][one] for key in first}
        )

    count = inputs["encoder_hidden_states"].shape[1]
    outputs = [head(**of_prompt(index)) for index in range(count)]
    return {
        key: None if value is None else torch.cat([each[key] for each in outputs])
        for key, value in outputs[0].items()
    }


def _text_attention_on_contiguous_tokens() -> None:
    """Give the text encoder's attention contiguous tokens.

    text_encoder_ve.py:22 makes the attention batch first, which torch turns to a view with tokens
    first. A frozen weight that multiplies such a view is copied for each token (`should_fold` in
    ATen's LinearAlgebra.cpp): half a second a layer at full size, more than the rest of a step.

    Goes when torch folds such views, or upstream's attention is tokens first.
    """
    from sam3.model.text_encoder_ve import ResidualAttentionBlock

    original = ResidualAttentionBlock.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.attn.batch_first = False

    def attention(
        self: Any, q_x: Any, k_x: Any = None, v_x: Any = None, attn_mask: Any = None
    ) -> Any:
        assert k_x is None
        assert v_x is None
        x = q_x.transpose(0, 1).contiguous()
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(x.dtype)
        return self.attn(x, x, x, need_weights=False, attn_mask=attn_mask)[0].transpose(0, 1)

    ResidualAttentionBlock.__init__ = init
    ResidualAttentionBlock.attention = attention


def _attention_on_contiguous_tokens() -> None:
    """Give model_misc.py:31's attention contiguous tokens, for the same reason.

    It matters where no gradient is kept, as under activation checkpointing. The geometry encoder
    attends to a view of the image (geometry_encoders.py): at full size and with three prompts, its
    copied weights came to 1.4 GB and a second for each of six products.

    Goes with `_text_attention_on_contiguous_tokens`.
    """
    from sam3.model.model_misc import MultiheadAttentionWrapper
    from torch.nn.functional import multi_head_attention_forward

    @functools.wraps(MultiheadAttentionWrapper.forward)
    def forward(self: Any, query: Any, key: Any, value: Any, **kwargs: Any) -> tuple[Any, None]:
        def tokens_first(x: Any) -> Any:
            return x.transpose(0, 1) if self.batch_first else x

        # One for each tensor: what is the same stays the same, as torch projects that at once.
        tokens = {id(x): tokens_first(x).contiguous() for x in (query, key, value)}
        result = multi_head_attention_forward(
            query=tokens[id(query)],
            key=tokens[id(key)],
            value=tokens[id(value)],
            embed_dim_to_check=self.embed_dim,
            num_heads=self.num_heads,
            in_proj_weight=self.in_proj_weight,
            in_proj_bias=self.in_proj_bias,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            training=self.training,
            **kwargs | {"need_weights": False},
        )
        return tokens_first(result[0]), None

    MultiheadAttentionWrapper.forward = forward


def _focal_loss_without_triton() -> None:
    """Compute the focal loss by torch on every device.

    loss_fns.py:134 takes a Triton kernel by default. Its backward pass computes
    `pow(1 - p, gamma - 1) * (1 - p)`: with the presence loss's gamma of 0 that is infinity times 0
    from a logit of 16.7 on, where p rounds to 1. It also needs a C compiler and Python's headers at
    the first step. The loss takes under 1 ms of a step on a GPU. As the kernel does, it computes in
    float32 there.

    Goes when upstream's kernel is finite for any gamma, and needs no compiler.
    """
    from sam3.train.loss import loss_fns

    original = loss_fns.sigmoid_focal_loss

    @functools.wraps(original)
    def sigmoid_focal_loss(inputs: Any, *args: Any, triton: bool = True, **kwargs: Any) -> Any:
        del triton
        inputs = inputs if inputs.device.type == "cpu" else inputs.float()
        return original(inputs, *args, triton=False, **kwargs)

    loss_fns.sigmoid_focal_loss = sigmoid_focal_loss


def _dice_loss_on_its_own_device() -> None:
    """Raise where a GPU's memory runs out in the dice loss, as anywhere else.

    loss_fns.py:81 goes on on the CPU instead, at each step, and the next operation runs out.

    Goes when upstream no longer catches it.
    """
    from sam3.train.loss import loss_fns

    loss_fns.dice_loss = loss_fns._dice_loss


def _zero_losses_without_waiting() -> None:
    """Let the losses fill a tensor on the GPU with 0, and not copy a 0 there.

    loss_fns.py:404 and others write `torch.tensor(0.0, device=…)`: the host waits for each copy, 24
    times an update. Their module gets a torch whose `tensor` fills.

    Goes when upstream writes `new_zeros(())`.
    """
    import torch
    from sam3.train.loss import loss_fns

    class Filling(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def tensor(value: float, **options: Any) -> Any:
            return torch.full((), value, **options)

    loss_fns.torch = Filling("torch")


def _box_overlaps_without_waiting() -> None:
    """Multiply the sides of boxes without a look at them, in the Python that stands there.

    box_ops.py:145,172 multiply them by `prod`, whose backward pass asks the GPU whether a side is
    0: 36 times an update. Both functions are scripted, and compiled by NVRTC at their third call,
    where torch was imported before PYTORCH_JIT=0 could be set. Gradients are `prod`'s to the bit.

    Goes when upstream multiplies two columns, and scripts nothing.
    """
    import torch
    from sam3.model import box_ops

    class Product(torch.autograd.Function):
        """The product of both sides (N, 2), and torch's gradient of it (prod_backward)."""

        @staticmethod
        def forward(ctx: Any, sides: Any) -> Any:
            product = sides[:, 0] * sides[:, 1]
            ctx.save_for_backward(sides, product)
            return product

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            sides, product = ctx.saved_tensors
            others = torch.where((sides == 0).any(), sides.flip(1), product[:, None] / sides)
            return gradient[:, None] * others

    area = Product.apply

    def fast_diag_generalized_box_iou(boxes1: Any, boxes2: Any) -> Any:
        """Return the GIoU (N,) of boxes (N, 4) xyxy, by upstream's operations in their order."""
        assert len(boxes1) == len(boxes2)
        end1, start1, end2, start2 = boxes1[:, 2:], boxes1[:, :2], boxes2[:, 2:], boxes2[:, :2]
        area1, area2 = area(end1 - start1), area(end2 - start2)
        inner_start, outer_start = torch.max(start1, start2), torch.min(start1, start2)
        inner_end, outer_end = torch.min(end1, end2), torch.max(end1, end2)
        common = area((inner_end - inner_start).clamp(min=0))
        total = area((outer_end - outer_start).clamp(min=0))
        union = area1 + area2 - common
        return common / union - (total - union) / total

    def fast_diag_box_iou(boxes1: Any, boxes2: Any) -> Any:
        """Return the IoU (N,) of boxes (N, 4) xyxy, likewise."""
        assert len(boxes1) == len(boxes2)
        end1, start1, end2, start2 = boxes1[:, 2:], boxes1[:, :2], boxes2[:, 2:], boxes2[:, :2]
        area1, area2 = area(end1 - start1), area(end2 - start2)
        start, end = torch.max(start1, start2), torch.min(end1, end2)
        common = area((end - start).clamp(min=0))
        return common / (area1 + area2 - common)

    box_ops.fast_diag_box_iou = fast_diag_box_iou
    box_ops.fast_diag_generalized_box_iou = fast_diag_generalized_box_iou


def _feature_size_on_the_host() -> None:
    """Tell the decoder the size of the feature map by a tensor of the CPU.

    encoder.py:352 puts it on the GPU, where nothing reads it but `_get_rpb_matrix`, twice a layer:
    the host then waits for all work before.

    Goes when upstream passes the size as two numbers.
    """
    import torch
    from sam3.model.encoder import TransformerEncoder

    original = TransformerEncoder._prepare_multilevel_features

    @functools.wraps(original)
    def prepare(self: Any, srcs: Any, *args: Any) -> tuple[Any, ...]:
        features = original(self, srcs, *args)
        return (*features[:-1], torch.tensor([tuple(src.shape[-2:]) for src in srcs]))

    TransformerEncoder._prepare_multilevel_features = prepare


def _mask_head_on_any_device() -> None:
    """Ask the mask head's parameters where they are.

    maskformer_segmentation.py:88 remembers it, and forgets it where the head itself is moved, not
    where the model is: later batches of two and more images met weights of another device.

    Goes when upstream remembers no device.
    """
    from sam3.model.maskformer_segmentation import SegmentationHead

    SegmentationHead.device = property(lambda self: next(self.parameters()).device)


def _loss_normalisation_without_process_group() -> None:
    """Count the boxes of one process where there is no process group.

    sam3_loss.py:71 always all-reduces the number. Goes when upstream asks whether
    `torch.distributed` is initialized.
    """
    import torch.distributed
    from sam3.train.loss.sam3_loss import Sam3LossWrapper

    original = Sam3LossWrapper._get_num_boxes

    @functools.wraps(original)
    def get_num_boxes(self: Any, targets: Any) -> Any:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.normalization == "global" and not grouped:
            return targets["num_boxes"].sum().float().clamp(min=1)
        return original(self, targets)

    Sam3LossWrapper._get_num_boxes = get_num_boxes


def _mask_loss_without_objects() -> None:
    """Return mask losses of 0 where no object of the batch has a mask.

    loss_fns.py:585 asserts on the masks' shape then. Goes when upstream returns zeros there, with
    the graph of the predicted masks.
    """
    from sam3.train.loss.loss_fns import Masks

    original = Masks.get_loss

    @functools.wraps(original)
    def get_loss(self: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any) -> Any:
        valid = targets["is_valid_mask"]
        if valid is not None and indices[2] is not None:
            valid = valid[indices[2]]
        if valid is not None and not valid.any():
            zero = outputs["pred_masks"].sum() * 0
            return {"loss_mask": zero, "loss_dice": zero}
        return original(self, outputs, targets, indices, num_boxes)

    Masks.get_loss = get_loss


def _adapted_attention_by_keyword() -> None:
    """Give an adapted attention its query by place.

    encoder.py:189, decoder.py:164 and others call attention as `query=…`. Around an attention that
    it adapts, PEFT takes the first argument by place alone (peft 0.21, tuners/lora/layer.py,
    ParamWrapper). This is mended here without importing peft, which takes 2 s.

    Goes when PEFT's ParamWrapper passes keywords on.
    """
    from sam3.model.decoder import TransformerDecoderLayer
    from sam3.model.encoder import TransformerEncoderLayer
    from sam3.model.maskformer_segmentation import UniversalSegmentationHead

    def by_place(_module: Any, args: Any, kwargs: Any) -> Any:
        return (args or (kwargs.pop("query"),)), kwargs

    def mend(cls: Any) -> None:
        original = cls.forward

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            for child in self.children():
                if type(child).__name__ == "ParamWrapper" and not child._forward_pre_hooks:
                    child.register_forward_pre_hook(by_place, with_kwargs=True)
            return original(self, *args, **kwargs)

        cls.forward = forward

    for cls in (TransformerEncoderLayer, TransformerDecoderLayer, UniversalSegmentationHead):
        mend(cls)


def _rotary_angles_on_meta() -> None:
    """Compute vitdet.py:41's angles on the CPU: they have no values on the meta device.

    torch divides such tensors in Python, which first imports sympy: half a second of each start.

    Goes when torch divides them in C++.
    """
    import torch
    from sam3.model import vitdet

    original = vitdet.compute_axial_cis

    @functools.wraps(original)
    def compute_axial_cis(dim: int, end_x: int, end_y: int, *args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "meta":
            return torch.empty(end_x * end_y, 2 * (dim // 4), dtype=torch.complex64)
        return original(dim, end_x, end_y, *args, **kwargs)

    vitdet.compute_axial_cis = compute_axial_cis
