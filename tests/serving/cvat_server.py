"""A server on loopback that answers as CVAT does, as far as `cvat-cli task auto-annotate` asks.

Paths and forms are those of cvat-sdk 2.70, which checks every answer against CVAT's own schema.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.loopback import Quiet, serve

TASK = 7
WHEN = "2026-01-01T00:00:00Z"


@dataclass
class Cvat:
    """What the server has been told.

    Attributes:
        address: where it listens.
        annotations: that were uploaded.
        tokens: that came with the requests.
    """

    address: str = ""
    annotations: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@contextlib.contextmanager
def cvat(images: dict[str, tuple[bytes, int, int]], labels: dict[int, str]) -> Iterator[Cvat]:
    """Serve a task of these images (file, width, height) and labels."""
    told = Cvat()
    frames = [
        {"name": name, "width": width, "height": height, "related_files": 0}
        for name, (_, width, height) in images.items()
    ]
    kinds = {"data_original_chunk_type": "imageset", "data_compressed_chunk_type": "imageset"}
    about = {"name": "CVAT", "description": "", "version": "2.70.0", "logo_url": "", "subtitle": ""}
    answers: dict[str, Any] = {
        "server/about": about,
        f"tasks/{TASK}": {
            **{"id": TASK, "name": "shapes", "size": len(images), "data_chunk_size": 36, **kinds},
            **{"mode": "annotation", "dimension": "2d", "updated_date": WHEN},
            **{"organization": None, "project_id": None},
            "labels": {"url": "http://127.0.0.1"},
            "jobs": {"count": 1, "completed": 0, "validation": 0, "url": "http://127.0.0.1"},
        },
        "labels": {
            **{"count": len(labels), "next": None, "previous": None},
            "results": [
                {"id": id, "name": name, "attributes": [], "type": "any", "sublabels": []}
                for id, name in labels.items()
            ],
        },
        f"tasks/{TASK}/data/meta": {
            **{"chunk_size": 36, "size": len(images), "image_quality": 70, "frames": frames},
            **{"start_frame": 0, "stop_frame": len(images) - 1, "frame_filter": ""},
            **{"deleted_frames": [], "chunks_updated_date": WHEN},
        },
    }

    class Handler(Quiet):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            told.tokens.add(self.headers["Authorization"])
            path = self.path.partition("?")[0].strip("/").removeprefix("api/")
            kind, data = "application/json", json.dumps(answers.get(path)).encode()
            if path == f"tasks/{TASK}/data":
                kind, data = "application/zip", chunk(images)
            elif path == f"tasks/{TASK}/annotations" and self.command in ("PUT", "PATCH"):
                told.annotations.append(json.loads(body))
                data = body
            elif path not in answers:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_PATCH = do_POST = answer

    with serve(Handler) as told.address:
        yield told


def chunk(images: dict[str, tuple[bytes, int, int]]) -> bytes:
    """Return a chunk of frames as CVAT sends it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for number, (data, _, _) in enumerate(images.values()):
            file.writestr(f"{number:06d}.png", data)
    return buffer.getvalue()
