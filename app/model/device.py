"""Choose where to compute and in which precision."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from app.config.schema import ModelConfig
from app.errors import UserError

log = logging.getLogger("app")
GROUPS = Path("/sys/fs/cgroup")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRIVERS = {11: 450, 12: 525, 13: 580}  # CUDA's version -> the first driver that runs its programs
QUERY_DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name: auto (the GPU where there is one), cpu or cuda.

    On CUDA products of float32 are TF32 from then on, as upstream has them (model_builder.py:46):
    ten bits of the mantissa, on the tensor cores of compute capability 8.0 and later.

    Raises:
        UserError: another name, or "cuda" where no GPU can be used.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu or cuda")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available() and gpu_problem() is None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return torch.device("cuda")
    if name == "cuda":
        why = gpu_problem() or "no CUDA device answers here. Check the driver (nvidia-smi)"
        raise UserError(f"device cuda: {why}; or use cpu")
    _tell_gpu_problem()
    return torch.device("cpu")


@functools.cache
def gpu_problem() -> str | None:
    """Return why the machine's GPU cannot be used; None where it can be, or where there is none."""
    if torch.cuda.is_available():
        capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        if has_kernels(capability, built_for):
            return None
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}."
            f"{capability[1]}, and this torch ({torch.__version__}) has kernels for "
            f"{', '.join(built_for)} alone"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or (driver := _find_driver()) is None:
        return None
    if torch.version.cuda is None:
        return f"driver {driver} is here, and this torch ({torch.__version__}) is made for CPUs"
    least = DRIVERS.get(int(torch.version.cuda.partition(".")[0]))
    needs = "a newer one" if least is None else f"{least} or newer"
    return (
        f"its driver is {driver}, and this torch ({torch.__version__}) needs {needs}, for CUDA "
        f"{torch.version.cuda}. Update the driver"
    )


@functools.cache
def _tell_gpu_problem() -> None:
    """Log, once a process, why its GPU is not used."""
    if problem := gpu_problem():
        log.info("note: the GPU is not used: %s", problem)


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Return whether a GPU can run what torch was built for.

    Args:
        capability: of the GPU's compute, such as (7, 5).
        built_for: `sm_75` runs on 7.5 and later of 7; `compute_75` is compiled for any later GPU.
    """
    for kind, _, number in (name.partition("_") for name in built_for):
        digits = "".join(filter(str.isdigit, number))
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return not built_for


def _find_driver() -> str | None:
    """Return the version of NVIDIA's driver, asked without torch; None where there is no GPU."""
    if (program := shutil.which("nvidia-smi")) is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words = [program, *QUERY_DRIVER]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
            return next(iter(done.stdout.split()), None)
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"of CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return None


def choose_threads(device: torch.device, config: ModelConfig) -> None:
    """Compute a narrow model on one thread of the CPU, unless OMP_NUM_THREADS says otherwise.

    Its operations are too small to be shared: on two threads that sleep while they wait for one
    another (`prepare_import`) an update of nano takes as long; on two that spin 0.8 times as long,
    but 1.7 times where another process has one of the cores.
    """
    if device.type == "cpu" and not is_wide(config) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def choose_precision(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """Return the dtype of a name: auto, fp32 (float32), or for autocast bf16 or fp16.

    `auto` is what helps: on CUDA bfloat16 where the GPU multiplies in it, else float16; bfloat16
    for wide models on CPUs that multiply in it. A narrow model spends its time between the matrix
    products, and casting only adds to it.

    Raises:
        UserError: another name, or fp16 on a CPU that cannot compute in it.
    """
    if name not in ("auto", *PRECISIONS):
        raise UserError(f"--precision {name}: give auto, fp32, bf16 or fp16")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if is_wide(config) and _cpu_multiplies_bfloat16() else "fp32"
    if name == "fp16" and device.type == "cpu" and not _cpu_multiplies_float16():
        raise UserError("--precision fp16: torch cannot compute in it on this CPU; give bf16")
    return PRECISIONS[name]


def in_words(device: torch.device, precision: torch.dtype) -> str:
    """Return the name of a precision, and what float32 stands for on CUDA."""
    name = str(precision).removeprefix("torch.")
    tf32 = precision == torch.float32 and device.type == "cuda"
    return f"{name} (its products in TF32)" if tf32 and torch.cuda.is_tf32_supported() else name


def autocast(
    device: torch.device, precision: torch.dtype, *, cache_weights: bool = True
) -> torch.autocast:
    """Return a context that multiplies in `precision` where that is a half, else as written.

    accelerate's autocast is no substitute: it converts outputs to float32, and cannot rebuild
    upstream's SAM3Output.

    Args:
        cache_weights: keep each weight in the half to the end of the context: faster where it is
            used again, but 2 bytes a parameter, which training spends on activations instead.
    """
    is_half = precision != torch.float32
    return torch.autocast(
        device.type,
        precision if is_half else torch.bfloat16,
        enabled=is_half,
        cache_enabled=cache_weights,
    )


def is_main() -> bool:
    """Return whether this process is alone, or the first of several that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that each of `processes` can have: of its GPU, or its share of the RAM.

    Memory that this process holds counts as free, on a GPU but for CUDA's context. A limit of the
    control group (a container's, a Slurm job's) counts where it is lower.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free = psutil.virtual_memory().available
    for limit, used in _group_memory():
        free = min(free, limit - used)
    return (free + psutil.Process().memory_info().rss) // processes


def spare_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU that no tensor holds; None for a CPU."""
    if device.type == "cpu":
        return None
    return free_memory(device) - torch.cuda.memory_allocated()


def release_memory() -> None:
    """Give the GPU back what this process reserved and no tensor holds."""
    torch.cuda.empty_cache()


def told(error: RuntimeError) -> str:
    """Return what an error says of a GPU's memory, without torch's advice for programmers."""
    return str(error).partition(" Of the allocated memory")[0].splitlines()[0].rstrip(".") + "."


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


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


def is_wide(config: ModelConfig) -> bool:
    """Return whether products of matrices are what a model spends its time on."""
    return config.vision.embed_dim >= 512


def _cpu_multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _cpu_multiplies_float16() -> bool:
    """Return whether torch has what a model needs in float16 on this CPU, which is tried."""
    ones = torch.ones(1, 4, 8, 8)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            torch.nn.functional.conv2d(ones, torch.ones(4, 4, 1, 1))
            torch.nn.functional.scaled_dot_product_attention(ones, ones, ones @ ones)
    except RuntimeError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process held: torch's on a GPU, else all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slots(processes: int | None) -> list[dict[str, str]]:
    """Return what processes that work at a time on this machine have of it, as their environment.

    Each has a GPU by itself where there are some, and a share of the CPU's threads unless
    OMP_NUM_THREADS is said.

    Args:
        processes: at most one a GPU; None: one a GPU, or one on a CPU.
    """
    gpus = _visible_gpus()
    own = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:processes]]
    own = own or [{} for _ in range(processes or 1)]
    return [share_of_threads(len(own)) | each for each in own]


def share_of_threads(processes: int) -> dict[str, str]:
    """Return the environment by which processes share the CPU, unless OMP_NUM_THREADS is said."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def _visible_gpus() -> list[str]:
    """Return the numbers of this machine's GPUs, as `CUDA_VISIBLE_DEVICES` has them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        numbers = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        # CUDA reads them up to the first that is none, as -1.
        return list(itertools.takewhile(lambda number: number and number[0] != "-", numbers))
    return [str(number) for number in range(torch.cuda.device_count())]
