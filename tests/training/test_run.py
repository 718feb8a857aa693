"""Runs from the command line on tiny data: what each flag says, it does."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.evaluation.metrics import evaluate
from app.files import hash_file
from app.model import weights
from app.tracking.files import Tracker
from app.training import run
from app.training.checkpoints import RunState
from app.training.metric import gain
from app.training.step import Step
from tests.helpers import (
    MICRO,
    finish,
    log_lines,
    metrics_rows,
    once,
    same_weights,
    saved_weights,
)
from tests.training.conftest import train_words

FROM_NONE = ("--checkpoint", "none", *MICRO)


def test_what_a_run_leaves(tiny_run: Path, shapes: Path) -> None:
    files = {p.relative_to(tiny_run).as_posix() for p in tiny_run.rglob("*") if p.is_file()}
    assert files >= {
        "config.yaml",
        "config_resolved.yaml",
        "environment.json",
        "train.log",
        "metrics.csv",
        "metrics.json",
        "weights/best/model.safetensors",
        "weights/last/model.safetensors",
        "checkpoints/update-00000002/model.safetensors",
        "checkpoints/update-00000002/state.pt",
        "metrics_by_class.csv",
        "report.html",
        "predictions/valid.json",
        "predictions/valid_truth.json",
        "plots/loss.png",
        "plots/ap.png",
        "plots/valid_001.png",
    }
    assert any(name.startswith("tensorboard/") for name in files)
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert {"gpu", "gpu_problem"} <= environment.keys()
    figures = json.loads((tiny_run / "metrics.json").read_text())
    for name in ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP/circle"):
        assert 0 <= figures[name] <= 1
        assert 0 <= figures[f"baseline/{name}"] <= 1
    header = weights.read_header(tiny_run / "weights" / "best")
    assert header.prompts == ["circle", "rectangle", "triangle"]
    assert header.data_hash == load_splits(shapes).train.content_hash()
    assert header.model.resolution == 64
    assert header.threshold == figures.get("calibration/threshold")
    least = 0.5 if header.threshold is None else header.threshold
    results = json.loads((tiny_run / "predictions" / "valid.json").read_text())
    above = [result for result in results if result["score"] > least]
    assert header.scores.images == 2
    assert sum(map(sum, header.scores.counts.values())) == len(above)
    for name in ("segm/cgF1", "segm/pmF1", "bbox/IL_MCC", "off_prompt/firing", "off_prompt/nouns"):
        assert name in figures
        assert f"baseline/{name}" in figures
    log = (tiny_run / "train.log").read_text()
    assert "weights/best" in log
    assert "./infer.sh --checkpoint" in log


def test_the_figures_are_those_of_the_predictions(tiny_run: Path, shapes: Path) -> None:
    """metrics.json can be had again from predictions/valid.json, by anyone."""
    figures = json.loads((tiny_run / "metrics.json").read_text())
    results = json.loads((tiny_run / "predictions" / "valid.json").read_text())
    again = evaluate(load_splits(shapes).valid, results)
    assert again == {name: figures[name] for name in again}


def test_pictures_are_truth_beside_prediction(tiny_run: Path) -> None:
    with Image.open(tiny_run / "plots" / "valid_001.png") as picture:
        assert picture.width == 2 * 96 + 8
        assert picture.height > 64


@pytest.fixture(scope="module")
def two_epochs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs in batches of three."""
    words = ("--epochs", 2, "--batch-size", 3, "--grad-accum", 1)
    return once(
        tmp_path_factory,
        "two-epochs",
        lambda folder: finish(*train_words(shapes, folder), *words),
    )


@pytest.mark.parametrize("words", [("--seed", 1), ("--batch-size", 1), ("--lr", 1e-5)])
def test_each_flag_changes_the_weights(train, two_epochs: Path, tmp_path: Path, words) -> None:
    assert [row["epoch"] for row in metrics_rows(two_epochs)] == ["1", "2"]
    assert train("--epochs", 2, "--batch-size", 3, *words).code == 0
    assert not same_weights(two_epochs, tmp_path / "out")
    rates = [
        float(metrics_rows(folder)[0]["train/learning_rate"])
        for folder in (tmp_path / "out", two_epochs)
    ]
    assert (rates[0] <= 1e-5 < rates[1]) == ("--lr" in words)


def test_the_same_flags_come_to_the_same_weights(train, two_epochs: Path, tmp_path: Path) -> None:
    assert train("--epochs", 2, "--batch-size", 3).code == 0
    assert same_weights(two_epochs, tmp_path / "out")


def test_a_stopped_run_resumes_to_the_same_weights(train, tmp_path: Path) -> None:
    """Stopped after the second of three epochs, as a kill between epochs would."""
    assert train("--epochs", 3).code == 0
    whole, cut = tmp_path / "out", tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("checkpoints/update-00000006", "weights"):
        for path in (cut / name).rglob("*.safetensors"):
            path.unlink()
        for path in (cut / name).glob("state.pt"):
            path.unlink()
    done = train("--epochs", 3, "--resume", folder="cut")
    assert done.code == 0, done.err
    assert "after epoch 2" in done.out
    assert same_weights(whole, cut)
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (whole, cut))
    assert ours["last/bbox/AP"] == theirs["last/bbox/AP"]
    assert len(metrics_rows(cut)) == 3


def test_resume_without_a_run(train, tmp_path: Path) -> None:
    done = train("--resume")
    assert done.code == 2
    assert "no run in" in done.err


def test_nothing_is_overwritten_unasked(train, tmp_path: Path) -> None:
    assert train("--epochs", 1).code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = saved_weights(tmp_path / "out", "best")
    done = train("--epochs", 1, "--seed", 5)
    assert done.code == 2
    assert "--overwrite" in done.err
    assert all(
        torch.equal(v, before[k]) for k, v in saved_weights(tmp_path / "out", "best").items()
    )
    assert train("--epochs", 1, "--seed", 5, "--overwrite").code == 0
    assert any(
        not torch.equal(v, before[k]) for k, v in saved_weights(tmp_path / "out", "best").items()
    )
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_eval_only_scores_the_weights(train, tiny_run: Path, tmp_path: Path) -> None:
    best = tiny_run / "weights" / "best"
    done = train("--eval-only", start=best)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    trained = json.loads((tiny_run / "metrics.json").read_text())
    assert figures == {name: trained[name] for name in figures}
    assert not (tmp_path / "out" / "weights").exists()


def test_training_goes_on_from_a_checkpoint(train, tiny_run: Path, tmp_path: Path) -> None:
    assert train("--epochs", 1, "--recipe", "none", start=tiny_run / "weights" / "best").code == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before = json.loads((tiny_run / "metrics.json").read_text())
    assert figures["baseline/bbox/AP"] == before["bbox/AP"]
    assert "lr_scale 0.1" in (tmp_path / "out" / "train.log").read_text()


def test_a_program_may_give_a_folder_of_weights(
    tiny_run: Path, shapes: Path, tmp_path: Path
) -> None:
    config = load_config([*MICRO, f"output_dir={tmp_path}", "training.epochs=1"])
    start = tiny_run / "weights" / "best"
    run.train(config, load_splits(shapes), start, recorder=Tracker(tmp_path))
    card = (tmp_path / "weights" / "best" / "README.md").read_text()
    assert hash_file(tiny_run / "weights" / "best" / "model.safetensors") in card


def test_what_was_trained_makes_room_for_the_best_weights(train, monkeypatch) -> None:
    """A second model is 3.4 GB at full size, which no plan counts."""
    build, score = run.build_model, run.score_dataset
    trained, alive = [], []

    def built(*arguments: Any, **settings: Any) -> Any:
        model = build(*arguments, **settings)
        trained.append(weakref.ref(model))
        return model

    def scored(*arguments: Any, **settings: Any) -> Any:
        if "reloaded" in arguments[-1]:
            alive.extend(model() is not None for model in trained)
        return score(*arguments, **settings)

    monkeypatch.setattr(run, "build_model", built)
    monkeypatch.setattr(run, "score_dataset", scored)
    assert train("--epochs", 1).code == 0
    assert alive == [False]


def test_the_best_weights_are_kept(train, tmp_path: Path) -> None:
    done = train("--epochs", 3, "evaluation.metric=bbox/AP50")
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["bbox/AP50"] == max(
        float(row["bbox/AP50"]) for row in metrics_rows(tmp_path / "out")
    )


def test_what_is_better() -> None:
    assert gain("segm/AP", 0.5, 0.4) == pytest.approx(0.1)
    assert gain("off_prompt/firing", 0.5, 0.4) == pytest.approx(-0.1)  # false positives
    assert gain("segm/AP", 0.0, None) > 0


def test_resolution_and_settings_are_written(train, command, shapes, tmp_path: Path) -> None:
    done = train("--resolution", 96, "--epochs", 1)
    assert done.code == 0, done.err
    resolved = yaml.safe_load((tmp_path / "out" / "config_resolved.yaml").read_text())
    assert resolved["model"]["resolution"] == 96
    asked = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert asked["model"]["resolution"] == 96
    assert weights.read_header(tmp_path / "out/weights/best").model.resolution == 96
    again = command(
        "train", "--config", tmp_path / "out/config.yaml", "--output-dir", tmp_path / "b"
    )
    assert again.code == 0, again.err
    assert same_weights(tmp_path / "out", tmp_path / "b")


def test_a_validation_set_is_made_and_said(train, shapes, tmp_path, command) -> None:
    done = command(
        *("train", "--dataset-dir", shapes / "train", "--epochs", 1, *FROM_NONE),
        *("evaluation.pictures=0", "--output-dir", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert "note: " in done.out
    assert "validation" in done.out


def test_the_default_job(command, tmp_path: Path, monkeypatch) -> None:
    """No words at all but what makes it small: synthetic shapes, nano, a free output folder."""
    monkeypatch.chdir(tmp_path)
    words = ("--epochs", 1, "evaluation.pictures=0", "model.resolution=64")
    small = ("dataset.shapes.train=2", "dataset.shapes.valid=1", "dataset.shapes.width=64")
    for _ in range(2):
        assert command("train", *words, *small).code == 0
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["train", "train-2"]


def test_a_dataset_of_boxes_only(command, shapes, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        folder = tmp_path / "boxes" / split
        folder.mkdir(parents=True)
        (folder / "images").symlink_to(shapes / split / "images")
        document = json.loads((shapes / split / "_annotations.coco.json").read_text())
        for annotation in document["annotations"]:
            annotation.pop("segmentation")
        for image in document["images"]:
            (folder / Path(image["file_name"]).name).write_bytes(
                (shapes / split / "images" / Path(image["file_name"]).name).read_bytes()
            )
            image["file_name"] = Path(image["file_name"]).name
        (folder / "images").unlink()
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
    done = command(
        *("train", "--dataset-dir", tmp_path / "boxes", "--epochs", 1, *FROM_NONE),
        *("evaluation.pictures=1", "--output-dir", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert "the dataset has boxes only" in done.out
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "bbox/AP" in figures
    assert "segm/AP" not in figures


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset-dir", "nowhere"], "nowhere"),
        (["--model", "nanoo"], "Did you mean 'nano'"),
        (["--checkpoint", "nowhere"], "no such checkpoint"),
        (["--epoch", "3"], "No such option"),
        (["--epochs", "0"], "training.epochs"),
        (["--lr", "0"], "--lr 0: must be greater than 0"),
        (["training.epoch=3"], "Did you mean 'training.epochs'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--config", "list.yaml"], "a mapping of keys"),
        (["--resolution", "100"], "96 or 104"),
        (["training.device=cuda"], "no CUDA device answers"),
        (["--use-base-config", "--config", "x.yaml"], "give one of them"),
        (["model.segmentation=false"], "loss=boxes"),
    ],
)
def test_bad_input(command, shapes, tmp_path, monkeypatch, words, said) -> None:
    if "cuda" in said.lower() and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    first = ["train", "--dataset-dir", shapes, "--output-dir", tmp_path / "out"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- a\n")
    done = command(*first, *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_size(command, shapes, tiny_run, tmp_path) -> None:
    done = command(
        *("train", "--dataset-dir", shapes, "--output-dir", tmp_path / "out"),
        *("--model", "small", "--checkpoint", tiny_run / "weights" / "best"),
    )
    assert done.code == 2
    assert "size 'nano', not 'small'" in done.err


def test_a_loss_that_is_not_finite_ends_with_a_word(train, nan_weights: Path) -> None:
    """Weights with a NaN in them: exit 1, one line, the first module named where asked."""
    done = train("--epochs", 1, "training.check_finite=true", start=nan_weights)
    assert done.code == 1
    assert "dot_prod_scoring.hs_proj (Linear)" in done.err
    assert "Traceback" not in done.err


def test_what_is_not_finite_is_saved_before_and_named(train, tmp_path, monkeypatch) -> None:
    """In the third update: its images, the first bad module, and the weights after the second."""
    words = ("--epochs", 2, "--batch-size", 1)
    update, losses = Step.__call__, []

    def spoil_the_third(step: Step, batches: list, epoch: int) -> object:
        losses.append(0.0)
        module = step.model.segmentation_head.mask_predictor.mask_embed.layers[0]
        if len(losses) == 3:
            module.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))
        return update(step, batches, epoch)

    monkeypatch.setattr(Step, "__call__", spoil_the_third)
    done = train(*words)
    assert done.code == 1
    assert "segmentation_head.mask_predictor.mask_embed.layers.0 (Linear)" in done.err
    assert len([word for word in done.err.split() if word.strip(".,;").endswith(".png")]) == 1
    assert "saved in" in done.err
    saved = tmp_path / "out" / "checkpoints" / "update-00000002"
    assert all(value.isfinite().all() for value in load_file(saved / "model.safetensors").values())
    monkeypatch.setattr(Step, "__call__", update)
    assert train(*words, "--resume").code == 0
    assert train(*words, folder="whole").code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_a_gradient_that_is_not_finite_is_named(train, tmp_path, monkeypatch) -> None:
    name = "transformer.decoder.norm.weight"
    losses = Step.batch_losses

    def spoil(step: Step, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        found = losses(step, *arguments, **options)
        weight = step.model.get_parameter(name)
        weight.register_hook(lambda gradient: gradient * float("nan"))
        return found

    monkeypatch.setattr(Step, "batch_losses", spoil)
    done = train("--epochs", 1)
    assert done.code == 1
    assert "the gradient of transformer.decoder.norm.weight is the first" in done.err


def test_memory_that_runs_out_is_told_with_what_would_fit(train, tmp_path, monkeypatch) -> None:
    """The state before is saved: where there is memory again, the run goes on as if never ended."""
    words = ("--epochs", 2, "--batch-size", 2, "model.dropout=0.2")
    losses, calls = Step.batch_losses, []

    def full(step: Step, *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory 9 GiB are"
            )
        return losses(step, *arguments, **options)

    monkeypatch.setattr(Step, "batch_losses", full)
    done = train(*words)
    assert done.code == 2
    said, *ways = done.err.splitlines()
    folder = tmp_path / "out" / "checkpoints"
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. Stopped after")
    assert f"saved in {folder}; go on with the same command and --resume" in said
    assert said.endswith("What would take less, begun anew or by --resume=weights:")
    assert ways[0] == "  --batch-size 1 --grad-accum 2"
    assert (folder / "update-00000003").is_dir()
    monkeypatch.setattr(Step, "batch_losses", losses)
    assert train(*words, "--resume").code == 0
    assert train(*words, folder="whole").code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_memory_that_runs_out_anywhere_is_a_line(train, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(run, "load_model", full)
    done = train("--epochs", 1)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: CUDA error: out of memory. Free it")
    assert "Traceback" not in done.err


def test_reloaded_weights_that_score_otherwise_end_no_run_on_a_gpu(monkeypatch) -> None:
    """A flipped detection of few is more than a rounding; on a CPU there is none."""
    config = load_config(["evaluation.metric=bbox/AP"])
    state, figures = RunState(best=0.50), {"bbox/AP": 0.47}
    with pytest.raises(RuntimeError, match=r"reloaded give 0\.47, and gave 0\.5"):
        run.check_reloaded(figures, state, config, torch.device("cpu"))
    lines = log_lines(monkeypatch)
    run.check_reloaded({"bbox/AP": 0.498}, state, config, torch.device("cuda"))
    assert not lines
    run.check_reloaded(figures, state, config, torch.device("cuda"))
    assert lines == ["note: weights/best reloaded give 0.47, and gave 0.5 when saved"]


def test_a_metric_that_is_none(train, tmp_path: Path) -> None:
    done = train("--epochs", 1, "evaluation.metric=bbox/Ap")
    assert done.code == 2
    assert "Did you mean 'bbox/AP'" in done.err
    assert not (tmp_path / "out" / "metrics.csv").exists()  # before anything was trained


def test_broken_data_leaves_nothing(command, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    (folder / "_annotations.coco.json").write_text('{"images": [')
    done = command("train", "--dataset-dir", tmp_path / "set", "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert "broken JSON" in done.err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(command, shapes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("train", "--dataset-dir", shapes, "--output-dir", tmp_path / "file" / "out")
    assert done.code == 2
    assert "cannot be written" in done.err


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path) -> Path:
    """The shapes with one training image cut short: a JPEG, whose header says nothing of it."""
    shutil.copytree(shapes, tmp_path / "set")
    image = tmp_path / "set" / "train" / "images" / "000002.png"
    Image.open(image).save(tmp_path / "whole.jpg", quality=95)
    image.write_bytes((tmp_path / "whole.jpg").read_bytes()[:-600])
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run(damaged, tmp_path: Path, command, workers: int) -> None:
    """By its path, without a traceback, also out of a loading process; nothing in its place."""
    done = command(
        *("train", "--dataset-dir", damaged, "--output-dir", tmp_path / "out", *FROM_NONE),
        *("--epochs", 1, f"training.num_workers={workers}"),
    )
    assert done.code == 2
    errors = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "000002.png: cannot be read as an image" in errors[0]
    assert "Traceback" not in done.out + done.err


def test_bad_images_are_left_out_when_asked(damaged, tmp_path: Path, command) -> None:
    done = command(
        *("train", "--dataset-dir", damaged, "--output-dir", tmp_path / "out", *FROM_NONE),
        *("--epochs", 1, "dataset.bad_images=skip", "evaluation.pictures=0"),
    )
    assert done.code == 0, done.err
    assert "000002.png" in done.out
    assert "1 of 4 images left out" in done.out
    assert "3 training and 2 validation images" in done.out


def test_prompts_of_a_file_are_trained_and_kept(shapes, tmp_path: Path, command) -> None:
    """The header carries the words that the weights know, not the dataset's names."""
    (tmp_path / "p.json").write_text('{"circle": ["disc", "round thing"]}')
    done = command(
        *("train", "--dataset-dir", shapes, "--output-dir", tmp_path / "out", *FROM_NONE),
        *("--epochs", 1, "--prompts", tmp_path / "p.json", "evaluation.pictures=0"),
        *("--augmentation", "strong"),
    )
    assert done.code == 0, done.err
    header = weights.describe(weights.find_file(tmp_path / "out" / "weights" / "best"))
    assert "disc" in header.prompts
    assert "circle" not in header.prompts
    resolved = yaml.safe_load((tmp_path / "out" / "config_resolved.yaml").read_text())
    assert resolved["transforms"]["augment"]["rotate"] == 15.0
