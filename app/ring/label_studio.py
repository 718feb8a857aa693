"""The labels of a project of Label Studio, fetched before a round."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import httpx

from app.errors import UserError
from app.files import parse_json, write_text
from app.serving.protocols.label_studio import authorised
from app.serving.refusals import Refused

FILE = "label-studio.json"
SECONDS = 300.0  # that an export may take
ADDRESS, TOKEN = "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"


def export(project: int, folder: Path) -> None:
    """Write a project's annotated tasks into a folder; without any, leave it as it is.

    Raises:
        UserError: no address, or Label Studio does not give them.
    """
    home = os.environ.get(ADDRESS, "").rstrip("/")
    if not home:
        raise UserError(f"label_studio: {ADDRESS} is not set; export it, and {TOKEN}")
    try:
        text = asyncio.run(_fetch(home, project))
    except httpx.HTTPError as error:
        raise UserError(f"{ADDRESS}={home}: does not answer ({type(error).__name__})") from None
    except Refused as refusal:
        raise UserError(f"{home}: {refusal.problems[0].message}; see {TOKEN}") from None
    tasks = None
    with contextlib.suppress(ValueError):
        tasks = parse_json(text)
    if not isinstance(tasks, list):
        raise UserError(f"{home}: project {project}: the export is no list of tasks")
    if tasks:
        write_text(folder / FILE, text)


async def _fetch(home: str, project: int) -> str:
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        headers = await authorised(client, home, os.environ.get(TOKEN))
        address = f"{home}/api/projects/{project}/export"
        answer = await client.get(address, params={"exportType": "JSON"}, headers=headers)
    if answer.status_code != 200:
        raise UserError(
            f"{home}: project {project}: the export is answered by {answer.status_code}; see the "
            f"number of the project, and {TOKEN}"
        )
    return answer.text
