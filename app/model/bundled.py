"""The weights that the project carries: packed small, and proved whole before they are used."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from app.errors import UserError
from app.files import atomic_path, claim, hash_file, remove_unfinished, write_text
from app.model.weights import FILE, Header, find_file, read_header, to_metadata

State = dict[str, torch.Tensor]
NANO = Path(__file__).resolve().parents[1] / "assets" / "nano"


def bundled_nano() -> Path | None:
    """Return the folder of nano's weights; None where this copy of the project has none.

    Raises:
        UserError: they are not those that were packed.
    """
    file = NANO / FILE
    if not file.is_file():
        return None
    if hash_file(file) != _hash_file(file).read_text("ascii", "replace").strip():
        raise UserError(
            f"{file}: is damaged: its SHA-256 is not that of {_hash_file(file).name}; restore both "
            "from the project, or give --checkpoint"
        )
    return NANO


def pack(source: Path, folder: Path, base: Path | None = None, share: float = 0.75) -> Path:
    """Write weights of ours as float16, half as large, to `folder`, with their SHA-256 beside.

    Args:
        base: the weights that `source` was tuned from; the mean of both is written, which often
            keeps what the base knows and most of what was learnt (WiSE-FT, arXiv 2109.01903).
        share: of `source` in that mean, 0..1.

    Raises:
        UserError: `source` is no weights file of ours, `base` has other tensors, or `folder` holds
            weights.
    """
    file = find_file(source)
    header = read_header(file)
    if header is None:
        raise UserError(f"{file}: has no header of ours; give weights that a run has left")
    state = load_file(file)
    if base is not None:
        other = find_file(base)
        state = _mean(state, load_file(other), share, base)
        header = _header_of_mean(header, read_header(other), share)
    state = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in state.items()
    }
    packed = folder / FILE
    claim(folder)
    remove_unfinished(packed)
    if packed.exists():
        raise UserError(f"--output-dir {folder}: holds {FILE} already; name another folder")
    with atomic_path(packed) as temporary:
        save_file(state, temporary, metadata=to_metadata(header))
    write_text(_hash_file(packed), hash_file(packed) + "\n")
    return packed


def _mean(tuned: State, base: State, share: float, place: Path) -> State:
    """Return the mean of two weights' floats, in float32; whole numbers are the tuned ones."""
    forms = [{key: value.shape for key, value in state.items()} for state in (tuned, base)]
    if forms[0] != forms[1]:
        keys = sorted({key for key, _ in set(forms[0].items()) ^ set(forms[1].items())})
        raise UserError(
            f"--base {place}: has other tensors, such as {keys[0]}; give what was tuned"
        )
    return {
        key: torch.lerp(base[key].float(), value.float(), share)
        if value.is_floating_point()
        else value
        for key, value in tuned.items()
    }


def _header_of_mean(tuned: Header, base: Header | None, share: float) -> Header:
    """Return what is known of a mean: no validation has seen it, its threshold is a mean too."""
    threshold = tuned.threshold
    if threshold is not None and base is not None and base.threshold is not None:
        threshold = share * threshold + (1 - share) * base.threshold
    return tuned.model_copy(update={"threshold": threshold, "scores": None, "golden": None})


def _hash_file(file: Path) -> Path:
    return file.with_suffix(file.suffix + ".sha256")
