"""Choose where to compute and in which precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from app.config.schema import ModelConfig
from app.errors import UserError

GROUPS = Path("/sys/fs/cgroup")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name: auto (the GPU where there is one), cpu or cuda.

    Raises:
        UserError: another name, or "cuda" where no GPU answers.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda: no CUDA device answers here. Use cpu, or check the driver (nvidia-smi)."
        )
    return torch.device(name)


def choose_threads(device: torch.device, config: ModelConfig) -> None:
    """Compute a narrow model on one thread of the CPU, unless OMP_NUM_THREADS says otherwise.

    Its operations are too small to be shared: on two threads an update of nano takes 0.9 times as
    long, but up to ten times where another process has one of the cores, as threads wait for one
    another by spinning.
    """
    if device.type == "cpu" and not _is_wide(config) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def choose_precision(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """Return the dtype of a name: auto, fp32 (float32) or bf16 (bfloat16, for autocast).

    `auto` is bfloat16 where it helps: on CUDA, and for wide models on CPUs that multiply in it. A
    narrow model spends its time between the matrix products, and casting only adds to it.

    Raises:
        UserError: another name.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {name}: give auto, fp32 or bf16")
    if name == "auto":
        helps = device.type == "cuda" or (_is_wide(config) and _cpu_multiplies_bfloat16())
        name = "bf16" if helps else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(
    device: torch.device, precision: torch.dtype, *, cache_weights: bool = True
) -> torch.autocast:
    """Return a context that multiplies in bfloat16 where that is `precision`, else as written.

    accelerate's autocast is no substitute: it converts outputs to float32, and cannot rebuild
    upstream's SAM3Output.

    Args:
        cache_weights: keep each weight in bfloat16 to the end of the context: faster where it is
            used again, but 2 bytes a parameter, which training spends on activations instead.
    """
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=precision == torch.bfloat16,
        cache_enabled=cache_weights,
    )


def is_main() -> bool:
    """Return whether this process is alone, or the first of several that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that each of `processes` can have: of its GPU, or its share of the RAM.

    Memory that this process holds counts as free. A limit of the control group (a container's, a
    Slurm job's) counts where it is lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    for limit, used in _group_memory():
        free = min(free, limit - used)
    return (free + psutil.Process().memory_info().rss) // processes


def _group_memory() -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of this process's control groups (version 2) with a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = GROUPS / own
    for folder in (group, *group.parents):
        if folder.is_relative_to(GROUPS):
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                limit = int((folder / "memory.max").read_text(encoding="ascii"))
                yield limit, int((folder / "memory.current").read_text(encoding="ascii"))


def _is_wide(config: ModelConfig) -> bool:
    return config.vision.embed_dim >= 512


def _cpu_multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
