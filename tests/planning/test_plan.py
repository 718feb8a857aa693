"""The plan beside the run: memory and disk as measured, and what makes it fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.config.compose import load_config, load_model_config, recipe_file
from app.config.schema import Config, ModelConfig
from app.datasets.build import Splits, load_splits
from app.model import device, weights
from app.model.build import build_model
from app.planning import plan as planning
from app.planning.plan import Planner
from app.training.prepare import Prepared, Request
from tests.helpers import PATIENCE, PEAK, REPOSITORY, TINY, Command

GB = 1e9


# Whose step is counted soon: what is asked here is what becomes of the count.
LEAST = [
    *(*TINY, "model.vision.depth=2", "model.vision.global_blocks=[1]", "model.text.depth=1"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=8"),
]


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of that size to start from."""
    model = load_config(LEAST).model
    folder = tmp_path_factory.mktemp("least")
    return weights.save(build_model(model), folder, weights.Header(model=model)).parent


def _header_alone(folder: Path, size: ModelConfig) -> Path:
    """A file that says what weights it holds, and holds none: a plan reads no more."""
    folder.mkdir()
    header = {"sam3-finetuning": weights.Header(model=size).model_dump_json()}
    save_file({"none": torch.zeros(1)}, folder / weights.FILE, metadata=header)
    return folder


def _figures(text: str, name: str) -> list[float]:
    """The numbers in a plan's line."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"[\d.]+\d", line)]


@pytest.mark.slow
def test_memory_and_disk_are_those_of_the_run(tmp_path: Path) -> None:
    """Within 15 %: of nano as it is, on the synthetic shapes."""
    words = [sys.executable, "-m", "app", "train", "--checkpoint", "none", "--epochs", "2"]
    words += ["--limit", "8", "--batch-size", "4", "--output-dir", str(tmp_path / "run")]
    words += ["evaluation.pictures=0", "evaluation.every=2"]

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=PATIENCE
        ).stdout

    plan = run(*words, "--plan")
    assert not (tmp_path / "run").exists()
    peak = int(run(sys.executable, "-c", PEAK, *words).split()[-1])
    assert _figures(plan, "memory")[0] == pytest.approx(peak / GB, rel=0.15)
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert _figures(plan, "disk")[0] == pytest.approx(written / GB, rel=0.15)
    assert "updates     4: 2 in each of 2 epochs" in plan


def test_a_plan_reads_no_weights(
    shapes: Path, least: Path, tmp_path: Path, command: Command, monkeypatch
) -> None:
    monkeypatch.setattr("app.model.weights.load_into", None)
    words = ["train", "--dataset-dir", shapes, "--checkpoint", least]
    done = command(*words, "--plan", "--method", "head", "--output-dir", tmp_path / "run")
    assert done.code == 0, done.err
    every, trained = _figures(done.out, "parameters")
    assert 0 < trained < every
    assert "features" in done.out


def test_weights_to_be_downloaded_are_named_once(
    shapes: Path, command: Command, monkeypatch
) -> None:
    """Whatever number of plans is made for what would fit."""
    monkeypatch.setattr("app.model.weights.cached_sam3", lambda: None)
    monkeypatch.setattr(planning.Planner, "predict_memory", lambda *_: planning.Memory(1, 1, 1, 1))
    monkeypatch.setattr(planning.Planner, "largest_batch", lambda *_, **__: 0)
    _small(monkeypatch, 0)
    done = command("train", "--dataset-dir", shapes, "--model", "sam3", "--plan")
    assert done.code == 2
    assert done.out.count("(to be downloaded, 3.4 GB)") == 1


def test_measured(shapes: Path, least: Path, tmp_path: Path, command: Command) -> None:
    words = ["train", "--dataset-dir", shapes, "--checkpoint", least]
    words += ["--output-dir", tmp_path / "run", "--plan=measure"]
    for method, cached in (("head", True), ("lora", False)):
        done = command(*words, "--method", method)
        assert done.code == 0, done.err
        assert re.search(r"time +.* s an update", done.out)
        assert ("from cached features" in done.out) == cached
        assert not (tmp_path / "run").exists()


def _planner(config: Config, splits: Splits) -> Planner:
    return Planner(Prepared(Request(()), config, splits, None, ()))


def _small(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda *_: int(free))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(
    shapes: Path, command: Command, monkeypatch
) -> None:
    words = ["train", "--dataset-dir", shapes, "--checkpoint", "none", "--plan", *LEAST]
    words += ["--batch-size", 4, "model.activation_checkpointing=false"]
    whole = _figures(command(*words).out, "memory")
    step = whole[4]
    _small(monkeypatch, (whole[0] - step / 4) * GB)
    refused = command(*words)
    assert refused.code == 2
    assert "more are needed; what would do:" in refused.err
    ways = refused.err.splitlines()[1:]
    assert 2 <= len(ways) <= 3
    assert re.fullmatch(r"  --batch-size [123] --grad-accum [24]", ways[0])
    for way in ways:  # each of them is true
        change = way.split("(")[0].split()
        assert command(*words, *change).code == 0, way


def test_what_is_refused_is_not_measured(
    shapes: Path, least: Path, command: Command, monkeypatch
) -> None:
    """And proposals that do not go with it, as LoRA with a frozen trunk, are left out."""
    monkeypatch.setattr(planning, "measure", lambda *_, **__: pytest.fail("it trained"))
    _small(monkeypatch, 0)
    words = ["train", "--dataset-dir", shapes, "--checkpoint", least]
    done = command(*words, "--plan=measure", "--freeze", "vision")
    assert done.code == 2
    assert "memory: " in done.err
    assert "both given" not in done.err


def test_the_largest_batch_fits_and_one_more_does_not(shapes: Path, monkeypatch) -> None:
    config, splits = load_config(LEAST), load_splits(shapes)

    planner = _planner(config, splits)  # one, because each reads anew what the process holds

    def needed(size: int) -> int:
        return planner.plan(load_config([*LEAST, f"training.batch_size={size}"])).memory.total

    sizes = {size: needed(size) for size in (1, 2, 3, 4)}
    for size in (1, 2, 3):
        _small(monkeypatch, (sizes[size] + sizes[size + 1]) / 2)
        assert planner.largest_batch() == size
    _small(monkeypatch, 1e12)
    assert planner.largest_batch() == 4  # all images
    _small(monkeypatch, sizes[1] - 1)
    assert planner.largest_batch() == 0


def test_batch_size_auto(shapes: Path, tmp_path: Path, command: Command, monkeypatch) -> None:
    words = ["train", "--dataset-dir", shapes, "--checkpoint", "none", "--batch-size", "auto"]
    words += ["--output-dir", tmp_path / "run", "evaluation.pictures=0", *LEAST]
    sizes = {}
    for free in (1e12, 0):
        _small(monkeypatch, free)
        sizes[free] = command(*words, "--epochs", 1)
        words += ["--overwrite"]
    assert "batch size: 4 images" in sizes[1e12].out
    assert sizes[0].code == 2
    assert "not even one image" in sizes[0].err
    words.remove("--overwrite")
    _small(monkeypatch, 1e12)
    monkeypatch.setattr(planning.Planner, "largest_batch", lambda *_, **__: 1)
    again = command(*words, "--epochs", 2, "--resume")  # keeps what the run has
    assert again.code == 0, again.err
    assert "batch size: 4 images" in again.out


def test_too_small_a_disk_is_refused(
    shapes: Path, least: Path, command: Command, monkeypatch
) -> None:
    usage = type("Usage", (), {"free": 50_000_000})
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage)
    words = ["train", "--dataset-dir", shapes, "--checkpoint", least, "--plan"]
    done = command(*words)
    assert done.code == 2
    assert "more are needed on its disk; what would do:" in done.err
    ways = [line.partition(" (")[0].strip() for line in done.err.splitlines()[1:]]
    assert ways == ["--method lora", "--method lora-minimal"]
    assert command(*words, *ways[0].split()).code == 0


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch) -> None:
    own = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line[4:] for line in own if line.startswith("0::/")), "")
    group = tmp_path / path
    group.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(device, "GROUPS", tmp_path)
    cpu = torch.device("cpu")
    plain = device.free_memory(cpu)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    assert device.free_memory(cpu) == pytest.approx(plain, rel=0.2)
    (group / "memory.max").write_text("6000\n")
    resident = planning.psutil.Process().memory_info().rss
    assert device.free_memory(cpu) == pytest.approx(resident + 1000, rel=0.05)
    assert device.free_memory(cpu, 2) == pytest.approx((resident + 1000) / 2, rel=0.05)


@pytest.mark.parametrize("recipe", ["distill", None])
def test_small_is_taught_and_fine_tuned_in_8_gb(
    recipe: str | None, shapes: Path, tmp_path: Path
) -> None:
    """At 672 px, two images a step, with stored words; benchmarks/compact.py measures it."""
    words = [*load_splits(shapes).train.class_names, "visual"]
    small = load_model_config("small").model_copy(update={"vocabulary": words})
    taught = [f"distill.teacher={_header_alone(tmp_path / 'sam3', load_model_config('sam3'))}"]
    config = load_config(
        [
            *("training.batch_size=2", "training.precision=bf16", "dataset.max_prompts=4"),
            "model.dropout=0",  # on a CPU, attention with dropout is made whole
            *(taught if recipe else []),
        ],
        recipe_file(recipe) if recipe else None,
        small,
    )
    prepared = Prepared(Request(()), config, load_splits(shapes), Path("model.safetensors"), ())
    memory = Planner(prepared).plan().memory
    assert memory.total - memory.process + planning.CUDA_CONTEXT < 8e9
    own = sum(p.numel() for p in build_model(small, device="meta").parameters())
    teacher = 454_039_808 * 2 + (840_509_750 - 454_039_808 - 353_724_672) * 4
    expected = own * 4 + (teacher if recipe else 0)
    assert memory.weights == pytest.approx(expected, rel=0.01)
