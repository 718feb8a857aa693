"""Against a server on this machine that answers as the host does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from datasets import ClassLabel

from app.datasets.build import load_splits
from tests.loopback import Quiet, serve

from .test_huggingface import BOTH, PAIR, PETS, image_folder, labels, objects_set, outline

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_canary"
CONVERSION = "refs/convert/parquet"
OBJECT = [("dog", (10, 5, 10, 10))]

# Fetches each dataset that it is given; prints its folder, or what the user is told, as JSON.
CHILD = """
import json, logging, sys
from pathlib import Path
from app.config.schema import HuggingFaceConfig
from app.datasets.huggingface import fetch
from app.errors import UserError
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
for request in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"folder": str(fetch(HuggingFaceConfig(**request), Path(sys.argv[2])))}))
    except UserError as error:
        print(json.dumps({"problems": error.problems}))
"""


class Hub:
    """Repositories: folders by name and revision; refusals by name: status, headers, where."""

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], Path] = {}
        self.refusals: dict[str, tuple[int, dict[str, str], str]] = {}
        self.tokens: set[str | None] = set()
        self.paths: list[str] = []
        self.address = ""

    def find(self, name: str, revision: str) -> tuple[Path, str] | None:
        """A revision's folder and commit, by branch or by commit."""
        for (known, branch), folder in self.folders.items():
            commit = hashlib.sha1(f"{known}@{branch}".encode()).hexdigest()
            if known == name and revision in (branch, commit):
                return folder, commit
        return None


ROUTES = re.compile(
    r"(?P<api>/api)?/datasets/(?P<name>[\w-]+/[\w-]+)"
    r"(/(?P<verb>revision|tree|paths-info|resolve)/(?P<revision>[^/]+)(/(?P<path>.*))?)?(/auth-check)?"
)


class Handler(Quiet):
    hub: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.hub.tokens.add(self.headers.get("Authorization"))
        self.hub.paths.append(self.path)
        route = ROUTES.fullmatch(urlsplit(self.path).path)
        if route is None:
            return self.answer(404, {})
        name = route["name"]
        status, headers, where = self.hub.refusals.get(name, (0, {}, ""))
        if status and where in self.path:
            return self.answer(status, headers)
        if not any(known == name for known, _ in self.hub.folders):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        found = self.hub.find(name, unquote(route["revision"] or "main"))
        if found is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        folder, commit = found
        if route["api"]:
            asked = parse_qs(body).get("paths", []) if route["verb"] == "paths-info" else None
            content = self.info(name, folder, commit, route["verb"], route["path"], asked)
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(content))
        path = folder / unquote(route["path"])
        if not path.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        self.send(path.read_bytes(), commit)

    do_HEAD = do_POST = do_GET

    def info(
        self, name: str, folder: Path, commit: str, verb: str, path: str, asked: list[str] | None
    ) -> object:
        paths = sorted(folder.rglob("*"))
        if verb in ("tree", "paths-info"):
            under = [p for p in paths if str(p.relative_to(folder)).startswith(path or "")]
            entries = [entry(p, folder) for p in under]
            return [e for e in entries if asked is None or e["path"] in asked]
        files = [
            {"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size}
            for p in paths
            if p.is_file()
        ]
        gated = "manual" if name in self.hub.refusals else False
        return {"id": name, "sha": commit, "siblings": files, "gated": gated}

    def send(self, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self.answer(200, headers, data)
        start, stop = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
        return self.answer(206, headers, data[start : stop + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes | str = b"") -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entry(path: Path, folder: Path) -> dict:
    name = {"path": str(path.relative_to(folder)), "oid": hashlib.sha1(bytes(path)).hexdigest()}
    if path.is_dir():
        return {"type": "directory", **name}
    return {"type": "file", "size": path.stat().st_size, **name}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with serve(handler) as hub.address:
        yield hub


def fetch(address: str, home: Path, *requests: dict, **environment: str) -> tuple[list, str]:
    """What came of each request, in a process whose hub is at `address`; and what it printed.

    Fails where the token is in anything that was printed or written.
    """
    empty = {"config": None, "split": None, "columns": None, "streaming": "auto"}
    words = [json.dumps([empty | request for request in requests]), str(home / "data")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    hidden = {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN}
    hidden["USE_TORCH"] = "0"  # `datasets` would import it, which takes seconds
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        env=kept | hidden | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert TOKEN not in printed
    written = [path for path in home.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    return [json.loads(line) for line in done.stdout.splitlines()], printed


def train(result: dict) -> list:
    return labels(load_splits(Path(result["folder"])).train)


def test_each_refusal_has_its_own_message(hub, tmp_path):
    hub.folders["me/gated", "main"] = objects_set(tmp_path / "gated", PETS, 1)
    hub.refusals["me/gated"] = (403, {"X-Error-Code": "GatedRepo"}, "/auth-check")
    hub.refusals["me/busy"] = (429, {"Retry-After": "77"}, "")
    limited = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=5;w=300'}
    hub.refusals["me/limited"] = (429, limited, "")
    hub.refusals["me/broken"] = (503, {}, "")
    invalid = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.refusals["me/token"] = (401, invalid, "")
    said = {
        "me/gated": "the account of HF_TOKEN has no access yet; ask for access at "
        "huggingface.co/datasets/me/gated",
        "me/missing": "there is no such dataset on huggingface.co, or it is private. Check",
        "me/gated@v9": "has no revision 'v9'; see the branches, tags and commits at "
        "huggingface.co/datasets/me/gated/tree/main",
        "me/busy": "too many requests from here; wait 77 seconds",
        "me/limited": "too many requests from here; wait 55 seconds",
        "me/broken": "answered 503; try again later",
        "me/token": "refuses HF_TOKEN; set a valid one",
        "no/such/folder": "is no folder, and no name of a dataset as OWNER/NAME[@REVISION]",
    }
    results, _ = fetch(hub.address, tmp_path / "home", *({"name": name} for name in said))
    for (name, expected), result in zip(said.items(), results, strict=True):
        (problem,) = result["problems"]
        assert problem.startswith(f"{name.partition('@')[0]}: ")
        assert expected in problem
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not [*tmp_path.glob("home/data/huggingface/*@*")]


def test_without_connection_the_earlier_copy_is_taken(hub, tmp_path):
    hub.folders["me/pets", "main"] = objects_set(tmp_path / "pets", PETS, 1)
    home, names = tmp_path / "home", ({"name": "me/pets"}, {"name": "me/other"})
    (online, _), _ = fetch(hub.address, home, *names)
    for address, environment, reason in (
        ("http://127.0.0.1:9", {}, "huggingface.co cannot be reached; check the network"),
        (hub.address, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids asking huggingface.co"),
    ):
        (copy, other), printed = fetch(address, home, *names, **environment)
        assert copy == online
        assert f"me/pets: {reason}" in printed
        assert reason in other["problems"][0]


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_and_image_folder_at_their_commit(hub, tmp_path, streaming):
    hub.folders["me/pets", "main"] = objects_set(tmp_path / "pets", PETS, 1)
    hub.folders["me/pets", "v1"] = objects_set(tmp_path / "v1", ClassLabel(names=["a", "ox"]), 1)
    (tmp_path / "pets/unrelated.bin").write_bytes(b"x")
    objects = [{"segmentation": [outline(*box)], "label": name} for name, box in PAIR.items()]
    rows = [{"file_name": "a.png", "objects": objects}]
    hub.folders["me/photos", "main"] = image_folder(tmp_path / "photos", rows)
    requests = [{"name": name, "streaming": streaming} for name in ("me/pets@v1", "me/photos")]
    requests.append({"name": "me/pets", "streaming": streaming})
    (tagged, photos, pets), printed = fetch(hub.address, tmp_path / "home", *requests)
    assert train(pets) == [OBJECT]
    assert train(tagged) == [[("ox", (10, 5, 10, 10))]]
    assert labels(load_splits(Path(photos["folder"])).test) == [BOTH]
    _, commit = hub.find("me/pets", "main")
    assert Path(pets["folder"]).name == f"me--pets@{commit[:12]}"
    assert "columns image=image,objects=objects,category=category,segmentation=polygon" in printed
    downloaded = {path.name for path in tmp_path.glob("home/data/huggingface/.cache/hub/**/*.*")}
    assert ("train-00000-of-00001.parquet" in downloaded) is not streaming
    assert "unrelated.bin" not in downloaded


@pytest.mark.parametrize("streaming", [True, False])
def test_scripts_load_through_their_parquet_conversion(hub, tmp_path, streaming):
    scripted, converted = tmp_path / "scripted", tmp_path / "converted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (scripted / "stuck.py").write_text("")
    for config, kind in (("full", PETS), ("mini", ClassLabel(names=["x", "y"]))):
        made = objects_set(tmp_path / f"made-{config}", kind, 1)
        for split in ("train", "validation"):
            target = converted / config / split / "0000.parquet"
            target.parent.mkdir(parents=True)
            (made / f"data/{split}-00000-of-00001.parquet").rename(target)
    hub.folders["me/scripted", "main"] = hub.folders["me/stuck", "main"] = scripted
    hub.folders["me/scripted", "v1"] = scripted
    hub.folders["me/scripted", CONVERSION] = converted
    requests = [
        {"name": "me/scripted", "streaming": streaming},
        {"name": "me/scripted", "streaming": streaming, "config": "mini"},
        {"name": "me/stuck", "streaming": streaming},
        {"name": "me/scripted@v1", "streaming": streaming},
    ]
    (full, mini, stuck, tagged), printed = fetch(hub.address, tmp_path / "home", *requests)
    assert train(full) == [OBJECT]
    assert train(mini) == [[("y", (10, 5, 10, 10))]]
    assert "configuration 'full' of full, mini" in printed
    assert "no repository's code is run; it has no Parquet conversion" in stuck["problems"][0]
    assert "only the newest revision has a Parquet conversion" in tagged["problems"][0]
    assert not (tmp_path / "ran").exists()
    assert not [path for path in hub.paths if "/resolve/" in path and path.endswith(".py")]
