"""Versions that follow an alias of a real registry, in SQLite; canary and shadow beside them."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from app.errors import UserError
from app.inference.golden import answer
from app.inference.predictor import Predictor
from app.model import weights
from app.serving.engine import Engine
from app.serving.loading import Registered, Source, parse
from app.serving.registry import Follower, Registry
from app.serving.settings import Settings
from app.serving.versions import Models
from tests.helpers import log_lines, until
from tests.serving.servers import NANO, drawn, files, serving

pytestmark = pytest.mark.system
CHAMPION = Registered("things", "champion", None)


@pytest.fixture(scope="module")
def told_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's weights, which tell what they answer about the drawn image."""
    model, header = weights.load(NANO)
    golden = answer(Predictor(model, header.model), header.prompts)
    folder = tmp_path_factory.mktemp("told")
    weights.save(model, folder, header.model_copy(update={"golden": golden}))
    return folder


class Store:
    """A registry of the model "things"."""

    def __init__(self, root: Path, tables: Path) -> None:
        self.root, self.uri = root, f"sqlite:///{root / 'mlflow.db'}"
        shutil.copy(tables, root / "mlflow.db")
        self.client = MlflowClient(self.uri, self.uri)
        self.client.create_registered_model("things")

    def add(self, fill: Callable[[Path], object]) -> str:
        """Register what `fill` writes as weights; return its version."""
        model = self.root / f"model-{len(list(self.root.iterdir()))}"
        folder = model / "artifacts" / "best"
        folder.mkdir(parents=True)
        fill(folder)
        return str(self.client.create_model_version("things", model.as_uri()).version)

    def point(self, version: str, alias: str = "champion") -> None:
        self.client.set_registered_model_alias("things", alias, version)

    def follower(self, *wanted: Registered) -> Follower:
        source = Source(Path(), "", device="cpu")
        return Follower(
            Registry(self.uri), wanted, source, lambda own: Engine(own.load, Settings())
        )


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of nothing, whose tables take MLflow seconds to make."""
    file = tmp_path_factory.mktemp("registry") / "mlflow.db"
    MlflowClient(uri := f"sqlite:///{file}", uri).search_registered_models()
    return file


@pytest.fixture
def store(tmp_path: Path, tables: Path) -> Store:
    return Store(tmp_path, tables)


def _change(folder: Path) -> None:
    """Other numbers under the header of a copied file, as a faulty copy or device would give."""
    file = folder / weights.FILE
    header = weights.read_header(folder)
    assert header is not None
    state = load_file(file)
    state["dot_prod_scoring.hs_proj.weight"] *= -1
    save_file(state, file, metadata=weights.to_metadata(header))


def test_an_alias_is_followed_and_a_faulty_version_is_not(
    told_nano: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved 20 times while it is asked: no request is lost, faults change nothing.

    Each is answered by a version that was the champion at some time from its start to its end.
    """
    copy = lambda folder: shutil.copytree(told_nano, folder, dirs_exist_ok=True)  # noqa: E731
    one, two = store.add(copy), store.add(copy)
    changed = store.add(lambda folder: (copy(folder), _change(folder)))
    cut = store.add(lambda folder: (folder / weights.FILE).write_bytes(b"cut"))
    empty = store.add(lambda folder: (folder / "notes.txt").write_text("none"))
    store.point(one)
    follower = store.follower(CHAMPION)
    engines, aliases = follower.load_all()
    assert aliases == {("things", "champion"): one}
    lines = log_lines(monkeypatch)
    with serving(*engines, aliases=dict(aliases)) as client:
        del engines
        models: Models = client.app.state.models
        answers: list[httpx.Response] = []
        times: list[tuple[float, float]] = []  # of each answer: from, to
        stop = threading.Event()

        def ask() -> None:
            data = {"prompt": "circle", "threshold": "0.1", "model": "things@champion"}
            while not stop.is_set():
                begun = time.monotonic()
                answers.append(client.post("/v1/predict", files=files(drawn(1)), data=data))
                times.append((begun, time.monotonic()))

        asking = threading.Thread(target=ask)
        asking.start()
        reigns = [(0.0, one)]  # from when a version may be the champion, until the next surely is
        surely = []
        faults = [(changed, two), (cut, two), (empty, two)]
        swaps = [(one, one), (two, two)] * 8
        for moved, version in ((two, two), *faults, *swaps):
            store.point(moved)
            reigns.append((time.monotonic(), version))
            follower.look(models)
            surely.append(time.monotonic())
            if moved != version:
                follower.look(models)  # a faulty one is not tried again
            assert models.default.version == version
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 1, "it answers")
        stop.set()
        asking.join()
        assert [each.version for each in models.all()] == [two]
    assert {each.status_code for each in answers} == {200}
    assert len({str(each.json()["results"]) for each in answers}) == 1
    ends = [*surely, time.monotonic()]
    told = []
    for given, (begun, ended) in zip(answers, times, strict=True):
        model = given.json()["model"]
        told.append(model["version"])
        assert model == {"name": "things", "version": told[-1], "alias": "champion"}
        assert told[-1] in {
            version
            for (first, version), last in zip(reigns, ends, strict=True)
            if first <= ended and begun <= last
        }
    assert sum(before != after for before, after in itertools.pairwise(told)) == 1 + len(swaps)
    refused = [line for line in lines if "is not taken" in line]
    assert [line.split(" is not")[0] for line in refused] == [
        f"models:/things@champion, version {version}," for version in (changed, cut, empty)
    ]
    assert "in place of" in refused[0]
    assert "holds no weights of this tool" in refused[2]


def test_a_registry_that_is_silent_changes_nothing(
    told_nano: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.add(lambda folder: shutil.copytree(told_nano, folder, dirs_exist_ok=True))
    store.point(version)
    follower = store.follower(CHAMPION)
    engines, aliases = follower.load_all()
    models = Models(engines, aliases)
    store.client.delete_registered_model_alias("things", "champion")
    lines = log_lines(monkeypatch)
    for _ in range(3):
        follower.look(models)
    assert len(lines) == 1
    assert lines[0].endswith("; the version that is here goes on")
    assert models.choose("things@champion").version == version
    models.close()


def test_what_is_not_registered_is_told_at_once(store: Store) -> None:
    wanted = [CHAMPION, parse("models:/other/3")]
    with pytest.raises(UserError) as told:
        store.follower(*wanted).load_all()
    assert [problem.partition(":/")[2].split()[0] for problem in told.value.problems] == [
        "things@champion",
        "other/3",
    ]
