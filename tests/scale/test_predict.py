"""Shards, really run: killed at any moment each image is there once, as one run finds it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.datasets.synthetic.films import draw_film
from app.scale import sources
from app.scale.parts import find, rows_of
from tests.helpers import REPOSITORY, Command, at_work, until
from tests.scale.store import serving
from tests.scale.test_sources import tar

IMAGES = 60
PROMPTS = ("--prompt", "circle", "--prompt", "cross", "--threshold", 0.002)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of images, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    film = draw_film((0, 5), width=192, height=144)
    names = [f"{number:03}.jpg" for number in range(IMAGES)]
    for number, name in enumerate(names):
        Image.fromarray(film.frame(number / 20)[0]).save(folder / name)
    (folder / "007.jpg").write_bytes(b"no image")
    cut = (folder / "008.jpg").read_bytes()
    (folder / "008.jpg").write_bytes(cut[: len(cut) // 3])
    (folder / "notes.md").write_text("no image")
    return tar(tmp_path_factory.mktemp("tars") / "all.tar", names, folder)


def words(source: object, output: Path, *more: object) -> list[str]:
    made = ("infer", "--checkpoint", "app/assets/nano", "--input", source, *PROMPTS)
    return list(map(str, (*made, "--output-dir", output, "--device", "cpu", *more)))


def rows(output: Path) -> dict[str, Any]:
    found = [row for part in sorted(output.glob("*/part-*")) for row in rows_of(part)]
    assert len({row["name"] for row in found}) == len(found)
    return {row["name"]: row for row in found}


@pytest.mark.slow
def test_killed_again_and_again_each_image_is_there_once(
    command: Command, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    # As images one by one: the one path of prediction.
    whole = command(*words(archive, tmp_path / "whole"))
    assert whole.code == 3
    assert whole.out.count("failed: all.tar/") == 2
    expected = rows(tmp_path / "whole")
    assert len(expected) == IMAGES

    chance, cut = random.Random(1), tmp_path / "cut"
    done: set[str] = set()
    for number in range(4):
        command_line = [sys.executable, "-m", "app", *words(archive, cut, "--shard", "1/2")]
        process = subprocess.Popen(command_line, start_new_session=True)
        time.sleep(4 + 3 * chance.random())
        process.send_signal(signal.SIGTERM if number == 1 else signal.SIGKILL)
        process.wait(60)
        until(lambda: not at_work(str(cut)), "the readers' end")
        now = {row["name"] for part in find(cut / "shard-00001-of-00002") for row in rows_of(part)}
        assert done <= now
        done = now
    assert command(*words(archive, cut, "--shard", "1/2")).code in (0, 3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert command(*words(archive, cut, "--shards", 2, "--shard", "auto")).code in (0, 3)
    assert rows(cut) == expected
    assert "was done before" in command(*words(archive, cut, "--shard", "1/2")).out
    made = command("collect", cut)
    assert made.code == 3
    coco = json.loads((cut / "coco.json").read_text())
    assert len(coco["images"]) == IMAGES - 2
    assert len(coco["annotations"]) == sum(len(row["score"]) for row in expected.values())


@pytest.mark.slow
def test_they_are_what_infer_finds_in_files(
    command: Command, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    monkeypatch.chdir(REPOSITORY)
    with tarfile.open(archive) as opened:
        for name in ("./000.jpg", "./020.jpg", "./040.jpg"):
            opened.extract(name, tmp_path / "files", filter="data")
    plain = command(*words(tmp_path / "files", tmp_path / "plain", "--save", "coco"))
    assert plain.code == 0, plain.err
    many = command(*words(tmp_path / "files", tmp_path / "many", "--save", "jsonl"))
    assert many.code == 0, many.err
    assert command("collect", tmp_path / "many").code == 0
    coco = json.loads((tmp_path / "many" / "coco.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    labels = {category["id"]: category["name"] for category in coco["categories"]}
    ours = {
        (files[a["image_id"]], labels[a["category_id"]], a["score"], a["segmentation"]["counts"])
        for a in coco["annotations"]
    }
    theirs = {
        (each["file_name"], each["prompt"], each["score"], each["segmentation"]["counts"])
        for each in json.loads((tmp_path / "plain" / "predictions.json").read_text())
    }
    assert ours == theirs != set()


@pytest.mark.slow
def test_what_cannot_be_fetched_is_left_for_another_time(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sources, "WAIT_SECONDS", 0.01)
    served = tmp_path / "served"
    served.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(served / f"{number}.png")
    with serving(served) as (address, faults):
        (tmp_path / "l.csv").write_text(
            "url\n" + "".join(f"{address}/{number}.png?key=secret\n" for number in range(6))
        )
        faults.always.add("3.png")
        first = command(*words(tmp_path / "l.csv", tmp_path / "out"))
        assert first.code == 3
        assert "1 image could not be fetched: the same command tries again" in first.out
        assert "secret" not in first.out + first.err
        assert len(rows(tmp_path / "out")) == 5
        assert "not done: 0" in command("collect", tmp_path / "out").err
        faults.always.clear()
        faults.asked.clear()
        assert command(*words(tmp_path / "l.csv", tmp_path / "out")).code == 0
        assert {path.partition("?")[0] for path in faults.asked} == {"/3.png"}
    assert len(rows(tmp_path / "out")) == 6
    assert "secret" not in "".join(rows(tmp_path / "out"))


@pytest.mark.slow
def test_all_shards_by_processes_of_their_own(
    command: Command, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    done = command(*words(archive, tmp_path / "out", "--shards", 2, "--price", 2.5))
    assert done.code == 3
    assert len(rows(tmp_path / "out")) == IMAGES
    assert done.out.count("at 2.5 an hour") == 2
    marks = [json.loads(f.read_text()) for f in sorted((tmp_path / "out").glob("*/done.json"))]
    assert sum(mark["images"] for mark in marks) == IMAGES
    assert sum(mark["failed"] for mark in marks) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--shard", "3/3"), "must be I/N"),
        (("--shard", "1"), "or with --shards N a number"),
        (("--shards", 2, "--shard", "2"), "must be below --shards 2"),
        (("--shards", 2, "--shard", "0/3"), "name other numbers"),
        (("--cluster", "slurm"), "say by --shards N"),
        (("--shards", 2, "--cluster", "sge"), "there is slurm, kubernetes"),
        (("--shards", 2, "--tile", 64), "--tile: is not for images by the million"),
        (("--shards", 2, "--save", "overlay"), "overlay"),
        (("--shard", "auto", "--shards", 2), "SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX"),
    ],
)
def test_what_is_refused(command: Command, more: Any, said: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    checkpoint = REPOSITORY / "app" / "assets" / "nano"
    asked = ("infer", "--checkpoint", checkpoint, "--input", tmp_path, "--prompt", "circle")
    done = command(*asked, "--output-dir", tmp_path / "out", *more)
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.glob("out/shard*"))


def test_a_cluster_gets_a_pod_a_shard(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    from tests.kubernetes import faults

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    checkpoint = REPOSITORY / "app" / "assets" / "nano"
    asked = ("infer", "--checkpoint", checkpoint, "--input", "s3://b/c", "--prompt", "circle")
    split = ("--shards", 40, "--cluster=kubernetes", "--at-once", 4, "--cluster-option", "cpus=3")
    done = command(*asked, "--output-dir", tmp_path / "out", *split)
    assert done.code == 0, done.err
    job = yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())
    assert faults(job) == []
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (40, 4)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][-4:] == ["--shards", "40", "--shard", "auto"]
    assert "out" in container["args"]
    assert container["resources"]["requests"]["cpu"] == 3
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    done = command(*asked, "--output-dir", tmp_path / "cpu", *split, "--device", "cpu")
    assert done.code == 0, done.err
    assert "nvidia.com/gpu" not in (tmp_path / "cpu" / "job.yaml").read_text()


def test_a_stream_is_a_film(command: Command, tmp_path: Path) -> None:
    checkpoint = REPOSITORY / "app" / "assets" / "nano"
    asked = ("infer", "--checkpoint", checkpoint, "--prompt", "circle", "--output-dir", tmp_path)
    done = command(*asked, "--input", "rtsp://127.0.0.1:9/none")
    assert done.code == 2
    assert "rtsp://127.0.0.1:9/none" in done.err
    assert "fsspec" not in done.err
    assert "is not read here" not in done.err
