"""LoRA: small matrices beside frozen weights, saved as an adapter folder that PEFT reads.

peft takes 2 s to import, so that is done where there is an adapter.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sam3.model.sam3_image import Sam3Image
from torch import nn

from app.config.schema import LoraConfig
from app.errors import UserError
from app.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    import peft

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_NAME = "default"  # peft's name of the only adapter
_PREFIX = "base_model.model."  # of keys in an adapter's file: where a PeftModel holds its base
_HASH = "sha256:"

_BLOCKS = "backbone.vision_backbone.trunk.blocks.*"
_TEXT = "backbone.language_backbone.encoder.transformer.resblocks.*"
_ENCODER, _DECODER = "transformer.encoder.layers.*", "transformer.decoder.layers.*"
_ATTENTION = {
    "vision": (f"{_BLOCKS}.attn.qkv", f"{_BLOCKS}.attn.proj"),
    "text": (f"{_TEXT}.attn",),
    "encoder": (f"{_ENCODER}.self_attn", f"{_ENCODER}.cross_attn_image"),
    "decoder": (f"{_DECODER}.self_attn", f"{_DECODER}.ca_text", f"{_DECODER}.cross_attn"),
}
_MLP = {
    "vision": (f"{_BLOCKS}.mlp.fc1", f"{_BLOCKS}.mlp.fc2"),
    "text": (f"{_TEXT}.mlp.c_fc", f"{_TEXT}.mlp.c_proj"),
    "encoder": (f"{_ENCODER}.linear1", f"{_ENCODER}.linear2"),
    "decoder": (f"{_DECODER}.linear1", f"{_DECODER}.linear2"),
}


@dataclass(frozen=True)
class Base:
    """The weights that an adapter belongs to.

    Attributes:
        reference: path of the file, or its name on the Hugging Face hub.
        sha256: of the file, in hexadecimal.
    """

    reference: str
    sha256: str


def apply_lora(model: Sam3Image, config: LoraConfig, base: Base | None = None) -> None:
    """Put an adapter into the model, in place: all else is frozen, and outputs stay as they are.

    A packed attention (`nn.MultiheadAttention`) is adapted in its `in_proj_weight`, the projections
    of queries, keys and values. Its output projection is left: peft's layer for such attentions
    adds what that one learns twice, and lets the frozen weights drift by rounding, since it adds to
    them and subtracts again at each call (peft 0.21, tuners/lora/layer.py, MultiheadAttention).

    Args:
        base: of the weights that the model holds; goes into the adapter's folder.

    Raises:
        UserError: a pattern of `config.targets` that matches nothing, or nothing to adapt.
    """
    import peft

    names = find_targets(model, config)
    packed = {name for name in names if _is_packed(model.get_submodule(name))}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(set(names) - packed),
        target_parameters=sorted(f"{name}.in_proj_weight" for name in packed),
        base_model_name_or_path=base.reference if base else None,
        revision=f"{_HASH}{base.sha256}" if base else None,
    )
    peft.inject_adapter_in_model(settings, model, _NAME)
    # Not in the settings, with which peft refuses packed attention; they need none to predict.
    for name in set(names) - packed if config.dropout else ():
        model.get_submodule(name).lora_dropout[_NAME] = nn.Dropout(config.dropout)


def find_targets(model: Sam3Image, config: LoraConfig) -> list[str]:
    """Return the names of the modules to adapt: linear layers and packed attentions.

    Raises:
        UserError: each pattern of `config.targets` that matches none; says near names.
    """
    known = [name for name, module in model.named_modules() if _can_adapt(module)]
    patterns = [
        pattern
        for table, wanted in ((_ATTENTION, config.attention), (_MLP, config.mlp))
        for part, names in table.items()
        for pattern in names
        if wanted and getattr(config.parts, part)
    ]
    matched = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
    problems = []
    for pattern in config.targets:
        matches = fnmatch.filter(known, pattern)
        matched.update(matches)
        if not matches:
            problems.append(
                f"method.lora.targets: '{pattern}' matches no linear layer or attention."
                f"{_near_names(pattern, known)}"
            )
    if not problems and not matched:
        problems = [
            "method.lora: nothing is adapted; set attention or mlp and one of parts, or targets"
        ]
    if problems:
        raise UserError(problems)
    return [name for name in known if name in matched]


def has_lora(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def save_lora(model: Sam3Image, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write `folder/adapter_model.safetensors` and `adapter_config.json`; returns the former.

    Args:
        metadata: for the header of the safetensors file.
    """
    import peft

    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[_NAME].to_dict().items()
    }
    write_json(folder / CONFIG, settings | {"inference_mode": True})
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {_PREFIX + key: value.detach().contiguous().cpu() for key, value in state.items()}
    with atomic_path(folder / FILE) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **metadata})
    return folder / FILE


def load_lora(model: Sam3Image, folder: Path) -> None:
    """Load an adapter into a model that holds its base, or that holds such an adapter already.

    Raises:
        UserError: no adapter, one of another base, or one that does not fit the model.
    """
    import peft

    settings = _read_settings(folder)
    if not has_lora(model):
        try:
            peft.inject_adapter_in_model(settings, model, _NAME)
        except ValueError as error:  # peft's: nothing of that name, or not to be adapted
            raise UserError(f"{folder / CONFIG}: does not fit the model ({error})") from None
    elif (ours := model.peft_config[_NAME].revision) != settings.revision:
        raise UserError(
            f"{folder}: belongs to weights of {settings.revision}, and the model holds {ours}"
        )
    try:
        state = load_file(folder / FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / FILE}: cannot be read, or cut short ({error})") from None
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {_PREFIX + key: value.shape for key, value in expected.items()}
    shapes_read = {key: value.shape for key, value in state.items()}
    if wrong := sorted(key for key, _ in shapes.items() ^ shapes_read.items()):
        raise UserError(f"{folder / FILE}: does not fit the model: {wrong[0]}, of {len(wrong)}")
    peft.set_peft_model_state_dict(model, state)


def merge_lora(model: Sam3Image) -> None:
    """Add the adapter to the weights, in place: the model is then plain, and predicts alike."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def read_base(folder: Path) -> Base:
    """Read which weights an adapter belongs to."""
    settings = _read_settings(folder)
    reference, revision = settings.base_model_name_or_path, settings.revision or ""
    if not reference or not revision.startswith(_HASH):
        raise UserError(
            f"{folder / CONFIG}: does not say which weights it belongs to, by "
            f"base_model_name_or_path and revision ({_HASH}…); it was not saved by this program"
        )
    return Base(reference, revision.removeprefix(_HASH))


def _read_settings(folder: Path) -> peft.LoraConfig:
    import peft

    content = read_json(folder / CONFIG)
    try:
        settings = peft.LoraConfig(**content)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: not the settings of a LoRA ({error})") from None
    if content.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type must be LORA")
    return settings


def _can_adapt(module: nn.Module) -> bool:
    """Return whether LoRA can adapt a module.

    Output projections of packed attention are left out, because their weights are read, not called.
    """
    plain = isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )
    return plain or _is_packed(module)


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _near_names(pattern: str, known: Sequence[str]) -> str:
    """Return ` Near: 'a', 'b'.`: names as patterns, as far to the left as the pattern goes."""
    names = {re.sub(r"\b\d+\b", "*", name) for name in known}
    if pattern.startswith("*"):
        depth = pattern.count(".")
        names = {".".join(["*", *name.split(".")[-depth:]]) if depth else name for name in names}
    near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.5)
    return f" Near: {', '.join(repr(name) for name in near)}." if near else ""
