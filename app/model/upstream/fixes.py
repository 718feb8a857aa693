"""Every fix that upstream SAM 3 needs, to train and to predict: the one place for its faults.

Places are those of the pinned commit 84cc43b (`pin.py`). No commit after it can train
(facebookresearch/sam3#509, #610), so each fix stays at least until one that can is pinned; its
docstring says what must be mended there for the fix to go. The fixes that upstream's own Trainer
alone needs are in `upstream_trainer/fixes.py`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

PARTS_OF_MASKS = 5  # in which the mask head is recomputed


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
        return fill(self, to_assign(self, state), strict=strict, assign=True)

    torch.load, nn.Module.load_state_dict = mapped, assigned  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load, nn.Module.load_state_dict = load, fill  # type: ignore[method-assign]


def to_assign(module: Any, state: Any) -> dict[str, Any]:
    """Return a file's tensors as `load_state_dict(assign=True)` takes them, of the module's types.

    What they replace gives its memory back first, so that a file of halves, which have to be
    converted, is not in memory beside random weights.
    """
    own = module.state_dict(keep_vars=True)
    for key in own.keys() & state.keys():
        own[key].data = own[key].data.new_empty(()).expand(own[key].shape)
    return {key: v.to(own[key]) if key in own else v for key, v in state.items()}


@contextlib.contextmanager
def leaving_autocast() -> Iterator[None]:
    """Leave the autocast that a tracker enters when it is made within the block, and never leaves.

    It is of sam3_tracking_predictor.py:50. Whatever the process does later would run in it.
    """
    from sam3.model.sam3_tracking_predictor import Sam3TrackerPredictor

    original = Sam3TrackerPredictor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.bf16_context.__exit__(None, None, None)

    Sam3TrackerPredictor.__init__ = init
    try:
        yield
    finally:
        Sam3TrackerPredictor.__init__ = original


@contextlib.contextmanager
def using_builders(*, on_meta: bool = False) -> Iterator[None]:
    """Let upstream's own builders of whole models run on any device, without what they print."""
    import torch

    apply_fixes()
    logging.getLogger("sam3.model.sam3_video_base").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        if on_meta:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(building_on_meta())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(leaving_autocast())
        yield


@functools.cache
def apply_fixes() -> None:
    """Mend upstream in place, once a process; spare prediction what it does not need.

    Each function below is one fix, with its reason and what would let it go.
    """
    for fix in (
        _initialise_text_encoder,
        _position_encoding_on_any_device,
        _decoder_coordinates_on_any_device,
        _decoder_feedforward_in_float32_on_any_device,
        _decoder_in_fewer_operations,
        _box_prompts_without_cuda,
        _activation_checkpointing_by_choice,
        _focal_loss_without_triton,
        _dice_loss_on_its_own_device,
        _zero_losses_without_waiting,
        _boxes_by_their_corners_at_once,
        _box_overlaps_without_waiting,
        _feature_size_on_the_host,
        _mask_head_on_any_device,
        _mask_head_selects_maps,
        _pointwise_convolutions_as_products,
        _text_attention_on_contiguous_tokens,
        _attention_on_contiguous_tokens,
        _image_repeated_once_for_its_prompts,
        _first_attention_once_an_image,
        _loss_normalisation_without_process_group,
        _mask_loss_without_objects,
        _layers_of_the_decoder_at_once,
        _adapted_attention_by_keyword,
        _no_level_that_is_dropped,
        _rotary_angles_on_meta,
        _rotary_embedding_at_once,
        _trunk_in_fewer_operations,
        _areas_on_a_cpu,
    ):
        fix()
    from app.model.upstream import examples, prediction

    prediction.apply()
    examples.apply()


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

    from app.model.upstream.attention import rectified

    def forward_ffn(self: Any, tgt: Any) -> Any:
        with torch.autocast(tgt.device.type, enabled=False):
            tgt = tgt.float()
            hidden = self.dropout3(rectified(self.linear1, tgt, self.activation))
            hidden = self.linear2(hidden)
        return self.norm3(tgt + self.dropout4(hidden))

    TransformerDecoderLayer.forward_ffn = forward_ffn


def _decoder_in_fewer_operations() -> None:
    """Decode by `decoder.py` where upstream would decode prompts of images.

    Goes when upstream makes once what is the same in all layers.
    """
    from sam3.model import sam3_image
    from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
    from torch import nn

    from app.model.upstream import decoder
    from app.model.upstream.attention import Attention

    sam3_image.inverse_sigmoid = decoder.logits_of

    def replace(layer: Any) -> None:
        for part in layer.children():
            if type(part) is nn.MultiheadAttention:
                part.__class__ = Attention

    _run_after(TransformerDecoderLayer, "__init__", replace)
    original = TransformerDecoder.forward

    @functools.wraps(original)
    def forward(self: Any, tgt: Any, memory: Any, **inputs: Any) -> Any:
        usual = decoder.is_usual(self, inputs)
        return (decoder.decode if usual else original)(self, tgt, memory, **inputs)

    TransformerDecoder.forward = forward


def _box_prompts_without_cuda() -> None:
    """Encode box prompts without `pin_memory()`, which raises where there is no CUDA driver.

    It is called in geometry_encoders.py:659. The sizes stay numbers: the host would wait for them.
    Goes when upstream makes them on the boxes' device.
    """
    import torch
    from sam3.model.box_ops import box_cxcywh_to_xyxy
    from sam3.model.geometry_encoders import SequenceGeometryEncoder
    from torchvision.ops import roi_align

    from app.model.upstream.examples import places_of

    def encode_boxes(
        self: Any, boxes: Any, boxes_mask: Any, boxes_labels: Any, img_feats: Any
    ) -> tuple[Any, Any]:
        """Encode boxes (N, B, 4) cxcywh 0..1, labels (N, B), img_feats (B, C, H, W): (N, B, C)."""
        count, batch = boxes.shape[:2]
        height, width = img_feats.shape[-2:]
        x0, y0, x1, y1 = box_cxcywh_to_xyxy(boxes).unbind(-1)
        in_features = [x0 * width, y0 * height, x1 * width, y1 * height]
        corners = torch.stack(in_features, dim=-1).float()  # (N, B, 4) xyxy
        pooled = roi_align(
            img_feats.float(), list(corners.transpose(0, 1).unbind(0)), self.roi_size
        )  # (B * N, C, roi, roi)
        pooled = self.boxes_pool_project(pooled.to(img_feats.dtype))
        places = places_of(self, boxes)
        encoded = self.pos_enc.encode_boxes(*(side.flatten() for side in places.unbind(-1)))
        embedding = (
            self.boxes_direct_project(places)
            + pooled.view(batch, count, self.d_model).transpose(0, 1)
            + self.boxes_pos_enc_project(encoded.view(count, batch, encoded.shape[-1]))
        )
        return self.label_embed(boxes_labels.long()) + embedding, boxes_mask

    SequenceGeometryEncoder._encode_boxes = encode_boxes


def _activation_checkpointing_by_choice() -> None:
    """Checkpoint activations where the configuration says so, and the mask head by a few prompts.

    encoder.py:440 and the decoder refuse to train without activation checkpointing. A small model
    has the memory and wants the speed: a module whose `checkpoint_activations` is False (set by
    `model/build.py`) is run plainly. The mask head is recomputed for a part of the prompts at a
    time, not for all of a batch at once (sam3_image.py:389), because it holds maps a quarter as
    large as the image for each prompt: a step's memory grew with them.

    Goes when upstream has a switch for each module, and checkpoints the mask head by part.
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
            return functools.partial(_few_prompts_at_a_time, original(module))
        return original(module)

    for user in (decoder, encoder, geometry_encoders, sam3_image):
        user.activation_ckpt_wrapper = wrapper


def _few_prompts_at_a_time(head: Any, **inputs: Any) -> dict[str, Any]:
    """Return the mask head's outputs for N prompts, a fifth of which are checkpointed at a time.

    What so many hold is less than what DETR holds of all of them, so that a step takes no more
    memory than with one at a time, and launches as little for 20 prompts as for 5.
    """
    import torch

    if not inputs["act_ckpt_enable"]:
        return dict(head(**inputs))

    count = inputs["encoder_hidden_states"].shape[1]
    few = max(1, count // PARTS_OF_MASKS)

    def of_prompts(first: int) -> dict[str, Any]:
        part = slice(first, first + few)
        second = ("obj_queries", "encoder_hidden_states", "prompt")  # axis of the prompts
        leading = ("image_ids", "prompt_mask")
        return (
            inputs
            | {key: inputs[key][:, part] for key in second}
            | {key: inputs[key][part] for key in leading}
        )

    outputs = [head(**of_prompts(index)) for index in range(0, count, few)]
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

    On a GPU `attention.py` attends. On a CPU it matters where no gradient is kept, as under
    activation checkpointing. The geometry encoder attends to a view of the image
    (geometry_encoders.py): at full size and with three prompts, its copied weights came to 1.4 GB
    and a second for each of six products.

    Goes with `_text_attention_on_contiguous_tokens`.
    """
    import torch
    from sam3.model.model_misc import MultiheadAttentionWrapper
    from torch.nn.functional import multi_head_attention_forward

    from app.model.upstream.attention import attend, is_usual, padding_as_mask

    @functools.wraps(MultiheadAttentionWrapper.forward)
    def forward(self: Any, query: Any, key: Any, value: Any, **kwargs: Any) -> tuple[Any, None]:
        kwargs["need_weights"] = False
        if is_usual(query, **kwargs):
            del kwargs["need_weights"]
            return attend(self, query, key, value, **kwargs), None

        def tokens_first(x: Any) -> Any:
            return x.transpose(0, 1) if self.batch_first else x

        weight, bias = self.in_proj_weight, self.in_proj_bias
        if torch.is_autocast_enabled(query.device.type):  # which would cast the thirds one by one
            half = torch.get_autocast_dtype(query.device.type)
            weight, bias = weight.to(half), None if bias is None else bias.to(half)
        # One for each tensor: what is the same stays the same, as torch projects that at once.
        tokens = {id(x): tokens_first(x).contiguous() for x in (query, key, value)}
        result = multi_head_attention_forward(
            query=tokens[id(query)],
            key=tokens[id(key)],
            value=tokens[id(value)],
            embed_dim_to_check=self.embed_dim,
            num_heads=self.num_heads,
            in_proj_weight=weight,
            in_proj_bias=bias,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
            training=self.training,
            **padding_as_mask(self, query, **kwargs),
        )
        return tokens_first(result[0]), None

    MultiheadAttentionWrapper.forward = forward


def _image_repeated_once_for_its_prompts() -> None:
    """Repeat an image for its prompts once on a GPU, in the order in which its tokens are read.

    sam3_image.py:125 does so for the geometry encoder and again for DETR's, by an index whose
    gradient a GPU sorts first, in an order that each layer of the geometry encoder copies.

    Goes when upstream selects tokens, once.
    """
    from sam3.model.sam3_image import Sam3Image

    original, key = Sam3Image._get_img_feats, "of_prompts"

    @functools.wraps(original)
    def get_img_feats(self: Any, backbone_out: Any, img_ids: Any) -> Any:
        is_encoded = "backbone_fpn" in backbone_out and backbone_out.get("id_mapping") is None
        if not (is_encoded and img_ids.is_cuda):
            return original(self, backbone_out, img_ids)

        def repeated(maps: Any) -> Any:
            """Map (B, d, h, w) to (h * w, P, d), in memory (P, h * w, d)."""
            return maps.flatten(2).transpose(1, 2).index_select(0, img_ids).transpose(0, 1)

        known = backbone_out.get(key)
        if known is None or known[0] is not img_ids:
            levels, places = (
                backbone_out[name][-self.num_feature_levels :]
                for name in ("backbone_fpn", "vision_pos_enc")
            )
            sizes = [level.shape[-2:] for level in places]
            found = [repeated(x) for x in levels], [repeated(x) for x in places], sizes
            known = backbone_out[key] = img_ids, found
        return backbone_out, *known[1]

    Sam3Image._get_img_feats = get_img_feats


def _first_attention_once_an_image() -> None:
    """Let DETR's encoder attend from image to image once, before it meets the first prompt.

    sam3_image.py:234 repeats an image for each of its prompts, of which the first self-attention
    knows nothing yet: with 20 prompts it came to the same 20 times. What dropout takes of its
    scores is therefore the same for an image's prompts; what it takes of its output is not.

    Goes when upstream repeats images behind it.
    """
    from sam3.model.encoder import TransformerEncoderLayer
    from sam3.model.sam3_image import Sam3Image

    from app.model.upstream.encoder import encode_layer

    run_encoder, original = Sam3Image._run_encoder, TransformerEncoderLayer.forward

    @functools.wraps(run_encoder)
    def run(self: Any, backbone_out: Any, find_input: Any, *args: Any, **kwargs: Any) -> Any:
        is_encoded = "backbone_fpn" in backbone_out and backbone_out.get("id_mapping") is None
        if is_encoded and self.num_feature_levels == 1:
            tokens, places = (
                backbone_out[name][-1].flatten(2).transpose(1, 2)  # (B, h * w, d)
                for name in ("backbone_fpn", "vision_pos_enc")
            )
            images = {"images": tokens, "image_pos": places, "image_ids": find_input.img_ids}
            kwargs["encoder_extra_kwargs"] = images
        return run_encoder(self, backbone_out, find_input, *args, **kwargs)

    def forward(
        self: Any,
        tgt: Any,
        memory: Any,
        dac: bool = False,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        pos: Any = None,
        query_pos: Any = None,
        images: Any = None,
        image_pos: Any = None,
        image_ids: Any = None,
    ) -> Any:
        """Map image tokens tgt (P, h * w, d) and prompt tokens memory (P, L, d) to (P, h * w, d).

        Args:
            images, image_pos: (B, h * w, d), those of `tgt` and `query_pos` before they were
                repeated; for the first layer.
            image_ids: (P,) int64, the image of each prompt.
        """
        is_first = images is not None and not self.layer_idx
        others = dac, tgt_mask, tgt_key_padding_mask
        plain = self.pre_norm and all(each is None or each is False for each in others)
        if not (is_first or (plain and tgt.is_cuda)):
            return original(
                self,
                tgt,
                memory,
                dac,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                pos,
                query_pos,
            )
        inputs = {"query_pos": query_pos, "pos": pos, "memory_mask": memory_mask}
        inputs["memory_key_padding_mask"] = memory_key_padding_mask
        of_images = (images, image_pos, image_ids) if is_first else None
        return encode_layer(self, tgt, memory, of_images, **inputs)

    Sam3Image._run_encoder, TransformerEncoderLayer.forward = run, forward


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


def _boxes_by_their_corners_at_once() -> None:
    """Compute both corners of boxes at once (box_ops.py:10): five operations where nine do.

    Goes when upstream takes x and y together.
    """
    import torch
    from sam3.model import box_ops, sam3_image
    from sam3.train import matcher

    def box_cxcywh_to_xyxy(x: Any) -> Any:
        """Return boxes (…, 4) by their corners instead of their centers and sides."""
        center, size = x.split(2, -1)
        half = 0.5 * size
        return torch.cat([center - half, center + half], -1)

    for user in (box_ops, sam3_image, matcher):
        user.box_cxcywh_to_xyxy = box_cxcywh_to_xyxy


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
            if sides.is_cuda:  # bits are compared on a CPU
                return gradient[:, None] * sides.flip(1)
            others = torch.where((sides == 0).any(), sides.flip(1), product[:, None] / sides)
            return gradient[:, None] * others

    area = Product.apply

    def fast_diag_generalized_box_iou(boxes1: Any, boxes2: Any) -> Any:
        """Return the GIoU (N,) of boxes (N, 4) xyxy, by upstream's operations in their order.

        On a GPU, for which each operation is a launch, those of x and y, start and end are one.
        """
        assert len(boxes1) == len(boxes2)
        if boxes1.is_cuda:
            return generalized_box_iou_at_once(boxes1, boxes2)
        (start1, end1), (start2, end2) = boxes1.split(2, 1), boxes2.split(2, 1)
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
        (start1, end1), (start2, end2) = boxes1.split(2, 1), boxes2.split(2, 1)
        area1, area2 = area(end1 - start1), area(end2 - start2)
        start, end = torch.max(start1, start2), torch.min(end1, end2)
        common = area((end - start).clamp(min=0))
        return common / (area1 + area2 - common)

    box_ops.fast_diag_box_iou = fast_diag_box_iou
    box_ops.fast_diag_generalized_box_iou = fast_diag_generalized_box_iou


def generalized_box_iou_at_once(boxes1: Any, boxes2: Any) -> Any:
    """Return the GIoU (N,) of boxes (N, 4) xyxy."""
    import torch

    outward = torch.tensor([-1.0, -1.0, 1.0, 1.0]).to(boxes1.device, non_blocking=True)
    edges1, edges2 = outward * boxes1, outward * boxes2
    inner, outer = torch.minimum(edges1, edges2), torch.maximum(edges1, edges2)
    starts, ends = torch.stack([edges1, edges2, inner, outer]).split(2, -1)
    width, height = (starts + ends).clamp(min=0).unbind(-1)  # (4, N) each
    area1, area2, common, total = (width * height).unbind()
    union = area1 + area2 - common
    return common / union - (total - union) / total


def _feature_size_on_the_host() -> None:
    """Tell the decoder the size of the one feature map by a tensor of the CPU.

    encoder.py:352 puts it on the GPU, where nothing reads it but `_get_rpb_matrix`, twice a layer:
    the host then waits for all work before, as it does to put it there.

    Goes when upstream passes the size as two numbers.
    """
    import torch
    from sam3.model.encoder import TransformerEncoder

    def prepare(self: Any, srcs: Any, masks: Any, pos_embeds: Any) -> tuple[Any, ...]:
        (source,), (mask,), (position,) = srcs, masks, pos_embeds
        assert mask is None
        assert self.level_embed is None
        tokens, places = (x.flatten(2).transpose(1, 2).contiguous() for x in (source, position))
        sizes = torch.tensor([tuple(source.shape[-2:])])
        ratios = torch.ones(len(tokens), 1, 2, device=tokens.device)  # of the map that is image
        return tokens, None, places, sizes.new_zeros(1), ratios, sizes

    TransformerEncoder._prepare_multilevel_features = prepare


def _mask_head_on_any_device() -> None:
    """Ask the mask head's parameters where they are.

    maskformer_segmentation.py:88 remembers it, and forgets it where the head itself is moved, not
    where the model is: later batches of two and more images met weights of another device.

    Goes when upstream remembers no device.
    """
    from sam3.model.maskformer_segmentation import SegmentationHead

    SegmentationHead.device = property(lambda self: next(self.parameters()).device)


def _mask_head_selects_maps() -> None:
    """Give the mask head's pixel decoder the maps that it reads, selected for each prompt.

    maskformer_segmentation.py:117 selects them by an index, whose gradient a GPU sorts first, and
    copies those of a single image, and the last, which it then replaces.

    Goes when upstream selects the maps that it uses.
    """
    from sam3.model.maskformer_segmentation import SegmentationHead

    original = SegmentationHead._embed_pixels

    @functools.wraps(original)
    def embed(self: Any, backbone_feats: Any, image_ids: Any, encoder_hidden_states: Any) -> Any:
        """Map the levels (B, C, h, w) and tokens (h * w, P, C) to pixel embeddings (P, C, H, W)."""
        *maps, last = backbone_feats
        if not self.use_encoder_inputs or self.act_ckpt or last.device != self.device:
            return original(self, backbone_feats, image_ids, encoder_hidden_states)
        if len(last) > 1:
            maps = [each.index_select(0, image_ids) for each in maps]
        tokens = encoder_hidden_states[: last[0, 0].numel()].permute(1, 2, 0)
        return self.pixel_decoder([*maps, tokens.reshape(-1, *last.shape[1:])])

    SegmentationHead._embed_pixels = embed


def _pointwise_convolutions_as_products() -> None:
    """Train the mask head's 1 x 1 convolutions as products of matrices on one thread of a CPU.

    torch leaves those of few maps to `_slow_conv2d` there (`use_mkldnn` in ATen's Convolution.cpp),
    whose backward pass copies all that comes in and fills what goes out with zeros: a twentieth of
    an update of nano. What the head answers is the same to the bit.

    Goes when torch multiplies such maps in place.
    """
    import torch
    from sam3.model.maskformer_segmentation import UniversalSegmentationHead
    from torch import nn

    class Pointwise(nn.Conv2d):
        """A convolution of 1 x 1."""

        def forward(self, x: Any) -> Any:
            """Map (B, C, h, w) to (B, c, h, w)."""
            is_slow = x.device.type == "cpu" and len(x) < 16 and torch.get_num_threads() == 1
            if not (is_slow and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
                return super().forward(x)
            weight, bias = self.weight.flatten(1).expand(len(x), -1, -1), self.bias
            assert bias is not None
            mapped = torch.baddbmm(bias[:, None], weight, x.flatten(2))  # (B, c, h * w)
            return mapped.unflatten(2, x.shape[2:])

    def replace(head: Any) -> None:
        head.semantic_seg_head.__class__ = head.instance_seg_head.__class__ = Pointwise

    _run_after(UniversalSegmentationHead, "__init__", replace)


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


def _layers_of_the_decoder_at_once() -> None:
    """Match and compare the answers of all layers at once, as `layers.py` says.

    Goes when upstream does.
    """
    from sam3.model import sam3_image
    from sam3.train.loss.sam3_loss import Sam3LossWrapper

    from app.model.upstream import layers

    sam3_image._update_out = layers.update_out
    sam3_image.Sam3Image._compute_matching = layers.compute_matching
    Sam3LossWrapper.compute_loss = layers.compute_loss


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


def _no_level_that_is_dropped() -> None:
    """Compute the levels of the neck that are used.

    vl_combiner.py:89 drops the last, which nothing is trained by, after necks.py:110 has made it.

    Goes when upstream makes the levels that it returns.
    """
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.vl_combiner import SAM3VLBackbone

    from app.model.upstream.attention import multiplied_in

    original = Sam3DualViTDetNeck.forward

    def note_dropped(backbone: Any) -> None:
        backbone.vision_backbone.dropped = backbone.scalp

    @functools.wraps(original)
    def forward(self: Any, tensor_list: Any) -> Any:
        dropped = getattr(self, "dropped", 0)
        if not dropped or self.sam2_convs is not None:
            return original(self, tensor_list)
        tokens = self.trunk(tensor_list)[-1]
        if tokens.is_cuda:  # each convolution would convert them
            tokens = tokens.to(multiplied_in(tokens))
        levels = [conv(tokens) for conv in self.convs[:-dropped]]
        places = [self.position_encoding(level).to(level.dtype) for level in levels]
        return levels + [None] * dropped, places + [None] * dropped, None, None

    _run_after(SAM3VLBackbone, "__init__", note_dropped)
    Sam3DualViTDetNeck.forward = forward


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


def _rotary_embedding_at_once() -> None:
    """Turn queries and keys together, and in real numbers where the trunk is compiled.

    vitdet.py:63 turns each by itself: twelve launches a block and step where six do. It does so in
    complex numbers, for which torch's compiler has no kernels: it leaves them, and what they touch,
    out of what it fuses. As written they take fewer launches than real ones.

    Goes when upstream turns both at once, and torch compiles products of complex numbers.
    """
    import torch
    from sam3.model.vitdet import Attention
    from torch.nn import functional

    def turn(pairs: Any, angles: Any) -> Any:
        """Turn neighboring units of (..., tokens, c) by (tokens, c / 2) complex."""
        units = pairs.float().unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():
            (first, second), (cos, sin) = units.unbind(-1), torch.view_as_real(angles).unbind(-1)
            turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(units) * angles)
        return turned.flatten(-2).type_as(pairs)

    def forward(self: Any, x: Any) -> Any:
        """Let the tokens of (B, H, W, C) attend to one another."""
        batch, height, width, _ = x.shape
        shape = batch, height * width, 3, self.num_heads, -1
        packed = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)  # (3, B, heads, tokens, c)
        turning, value = packed.split((2, 1))
        query, key = turn(turning, self.freqs_cis)
        x = functional.scaled_dot_product_attention(query, key, value.squeeze(0))
        x = x.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(x.reshape(batch, height, width, -1))

    Attention.forward = forward


def _trunk_in_fewer_operations() -> None:
    """Map images by `trunk.py` on a GPU.

    Goes when upstream converts and adds by fewer operations.
    """
    from sam3.model.vitdet import Block, ViT

    from app.model.upstream import trunk

    of_images, of_tokens = ViT.forward, Block.forward

    @functools.wraps(of_images)
    def encode(self: Any, x: Any) -> Any:
        return (trunk.encode if trunk.is_usual(self, x) else of_images)(self, x)

    @functools.wraps(of_tokens)
    def run_block(self: Any, x: Any, factors: Any = None) -> Any:
        return of_tokens(self, x) if factors is None else trunk.run_block(self, x, factors)

    ViT.forward, Block.forward = encode, run_block


def _areas_on_a_cpu() -> None:
    """Find the areas of connected pixels at once, also of no mask at all.

    perflib/connected_components.py:31 goes through a mask once for each of them, and stacks no
    masks, which raises: a film's predictor asks for those of new objects in every frame.

    Goes when upstream returns what is empty as it came.
    """
    import cv2
    import numpy as np
    import torch
    from sam3.perflib import connected_components

    def find(masks: Any) -> tuple[Any, Any]:
        """Return labels and areas, int32, of masks (B, H, W) or (B, 1, H, W); 0: background."""
        labels = np.zeros((masks[..., 0, 0].numel(), *masks.shape[-2:]), dtype=np.int32)
        areas = np.zeros_like(labels)
        for index, mask in enumerate(masks.reshape(labels.shape).cpu().numpy().astype(np.uint8)):
            _, labels[index], stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            sizes = stats[:, cv2.CC_STAT_AREA]
            sizes[0] = 0
            areas[index] = sizes[labels[index]]
        found = (torch.from_numpy(each).view(masks.shape) for each in (labels, areas))
        first, second = (each.to(masks.device) for each in found)
        return first, second

    connected_components.connected_components_cpu = find
