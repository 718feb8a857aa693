"""Where to compute, and in which precision."""

from __future__ import annotations

import torch

from app.config import ModelConfig
from app.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: the GPU where there is one. Raises UserError when "cuda" is asked for in vain."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda: no CUDA device answers here. Use cpu, or check the driver (nvidia-smi)."
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """`auto`: bfloat16 where it helps: on CUDA, and for wide models on CPUs that multiply in it.

    A narrow model spends its time between the matrix products, and casting only adds to it.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {name}: give auto, fp32 or bf16")
    if name == "auto":
        wide = config.vision.embed_dim >= 512
        helps = device.type == "cuda" or (wide and _cpu_multiplies_bfloat16())
        name = "bf16" if helps else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
