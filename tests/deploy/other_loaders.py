"""Give exported weights to loaders that are installed apart; print what they took, as JSON.

`python -m tests.deploy.other_loaders ultralytics|samgeo|roboflow FILE`, with its packages.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from app.model.upstream import fixes, pin
from tests.model.published import SMALL, build_small


def ultralytics(file: Path) -> dict[str, Any]:
    """Return the names that ultralytics' models miss of a full-size file, which it says to nobody.

    Its tokenizer is from a package that no index carries: open_clip's is the same.
    """
    tokenizers = types.SimpleNamespace(SimpleTokenizer=SimpleTokenizer)
    clip = types.ModuleType("clip")
    clip.simple_tokenizer = tokenizers  # type: ignore[attr-defined]
    sys.modules["clip"] = clip
    from ultralytics.models.sam import build_sam3

    found: dict[str, Any] = {}
    fill = nn.Module.load_state_dict

    def told(self: nn.Module, state: Any, strict: bool = True, **options: Any) -> Any:
        del strict
        result = fill(self, state, strict=False, **options)
        found.setdefault("missing", []).append(list(result.missing_keys))
        found.setdefault("tensors", []).append(len(self.state_dict()))
        return result

    nn.Module.load_state_dict = told  # type: ignore[method-assign]
    with torch.device("meta"), fixes.building_on_meta(), contextlib.redirect_stdout(sys.stderr):
        for build in (build_sam3.build_sam3_image_model, build_sam3.build_interactive_sam3):
            # what comes after the weights, such as a move to a device, is none of this test's
            with contextlib.suppress(NotImplementedError):
                build(str(file))
    return found


def samgeo(file: Path) -> dict[str, Any]:
    """Return whether the model of samgeo's `SamGeo3` has a small file's tensors, and an answer."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(sys.stderr):
        build_small(patch)
        from samgeo.samgeo3 import SamGeo3

        sam = SamGeo3(
            backend="meta",
            bpe_path=str(pin.bpe_path()),
            device="cpu",
            checkpoint_path=str(file),
            load_from_HF=False,
            resolution=SMALL.resolution,
        )
    return _compared(sam.model, file)


def roboflow(file: Path) -> dict[str, Any]:
    """Return whether the model of Roboflow's `SAM3Torch` has the tensors of a small package."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(sys.stderr):
        build_small(patch)
        from inference_models.models.sam3.sam3_torch import SAM3Torch

        sam = SAM3Torch.from_pretrained(str(file.parent), device=torch.device("cpu"))
    return _compared(sam._model, file)


def _compared(model: nn.Module, file: Path) -> dict[str, Any]:
    """Return the number of a model's tensors, and the names of those that are not the file's."""
    written, head = torch.load(file, weights_only=True), "inst_interactive_predictor.model."
    loaded = {
        f"tracker.{name.removeprefix(head)}" if name.startswith(head) else f"detector.{name}": value
        for name, value in model.state_dict().items()
    }
    other = [name for name, value in loaded.items() if not torch.equal(written[name], value)]
    return {"tensors": len(loaded), "other": other}


if __name__ == "__main__":
    fixes.apply_fixes()
    loader = {"ultralytics": ultralytics, "samgeo": samgeo, "roboflow": roboflow}[sys.argv[1]]
    print(json.dumps(loader(Path(sys.argv[2]))))
