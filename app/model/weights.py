"""Any SAM 3 checkpoint in, strictly; ours out, as safetensors with a header.

Upstream's loader keeps keys that contain "detector" and drops the rest without an error, so that a
fine-tuned checkpoint loads nothing (facebookresearch/sam3#260, #298, #434, #606). Here a key that
does not fit is an error that names it.
"""

from __future__ import annotations

import functools
import os
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app import __version__
from app.config.compose import load_model_config, model_config, model_names
from app.config.schema import ModelConfig, Prompt, problems_of
from app.console import command
from app.errors import UserError
from app.files import atomic_path, claim, flatten, hash_file, remove_unfinished
from app.model import adapters, published
from app.model.build import build_model
from app.model.golden import Golden
from app.model.halves import originals
from app.model.published import COMPUTED
from app.model.score_counts import ScoreCounts
from app.model.transformers.config import read_config
from app.model.transformers.state import TRACKER, from_transformers, is_layout, is_transformers
from app.model.upstream.fixes import to_assign
from app.model.upstream.pin import COMMIT
from app.model.vocabulary import VISUAL_PROMPT
from app.model.weight_files import FILE as FILE  # of `weights` for all who load torch anyway
from app.model.weight_files import find_file as find_file
from app.model.weight_files import require_adapter, require_free, shards

HUB = ("facebook/sam3", "sam3.pt")
BASE = "SAM3_BASE"  # environment variable: the file of an adapter's base, where it was moved
SUFFIXES = (
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".json",
)  # of weights that an adapter may build on
MAX_PROMPTS = 50_000  # of a header
MAX_PICKLE = 16 << 20  # bytes of the index of a .pt; that of SAM 3 has 0.5 MB
MAX_HASHED = 10_000  # values in a tuple of it
_HEADER = "sam3-finetuning"
Layout = Literal["3.0", "3.1", "transformers"]  # of a published file


class Origin(BaseModel):
    """The published file that weights began as, of which they are the image part.

    Attributes:
        reference: path of the file, or its name on the Hugging Face hub.
        sha256: of the file, in hexadecimal.
        layout: Meta's SAM 3 or 3.1, or transformers' folder.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    reference: str = Field(min_length=1, max_length=adapters.MAX_PATH)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    layout: Layout


class Header(BaseModel):
    """The facts about weights: JSON in the metadata of their safetensors file.

    `threshold` is the score that maximised F1 on the validation images; None where nothing was
    found on them, or from weights made before it was kept. `levels` are the values of training
    images of more than 8 bits that became 0 and 255; None where there were none. `base` is None for
    weights that began as random ones, or as ours of before it was kept. `scores` are those above
    the threshold on the validation images, and `golden` is what the weights answer about a drawn
    image; None of those that no validation chose, or from before they were kept.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: ModelConfig
    prompts: list[Prompt] = Field(default=[], max_length=MAX_PROMPTS)
    pin: str = Field(default=COMMIT, max_length=100)
    data_hash: str = Field(default="", max_length=100)
    threshold: float | None = Field(default=None, ge=0, le=1)
    levels: tuple[FiniteFloat, FiniteFloat] | None = None
    base: Origin | None = None
    scores: ScoreCounts | None = None
    golden: Golden | None = None
    version: str = __version__


def save(model: Sam3Image, folder: Path, header: Header) -> Path:
    """Write `folder/model.safetensors`, or the adapter that the model holds; returns its path.

    Each file is written whole or not at all.
    """
    if adapters.has_lora(model):
        return adapters.save_lora(model, folder, to_metadata(header))
    file = folder / FILE
    with atomic_path(file) as temporary:
        save_file(to_state(model), temporary, metadata=to_metadata(header))
    return file


def to_metadata(header: Header) -> dict[str, str]:
    """Return the header as a safetensors file carries it."""
    return {_HEADER: header.model_dump_json()}


def to_state(model: Sam3Image) -> dict[str, Tensor]:
    """Return the state dict to save, in float32: all of the model's but what is computed."""
    held = originals(model)
    return {
        key: held.get(key, value).detach().contiguous().cpu()
        for key, value in model.state_dict().items()
        if not key.endswith(COMPUTED)
    }


def load(
    path: Path,
    *,
    size: str | None = None,
    resolution: int | None = None,
    merge: bool = False,
    mapped: bool = False,
) -> tuple[Sam3Image, Header]:
    """Build the model that the checkpoint holds and load it, strictly.

    Args:
        path: a weights folder or file: ours, an adapter, upstream's `sam3.pt` (`detector.`
            prefix), the upstream trainer's `checkpoint.pt` (bare keys), or a folder of
            transformers' `Sam3Model`.
        size: name of the size that is expected; None takes what the file says or fits.
        resolution: pixels, where it should differ from the one trained at.
        merge, mapped: as of `load_into`.

    Raises:
        UserError: no such file, not a checkpoint, or another size; names the first keys that do
            not fit.
    """
    header = describe(path, size, resolution)
    _check_base(header, find_file(path))
    model = build_model(header.model)
    load_into(model, path, merge=merge, mapped=mapped)
    return model, header


def merge(path: Path, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an adapter and its base as one plain `folder/model.safetensors`."""
    require_adapter(path)
    require_free(folder, overwrite=overwrite)
    model, header = load(path, merge=True)
    header = header.model_copy(update={"base": origin(path)})
    claim(folder)
    require_free(folder, overwrite=overwrite)  # again, now that no other process writes here
    remove_unfinished(folder / FILE)
    return save(model, folder, header)


def describe(path: Path, size: str | None = None, resolution: int | None = None) -> Header:
    """Return a checkpoint's header, or one of the size that its keys and shapes, or its config fit.

    Args:
        size, resolution: as of `load`.
    """
    file = find_file(path)
    header = read_header(file)
    if header is None and file.name == adapters.FILE:
        header = describe(find_base(file.parent))
    elif header is None and is_transformers(file):
        header = Header(model=read_config(file.parent))
    header = header or Header(model=_identify(file, _read_state(file), size))
    if size is not None and header.model.name != size:
        raise UserError(
            f"{file} holds a model of size '{header.model.name}', not '{size}'. "
            f"Use {command('--model', header.model.name)}, or weights of size {size}."
        )
    if resolution is not None:
        config = header.model.model_dump() | {"resolution": resolution}
        changed = {"model": model_config(config, "--resolution"), "golden": None}
        header = header.model_copy(update=changed)
    return header


def load_into(model: Sam3Image, path: Path, *, merge: bool, mapped: bool = False) -> None:
    """Load a checkpoint of any layout into a model that is already built, strictly.

    Args:
        model: where it holds an adapter, `path` is another state of that adapter.
        merge: add an adapter to the weights, so that the model stays plain.
        mapped: leave the weights in the file, read where they are used: half the memory of a copy,
            for as long as the file stays what it is.
    """
    file = find_file(path)
    if adapters.has_lora(model):
        adapters.load_lora(model, file.parent)
    elif file.name == adapters.FILE:
        base = find_base(file.parent)
        _load_state(model, _read_state(base), base, mapped=mapped)
        adapters.load_lora(model, file.parent)
        if merge:
            adapters.merge_lora(model)
    else:
        _load_state(model, _read_state(file), file, mapped=mapped)


def base_reference(file: Path) -> adapters.Base:
    """Return how an adapter names the weights that it is trained on."""
    reference = "/".join(HUB) if file == cached_sam3() else str(file.resolve())
    state = file.stat()
    return adapters.Base(reference, _hash(file, state.st_size, state.st_mtime_ns))


def origin(path: Path) -> Origin | None:
    """Return the published file that weights began as, themselves included; None of no such."""
    file = find_file(path)
    if (header := read_header(file)) is not None and header.base is not None:
        return header.base
    if file.name == adapters.FILE:
        return origin(find_base(file.parent))
    if header is not None:
        return None
    keys = read_tensors(file).keys()
    of_video = any(key.startswith(TRACKER) for key in keys)  # transformers'
    layout: Layout | None = "transformers" if of_video else published.release(keys)
    if layout is None:
        return None
    base = base_reference(file)
    return Origin(reference=base.reference, sha256=base.sha256, layout=layout)


def find_base(folder: Path) -> Path:
    """Return the weights file that the adapter in `folder` belongs to, proved by its hash.

    Looked for where the environment variable SAM3_BASE says, where it was when the adapter was
    trained (from the adapter's folder, if that is not absolute), or on the hub.

    Raises:
        UserError: it is not there, or is another file; says which is wanted.
    """
    return locate(adapters.read_base(folder), folder)


def locate(base: adapters.Base, folder: Path) -> Path:
    """Return the file that weights in `folder` belong to, as `find_base` does."""
    named = os.environ.get(BASE)
    if named:
        file = find_file(Path(named))
    elif base.reference == "/".join(HUB):
        file = published_sam3()
    else:
        file = folder / base.reference
    wanted = f"the weights it was trained on, {base.reference} (sha256 {base.sha256[:16]}…)"
    if not file.is_file():
        raise UserError(f"{folder}: needs {wanted}; there is no {file}. Set {BASE}=FILE to them.")
    if file.name == adapters.FILE or file.resolve().suffix not in SUFFIXES:
        raise UserError(
            f"{folder}: needs {wanted}; {file} is no file of weights that stand alone. Set "
            f"{BASE}=FILE to them."
        )
    state = file.stat()
    if _hash(file, state.st_size, state.st_mtime_ns) != base.sha256:
        raise UserError(f"{folder}: needs {wanted}; {file} is another. Set {BASE}=FILE to them.")
    return file


def is_adapter(path: Path) -> bool:
    return find_file(path).name == adapters.FILE


def read_header(path: Path) -> Header | None:
    """Read the header of our weights; None for a checkpoint from elsewhere."""
    file = find_file(path)
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(_HEADER)
            if text is None:
                return None
            header = Header.model_validate_json(text)
            if file.name != adapters.FILE:
                keys = content.keys()
                _check_sizes(
                    header.model, {k: content.get_slice(k).get_shape() for k in keys}, file
                )
            return header
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None
    except ValidationError as error:
        raise UserError(f"{file}: its header is broken: {problems_of(error)[0]}") from None


def _check_sizes(model: ModelConfig, shapes: Mapping[str, Sequence[int]], file: Path) -> None:
    """Raise UserError where the sizes in a file's header are not those of its tensors.

    A model of the header's sizes would be built before its tensors are compared with the file's,
    however large it is. Files in transformers' layout have other keys and are passed over: the
    schema bounds what is built of their header.
    """
    if not any(key.startswith(("backbone.", "transformer.")) for key in shapes):
        return
    vision, trunk = model.vision, "backbone.vision_backbone.trunk"
    first, decoder = f"{trunk}.blocks.0", "transformer.decoder"
    heads = vision.heads or vision.num_heads
    sizes = {
        f"{trunk}.patch_embed.proj.weight": [vision.embed_dim, 3, *[vision.patch_size] * 2],
        f"{trunk}.pos_embed": [1, vision.window_size**2 + 1, vision.embed_dim],
        f"{first}.attn.proj.weight": [
            vision.embed_dim,
            heads * (vision.embed_dim // vision.num_heads),
        ],
        f"{first}.mlp.fc1.weight": [vision.mlp_units, vision.embed_dim],
        f"{decoder}.layers.0.linear1.weight": [model.feedforward, model.d_model],
        f"{decoder}.query_embed.weight": [model.num_queries, model.d_model],
    }
    layers = {
        f"{trunk}.blocks": vision.depth,
        "transformer.encoder.layers": model.encoder_layers,
        f"{decoder}.layers": model.decoder_layers,
        "geometry_encoder.encode": model.geometry_layers,
    }
    if model.vocabulary is None:
        text, encoder = model.text, "backbone.language_backbone.encoder"
        sizes[f"{encoder}.positional_embedding"] = [text.context_length, text.width]
        layers[f"{encoder}.transformer.resblocks"] = text.depth
    else:
        count = len({*model.vocabulary, VISUAL_PROMPT})
        sizes["backbone.language_backbone.mask"] = [count, model.text.context_length]
    problems = [
        f"{file}: its header says {size} of {key}, and the file has {list(shapes.get(key, []))}"
        for key, size in sizes.items()
        if list(shapes.get(key, [])) != size
    ]
    for name, count in layers.items():
        numbered = (key.removeprefix(f"{name}.") for key in shapes if key.startswith(f"{name}."))
        found = len({key.partition(".")[0] for key in numbered})
        if found != count:
            problems.append(f"{file}: its header says {count} {name}, and the file has {found}")
    if problems:
        raise UserError(problems)


def _check_base(header: Header, file: Path) -> None:
    """Raise UserError where an adapter's header has other sizes than its base."""
    if file.name != adapters.FILE:
        return
    base = find_base(file.parent)
    own, theirs = (
        flatten(each.model.model_dump(exclude=_FREE))
        for each in (header, describe(base, header.model.name))
    )
    if changed := [key for key in own if own[key] != theirs.get(key)]:
        raise UserError(
            f"{file}: its header says {changed[0]} {own[changed[0]]}, and its base {base} has "
            f"{theirs.get(changed[0])}"
        )


# Of a size, what may be another in an adapter than in its base: no tensor depends on it.
_FREE: dict[str, Any] = {
    **dict.fromkeys(("resolution", "dropout", "mask_points", "activation_checkpointing"), True),
    "vision": {"drop_path"},
}


@functools.lru_cache(maxsize=8)
def _hash(file: Path, size: int, changed: int) -> str:
    """Return the hash of a file, once for each size and time of change: 3 s for SAM 3's."""
    del size, changed
    return hash_file(file)


def cached_sam3() -> Path | None:
    """Return Meta's weights, if the Hugging Face cache has them."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(*HUB)
    return Path(file) if isinstance(file, str) else None


def published_sam3() -> Path:
    """Return Meta's weights, cached or from the hub; raise UserError that says how to get them."""
    try:
        from huggingface_hub import hf_hub_download

        return cached_sam3() or Path(hf_hub_download(*HUB))
    except Exception as error:  # the hub raises many kinds: gated, offline, missing token, limits
        raise UserError(
            f"SAM 3's weights ({HUB[0]}) could not be had: {type(error).__name__}. They are under "
            "the SAM License and gated: ask for access at co/facebook/sam3, then set "
            "HF_TOKEN; or give --checkpoint FILE; or --checkpoint none for random weights; or "
            "--model nano."
        ) from None


def _read_state(file: Path) -> dict[str, Tensor]:
    """Read bare keys → tensors, whatever the layout."""
    state = read_tensors(file)
    if published.is_layout(state):
        state = published.image_part(state)
    elif is_layout(state):
        state = from_transformers(state)
    return {key: value for key, value in state.items() if not key.endswith(COMPUTED)}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a file's own keys → tensors, mapped: they lie in the file until they are used."""
    if file.suffix == ".json":
        return {key: value for part in shards(file) for key, value in read_tensors(part).items()}
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    return read_index(file)[0]


def read_index(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a checkpoint of torch's: keys → tensors, mapped, and what is kept beside the model."""
    _check_pickle(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a checkpoint that can be read safely ({reason})") from None
    beside: list[str] = []
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        beside = [str(key) for key in content if key != "model"]
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{file}: holds no state dict")
    wrong = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if wrong:
        raise UserError(f"{file}: not a state dict: '{wrong[0]}' is no tensor")
    return {str(key): value for key, value in content.items()}, beside


def _check_pickle(file: Path) -> None:
    """Raise UserError where reading a checkpoint could take what its size does not tell.

    What it holds is not run: `torch.load` sees to that. But a member of its zip may unpack to any
    size, and a key of tuples within tuples, each written once and named twice, is hashed for ever.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [m.filename for m in archive.infolist() if m.compress_size != m.file_size]
            pickles = [m for m in archive.infolist() if m.filename.endswith("data.pkl")]
            small = all(member.file_size <= MAX_PICKLE for member in pickles)
            sound = small and all(_hashes(archive.read(member)) for member in pickles)
    except Exception as error:  # zipfile and pickletools raise nearly anything on what is damaged
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not a checkpoint that can be read safely ({reason})") from None
    if packed or not sound:
        raise UserError(
            f"{file}: not a checkpoint that can be read safely (its zip is packed, or its index is "
            "no list of tensors)"
        )


def _hashes(data: bytes) -> bool:
    """Return whether each tuple of a pickle holds few enough values to be hashed, inner ones too.

    The opcodes are followed as far as tuples go: a number on the stack is the values in a value.
    """
    stack: list[int | None] = []  # None: a mark
    memo: dict[int, int | None] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
            continue
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        taken = len(opcode.stack_before)
        if pickletools.stackslice in opcode.stack_before:  # all down to the last mark
            taken += stack[::-1].index(None) - 1
        values = sum(value or 0 for value in stack[len(stack) - taken :])
        del stack[len(stack) - taken :]
        for made in opcode.stack_after:
            is_tuple = made is pickletools.pytuple
            if is_tuple and values > MAX_HASHED:
                return False
            is_mark = made is pickletools.markobject
            stack.append(None if is_mark else 1 + values * is_tuple)
    return True


def _load_state(model: Sam3Image, state: Mapping[str, Tensor], file: Path, *, mapped: bool) -> None:
    problems = _differences(model, state)
    if problems:
        more = [f"… and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise UserError([f"{file} does not fit the model:", *problems[:6], *more])
    # strict but for what is computed
    state = to_assign(model, state) if mapped else dict(state)
    model.load_state_dict(state, strict=False, assign=mapped)


def _differences(model: Sam3Image, state: Mapping[str, Tensor]) -> list[str]:
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.endswith(COMPUTED)}
    shapes = [
        f"  {key}: shape {tuple(state[key].shape)} in the file, {tuple(shape)} in the model"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    missing = [f"  {key}: not in the file" for key in expected if key not in state]
    unknown = [f"  {key}: not in the model" for key in state if key not in expected]
    return shapes + missing + unknown


def _identify(file: Path, state: Mapping[str, Tensor], size: str | None) -> ModelConfig:
    """Return the size whose keys and shapes are the file's; its mask head may be left out."""
    has_masks = any(key.startswith("segmentation_head.") for key in state)
    nearest: tuple[int, str, list[str]] | None = None
    for name in [size] if size else model_names():
        config = load_model_config(name)
        config = config.model_copy(update={"segmentation": has_masks})
        problems = _differences(build_model(config, device="meta"), state)
        if not problems:
            return config
        if nearest is None or len(problems) < nearest[0]:
            nearest = (len(problems), name, problems)
    assert nearest is not None
    raise UserError(
        [
            f"{file}: {len(state)} tensors that fit none of the sizes {', '.join(model_names())}. "
            f"Nearest is '{nearest[1]}', where {nearest[0]} do not fit:",
            *nearest[2][:6],
        ]
    )
