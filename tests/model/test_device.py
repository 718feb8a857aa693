"""Where and how a model computes: on which device, in which precision, on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.config.compose import load_model_config
from app.errors import UserError
from app.model import device
from tests.helpers import log_lines

CPU = torch.device("cpu")


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU that torch can use, and nothing told of one yet."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    caches = (device.gpu_problem, device._tell_gpu_problem)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def _driver(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 0), ["sm_80", "sm_100"], False),
        ((12, 1), ["sm_80", "sm_100", "compute_120"], True),
        ((10, 0), ["sm_80", "compute_120"], False),
    ],
)
def test_a_gpu_runs_what_is_built_for_its_kind(capability, built_for, runs) -> None:
    assert device.has_kernels(capability, built_for) is runs


@pytest.mark.usefixtures("without_gpu")
def test_an_old_driver_is_named_with_the_one_that_is_needed(tmp_path, monkeypatch) -> None:
    _driver(tmp_path, "echo 535.104.05", monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    lines = log_lines(monkeypatch)
    assert device.choose_device().type == "cpu"
    assert device.choose_device("auto").type == "cpu"
    (line,) = lines
    assert "the GPU is not used: its driver is 535.104.05" in line
    assert "needs 580 or newer, for CUDA 13.2" in line
    with pytest.raises(UserError, match=r"device cuda: its driver is 535\.104\.05"):
        device.choose_device("cuda")


@pytest.mark.usefixtures("without_gpu")
def test_a_torch_made_for_cpus_is_named(tmp_path, monkeypatch) -> None:
    _driver(tmp_path, "echo 590.1", monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "driver 590.1 is here, and this torch" in str(device.gpu_problem())


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("hidden", [True, False])
def test_nothing_is_said_where_there_is_no_gpu_to_use(tmp_path, monkeypatch, hidden) -> None:
    _driver(tmp_path, "echo 535.104.05" if hidden else "exit 9", monkeypatch)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.gpu_problem() is None


def test_a_precision_is_chosen_by_name() -> None:
    nano = load_model_config("nano")
    chosen = {name: device.choose_precision(name, CPU, nano) for name in ("auto", "bf16", "fp16")}
    assert chosen == {"auto": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with pytest.raises(UserError, match="fp64: give auto, fp32, bf16 or fp16"):
        device.choose_precision("fp64", CPU, nano)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_in_the_precision(precision: torch.dtype) -> None:
    ones = torch.ones(2, 2)
    with device.autocast(CPU, precision):
        assert (ones @ ones).dtype == precision


def test_of_an_error_the_advice_for_programmers_is_left_out() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8.00 GiB."
    advice = " Of the allocated memory 7 GiB is allocated by PyTorch, and 1 GiB is reserved"
    assert device.told(torch.OutOfMemoryError(said + advice)) == said


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("size", "on", "chosen", "threads"),
    [
        ("nano", "cpu", None, 1),
        ("nano", "cpu", "3", 3),  # by the user
        ("nano", "cuda", None, 3),
        ("small", "cpu", None, 3),
    ],
)
def test_a_narrow_model_computes_on_one_thread(
    three_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    on: str,
    chosen: str | None,
    threads: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    device.choose_threads(torch.device(on), load_model_config(size))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [
        ("", None, [{}]),
        ("", 1, [{}]),
        ("", 3, [{"OMP_NUM_THREADS": "2"}] * 3),
        ("", 9, [{"OMP_NUM_THREADS": "1"}] * 9),
        ("-1", None, [{}]),
        ("3", 2, [{"CUDA_VISIBLE_DEVICES": "3"}]),
        ("3,-1,4", 2, [{"CUDA_VISIBLE_DEVICES": "3"}]),
        ("0,5", None, [{"CUDA_VISIBLE_DEVICES": n, "OMP_NUM_THREADS": "3"} for n in "05"]),
    ],
)
def test_processes_share_a_machine(
    gpus: str, processes: int | None, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 6)
    assert device.slots(processes) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert all("OMP_NUM_THREADS" not in slot for slot in device.slots(processes))
