"""A dataset version of Roboflow → its export on this machine, over Roboflow's REST API.

The key goes to the API alone, in a header, as Roboflow recommends
(https://docs.roboflow.com/developer/rest-api/authenticate): no URL holds it. The link to an export
lets anyone download it, so it is never shown either.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from app.datasets.archive import CHUNK_BYTES, unzip
from app.errors import UserError

API_URL = "https://api.roboflow.com"
KEY_PAGE = "https://app.roboflow.com/settings/api"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# type of a project -> format of its export; each has all that the type can label
EXPORTS = {
    "instance-segmentation": "coco-segmentation",
    "semantic-segmentation": "coco-segmentation",
    "object-detection": "coco",
}
SILENCE_SECONDS = 60.0
EXPORT_SECONDS = 1800.0  # for Roboflow to make the export
POLL_SECONDS = 10.0
MAX_DOWNLOAD_BYTES = 10**12

log = logging.getLogger(__name__)


def fetch(version: str, data: Path) -> Path:
    """Return the folder under `data` that holds the export; download it if it is missing.

    Args:
        version: WORKSPACE/PROJECT/VERSION, as in the address of the version's page.

    Raises:
        UserError: it is not to be had; says why and what to do, and never the key.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+/[0-9]+", version):
        raise UserError(
            f"--roboflow {version}: must be WORKSPACE/PROJECT/VERSION, the version a number, "
            "as in app.roboflow.com/WORKSPACE/PROJECT/VERSION"
        )
    folder = data / "roboflow" / version
    if folder.is_dir():
        return folder
    with _unlogged(), _explained(version, data):
        link = _export_link(version)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
            archive = Path(temporary) / "export.zip"
            log.info("downloading %s from Roboflow to %s", version, folder)
            _download(link, archive)
            unzip(archive, folder)
    return folder


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep httpx from logging links, whatever level the root logger has."""
    loggers = {name: logging.getLogger(name) for name in ("httpx", "httpcore")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


@contextlib.contextmanager
def _explained(version: str, data: Path) -> Iterator[None]:
    """Turn failures into UserErrors that name the version, and quote nothing of httpx's."""
    try:
        yield
    except UserError as error:
        raise UserError([f"--roboflow {version}: {text}" for text in error.problems]) from None
    except httpx.TimeoutException:
        why = f"no answer within {SILENCE_SECONDS:g} seconds; run again later"
    except httpx.RemoteProtocolError:
        why = "the connection was cut before all had come; run again"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = f"Roboflow cannot be reached ({type(error).__name__}); check the connection and proxy"
    except OSError as error:
        why = f"cannot be saved under {data} ({error.strerror})"
    else:
        return
    raise UserError(f"--roboflow {version}: {why}")


def _export_link(version: str) -> str:
    """Return the link to the export, once Roboflow has made it."""
    headers = {"Authorization": f"Bearer {_read_key()}"}
    with httpx.Client(base_url=_api_url(), headers=headers, timeout=SILENCE_SECONDS) as client:
        about = _ask_until(client, version, lambda a: not _part(a, "version", "generating"))
        kind = str(_part(about, "project", "type"))
        if kind not in EXPORTS:
            raise UserError(f"is a project for {kind!r}: understood are {', '.join(EXPORTS)}")
        answer = _ask_until(client, f"{version}/{EXPORTS[kind]}", _has_export)
        return str(_part(answer, "export", "link"))


def _has_export(answer: Any) -> bool:
    """Return whether the answer links an export; until then, it tells the progress."""
    return "export" in answer or _part(answer, "progress") is None


def _part(answer: Any, *keys: str) -> Any:
    """Return `answer[key][key]…`; raise UserError where there is no such part."""
    for key in keys:
        if not isinstance(answer, dict) or key not in answer:
            raise UserError(f"Roboflow's answer has no '{'.'.join(keys)}'; run again later")
        answer = answer[key]
    return answer


def _read_key() -> str:
    key = os.environ.get("ROBOFLOW_API_KEY", "").strip()
    if not key:
        raise UserError(
            f"ROBOFLOW_API_KEY is not set: copy your key from {KEY_PAGE} and "
            "`export ROBOFLOW_API_KEY=…`"
        )
    if not re.fullmatch(r"[!-~]+", key):  # httpx would quote it in its error
        raise UserError(
            f"ROBOFLOW_API_KEY holds signs that no key has; copy it anew from {KEY_PAGE}"
        )
    return key


def _api_url() -> httpx.URL:
    """Return Roboflow's address, or that of a test's server."""
    url = httpx.URL(os.environ.get("ROBOFLOW_API_URL") or API_URL)
    if not _is_safe(url, url):
        raise UserError("ROBOFLOW_API_URL must begin with https://; unset it for Roboflow itself")
    return url


def _is_safe(url: httpx.URL, api: httpx.URL) -> bool:
    """Return whether the link is encrypted, or never leaves this machine, as the API's."""
    local = url.host in LOOPBACK and api.host in LOOPBACK
    return url.scheme == "https" or (url.scheme == "http" and local)


def _ask_until(client: httpx.Client, path: str, is_ready: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the API's answer once it is ready."""
    start = time.monotonic()
    while not is_ready(answer := _ask(client, path)):
        log.info("Roboflow is making the export (%d s)", time.monotonic() - start)
        if time.monotonic() - start > EXPORT_SECONDS:
            raise UserError(
                f"Roboflow has not made the export within {EXPORT_SECONDS / 60:g} minutes; "
                "run again later"
            )
        time.sleep(POLL_SECONDS)
    return answer


def _ask(client: httpx.Client, path: str) -> dict[str, Any]:
    response = client.get(path, params={"nocache": "true"})
    if response.status_code not in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
        raise UserError(_refusal(response.status_code))
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UserError("Roboflow's answer is no JSON object; run again later")
    return answer


def _refusal(status: int) -> str:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return (
            f"Roboflow refuses the key in ROBOFLOW_API_KEY ({status}): copy the one of this "
            f"workspace from {KEY_PAGE}"
        )
    if status == HTTPStatus.NOT_FOUND:
        return "Roboflow has no such workspace, project or version that this key may see (404)"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "Roboflow has had too many requests with this key (429); wait some minutes"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"Roboflow fails ({status}); run again later"
    return f"Roboflow answers with status {status}; export a zip on its page and give --dataset-dir"


def _download(link: str, path: Path) -> None:
    """Stream the file at `link` to `path`; no key goes along."""
    api = _api_url()

    def check(request: httpx.Request) -> None:  # each redirect as well
        if not _is_safe(request.url, api):
            raise UserError("Roboflow's link to the export leads off https; not followed")

    with (
        httpx.Client(
            timeout=SILENCE_SECONDS,
            follow_redirects=True,
            event_hooks={"request": [check]},
            headers={"Accept-Encoding": "identity"},
        ) as client,
        client.stream("GET", link) as response,
    ):
        if response.status_code != HTTPStatus.OK:
            raise UserError(
                f"the link to the export answers with status {response.status_code}; run again "
                "for a new one"
            )
        _save(response, path)


def _save(response: httpx.Response, path: Path) -> None:
    limit = min(MAX_DOWNLOAD_BYTES, shutil.disk_usage(path.parent).free)
    written, announced = 0, int(response.headers.get("Content-Length", 0))
    with path.open("wb") as file:
        for chunk in response.iter_bytes(CHUNK_BYTES):
            written += len(chunk)
            if max(written, announced) > limit:
                raise UserError(
                    f"the export has {max(written, announced)} bytes or more: must be at most "
                    f"{limit}, by what is free on the disk"
                )
            file.write(chunk)
