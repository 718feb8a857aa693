"""Where images by the million come from: manifests, folders, archives, stores of fsspec.

An image has a name, by which it is assigned to a shard, told of and found again. Names are made as
a source is read, a block at a time, so that no list of all of them is ever held.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from app.console import plain
from app.datasets.images import EXTENSIONS
from app.errors import UserError
from app.launch.shards import Shard

KINDS = ("parquet", "jsonl")  # of --save: what parts are written as
MANIFESTS = (".txt", ".csv", ".parquet")
ARCHIVES = (".tar", ".zip")
COLUMNS = ("path", "file_name", "filename", "image", "url", "name")  # of a table's images
BLOCK = 4 << 20  # bytes of a manifest that are read at once
ROWS = 1 << 16  # of a table
TRIES = 4  # at what a network answers
GOOGLE_LIMIT = timedelta(seconds=10)  # of what its client tries by itself
CREDENTIALS = {  # of the stores that pyarrow reads: where its clients find them
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
}
WAIT_SECONDS = 0.5  # after the first failure; then twice as long, and so on
MAX_MEMBER = 1 << 30  # bytes of an image in an archive
FETCHED = "sam3-archive-"  # how the folders of archives begin that were fetched
Answer = TypeVar("Answer")


class Unreachable(Exception):
    """Raise where an image could not be fetched, and may be another time."""


@dataclass(frozen=True)
class Item:
    """Hold where an image is.

    Attributes:
        name: of it; without a password or a query.
        place: path or address of the file, or of the archive that holds it.
        member: number of bytes from which it begins in a tar, or its name in a zip.
        size: bytes of it in a tar.
    """

    name: str
    place: str
    member: int | str | None = None
    size: int = 0


def is_many(source: str) -> bool:
    """Return whether a source is for many images alone: a table, an archive, or an address."""
    return is_address(source) or Path(source).suffix.lower() in (*ARCHIVES, *MANIFESTS[1:])


def is_address(text: str) -> bool:
    """Return whether a text is an address of a store, such as s3://… or https://…."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://", text) is not None


def shown(place: str) -> str:
    """Return a place without what may be secret in it: user, password, and the query."""
    if not is_address(place):
        return place
    parts = urlsplit(place)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shard_of(name: str, count: int) -> int:
    """Return the number of an image's shard: CRC-32 of its name in UTF-8, modulo their count."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape")) % count


def items(source: str, shard: Shard) -> Iterator[Item]:
    """Yield the images of a shard, in the source's order.

    Archives of a store are pieces of their own, by their names, as each is fetched whole; of those
    on disk each image is.

    Raises:
        UserError: a source that is not there, or holds no images.
    """
    for name, place in _files(source, shard):
        if not _is_archive(place):
            yield Item(name, place)
            continue
        whole = is_address(place)
        yield from (e for e in _members(place, name) if whole or _is_in(e.name, shard))


def count(source: str, shard: Shard) -> int | None:
    """Return how many images a shard has; None where archives would have to be fetched for it."""
    number = 0
    for name, place in _files(source, shard):
        if not _is_archive(place):
            number += 1
        elif is_address(place):
            return None
        else:
            number += sum(_is_in(each.name, shard) for each in _members(place, name))
    return number


def _is_archive(place: str) -> bool:
    return shown(place).lower().endswith(ARCHIVES)


def _members(place: str, name: str) -> Iterator[Item]:
    """Yield the images of an archive."""
    return (_tar if shown(place).lower().endswith(".tar") else _zip)(place, name)


def _is_in(name: str, shard: Shard) -> bool:
    return shard_of(name, shard.count) == shard.number


def _files(source: str, shard: Shard) -> Iterator[tuple[str, str]]:
    """Yield name and place of the images and archives that may hold some of a shard's."""
    path = Path(source)
    suffix = posixpath.splitext(shown(source))[1].lower()
    if suffix in MANIFESTS and (is_address(source) or path.is_file()):
        yield from _manifest(source, suffix, shard)
    elif suffix in (*ARCHIVES, *EXTENSIONS) and (is_address(source) or path.is_file()):
        yield posixpath.basename(shown(source)), source
    elif is_address(source):
        yield from _select(_listing(source), shard)
    elif path.is_dir():
        yield from _select(_folder(path), shard)
    else:
        raise UserError(f"--input {source}: no such file or folder")


def _select(files: Iterable[tuple[str, str]], shard: Shard) -> Iterator[tuple[str, str]]:
    """Yield those of a shard, and archives on disk, whose images are selected one by one."""
    for name, place in files:
        opened = _is_archive(place) and not is_address(place)
        if opened or _is_in(name, shard):
            yield name, place


def _folder(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the images and archives below a folder, in the order of their names."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in sorted(files):
            if not file.startswith(".") and file.lower().endswith((*EXTENSIONS, *ARCHIVES)):
                place = Path(folder, file)
                yield place.relative_to(root).as_posix(), str(place)


def _listing(address: str) -> Iterator[tuple[str, str]]:
    """Yield the images and archives below an address, in the order of their names."""
    system, root = _store(address)
    found = sorted(_tried(lambda: _below(system, root), address))
    if not found:
        raise UserError(f"--input {shown(address)}: holds nothing")
    parts = urlsplit(address)
    user = "anonymous@" if parts.username == "anonymous" else ""
    for path in found:
        if path.lower().endswith((*EXTENSIONS, *ARCHIVES)):
            whole = path if is_address(path) else f"{parts.scheme}://{user}{path}"
            name = shown(path).removeprefix(shown(root)).lstrip("/")
            yield name, whole


def _below(system: Any, root: str) -> list[str]:
    """Return the files below a path of a store.

    pyarrow sees folders of Google's store only where they are objects themselves, so that it is
    asked for all that is below at once.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSelector, FileType

    if not isinstance(system, ArrowFSWrapper):
        return list(system.find(root, on_error="raise"))
    below = system.fs.get_file_info(FileSelector(root, recursive=True))
    return [each.path for each in below if each.type == FileType.File]


def _manifest(source: str, suffix: str, shard: Shard) -> Iterator[tuple[str, str]]:
    """Yield name and place of a manifest's lines that are of a shard."""
    base = "" if is_address(source) else str(Path(source).parent)
    blocks = {".txt": _lines, ".csv": _cells, ".parquet": _rows}[suffix](source)
    for block in blocks:
        for line in _of_shard(block, shard):
            text = line.decode("utf-8", "surrogateescape")
            yield shown(text), _place(text, base)


def _of_shard(block: Sequence[bytes], shard: Shard) -> Iterator[bytes]:
    """Yield the names of a shard, and archives on disk; CRC-32 of all is computed in C.

    A name with a query or a password is shown without: its shard is that of what is shown.
    """
    sums = np.fromiter(map(zlib.crc32, block), dtype=np.uint32, count=len(block))
    mine = sums % np.uint32(shard.count) == shard.number
    whole = b"\n".join(block).lower()
    for number, line in enumerate(block) if b"://" in whole else ():
        text = line.decode("utf-8", "surrogateescape")
        mine[number] = _is_in(shown(text), shard)
    if b".tar" in whole or b".zip" in whole:
        for number, line in enumerate(block):
            mine[number] |= line.lower().endswith((b".tar", b".zip")) and b"://" not in line
    return (block[number] for number in np.flatnonzero(mine).tolist())


def _place(text: str, base: str) -> str:
    """Return the place of a line: an address, or a path relative to the manifest or from here."""
    if is_address(text) or posixpath.isabs(text) or not base:
        return text
    beside = f"{base}/{text}"  # no Path: a million times
    return beside if os.path.exists(beside) else text  # noqa: PTH110


def _lines(source: str) -> Iterator[list[bytes]]:
    with open_place(source) as file:
        rest = b""
        while block := file.read(BLOCK):
            whole, _, rest = (rest + block).rpartition(b"\n")
            yield _clean(whole)
        yield _clean(rest)


def _clean(text: bytes) -> list[bytes]:
    """Return lines without blanks at their ends, empty ones and comments, as a list has them."""
    lines = text.split(b"\n")
    framed = b"\n" + text + b"\n"
    if any(sign in framed for sign in (b"\r", b"\t", b"\n#", b" \n", b"\n ", b"\n\n")):
        lines = [line.strip() for line in lines]
        return [line for line in lines if line and not line.startswith(b"#")]
    return lines


def _cells(source: str) -> Iterator[list[bytes]]:
    with open_place(source) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors="surrogateescape")
        try:
            rows = csv.reader(text)
            column = _column(next(rows, []), source)
            while block := list(itertools.islice(rows, ROWS)):
                values = (row[column] for row in block if len(row) > column and row[column])
                yield [value.encode("utf-8", "surrogateescape") for value in values]
        except csv.Error as error:
            raise UserError(f"{shown(source)}: cannot be read as a table ({error})") from None


def _rows(source: str) -> Iterator[list[bytes]]:
    import pyarrow
    import pyarrow.parquet

    with open_place(source) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            name = names[_column(names, source)]
            for batch in table.iter_batches(ROWS, columns=[name]):
                values = batch.column(0).cast(pyarrow.string()).to_pylist()
                yield [value.encode() for value in values if value]
        except pyarrow.ArrowException as error:
            raise UserError(f"{shown(source)}: cannot be read as Parquet ({error})") from None


def _column(names: Sequence[str], source: str) -> int:
    """Return the number of the column that names images."""
    lower = [name.strip().lower() for name in names]
    for wanted in COLUMNS:
        if wanted in lower:
            return lower.index(wanted)
    raise UserError(
        f"{shown(source)}: has no column of images ({plain(', '.join(names)) or 'it is empty'}); "
        f"name one {', '.join(COLUMNS)}"
    )


def _tar(place: str, name: str) -> Iterator[Item]:
    """Yield the images of a tar, by where each lies in it; links and others are passed over."""
    file = _local(place)
    with _opened(place, lambda: tarfile.open(file, "r:")) as archive:
        try:
            for member in archive:
                if member.isreg() and member.name.lower().endswith(EXTENSIONS):
                    inner = f"{name}/{member.name.lstrip('./')}"
                    yield Item(inner, str(file), member.offset_data, member.size)
                archive.members.clear()  # else each of a million is kept
        except tarfile.TarError as error:
            raise UserError(f"{shown(place)}: is a damaged tar ({error})") from None


def _zip(place: str, name: str) -> Iterator[Item]:
    """Yield the images of a zip, by their names."""
    file = _local(place)
    with _opened(place, lambda: zipfile.ZipFile(file)) as archive:
        for member in archive.infolist():
            if not member.is_dir() and member.filename.lower().endswith(EXTENSIONS):
                inner = PurePosixPath(name, member.filename.lstrip("./"))
                yield Item(str(inner), str(file), member.filename, member.file_size)


@contextmanager
def _opened(place: str, open_it: Callable[[], Any]) -> Iterator[Any]:
    try:
        archive = open_it()
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{shown(place)}: cannot be opened as an archive ({error})") from None
    with closing(archive):
        yield archive


def read(item: Item) -> bytes:
    """Return the bytes of an image's file.

    Raises:
        Unreachable: a store does not answer, or an answer is cut short.
        OSError: a file that is not there, or cannot be read.
    """
    if item.member is None:
        if not is_address(item.place):
            return Path(item.place).read_bytes()
        system, path = _store(item.place)
        return bytes(_tried(lambda: _whole(system, path), item.place))
    if item.size > MAX_MEMBER:
        raise OSError(f"{item.size} bytes are no image")
    if isinstance(item.member, int):
        with Path(item.place).open("rb") as archive:
            archive.seek(item.member)
            data = archive.read(item.size)
        if len(data) < item.size:
            raise OSError("the tar ends within it")
        return data
    return _zip_member(Path(item.place), item.member)


def _zip_member(file: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(name) as member:
            data = member.read(MAX_MEMBER + 1)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise OSError(str(error)) from None
    if len(data) > MAX_MEMBER:
        raise OSError("it unpacks to more than an image has")
    return data


def _whole(system: Any, path: str) -> bytes:
    """Return a file of a store."""
    data: bytes = system.cat_file(path)
    _check_length(system, path, len(data))
    return data


def _tried(ask: Callable[[], Answer], place: str) -> Answer:
    """Return an answer of a store, which is asked again where it fails.

    Raises:
        Unreachable: it failed again and again.
        FileNotFoundError: it says that there is no such file.
    """
    for attempt in range(TRIES):
        try:
            return ask()
        except FileNotFoundError:
            raise FileNotFoundError(f"{shown(place)}: no such file") from None
        except Exception as error:  # stores raise errors of their clients
            problem = type(error).__name__
            if attempt < TRIES - 1:
                time.sleep(WAIT_SECONDS * 2**attempt)
    scheme, remedy = urlsplit(place).scheme.lower(), ""
    if scheme in CREDENTIALS:
        public = f"{scheme}://anonymous@BUCKET/…"
        remedy = f": look at {CREDENTIALS[scheme]}, or for a public bucket say {public}"
    raise Unreachable(f"{shown(place)}: cannot be fetched ({problem}){remedy}")


@lru_cache(maxsize=8)
def _system(scheme: str, anonymous: bool) -> Any:
    """Return fsspec's file system of a scheme; of S3 and Google's store that of pyarrow.

    AWS_ENDPOINT_URL and STORAGE_EMULATOR_HOST name other servers than their makers'.
    """
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    if scheme not in CREDENTIALS:
        return fsspec.filesystem(scheme)
    import pyarrow.fs

    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return ArrowFSWrapper(
            pyarrow.fs.S3FileSystem(endpoint_override=endpoint, anonymous=anonymous)
        )
    emulator = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST", ""))
    google = pyarrow.fs.GcsFileSystem(
        anonymous=anonymous,
        endpoint_override=emulator.netloc or None,
        scheme=emulator.scheme or None,
        retry_time_limit=GOOGLE_LIMIT,  # 15 minutes, were it not said
    )
    return ArrowFSWrapper(google)


def _store(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path that it takes.

    ``anonymous@`` before a bucket, as pyarrow has it, asks without credentials.
    """
    parts = urlsplit(address)
    scheme = parts.scheme.lower()
    bucket = parts.netloc.rpartition("@")[2]
    try:
        system = _system(scheme, parts.username == "anonymous")
    except (ImportError, ValueError) as error:
        raise UserError(f"{shown(address)}: {scheme}:// is not read here ({error})") from None
    return system, address if scheme in ("http", "https") else f"{bucket}{parts.path}"


@contextmanager
def open_place(place: str) -> Iterator[Any]:
    """Open a file of a disk or a store for reading bytes."""
    if not is_address(place):
        with Path(place).open("rb") as file:
            yield file
        return
    system, path = _store(place)
    with _tried(lambda: system.open(path, "rb"), place) as file:
        yield file


def _local(place: str) -> Path:
    """Return an archive on disk; one of a store is fetched whole, until `release` removes it."""
    if not is_address(place):
        return Path(place)
    system, path = _store(place)
    folder = Path(tempfile.mkdtemp(prefix=FETCHED))
    file = folder / posixpath.basename(shown(place))
    _tried(lambda: _fetch(system, path, file), place)
    return file


def release(place: str) -> None:
    """Remove an archive that was fetched, once all its images are read."""
    folder = Path(place).parent
    if folder.name.startswith(FETCHED) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(system: Any, path: str, file: Path) -> None:
    system.get_file(path, str(file))
    _check_length(system, path, file.stat().st_size)


def _check_length(system: Any, path: str, came: int) -> None:
    """Refuse a file of a store that is not as long as the store says."""
    told = system.info(path).get("size")
    if told is not None and came != told:
        raise OSError(f"{came} of {told} bytes came")
