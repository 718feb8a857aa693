"""List a repository's files at a commit, and explain its host's refusals.

Nothing of a repository is ever run: a loading script only tells that its Parquet conversion, which
the host makes, is to be read instead.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import UserError

CONVERSION = "refs/convert/parquet"
NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>.+))?")


class Unreachable(UserError):
    """The host cannot be asked: a copy that was fetched earlier may do."""


@dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit.

    Attributes:
        name: OWNER/NAME, or the folder's name.
        commit: of its files; of a folder, a hash of their names, sizes and times.
        sizes: bytes by path, None where they are not known.
        folder: where it lies, if on this machine.
        converted: whether the files are the host's Parquet conversion: CONFIG/SPLIT/*.parquet.
    """

    name: str
    commit: str
    sizes: dict[str, int | None]
    folder: Path | None
    converted: bool = False

    @property
    def root(self) -> str:
        """Return the start of every address of its files."""
        return str(self.folder) if self.folder else f"hf://datasets/{self.name}@{self.commit}"


def resolve(name: str) -> Repository:
    """Return the repository OWNER/NAME[@REVISION], or the folder `name`, at its current commit.

    Raises:
        Unreachable: there is no connection, or HF_HUB_OFFLINE forbids it.
        UserError: there is no such repository, or it may not be read; says what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _local(folder.resolve())
    if not (match := NAME.fullmatch(name)):
        raise UserError(f"{name}: is no folder, and no name of a dataset as OWNER/NAME[@REVISION]")
    return _remote(match["name"], match["revision"])


def _local(folder: Path) -> Repository:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {str(path.relative_to(folder)): path.stat() for path in paths}
    if f"{folder.name}.py" in facts:
        raise UserError(
            f"{folder}: is read by a script, {folder.name}.py, and no repository's code is run; "
            "save it as Parquet or as an image folder"
        )
    content = repr([(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()])
    commit = hashlib.sha256(content.encode()).hexdigest()
    return Repository(folder.name, commit, {n: f.st_size for n, f in facts.items()}, folder)


def _remote(name: str, revision: str | None) -> Repository:
    answer = _ask(name, revision)
    script = f"{name.rpartition('/')[2]}.py"
    if revision == CONVERSION:
        return Repository(*answer, None, converted=True)
    if script not in answer[2]:
        return Repository(*answer, None)
    if revision not in (None, "main"):
        raise UserError(
            f"{name}@{revision}: is read by a script, {script}, which is never run, and only the "
            f"newest revision has a Parquet conversion; name it without @{revision}"
        )
    try:
        return Repository(*_ask(name, CONVERSION), None, converted=True)
    except _NoRevision:
        raise UserError(
            f"{name}: is read by a script, {script}, and no repository's code is run; it has no "
            f"Parquet conversion ({CONVERSION}) either. Ask its owner to publish it as Parquet, or "
            "take another dataset"
        ) from None


def _ask(name: str, revision: str | None) -> tuple[str, str, dict[str, int | None]]:
    """Name, commit and the files with their sizes."""
    from huggingface_hub import HfApi

    with explained(name, revision):
        info = HfApi().dataset_info(name, revision=revision, files_metadata=True, timeout=60)
        if info.gated:  # its list of files is public all the same
            HfApi().auth_check(name, repo_type="dataset")
    files = {file.rfilename: file.size for file in info.siblings or []}
    return info.id, str(info.sha), files  # it may have moved to another name


class _NoRevision(UserError):
    """The repository is there, the revision is not."""


@contextmanager
def explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the libraries raise in the block into a UserError that says what to do."""
    import httpx
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    # OSError holds the hub's own errors; RuntimeError is how `datasets` refuses a script.
    expected = (
        OSError,
        ValueError,
        RuntimeError,
        httpx.HTTPError,
        DatasetsError,
        pa.ArrowException,
    )
    try:
        yield
    except UserError:
        raise
    except expected as error:
        raise _explain(error, name, revision) from None


def _explain(error: BaseException, name: str, revision: str | None) -> UserError:
    import httpx
    from huggingface_hub import errors

    for cause in _chain(error):
        if isinstance(cause, errors.GatedRepoError):
            return UserError(_gated(name))
        if isinstance(cause, errors.RepositoryNotFoundError):
            return UserError(
                f"{name}: there is no such dataset on huggingface.co, or it is private. Check the "
                f"name; for a private one set HF_TOKEN to a token of an account that may read it"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return _NoRevision(
                f"{name}: has no revision '{revision}'; see the branches, tags and commits at "
                f"huggingface.co/datasets/{name}/tree/main"
            )
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return Unreachable(
                f"{name}: HF_HUB_OFFLINE forbids asking huggingface.co; unset it to fetch this "
                "dataset."
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return UserError(_refused(cause.response, name))
        if isinstance(cause, httpx.TransportError):
            return Unreachable(
                f"{name}: huggingface.co cannot be reached; check the network, the proxy "
                "(HTTPS_PROXY) and HF_ENDPOINT."
            )
    text = " ".join(str(error).split())
    return UserError(f"{name}: cannot be read as a dataset ({type(error).__name__}: {_hide(text)})")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _gated(name: str) -> str:
    from huggingface_hub import get_token

    page = f"ask for access at huggingface.co/datasets/{name}"
    if get_token():
        return f"{name}: is gated, and the account of HF_TOKEN has no access yet; {page}"
    return f"{name}: is gated; {page}, then set HF_TOKEN to a token of that account"


def _refused(response: object, name: str) -> str:
    from huggingface_hub.utils import parse_ratelimit_headers

    status = getattr(response, "status_code", None)
    if status == 401:
        return f"{name}: huggingface.co refuses HF_TOKEN; set a valid one, or unset it"
    if status != 429:
        return f"{name}: huggingface.co answered {status}; try again later"
    headers = getattr(response, "headers", {})
    limit = parse_ratelimit_headers(headers)
    seconds = headers.get("retry-after") or (limit.reset_in_seconds if limit else None)
    wait = f"wait {seconds} seconds" if seconds else "wait some minutes"
    return (
        f"{name}: huggingface.co has had too many requests from here; {wait}, then run again. With "
        "HF_TOKEN set the limit is higher"
    )


def _hide(text: str) -> str:
    """Return the text without the token, should a library ever put it into an error."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "…") if token else text


def quiet() -> None:
    """Turn off telemetry and download counts, and progress bars beside a terminal."""
    import datasets
    import huggingface_hub.utils as hub_utils
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity_error()
    hub_utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        hub_utils.disable_progress_bars()
