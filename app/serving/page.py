"""Pages: each is one file, under a policy that admits its own style and script alone.

`pages/` has a file for each, and what they share.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).with_name("pages")
# The lines of a page that stand for a file beside it.
SHARED = {
    "/* shared.css */": "shared.css",
    "// shared.js": "shared.js",
    "// film.js": "film.js",
    "<!-- key.html -->": "key.html",
}


def router() -> APIRouter:
    """Return the route of the page at `/`, which is read once."""
    answer = answering("find")
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return answer()

    return routes


def answering(name: str) -> Callable[[], HTMLResponse]:
    """Return what answers with a page, which is read once."""
    html = read(name)
    headers = {"Content-Security-Policy": policy(html), "Cache-Control": "no-cache"}
    return lambda: HTMLResponse(html, headers=headers)


def read(name: str) -> str:
    """Return a page with what it shares with others."""
    html = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
    for line, file in SHARED.items():
        html = html.replace(f"{line}\n", (FOLDER / file).read_text(encoding="utf-8"))
    return html


def policy(html: str) -> str:
    """Return the policy under which a page runs what is in it, and nothing else.

    Style and script are named by their hashes: what a name or an answer might smuggle into the page
    has another one. Requests go to this server; images and films come from the page's own memory.
    """
    style, script = (_hash_of(html, tag) for tag in ("style", "script"))
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {style}",
            f"script-src {script}",
            "img-src blob: data:",
            "media-src blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_of(html: str, tag: str) -> str:
    """Return the hash of the one element of its kind, as policies name it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
