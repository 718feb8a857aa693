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
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sam3.model.sam3_image import Sam3Image
from torch import nn

from app.config.schema import LoraConfig, problems_of
from app.errors import UserError
from app.files import SETTINGS_BYTES, atomic_path, read_json, write_json
from app.model.weight_files import ADAPTER

if TYPE_CHECKING:
    import peft

FILE = ADAPTER
CONFIG = "adapter_config.json"
_NAME = "default"  # peft's name of the only adapter
_PREFIX = "base_model.model."  # of keys in an adapter's file: where a PeftModel holds its base
_PACKED = ".in_proj_weight"
_HASH = "sha256:"
MAX_RANK, MAX_TARGETS, MAX_PATH = 4096, 10_000, 4096
Name = Annotated[str, Field(min_length=1, max_length=500)]  # of a module, a parameter, a revision

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
        target_parameters=sorted(f"{name}{_PACKED}" for name in packed),
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
        _check_tensors(model, folder, settings)
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
    """Read the settings of an adapter as `save_lora` writes them.

    PEFT does more than that with what it is given: it takes one text of `target_modules`, and the
    keys of patterns, for regular expressions, and it imports modules that settings name. So only
    its plain settings are passed on, and the others must be left at their defaults.
    """
    import peft

    file = folder / CONFIG
    content = read_json(file, most=SETTINGS_BYTES)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type must be LORA")
    try:
        plain = _Settings.model_validate(content)
    except ValidationError as error:
        lines = [f"{file}: not the settings of a LoRA: {problem}" for problem in problems_of(error)]
        raise UserError(lines) from None
    default = peft.LoraConfig().to_dict()
    default |= dict.fromkeys(("auto_mapping", "peft_version", "task_type"))
    read = {*_Settings.model_fields, "peft_type", "inference_mode", "peft_version"}
    foreign = [
        f"{file}: {key}: must be {default.get(key)!r}, as this program leaves it"
        for key, value in content.items()
        if key not in read and (value or None) != (default.get(key) or None)
    ]
    if foreign:
        raise UserError(foreign)
    return peft.LoraConfig(
        **plain.model_dump(), inference_mode=content.get("inference_mode") is True
    )


class _Settings(BaseModel):
    """The settings of an adapter that decide what it does; named as in PEFT's LoraConfig."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    r: int = Field(ge=1, le=MAX_RANK)
    lora_alpha: float = Field(gt=0)
    target_modules: list[Name] = Field(max_length=MAX_TARGETS)
    target_parameters: list[Name] | None = Field(default=None, max_length=MAX_TARGETS)
    base_model_name_or_path: Annotated[str, Field(max_length=MAX_PATH)] | None = None
    revision: Name | None = None


def _check_tensors(model: Sam3Image, folder: Path, settings: peft.LoraConfig) -> None:
    """Raise UserError where a file's matrices are not those that its settings would make.

    They are compared before any is made, because a rank may be anything.
    """
    file = folder / FILE
    targets = set(settings.target_modules or ()) | set(settings.target_parameters or ())
    parameters = (name for name, _ in model.named_parameters() if name.endswith(_PACKED))
    names = [name for name, _ in model.named_modules()] + list(parameters)
    modules = [name.removesuffix(_PACKED) for name in names if targets & _ends(name)]
    expected = {f"{_PREFIX}{name}.lora_A.weight": settings.r for name in modules}
    try:
        with safe_open(file, framework="pt") as content:
            ranks = {
                key: content.get_slice(key).get_shape()[0]
                for key in content.keys()  # noqa: SIM118 (no dict)
                if key.endswith(".lora_A.weight")
            }
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{file}: cannot be read, or cut short ({error})") from None
    if wrong := sorted(key for key, _ in ranks.items() ^ expected.items()):
        raise UserError(
            f"{file}: does not fit the model, or is not what {CONFIG} says: {wrong[0]}, of "
            f"{len(wrong)}"
        )


def _ends(name: str) -> set[str]:
    """Return a dotted name and what it ends with, by which PEFT finds the modules to adapt."""
    parts = name.split(".")
    return {".".join(parts[at:]) for at in range(len(parts))}


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
