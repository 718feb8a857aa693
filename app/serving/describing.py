"""The API described: OpenAPI for programs, and /docs for people, which needs no script."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app import page
from app.serving import messages

TEXT = (
    "Finds in images what words, or boxes of examples, name. The answers are those of `infer.sh`. "
    "Films are followed. Images come as multipart/form-data or as base64 in JSON; no address is "
    "fetched."
)
REF = "#/components/schemas/{model}"
WORDS = {
    401: "no key, or a wrong one",
    403: "a page of another server asks",
    404: "no such model, session or path",
    405: "another method",
    408: "sent too slowly",
    413: "too many bytes, pixels or images",
    415: "a body of another kind",
    421: "called by a stranger's name",
    422: "values that cannot be answered; `problems` names each, and what mends it",
    500: "the server's fault",
    503: "all places are taken, or it is ending; `Retry-After` says when to ask again",
    504: "took too long",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": messages.ErrorOut, "description": words} for status, words in WORDS.items()
}
READ = (
    *(messages.PredictRequest, messages.FormQuestion, messages.Question),
    *(messages.SessionRequest, messages.FormSession, messages.FilmQuestion),
)
EXAMPLES = {
    "/v1/predict": "curl -F image=@a.jpg -F prompt=pothole {address}/v1/predict",
    "/v1/follow": "curl -N -F film=@a.mp4 -F prompt=pothole {address}/v1/follow",
    "/v1/sessions": "curl -F image=@a.jpg {address}/v1/sessions",
    "/v1/sessions/{id}/prompts": 'curl --json \'{{"prompts": [{{"text": "pothole"}}]}}\' '
    "{address}/v1/sessions/ID/prompts",
}


def body(in_json: type[BaseModel], in_form: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return what OpenAPI says of a body that is JSON, or a form with `image` and `request`."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(in_json)}}
    if in_form is not None:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        properties: dict[str, Any] = {
            "image": {"type": "array", "items": file, "minItems": 1},
            "request": _ref(in_form),
        }
        short: dict[str, Any] = {"model": {"type": "string"}}
        if in_form is messages.FormQuestion:
            short |= {
                "prompt": {"type": "array", "items": {"type": "string"}},
                "threshold": {"type": "number", "minimum": 0, "maximum": 1},
                "max_detections": {"type": "integer", "minimum": 1},
                "format": {"enum": ["rle", "polygon", "png", "geojson"]},
            }
        schema = {
            "type": "object",
            "properties": properties | short,
            "required": ["image"],
            "description": "`request` says all but the images; or the short form, without it",
        }
        content["multipart/form-data"] = {
            "schema": schema,
            "encoding": {"request": {"contentType": "application/json"}},
        }
    return {"requestBody": {"required": True, "content": content}}


def film() -> dict[str, Any]:
    """Return what OpenAPI says of a body that is a form with `film` and `request`."""
    properties = {
        "film": {"type": "string", "contentMediaType": "application/octet-stream"},
        "request": _ref(messages.FilmQuestion),
        "prompt": {"type": "array", "items": {"type": "string"}},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1},
        "every": {"type": "integer", "minimum": 1, "maximum": 1000},
        "model": {"type": "string"},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["film"],
        "description": "`request` says all but the film; or the short form, without it",
    }
    encoding = {"request": {"contentType": "application/json"}}
    content = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    return {"requestBody": {"required": True, "content": content}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def complete(app: FastAPI) -> None:
    """Let `app.openapi` describe the bodies as well, which the routes read themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, read = models_json_schema([(m, "validation") for m in READ], ref_template=REF)
            schemas = described["components"]["schemas"] | read["$defs"]
            described["components"]["schemas"] = dict(sorted(schemas.items()))
            described["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            described["security"] = [{}, {"bearer": []}, {"header": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def router(app: FastAPI) -> APIRouter:
    """Return the route of /docs."""
    routes = APIRouter()
    digest = base64.b64encode(hashlib.sha256(page.STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; frame-ancestors 'none'"

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Return the description as a page."""
        return Response(
            docs_page(app.openapi()),
            media_type="text/html",
            headers={"Content-Security-Policy": policy},
        )

    return routes


def docs_page(described: dict[str, Any], address: str = "http://127.0.0.1:8000") -> str:
    """Return a page of every route, with what it takes and answers."""
    parts = [f"<p>{page.text(described['info']['description'])}</p>"]
    parts.append('<p><a href="/openapi.json">/openapi.json</a> says the same to programs.</p>')
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2>{method.upper()} {page.text(path)}</h2>")
            parts.append(f"<p>{page.text(route.get('description', ''))}</p>")
            if path in EXAMPLES:
                example = EXAMPLES[path].format(address=address, id="{id}")
                parts.append(f"<pre>{page.text(example)}</pre>")
    parts.append("<h2>What they take and answer</h2>")
    for name, schema in described["components"]["schemas"].items():
        text = page.text(json.dumps(schema, indent=2, ensure_ascii=False))
        parts.append(
            f"<details><summary>{page.text(name)}: {page.text(schema.get('description', ''))}"
            f"</summary><pre>{text}</pre></details>"
        )
    return page.page(described["info"]["title"], parts)
