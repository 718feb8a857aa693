"""Films in: every container, upright, with their own times; what is broken costs itself."""

from __future__ import annotations

import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from app.errors import UserError
from app.inference.films import Film, Frame, Reader, Section, find_films, is_film, parse_time
from tests.inference.film_files import number_of, pixels, turn_clockwise, write, write_sound
from tests.inference.rtsp_server import serving


def read(source: Path | str, section: Section | None = None, **options: float) -> list[Frame]:
    (film,) = find_films(str(source), **options)
    reader = Reader(film, section or Section())
    frames = list(reader)
    assert (reader.broken, reader.ended) == (0, "")
    return frames


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("film.mp4", "libx264", "yuv420p"),
        ("film.MOV", "libx264", "yuv420p"),
        ("film.mkv", "libx264", "yuv444p10le"),
        ("film.webm", "libvpx-vp9", "yuv420p"),
        ("film.avi", "mjpeg", "yuvj420p"),
        ("film.ts", "libx264", "yuv420p"),
        ("film.mp4", "libx265", "yuv420p10le"),
    ],
)
def test_each_container_and_codec(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    path = write(tmp_path / name, codec=codec, pix_fmt=pix_fmt, options={"g": "5"})
    frames = read(path)
    assert [frame.number for frame in frames] == list(range(20))
    assert [number_of(frame.image) for frame in frames] == pytest.approx(list(range(20)), abs=1)
    assert [frame.time for frame in frames] == pytest.approx(np.arange(20) / 10, abs=2e-3)
    assert {(frame.image.mode, frame.image.size) for frame in frames} == {("RGB", (64, 48))}
    assert is_film(str(path))


def test_gif_alpha_and_odd_sizes(tmp_path: Path) -> None:
    images = [Image.fromarray(pixels(n)) for n in range(0, 40, 10)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=200)
    frames = read(tmp_path / "a.gif")
    assert [frame.time for frame in frames] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [number_of(frame.image) for frame in frames] == [0, 10, 20, 30]
    images[0].save(tmp_path / "still.gif")
    assert not is_film(str(tmp_path / "still.gif"))
    clear = write(tmp_path / "a.webm", codec="libvpx-vp9", pix_fmt="yuva420p")
    assert len(read(clear)) == 20
    odd = write(tmp_path / "odd.mkv", 3, size=(501, 333))
    assert {frame.image.size for frame in read(odd)} == {(501, 333)}
    one = write(tmp_path / "one.mp4", 1)
    assert [frame.time for frame in read(one)] == [0]


def test_a_phones_film_is_upright(tmp_path: Path) -> None:
    """Turned clockwise the blue upper half is on the right, the green left half above."""
    path = write(tmp_path / "phone.mp4", 2)
    turn_clockwise(path, 64, 48)
    shown = np.asarray(read(path)[0].image).astype(int)
    assert shown.shape == (64, 48, 3)
    assert shown[:, 30:, 2].min() > 150 > 50 > shown[:, :18, 2].max()
    assert shown[:26, :, 1].min() > 150 > 50 > shown[38:, :, 1].max()


def test_times_are_the_films_own(tmp_path: Path) -> None:
    """A rate that varies, and a film that does not begin at zero."""
    times = [5.0, 5.1, 5.5, 6.0, 6.02, 9.0]
    for name in ("film.mkv", "film.mp4"):
        frames = read(write(tmp_path / name, 6, times=times))
        assert [frame.time for frame in frames] == pytest.approx(np.array(times) - 5, abs=2e-3)
    cut = read(tmp_path / "film.mkv", Section(begin=0.5, end=4.0))
    assert [round(frame.time, 2) for frame in cut] == [0.5, 1.0, 1.02]
    assert [frame.number for frame in cut] == [0, 1, 2]


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "file"])
def test_sections(tmp_path: Path, frames: bool) -> None:
    if frames:
        for number in range(40):
            Image.fromarray(pixels(number)).save(tmp_path / f"{number:03d}.png")
        source: Path = tmp_path
    else:
        source = write(tmp_path / "film.mp4", 40, options={"g": "12", "bf": "2"})

    def numbers(section: Section) -> list[int]:
        return [number_of(frame.image) for frame in read(source, section, fps=10)]

    assert numbers(Section(every=7)) == [0, 7, 14, 21, 28, 35]
    assert numbers(Section(begin=1.5, end=2.0)) == [15, 16, 17, 18, 19]
    assert numbers(Section(every=3, begin=3.05)) == [31, 34, 37]
    assert numbers(Section(begin=100)) == []


def test_the_end_of_a_long_film_is_found_at_once(tmp_path: Path) -> None:
    """Two hours at a frame a second: what is before the section is not decoded."""
    options = {"g": "60", "preset": "ultrafast"}
    path = write(tmp_path / "long.mp4", 7200, size=(16, 16), fps=1, options=options)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    data[start + 4 : (start + data.index(b"moov")) // 2] = bytes(
        (start + data.index(b"moov")) // 2 - start - 4
    )
    path.write_bytes(data)  # nothing of the first hour could be decoded
    frames = read(path, Section(begin=7190))
    assert [frame.time for frame in frames] == list(range(7190, 7200))
    (film,) = find_films(str(path))
    whole = Reader(film, Section(end=600))
    assert list(whole) == []
    assert whole.broken


def test_a_broken_frame_costs_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "film.avi", codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    place, size = packets[7]
    start = data.index(b"\xff\xd8", place)
    data[start : start + size - 8] = bytes(size - 8)
    path.write_bytes(data)
    (film,) = find_films(str(path))
    reader = Reader(film, Section())
    seen = [number_of(frame.image) for frame in reader]
    assert seen == [n for n in range(20) if n != 7]
    assert reader.broken == 1
    (tmp_path / "f").mkdir()
    for number in range(3):
        Image.fromarray(pixels(number)).save(tmp_path / "f" / f"{number}.png")
    (tmp_path / "f" / "1.png").write_bytes(b"no image")
    (film,) = find_films(str(tmp_path / "f"))
    reader = Reader(film, Section())
    assert [frame.number for frame in reader] == [0, 2]
    assert reader.broken == 1
    assert "1.png" in reader.problems[0]


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4"])
def test_a_cut_film_keeps_what_is_there(tmp_path: Path, name: str) -> None:
    mjpeg = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
    path = write(tmp_path / name, 50, **mjpeg, container={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (film,) = find_films(str(path))
    reader = Reader(film, Section())
    seen = [number_of(frame.image) for frame in reader]
    assert 5 < len(seen) < 45
    assert seen == pytest.approx(list(range(len(seen))), abs=1)
    assert reader.ended


def test_what_is_no_film_is_told(tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            list(Reader(Film(str(path), path=path), Section()))
        return str(caught.value)

    assert "no video stream" in told(write_sound(tmp_path / "sound.mp4"))
    (tmp_path / "empty.mp4").touch()
    assert "it has 0 bytes" in told(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a film")
    assert "ffmpeg -i" in told(tmp_path / "text.mp4")
    assert "No such file" in told(tmp_path / "absent.mp4")
    assert "is a folder" in told(tmp_path)
    assert "cannot be read as a film" in told(write(tmp_path / "none.mkv", 0))


def test_a_film_opens_no_other_file(tmp_path: Path) -> None:
    """FFmpeg's playlists name files and addresses: a film from a stranger could read any."""
    secret = write(tmp_path / "secret.mp4", 3)
    lists = {
        "hls.mp4": f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="cannot be read as a film"):
            list(Reader(Film(name, path=tmp_path / name), Section()))


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.mp4", "a.mkv"):
        write(tmp_path / name, 2)
    Path("frames").mkdir()
    Image.fromarray(pixels(0)).save("frames/0.png")
    Path("list.txt").write_text("b.mp4\n# a comment\nframes\n\nrtsp://me:secret@cam/1\n")
    films = find_films("list.txt")
    assert [film.name for film in films] == ["b", "frames", "1"]
    assert [film.source for film in films] == ["b.mp4", "frames", "rtsp://cam/1"]
    assert films[2].address == "rtsp://me:secret@cam/1"
    assert [film.live for film in films] == [False, False, True]
    assert [film.name for film in find_films("*.m*")] == ["a", "b"]
    assert [film.name for film in find_films("b.mp4")] == [""]
    Path("bad.txt").write_text("b.mp4\nabsent.mp4\nlist.csv\n")
    Path("list.csv").touch()
    with pytest.raises(UserError) as caught:
        find_films("bad.txt")
    assert caught.value.problems == [
        "--input bad.txt: absent.mp4: no such file",
        "--input bad.txt: list.csv: is no film",
    ]
    assert not is_film("frames")
    assert not is_film("frames/*.png")
    with pytest.raises(UserError, match="a camera is camera:0"):
        find_films("camera:front")


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10), ("0:10", 10), ("1:02:03.5", 3723.5), ("90:00", 5400)]
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_time(text, "--from") == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-1", "1:", "ten", "1e3"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError, match="--from"):
        parse_time(text, "--from")


def test_a_stream_is_read_until_it_is_stopped(tmp_path: Path) -> None:
    """RTSP on loopback; frames that come while the last one is at work are passed over."""
    film = write(tmp_path / "film.ts", 250, pix_fmt="yuv420p", fps=25)
    with serving(film) as address:
        (live,) = find_films(address)
        reader = Reader(live, Section())
        seen: list[Frame] = []
        for frame in reader:
            seen.append(frame)
            time.sleep(0.1)
            if len(seen) == 5:
                reader.stop()
        assert len(seen) >= 5
        assert [frame.number for frame in seen] == list(range(len(seen)))
        times = [frame.time for frame in seen]
        assert times == sorted(times)
        assert times[4] > 0.25  # of 25 frames a second a slow reader passes some over


def test_a_stream_that_is_not_there(tmp_path: Path) -> None:
    (film,) = find_films("rtsp://user:secret@127.0.0.1:1/live")
    with pytest.raises(UserError) as caught:
        list(Reader(film, Section()))
    assert "rtsp://127.0.0.1:1/live: gives no picture" in str(caught.value)
    assert "secret" not in str(caught.value)
