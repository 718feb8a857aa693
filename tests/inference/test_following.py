"""Films in, tracks out: films, tables and files of frames; stopped, it goes on and is the same."""

from __future__ import annotations

import csv
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.rle import decode
from app.datasets.synthetic.films import KINDS, draw_film
from app.errors import UserError
from app.evaluation.tracks import read_films
from app.inference.film_writer import FilmWriter
from app.inference.films import Section
from app.inference.following import Following, follow_films, list_films
from app.inference.journal import FILE as JOURNAL
from app.inference.settings import RANDOM, Settings
from app.inference.track_files import TRACK_SAVES
from app.model.bundled import bundled_nano
from tests.helpers import PATIENCE, REPOSITORY, log_lines, run_module, until
from tests.inference.colors import ByColor
from tests.inference.film_files import squares, write_sound

LENGTH = 70  # frames, of which enough are left when a run is stopped
SETTINGS = Settings(RANDOM, prompts=("red", "green", "blue"), threshold=0.5)


def follow(
    source: Path, output: Path, save: Sequence[str] = ("coco",), **following: Any
) -> tuple[list[str], ByColor]:
    finder = ByColor()
    films = list_films(str(source), output, save, fps=10, overwrite=False)
    settings = replace(SETTINGS, save=tuple(save))
    return follow_films(films, output, settings, Following(**following), finder), finder


def tracks(output: Path) -> list[tuple[int, int, str, list[float], bool]]:
    """Frame, id, class, box and whether it is filled, of each row of tracks.json."""
    document = json.loads((output / "tracks.json").read_text())
    names = {each["id"]: each["name"] for each in document["categories"]}
    frames = {each["id"]: each["frame_id"] for each in document["images"]}
    return [
        (
            frames[a["image_id"]],
            a["track_id"],
            names[a["category_id"]],
            a["bbox"],
            a.get("interpolated", False),
        )
        for a in document["annotations"]
    ]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red and a green square that pass each other, and a blue one for two frames."""
    frames = [
        [("red", 5 + 4 * n, 20), ("green", 130 - 4 * n, 60), *[("blue", 70, 95)] * (n in (8, 9))]
        for n in range(30)
    ]
    return squares(tmp_path_factory.mktemp("film") / "film.mp4", frames)


def test_every_output(film: Path, tmp_path: Path) -> None:
    problems, _ = follow(film, tmp_path, TRACK_SAVES)
    assert problems == []
    rows = tracks(tmp_path)
    assert len(rows) == 60
    assert {(id, name) for _, id, name, _, _ in rows} == {(1, "red"), (2, "green")}
    for frame, id, _, box, _ in rows:
        left = 5 + 4 * frame if id == 1 else 130 - 4 * frame
        assert box == pytest.approx([left, 20 if id == 1 else 60, 20, 20], abs=2)
    read = read_films(tmp_path / "tracks.json")
    assert [len(frame) for frame in read.films[1]] == [2] * 30
    assert (read.fps, read.names) == ({1: 10.0}, {1: "film.mp4"})

    with (tmp_path / "tracks.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [(int(row["frame"]), int(row["track"])) for row in table] == [r[:2] for r in rows]
    assert float(table[-1]["time"]) == pytest.approx(2.9)
    mot = [line.split(",") for line in (tmp_path / "tracks.txt").read_text().splitlines()]
    assert [(int(row[0]) - 1, int(row[1])) for row in mot] == [row[:2] for row in rows]
    assert [float(side) for side in mot[0][2:6]] == pytest.approx(rows[0][3], abs=0.01)

    results = json.loads((tmp_path / "youtube_vis.json").read_text())
    assert [result["category_id"] for result in results] == [1, 2]
    masks = [coco_mask.decode(each) for each in results[0]["segmentations"]]
    assert len(masks) == 30
    assert [int(np.nonzero(mask)[1].min()) for mask in masks] == pytest.approx(
        [5 + 4 * n for n in range(30)], abs=2
    )

    with av.open(str(tmp_path / "tracks.mp4")) as file:
        assert file.streams.video[0].codec_context.name in ("h264", "vp9")
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    assert [time for time, _ in shown] == pytest.approx(np.arange(30) / 10)
    assert shown[15][1].shape == (120, 160, 3)
    with Image.open(tmp_path / "tracks.gif") as gif:
        assert (gif.n_frames, gif.size) == (30, (160, 120))
        for number in (0, 17, 29):
            gif.seek(number)
            drawn = np.asarray(Image.open(tmp_path / f"{number:06d}.png")).astype(int)
            assert np.abs(np.asarray(gif.convert("RGB")) - drawn).mean() < 6
    for kind, name in (
        *(("overlay", "000029.png"), ("yolo", "labels/000029.txt"), ("csv", "data.yaml")),
        *(("instances", "instances/000000.png"), ("cutouts", "cutouts/000007")),
        *(("semantic", "semantic/legend.json"), ("geojson", "geojson/000000.geojson")),
    ):
        assert (tmp_path / name).exists(), kind
    semantic = np.array(Image.open(tmp_path / "semantic" / "000010.png"))
    assert set(np.unique(semantic)) == {0, 1, 2}


def test_a_track_keeps_its_id_while_it_is_hidden(tmp_path: Path) -> None:
    """Hidden for half a second it goes on; its gap is filled where that is asked for."""
    frames = [[("red", 5 + 4 * n, 20)] if not 12 <= n < 17 else [] for n in range(30)]
    source = squares(tmp_path / "film.mp4", frames)
    follow(source, tmp_path / "plain")
    assert [row[0] for row in tracks(tmp_path / "plain")] == [*range(12), *range(17, 30)]
    assert {row[1] for row in tracks(tmp_path / "plain")} == {1}
    follow(source, tmp_path / "filled", fill=True)
    rows = tracks(tmp_path / "filled")
    assert [row[0] for row in rows] == list(range(30))
    assert [row[0] for row in rows if row[4]] == list(range(12, 17))
    assert [row[3][0] for row in rows] == pytest.approx([5 + 4 * n for n in range(30)], abs=2)
    document = json.loads((tmp_path / "filled" / "tracks.json").read_text())
    mask = decode(document["annotations"][14]["segmentation"])
    assert np.nonzero(mask)[1].min() == pytest.approx(5 + 4 * 14, abs=2)


def test_what_comes_back_is_known_again(tmp_path: Path) -> None:
    """Out of the picture for three seconds, and back at the same side in the same color."""
    frames = [[("red", 120 + 3 * n, 40)] for n in range(14)]
    frames += [[] for _ in range(30)]
    frames += [[("red", 160 - 3 * n, 50)] for n in range(1, 14)]
    follow(squares(tmp_path / "film.mp4", frames), tmp_path / "out")
    assert {row[1] for row in tracks(tmp_path / "out")} == {1}
    far = [*frames[:44], *([("red", 3 * n, 50)] for n in range(1, 14))]
    follow(squares(tmp_path / "far.mp4", far), tmp_path / "far")
    assert {row[1] for row in tracks(tmp_path / "far")} == {1, 2}


def test_a_film_that_shows_nothing(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = log_lines(monkeypatch)
    follow(squares(tmp_path / "dark.mp4", [[("dark red", 50, 50)]] * 12), tmp_path / "out")
    assert tracks(tmp_path / "out") == []
    assert any("the highest score is 0.3: --threshold" in line for line in lines)
    with pytest.raises(UserError, match=r"--from 100: .*film.mp4 ends before it"):
        follow(film, tmp_path / "late", section=Section(begin=100))


def test_a_list_where_one_is_no_film(film: Path, tmp_path: Path) -> None:
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "list.txt").write_text(f"{film}\nsound.mp4\n")
    problems, _ = follow(tmp_path / "list.txt", tmp_path / "out")
    assert len(problems) == 1
    assert "sound.mp4: has no picture" in problems[0]
    assert len(tracks(tmp_path / "out" / "film")) == 60
    with pytest.raises(UserError, match="has no picture"):
        follow(tmp_path / "sound.mp4", tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_the_same_call_again_does_nothing_anew(film: Path, tmp_path: Path) -> None:
    _, finder = follow(film, tmp_path, ("coco", "video"))
    assert finder.seen == 30
    before = (tmp_path / "tracks.json").stat().st_mtime_ns
    _, finder = follow(film, tmp_path, ("coco", "video"))
    assert finder.seen == 0
    assert (tmp_path / "tracks.json").stat().st_mtime_ns == before
    (tmp_path / "tracks.mp4").unlink()
    _, finder = follow(film, tmp_path, ("coco", "video"))
    assert finder.seen == 0
    assert (tmp_path / "tracks.mp4").exists()
    with pytest.raises(UserError, match="--every was 1, now 2"):
        follow(film, tmp_path, ("coco", "video"), section=Section(every=2))


def test_nothing_of_others_is_overwritten(film: Path, tmp_path: Path) -> None:
    (tmp_path / "tracks.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds tracks.json already"):
        follow(film, tmp_path)
    assert (tmp_path / "tracks.json").read_text() == "mine"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "shapes.mp4"
    film, writer = draw_film((0, 5), width=96, height=72), FilmWriter(path, 20)
    for number in range(LENGTH):
        writer.add(Image.fromarray(film.frame(number / 20)[0]), number / 20)
    writer.close()
    return path


def infer(source: Path, output: Path) -> list[str]:
    words = ["-m", "app", "infer", "--checkpoint", str(bundled_nano()), "--input", str(source)]
    words += [part for kind in KINDS for part in ("--prompt", kind)]
    return [sys.executable, *words, "--output-dir", str(output), "--save", "video,gif,coco,csv,mot"]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JOURNAL}


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_is_the_same(shapes: Path, tmp_path: Path) -> None:
    """Killed, then stopped, then let alone: every file is that of a run without a break."""
    subprocess.run(infer(shapes, tmp_path / "whole"), cwd=REPOSITORY, check=True)
    journal = tmp_path / "out" / JOURNAL
    for how, frames, code in ((signal.SIGKILL, 7, -9), (signal.SIGTERM, 25, 143)):
        started = subprocess.Popen(infer(shapes, tmp_path / "out"), cwd=REPOSITORY)
        until(
            lambda: journal.exists() and journal.read_bytes().count(b'"image"') >= frames,  # noqa: B023
            "frames done",
        )
        started.send_signal(how)
        assert started.wait(PATIENCE) == code
        assert not {"tracks.json", "tracks.mp4"} & _files(tmp_path / "out").keys()
    subprocess.run(infer(shapes, tmp_path / "out"), cwd=REPOSITORY, check=True)
    whole, again = _files(tmp_path / "whole"), _files(tmp_path / "out")
    assert {name: again[name] for name in whole} == whole
    assert len(read_films(tmp_path / "out" / "tracks.json").films[1]) == LENGTH


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_is_done_is_kept(shapes: Path, tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = infer(shapes, tmp_path)
    done = subprocess.run(
        words, cwd=REPOSITORY, preexec_fn=small, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written (File too large). What is done is kept" in done.stderr
    assert list(_files(tmp_path)) == []
    assert (tmp_path / JOURNAL).read_bytes().count(b'"image"') > 3
    subprocess.run(words, cwd=REPOSITORY, check=True)
    assert "tracks.mp4" in _files(tmp_path)


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_frames(tmp_path: Path) -> None:
    """Squares that come and go; what 8,000 more frames take is less than 5 MB."""
    done = run_module("tests.inference.long_film", tmp_path)
    after_2000, after_10_000 = map(float, done.stdout.split())
    assert after_10_000 - after_2000 < 5


def test_frames_in_a_folder_by_the_command(command, tmp_path: Path) -> None:
    """--track, with sections; flags of films and of images do not mix."""
    film = draw_film((0, 5), width=96, height=72)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(film.frame(number / 20)[0]).save(folder / f"{number:03d}.png")
    words = ("infer", "--checkpoint", bundled_nano(), "--input", folder, "--prompt", "circle")
    done = command(
        *(*words, "--track", "--fps", 20, "--from", "0.1", "--to", "0:00.5", "--every", 2),
        *("--output-dir", tmp_path / "out", "--save", "coco,mot"),
    )
    assert done.code == 0, done.err
    read = read_films(tmp_path / "out" / "tracks.json")
    assert len(read.films[1]) == 4
    assert read.fps == {1: 10.0}
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {JOURNAL, "tracks.json", "tracks.txt"}
    done = command(*words, "--every", 2, "--fill-gaps", "--output-dir", tmp_path / "x")
    assert done.code == 2
    assert done.err.count("is for films; with --track") == 2
    done = command(*words, "--track", "--to", "5", "--from", "0:06", "--output-dir", tmp_path / "x")
    assert "--to 5: must be after --from 0:06" in done.err
    done = command(*words, "--track", "--save", "video,psd", "--output-dir", tmp_path / "x")
    assert "--save psd: there is video, gif, coco" in done.err
