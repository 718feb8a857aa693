"""The pin: which SAM 3 is installed, proved before it is imported, and what its import needs.

The package index's `sam3` 0.1.4 is facebookresearch/sam3 at commit 84cc43b, byte for byte but for
two files. Later commits cannot train ("Expected grad to be disabled": facebookresearch/sam3#509,
#610), so any other package is refused.

Nothing here imports torch or sam3: `prove_pin` must run before they load.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.model.upstream.lazy import import_later

COMMIT = "84cc43bca4347b772f17d1078a1ddb4c054655c2"
INSTALL = "pip install --no-deps sam3==0.1.4"

# The two files in which the wheel differs from the commit: the version string, and `decord`
# imported only where a video is read.
WHEEL_BLOBS = {
    "sam3/__init__.py": "9655d3e3425f76e64f443cc33a9a01c059b88d80",
    "sam3/train/data/sam3_image_dataset.py": "276636e2dd57cffd7e1b13b101e4224e5cb96065",
}
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package '{name}' is not installed. Run: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def prove_pin(folder: Path | None = None) -> None:
    """Check that the installed `sam3` is commit 84cc43b but for the two known files.

    Compares git blob ids of all Python files: some 5 ms.

    Raises:
        UserError: a file is missing, differs or does not belong; says what to install.
    """
    folder = folder or package_folder("sam3")
    listing = Path(__file__).with_name("sam3-84cc43b.blobs").read_text(encoding="ascii")
    expected = {path: blob for blob, path in (line.split() for line in listing.splitlines())}
    installed = {f"sam3/{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*.py")}
    wrong = [
        f"{path} differs"
        for path in sorted(expected.keys() & installed.keys())
        if _git_blob_id(installed[path]) not in (expected[path], WHEEL_BLOBS.get(path))
    ]
    wrong += [f"{path} is missing" for path in sorted(expected.keys() - installed.keys())]
    wrong += [
        f"{path} does not belong there" for path in sorted(installed.keys() - expected.keys())
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"The installed sam3 ({folder}) is not commit {COMMIT[:7]}: "
            f"{'; '.join(wrong[:3])}{more}. Run: {INSTALL}"
        )


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def prepare_import() -> None:
    """Set what torch and sam3 need before they are imported; `app/__init__.py` calls this.

    Upstream scripts its box functions with `torch.jit.script` (box_ops.py), whose arithmetic
    changes once it has profiled their first calls: the first step of a process, and so a resumed
    run, would differ in the last bit. Both that and its decorators for CUDA autocast warn at import
    of what says nothing about the user's run.

    torch 2.15 multiplies outer products on a GPU by a Triton kernel (torch/_native), where it finds
    a C compiler: the first step waits for it, and warns. cuBLAS does as well, elsewhere and here.

    Threads of a CPU sleep while they wait for one another, unless the user has chosen: those that
    spin take the cores from the thread that they wait for, where other processes want them too.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("PYTORCH_JIT", "0")
    os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
    warnings.filterwarnings("ignore", message="CUDA is not available or torch_xla", module="sam3")
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    # Of a driver or a card that is too old, which `device.gpu_problem` says in one line.
    warnings.filterwarnings("ignore", message=r"CUDA initialization|\s*Found GPU\d+ ")
    if importlib.util.find_spec("torchmetrics") is None:
        sys.modules["torchmetrics"] = _torchmetrics()
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is not None:
        import_later()  # the runtime of exported folders has no torch


def _torchmetrics() -> types.ModuleType:
    """Return the one function of a library that loss_fns.py:9 imports, and that takes seconds to.

    Nothing is learnt from it: it is the F1 score that upstream's Trainer logs as `ce_f1`.
    """
    module = types.ModuleType("torchmetrics")
    module.__spec__ = importlib.machinery.ModuleSpec("torchmetrics", loader=None)

    def f1_score(predicted: Any, target: Any, task: str) -> Any:
        """Return F1 of scores 0..1 and labels 0 or 1, both (n,), at 0.5; 0 if there is neither."""
        assert task == "binary"
        chosen = predicted > 0.5
        both = chosen.sum() + target.sum()
        return 2 * (chosen & target.bool()).sum() / both.clamp(min=1)

    module.functional = types.SimpleNamespace(f1_score=f1_score)  # type: ignore[attr-defined]
    return module


@functools.cache
def bpe_path() -> Path:
    """Return the path of CLIP's vocabulary, which no sam3 wheel has; open_clip has that file."""
    path = package_folder("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != BPE_SHA256:
        raise UserError(f"{path} is not CLIP's vocabulary. Run: pip install open-clip-torch==3.3.0")
    return path
