"""The published file that weights began as: an export takes the tracker of videos from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from app.errors import UserError
from app.files import hash_file
from app.model import adapters, published, weights
from app.model.transformers.state import TRACKER, from_transformers, is_layout
from app.model.transformers.tracker import to_transformers

log = logging.getLogger("app")
SHOWN = 6  # problems
NECK = "tracker_neck.safetensors"  # beside weights: what `app retrack` made for their trunk
_HEAD = "segmentation_head."


@dataclass(frozen=True)
class Base:
    """The published file whose tracker goes beside our image part.

    Attributes:
        file: its path.
        origin: how a header names it.
        tensors: its own keys → tensors, mapped.
        is_proved: whether the weights say that they began as this very file.
        neck: of the tracker, as it was taught to see through the weights' trunk; empty: it was not.
    """

    file: Path
    origin: weights.Origin
    tensors: Mapping[str, Tensor]
    is_proved: bool
    neck: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def written(self) -> Mapping[str, Tensor]:
        """Return the file's tensors with the neck that was taught in the place of its own."""
        return {**self.tensors, **self.neck}

    @property
    def release(self) -> published.Release:
        """Return which SAM 3 it is."""
        return "3.1" if self.origin.layout == "3.1" else "3.0"


def find_base(source: Path, named: Path | None, *, own_neck: bool = True) -> Base | None:
    """Return the published file that weights began as; None where they name none and none is given.

    Args:
        source: file of the weights.
        named: by --base.
        own_neck: take the tracker's neck that lies beside the weights, where one does.

    Raises:
        UserError: it cannot be found, is another than that of the weights, or holds no tracker; or
            the neck beside the weights is of others.
    """
    base = _find(source, named)
    file = source.parent / NECK
    if base is None or not own_neck or not file.exists():
        return base
    with safe_open(file, framework="pt") as content:
        notes = content.metadata() or {}
    again = f"make it anew: python -m app retrack {source.parent} --images DIR --overwrite"
    if notes.get("weights") != hash_file(source):
        raise UserError(f"{file}: was taught for other weights than {source.name}; {again}")
    neck = weights.read_tensors(file)
    unknown = {key for key in neck if key not in base.tensors}
    if unknown or notes.get("base") != base.origin.sha256:
        raise UserError(f"{file}: is of another base than {base.file}; {again}")
    log.info("the tracker's neck: %s", file)
    return replace(base, neck=neck)


def _find(source: Path, named: Path | None) -> Base | None:
    origin = weights.origin(source)
    folder = source.parent
    if origin is not None and named is None:
        reference = adapters.Base(origin.reference, origin.sha256)
        try:
            file = weights.locate(reference, folder)
        except UserError as error:
            raise UserError([*error.problems, "Or name them: --base FILE."]) from None
        return Base(file, origin, weights.read_tensors(file), is_proved=True)
    if named is None:
        return None
    file = weights.find_file(named)
    found = weights.origin(file) if weights.read_header(file) is None else None
    if found is None:
        raise UserError(
            f"--base {named}: is no file that Meta published: it has no tracker. Name sam3.pt or "
            "sam3.1_multiplex.pt."
        )
    if origin is None or "transformers" in {origin.layout} ^ {found.layout}:
        log.info(
            "note: nothing in %s proves that they began as %s: taken at your word", source, file
        )
        return Base(file, found, weights.read_tensors(file), is_proved=False)
    if found.sha256 != origin.sha256:
        raise UserError(
            f"--base {named}: is another file than these weights began as: SHA-256 "
            f"{found.sha256[:16]}…, and they want {origin.sha256[:16]}… ({origin.reference}). A "
            "tracker of other weights would not fit them."
        )
    return Base(file, origin, weights.read_tensors(file), is_proved=True)


def check_fit(state: Mapping[str, Tensor], base: Base) -> None:
    """Raise UserError where the image part has other tensors than the base, but for a mask head.

    Of a base that nothing proves, the tracker is compared too, with upstream's strict video model:
    SAM 3.1's alone is not known there.
    """
    whole = {key: value.to("meta") for key, value in base.tensors.items()}  # their shapes alone
    is_theirs = is_layout(whole)
    theirs = from_transformers(whole) if is_theirs else published.image_part(whole)
    ours = {key: value for key, value in state.items() if not key.endswith(published.COMPUTED)}
    has_masks = any(key.startswith(_HEAD) for key in ours)
    problems = _differences(
        ours, {key: v for key, v in theirs.items() if has_masks or not key.startswith(_HEAD)}
    )
    if not problems and not base.is_proved and base.release == "3.0":
        wanted = published.video_part()
        if is_theirs:
            wanted, beside = to_transformers(wanted), {k for k in whole if k.startswith(TRACKER)}
        else:
            beside = {key for key in whole if published.image_name(key) is None}
        problems = _differences(wanted, {key: whole[key] for key in beside})
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError([f"{base.file} is no base of these weights:", *problems[:SHOWN], *more])


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each name or shape of the base that is not as it must be."""
    problems = [
        f"  {key}: shape {tuple(value.shape)}, in the base {tuple(found[key].shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    problems += [f"  {key}: not in the base" for key in wanted if key not in found]
    return problems + [f"  {key}: in the base alone" for key in sorted(found) if key not in wanted]
