"""Every command of README and docs: its flags are known, and it runs as it stands on less.

Less is fewer images and fewer pixels.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from app.deploy.runtime.cli import main as run_deployed
from app.deploy.runtime.cli import make_parser
from tests.helpers import REPOSITORY, TINY, Command

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
README, *DOCS = (page.read_text(encoding="utf-8") for page in PAGES)
WORDS = "\n".join(
    [
        README,
        *(
            text
            for page, text in zip(PAGES[1:], DOCS, strict=True)
            if page.stem not in ("jetson", "figures", "gpu", "elsewhere")
        ),
    ]
)
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", WORDS, flags=re.DOTALL))
COMMANDS = [line.partition("  #")[0].strip() for line in BLOCKS.splitlines() if line.strip()]
TABLED = re.findall(r"\| `((?:\./train\.sh|\.venv/bin/python -m app) [^`]*)`", WORDS)
SPLIT = [c for c in COMMANDS if re.search(r" --sweep | --shards | -m app (sweep|collect) ", c)]
TRAINING = [c for c in COMMANDS if c.startswith("./train.sh") and c not in SPLIT]
PREDICTING = [c for c in COMMANDS if c.startswith("./infer.sh") and c not in SPLIT]
SERVING = [c for c in COMMANDS if c.startswith("./serve.sh")]
TRACKING = [c for c in COMMANDS if c.startswith(".venv/bin/python -m app track")]
CUTTING = [c for c in COMMANDS if c.startswith(".venv/bin/python -m app compact")]
EXPORTING = [c for c in COMMANDS if c.startswith(".venv/bin/python -m app export")]
SCORING = [
    c for c in COMMANDS if re.match(r"\.venv/bin/python -m app (evaluate|report|compare|merge)", c)
]
FEW = [c for c in COMMANDS if re.match(r"\.venv/bin/python -m app (curve|concept)", c)]
LABELLING = [c for c in COMMANDS if re.match(r"\.venv/bin/python -m app (rank|label) ", c)]
DRAWING = [c for c in COMMANDS if c.startswith(".venv/bin/python -m app data films")]
DEPLOYED = [c for c in COMMANDS if c.startswith(".venv/bin/python -m app.deploy.runtime")]
OURS = [
    *(*TRAINING, *PREDICTING, *SERVING, *SCORING, *FEW, *LABELLING),
    *(*TRACKING, *CUTTING, *EXPORTING, *TABLED, *DRAWING, *SPLIT),
]
IN_AN_ENGINE = {"docker compose up -d mlflow", "docker compose up -d serve"}  # tests/container
SETTING = ("export SAM3_API_KEY=", "export LABEL_STUDIO_URL=")
ASKING = {c for c in COMMANDS if c.startswith(("curl ", *SETTING))}  # tests/serving
LESS = ["dataset.limit=2", "dataset.shapes.train=2", "dataset.shapes.valid=1"]


def _words(line: str) -> list[str]:
    return shlex.split(line.replace("YOUR_FOLDER", "examples/potholes"))[1:]


def test_the_first_screen_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_nothing_that_users_read_names_what_they_lack() -> None:
    """The folder of data beside this repository, which strangers do not have."""
    done = subprocess.run(
        ["git", "grep", "-nF", "../shared", "--", ":!tests", ":!CONTRIBUTING.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        pytest.skip(f"no git repository: {done.stderr}")
    assert done.stdout == ""


def test_they_have_commands() -> None:
    assert len(TABLED) == 7
    assert len(TRAINING) >= 3
    assert len(PREDICTING) >= 2
    assert len(TRACKING) == 1
    assert len(CUTTING) == len(EXPORTING) == 2
    assert len(DEPLOYED) == 1
    assert len(SCORING) == 5
    assert len(DRAWING) == 1
    assert len(FEW) == len(LABELLING) == 2
    assert len(SERVING) >= 4
    assert len(SPLIT) == 5
    rest = set(COMMANDS) - {*OURS, *DEPLOYED, *ASKING}
    assert rest == {"./build.sh", "./test.sh", *IN_AN_ENGINE}


@pytest.mark.parametrize("line", [*OURS, "./train.sh --epoch 3", "./infer.sh --prompt"])
def test_its_flags_are_known(command: Command, line: str) -> None:
    """Each with its value. --help ends a command before it does anything, but not before that."""
    is_ours = line in OURS
    for script in ("train", "infer", "serve"):
        line = line.replace(f"./{script}.sh", f".venv/bin/python -m app {script}")
    done = command(*shlex.split(line)[3:], "--help")
    assert (done.code, "Usage: " in done.out) == ((0, True) if is_ours else (2, False)), done.err


@pytest.mark.parametrize("line", DEPLOYED)
def test_the_flags_of_a_deployed_folder_are_known(line: str) -> None:
    assert make_parser().parse_args(shlex.split(line)[3:]).input


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in TRAINING if "--use-base-config" not in c])
def test_training(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch, line: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = [*_words(line), *LESS, *TINY, "evaluation.pictures=0"]
    words = [re.sub("^--mlflow=.*", "--mlflow=none", word) for word in words]  # test_tracking.py
    if "--resolution" in words:
        words.remove("model.resolution=64")
    if "--checkpoint" in words:
        words += ["--checkpoint", str(tiny_run / "weights" / "best")]
    if "--teacher" in words:
        words += ["--teacher", str(tiny_run / "weights" / "best")]
    if "--resume" in words:
        words.remove("--resume")
        assert command("train", *words, "--epochs", 1, "--output-dir", tmp_path).code == 0
        words.append("--resume")
    done = command("train", *words, "--epochs", 2, "--output-dir", tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", TABLED)
def test_the_sources(command: Command, tmp_path: Path, monkeypatch, line: str) -> None:
    """What lies on this machine is used; what does not gets as far as asking for it."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("ROBOFLOW_API_KEY", raising=False)
    words = shlex.split(line.removeprefix(".venv/bin/python -m app"))
    if line.startswith("./train.sh"):
        less = [part for part in LESS if "shapes" in part or "dataset-dir" in line]
        words = ["train", *_words(line), *less, *TINY, "evaluation.pictures=0", "--epochs", "1"]
    done = command(*words, "--output-dir", tmp_path / "out")
    if "--hf-dataset" in line:
        assert done.code == 2
        assert "keremberke/pcb-defect-segmentation" in done.err
    elif "--roboflow" in line:
        assert done.code == 2
        assert "ROBOFLOW_API_KEY" in done.err
    else:
        assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in TRAINING if "--use-base-config" in c])
def test_upstreams_trainer(tmp_path: Path, line: str) -> None:
    words = [*_words(line), "scratch.num_workers=0", "trainer.data.train.dataset.limit_ids=2"]
    done = subprocess.run(
        ["./train.sh", *words, "--epochs", "1", "--resolution", "64", "--output-dir", tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "SAM3_RUNTIME": "local"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in (*PREDICTING, *SCORING) if "outputs/films" in c])
def test_films(command: Command, tmp_path: Path, monkeypatch, line: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    films = [*shlex.split(DRAWING[0])[3:], "--films", 2, "--frames", 65, "--width", 96]
    assert command(*films, "--height", 72, "--output-dir", tmp_path / "films").code == 0
    line = line.replace("outputs/films", str(tmp_path / "films")).replace(
        "./infer.sh", "- - - infer"
    )
    done = command(*shlex.split(line)[3:], "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / ("metrics.json" if " evaluate " in line else "tracks.mp4")).exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in PREDICTING if "outputs/films" not in c])
def test_prediction(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch, line) -> None:
    monkeypatch.chdir(REPOSITORY)
    best = ("--checkpoint", tiny_run / "weights" / "best")
    words = _words(line)
    if "--concept" in words:
        (encoding,) = [each for each in FEW if " concept " in each]
        encoded = tmp_path / "made.concept"
        done = command(*shlex.split(encoding)[3:], *best, "--output", encoded)
        assert done.code == 0, done.err
        words[words.index("--concept") + 1] = str(encoded)
    done = command("infer", *words, *best, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("*.png"))) == (8 if "potholes" in line else 1)


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in SCORING if "--video" not in c])
def test_scoring(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch, line: str) -> None:
    """Each on a run of its own, with a LoRA where it is merged."""
    monkeypatch.chdir(REPOSITORY)
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(tiny_run, run)
    verb, *words = shlex.split(line)[3:]
    if verb == "merge":
        data = ("--dataset-dir", "examples/potholes", *LESS, *TINY, "evaluation.pictures=0")
        lora = command("train", *data, "--method", "lora", "--epochs", 1, "--output-dir", run / "l")
        assert lora.code == 0, lora.err
        words = [str(run / "l" / "weights" / "best"), "--output-dir", str(out)]
    elif verb == "evaluate":
        best = ("--checkpoint", str(run / "weights" / "best"), "--output-dir", str(out))
        words = [*words, *best]
    else:
        words = [str(run) for _ in words]
    done = command(verb, *words)
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in FEW if " curve " in c])
def test_curve(command: Command, tmp_path: Path, monkeypatch, line: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    done = command(*shlex.split(line)[3:], *TINY, "--output-dir", tmp_path)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_work_that_is_split(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    """In the order of the pages: a sweep and its table, shards and what they have found."""
    monkeypatch.chdir(REPOSITORY)
    for line in sorted(SPLIT, key=lambda each: " collect " in each):
        for name in ("sweep", "many"):
            line = line.replace(f"outputs/{name}", str(tmp_path / name))
        for script in ("train", "infer"):
            line = line.replace(f"./{script}.sh", f".venv/bin/python -m app {script}")
        words = shlex.split(line)[3:]
        if "--sweep" in words:
            file = words.index("--sweep") + 1
            example = yaml.safe_load(Path(words[file]).read_text())
            example["keys"]["optim.lr_scale"], example["seeds"] = [0.8], [0]
            (tmp_path / "less.yaml").write_text(yaml.safe_dump(example))
            words[file] = str(tmp_path / "less.yaml")
            words += [*LESS, *TINY, "evaluation.pictures=0", "--epochs", "1"]
        if "--shards" in words:
            words += ["--checkpoint", str(tiny_run / "weights" / "best")]
        done = command(*words)
        assert done.code == 0, done.err
    assert (tmp_path / "sweep" / "sweep.html").is_file()
    assert (tmp_path / "many" / "coco.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("line", LABELLING)
def test_labelling(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch, line) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)[3:]
    if "last" in words:
        words += ["--checkpoint", str(tiny_run / "weights" / "best")]
    done = command(*words, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("line", TRACKING)
def test_tracking(command: Command, tiny_run: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    words = shlex.split(line.removeprefix(".venv/bin/python -m app"))
    words = ["track", tmp_path / "run", f"--mlflow=sqlite:///{tmp_path}/mlflow.db", *words[3:]]
    assert command(*words).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", CUTTING)
def test_cutting(command: Command, tiny_run: Path, tmp_path: Path, monkeypatch, line: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = _words(line)[3:]
    less = ["dataset.limit=2", "--measure-on", 2] if "--dataset-dir" in words else []
    done = command(
        *("compact", tiny_run / "weights" / "best", *words[1:], *less),
        *("--output-dir", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_exporting(command: Command, shapes: Path, tmp_path: Path, monkeypatch) -> None:
    """Each on a run's own weights, the graphs' answers by the command beside them.

    Of nano's shapes: int8 costs a model without widths more than an export allows.
    """
    run = tmp_path / "run"
    words = ("--dataset-dir", shapes, "--model", "nano", "--checkpoint", "none", "--epochs", 1)
    done = command("train", *words, "--output-dir", run, "evaluation.pictures=0", *TINY)
    assert done.code == 0, done.err
    monkeypatch.chdir(REPOSITORY)
    for line in EXPORTING:
        out = tmp_path / ("hf" if "--format hf" in line else "onnx")
        done = command(*("export", run / "weights" / "best", *_words(line)[4:], "--output", out))
        assert done.code == 0, done.err
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    found = tmp_path / "found"
    words = [tmp_path / "onnx", *_words(DEPLOYED[0])[3:], "--output", found]
    with pytest.raises(SystemExit) as ended:
        run_deployed([str(word) for word in words])
    assert ended.value.code == 0
    assert len(list(found.glob("*.png"))) == 8


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("./")])
def test_the_scripts_take_it(tmp_path: Path, line: str) -> None:
    """Through the shell, as printed, up to the command that would run."""
    if line == "./test.sh":
        assert (REPOSITORY / "test.sh").stat().st_mode & 0o111
        return
    environment = {**os.environ, "SAM3_RUNTIME": "local"}
    done = subprocess.run(
        ["bash", "-c", f"{line} --dry-run"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_they_name_is_there() -> None:
    for page, text in zip(PAGES, (README, *DOCS), strict=True):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        assert "@" not in re.sub(r"@champion|NAME@ALIAS|anonymous@BUCKET|=@a\.(jpg|mp4)", "", text)
