"""Every source gives each image to one shard, by a hash that anyone can compute."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from app.errors import UserError
from app.launch.shards import Shard
from app.scale import sources
from app.scale.sources import Item, Unreachable, count, is_many, items, read, shard_of, shown
from tests.helpers import until
from tests.loopback import free_port
from tests.scale.store import Faults, before, serving

WHOLE = Shard(0, 1)
NAMES = [f"{group}/{number:03}.png" for group in ("a", "b") for number in range(20)]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    (root / "notes.md").write_text("no image")
    (root / ".hidden.png").write_bytes(png(0))
    return root


def manifest(path: Path, names: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("# a list\n\n" + "\r\n".join(names))
    elif path.suffix == ".csv":
        path.write_text("id,Path\n" + "".join(f'{n},"{name}"\n' for n, name in enumerate(names)))
    else:
        table = pyarrow.table({"id": list(range(len(names))), "file_name": names})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def tar(path: Path, names: list[str], folder: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(folder / name, f"./{name}")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.add(folder / "notes.md", "notes.md")
    return path


def zipped(path: Path, names: list[str], folder: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    return path


MAKE: dict[str, Callable[[Path, Path], str]] = {
    "folder": lambda tmp, folder: str(folder),
    "txt": lambda tmp, folder: str(manifest(folder / "list.txt", NAMES)),
    "csv": lambda tmp, folder: str(manifest(folder / "list.csv", NAMES)),
    "parquet": lambda tmp, folder: str(manifest(folder / "list.parquet", NAMES)),
    "tar": lambda tmp, folder: str(tar(tmp / "all.tar", NAMES, folder)),
    "zip": lambda tmp, folder: str(zipped(tmp / "all.zip", NAMES, folder)),
}


@pytest.mark.parametrize("kind", MAKE)
def test_each_image_is_of_one_shard(kind: str, folder: Path, tmp_path: Path) -> None:
    source = MAKE[kind](tmp_path, folder)
    of_all = list(items(source, WHOLE))
    inner = {"tar": "all.tar/", "zip": "all.zip/"}.get(kind, "")
    assert sorted(item.name for item in of_all) == [inner + name for name in NAMES]
    assert [read(item) for item in sorted(of_all, key=lambda each: each.name)] == [
        png(number) for number in range(len(NAMES))
    ]
    for number in range(7):
        shard = Shard(number, 7)
        names = [item.name for item in items(source, shard)]
        expected = [n for n in (i.name for i in of_all) if zlib.crc32(n.encode()) % 7 == number]
        assert names == expected
        assert count(source, shard) == len(names)
        assert all(shard_of(name, 7) == number for name in names)


def test_a_manifest_names_archives_and_addresses(folder: Path, tmp_path: Path) -> None:
    tar(folder / "some.tar", NAMES[:3], folder)
    lines = ["some.tar", NAMES[5], "https://user:secret@host/x.png?key=hidden", "../../etc/x.png"]
    found = {item.name: item for item in items(str(manifest(folder / "l.txt", lines)), WHOLE)}
    assert set(found) == {
        *(f"some.tar/{name}" for name in NAMES[:3]),
        *(NAMES[5], "https://host/x.png", "../../etc/x.png"),
    }
    assert found["https://host/x.png"].place == lines[2]
    shares = [
        [item.name for item in items(str(folder / "l.txt"), Shard(number, 5))]
        for number in range(5)
    ]
    assert sorted(name for share in shares for name in share) == sorted(found)


def test_names_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 50)
    names = [f"image-{number:04}.png" for number in range(200)]
    (tmp_path / "l.txt").write_text("\n".join(names) + "\n")
    assert [item.name for item in items(str(tmp_path / "l.txt"), WHOLE)] == names


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/a/b?c", "/a/b?c"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://me:pw@host:1/a.jpg?X-Amz-Signature=abc#f", "https://host:1/a.jpg"),
    ],
)
def test_secrets_of_an_address_are_not_shown(place: str, told: str) -> None:
    assert shown(place) == told


def test_what_is_for_many_alone() -> None:
    many = ("a.tar", "a.ZIP", "a.csv", "a.parquet", "s3://b/c", "https://x/y")
    assert all(map(is_many, many))
    assert not any(map(is_many, ("a.jpg", "folder", "list.txt", "camera:0", "film.mp4")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none", None, "no such file or folder"),
        ("bad.tar", b"no tar at all" * 100, "cannot be opened as an archive"),
        ("bad.zip", b"no zip", "cannot be opened as an archive"),
        ("bad.parquet", b"no parquet", "cannot be read as Parquet"),
        ("bad.csv", b"id,size\n1,2\n", "has no column of images"),
    ],
)
def test_what_is_no_source(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(items(str(tmp_path / name), WHOLE))
    with pytest.raises(UserError, match="is not read here"):
        list(items("nothing://a/b", WHOLE))


def test_what_an_archive_lacks(folder: Path, tmp_path: Path) -> None:
    path = tar(tmp_path / "cut.tar", NAMES, folder)
    found = list(items(str(path), WHOLE))
    os.truncate(path, found[-1].member + 10)  # type: ignore[operator]
    with pytest.raises(OSError, match="ends within it"):
        read(found[-1])
    with pytest.raises(UserError, match="damaged tar"):
        list(items(str(path), WHOLE))
    zip_path = zipped(tmp_path / "z.zip", NAMES[:1], folder)
    (item,) = items(str(zip_path), WHOLE)
    data = bytearray(zip_path.read_bytes())
    data[60:80] = bytes(20)
    zip_path.write_bytes(data)
    with pytest.raises(OSError, match=r"CRC|header|invalid"):
        read(item)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WAIT_SECONDS", 0.01)


def test_a_web_server_is_listed_and_asked_again_where_it_fails(
    quick: None, folder: Path, tmp_path: Path
) -> None:
    tar(folder / "some.tar", NAMES[:3], folder)
    (folder / ".hidden.png").unlink()
    with serving(folder) as (address, faults):
        found = {item.name: item for item in items(address + "/", WHOLE)}
        assert set(found) == {*NAMES, *(f"some.tar/{name}" for name in NAMES[:3])}
        faults.fail = 2
        assert read(found[NAMES[4]]) == png(4)
        faults.cut = 1
        assert read(found[NAMES[5]]) == png(5)
        assert read(found[f"some.tar/{NAMES[1]}"]) == png(1)
        kept = Path(found[f"some.tar/{NAMES[1]}"].place)
        sources.release(str(kept))
        assert not kept.exists()
        faults.always.add(NAMES[6])
        with pytest.raises(Unreachable, match="cannot be fetched"):
            read(found[NAMES[6]])
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(Item("x", f"{address}/none.png?token=secret"))
        lines = manifest(tmp_path / "l.txt", [f"{address}/{NAMES[7]}?token=secret"])
        (item,) = items(str(lines), WHOLE)
        assert item.name == f"{address}/{NAMES[7]}"
        assert read(item) == png(7)


def test_archives_of_a_store_are_whole_pieces(folder: Path, tmp_path: Path) -> None:
    """Each is fetched by one shard alone."""
    (tmp_path / "served").mkdir()
    for number in range(6):
        tar(tmp_path / "served" / f"{number}.tar", NAMES[number : number + 2], folder)
    with serving(tmp_path / "served") as (address, faults):
        shares = [[item.name for item in items(address, Shard(n, 4))] for n in range(4)]
        names = sorted(name for share in shares for name in share)
        assert len(names) == len(set(names)) == 12
        gets = [path for path in faults.asked if path.endswith(".tar")]
        assert len(gets) == len(set(gets)) == 6


@dataclass(frozen=True)
class Bucket:
    """A bucket "images" on loopback, which is reached through what goes wrong on the way."""

    client: Any
    faults: Faults


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with before(f"http://{host}:{port}") as (address, faults):
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        sources._system.cache_clear()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="images")
        yield Bucket(client, faults)
        sources._system.cache_clear()
    server.stop()


def test_a_bucket_is_listed_and_read(quick: None, bucket: Bucket) -> None:
    for number, name in enumerate(NAMES[:6]):
        bucket.client.put_object(Bucket="images", Key=f"set/{name}", Body=png(number))
    listed = "s3://images/set/a/001.png\n"
    bucket.client.put_object(Bucket="images", Key="set/list.txt", Body=listed)
    found = {item.name: item for item in items("s3://images/set", WHOLE)}
    assert set(found) == set(NAMES[:6])
    assert [read(found[name]) for name in NAMES[:6]] == [png(number) for number in range(6)]
    (item,) = items("s3://images/set/list.txt", WHOLE)
    assert read(item) == png(1)
    bucket.client.put_object_acl(Bucket="images", Key=f"set/{NAMES[2]}", ACL="public-read")
    public = {item.name: item for item in items("s3://anonymous@images/set", WHOLE)}
    assert read(public[NAMES[2]]) == png(2)
    with pytest.raises(Unreachable, match=r"^s3://images/set/a/003\.png: cannot be fetched"):
        read(public[NAMES[3]])
    with pytest.raises((UserError, Unreachable, FileNotFoundError)):
        list(items("s3://images/none", WHOLE))


def test_a_bucket_that_fails_cuts_and_slows(
    quick: None,
    bucket: Bucket,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of S3 asks again by itself; what it gives up, we ask for again."""
    archive = tar(tmp_path / "some.tar", NAMES[:9], folder)
    bucket.client.put_object(Bucket="images", Key="some.tar", Body=archive.read_bytes())
    for number, name in enumerate(NAMES[:6]):
        bucket.client.put_object(Bucket="images", Key=name, Body=png(number))
    faults = bucket.faults
    faults.fail, faults.slow = 2, 1
    found = {item.name: item for item in items("s3://images/a", WHOLE)}
    assert len(found) == 6
    for number, fault in enumerate(("fail", "cut", "slow")):
        setattr(faults, fault, 3)
        assert read(found[f"{number:03}.png"]) == png(number)
        assert getattr(faults, fault) < 3
    faults.cut = 2
    members = list(items("s3://images/some.tar", WHOLE))
    assert [read(member) for member in members] == [png(number) for number in range(9)]
    sources.release(members[0].place)
    faults.always.add("005.png")
    monkeypatch.setattr(sources, "TRIES", 2)
    with pytest.raises(Unreachable, match=r"a/005\.png: cannot be fetched .* AWS_ACCESS_KEY_ID"):
        read(found["005.png"])


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of Google's store, of an emulator: SAM3_GCS_EMULATOR names its command."""
    program = shutil.which(os.environ.get("SAM3_GCS_EMULATOR", "gcp-storage-emulator"))
    if program is None:
        pytest.skip("no gcp-storage-emulator: pip install it in an environment of its own")
    port = free_port()
    words = [program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        sources._system.cache_clear()
        until(lambda: _answers(address), "the emulator")
        yield address
    finally:
        process.kill()
        process.wait()
        sources._system.cache_clear()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/storage/v1/b", params={"project": "p"}).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.system
def test_a_bucket_of_google(google: str) -> None:
    made = httpx.post(f"{google}/storage/v1/b", params={"project": "p"}, json={"name": "images"})
    assert made.status_code == 200
    for number, name in enumerate(NAMES[:3]):
        sent = httpx.post(
            f"{google}/upload/storage/v1/b/images/o",
            params={"uploadType": "media", "name": f"set/{name}"},
            content=png(number),
            headers={"Content-Type": "image/png"},  # without, it answers what no client expects
        )
        assert sent.status_code == 200
    found = {item.name: item for item in items("gs://anonymous@images/set", WHOLE)}
    assert set(found) == set(NAMES[:3])
    assert [read(found[name]) for name in NAMES[:3]] == [png(number) for number in range(3)]
    assert not any("anonymous" in item.name for item in found.values())
