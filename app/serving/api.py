"""The routes of the server: what is asked is read, an engine is asked, the answer is written."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from app import __version__
from app.errors import UserError
from app.serving import answers, describing, following, labelling, messages, page
from app.serving.asking import find, in_time, used
from app.serving.engine import Engine
from app.serving.guard import Guard, Held, to_response
from app.serving.messages import ModelList, PredictAnswer, SessionAnswer, SessionMade
from app.serving.metrics import CONTENT_TYPE, Requests
from app.serving.observer import Observer
from app.serving.protocols import label_studio, open_inference, x_anylabeling
from app.serving.refusals import Problem, Refused, unusable
from app.serving.rounds import Rounds
from app.serving.sessions import Sessions
from app.serving.settings import Settings
from app.serving.versions import Models

JSON = "application/json"


def create_app(models: Models, settings: Settings, observer: Observer | None = None) -> FastAPI:
    """Return the server's application.

    Args:
        models: answer; they are told to end when it ends.
        observer: is told what happens.
    """
    observer = observer or Observer()
    rounds = Rounds(settings.ring)
    for engine in models.all():
        engine.observer = observer
        observer.waiting(engine, 0)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threads = ThreadPoolExecutor(2 + len(os.sched_getaffinity(0)), "request")
        asyncio.get_running_loop().set_default_executor(threads)
        yield
        app.state.closing = True
        await asyncio.to_thread(rounds.close)
        await asyncio.to_thread(models.close)
        threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="SAM 3 fine-tuning: server",
        version=__version__,
        description=describing.TEXT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.closing, app.state.models = False, models
    app.include_router(router(models, settings))
    app.include_router(following.router(models, settings.limits))
    app.include_router(open_inference.router(models, settings))
    app.include_router(x_anylabeling.router(models, settings))
    app.include_router(label_studio.router(models, settings, rounds))
    if settings.label is not None:
        app.include_router(labelling.router(models, settings, settings.label, rounds))
    app.include_router(state_router(models, observer))
    app.include_router(describing.router(app))
    app.include_router(page.router())
    describing.complete(app)
    _answer_errors(app)
    app.state.held = Held()
    app.add_middleware(Guard, settings=settings, held=app.state.held)
    app.add_middleware(Requests, observer=observer)
    return app


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the routes that find things."""
    routes = APIRouter(prefix="/v1", responses=describing.ERRORS)
    limits = settings.limits
    sessions = Sessions(limits)

    @routes.post(
        "/predict",
        response_model=PredictAnswer,
        openapi_extra=describing.body(messages.PredictRequest, messages.FormQuestion),
    )
    async def predict(request: Request) -> Response:
        """Find what the prompts name in images."""
        body, kind = await request.body(), request.headers.get("content-type", "")
        question, images = await asyncio.to_thread(messages.read_predict, kind, body, limits)
        engine = models.choose(question.model)
        asked = question.asked(engine.finder.prompts)
        found = await find(models, engine, images, asked, question.max_detections, limits.seconds)
        answer = await asyncio.to_thread(
            answers.results,
            [image.name for image in images],
            found,
            question.format,
            used(engine, question.model),
        )
        return Response(answer, media_type=JSON)

    @routes.post(
        "/sessions",
        status_code=201,
        response_model=SessionMade,
        openapi_extra=describing.body(messages.SessionRequest, messages.FormSession),
    )
    async def begin_session(request: Request) -> Response:
        """Begin to ask about an image: it is sent and encoded once."""
        body, kind = await request.body(), request.headers.get("content-type", "")
        model, image = await asyncio.to_thread(messages.read_session, kind, body, limits)
        engine = models.choose(model)
        async with in_time(limits.seconds):
            seen = await engine.see(image)
        session = sessions.begin(image, model)
        made = {
            "id": session.id,
            "model": used(engine, model),
            "width": seen.width,
            "height": seen.height,
            "expires_in": limits.session_seconds,
        }
        return Response(answers.to_json(made), 201, media_type=JSON)

    @routes.post(
        "/sessions/{id}/prompts",
        response_model=SessionAnswer,
        openapi_extra=describing.body(messages.Question),
    )
    async def ask_session(id: str, request: Request) -> Response:
        """Find what the prompts name in a session's image."""
        question = messages.read_question(
            request.headers.get("content-type", ""), await request.body()
        )
        session = sessions.get(id)
        engine = models.choose(session.model)
        asked, most = question.asked(engine.finder.prompts), question.max_detections
        found = await find(models, engine, [session.image], asked, most, limits.seconds)
        answer = await asyncio.to_thread(
            answers.result, session.image.name, found[0], question.format
        )
        answer["model"] = used(engine, session.model)
        return Response(await asyncio.to_thread(answers.to_json, answer), media_type=JSON)

    @routes.delete("/sessions/{id}", status_code=204)
    async def end_session(id: str) -> Response:
        """End a session; it would end by itself as well."""
        sessions.end(id)
        return Response(status_code=204)

    @routes.get("/models", response_model=ModelList)
    async def list_models() -> Response:
        """List the models that can be asked."""
        listed = [describe(engine) for engine in models.all()]
        return Response(answers.to_json({"models": listed}), media_type=JSON)

    def describe(engine: Engine) -> dict[str, Any]:
        about = engine.about
        return {
            "name": about.name,
            "version": about.version,
            "aliases": models.aliases(engine),
            "default": engine is models.default,
            "prompts": about.prompts,
            "vocabulary": about.vocabulary,
            "threshold": about.threshold,
            "size": about.size,
            "resolution": about.resolution,
            "pin": about.pin,
            "masks": about.masks,
        }

    return routes


def state_router(models: Models, observer: Observer) -> APIRouter:
    """Return the routes that tell how the server is."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        """Tell whether the server lives; if not, start it anew."""
        alive = all(engine.alive for engine in models.all())
        return Response(
            answers.to_json({"status": "alive" if alive else "a model's thread has ended"}),
            200 if alive else 503,
            media_type=JSON,
        )

    @routes.get("/ready")
    async def ready(request: Request) -> Response:
        """Tell whether requests are taken."""
        closing = request.app.state.closing
        status = "ending" if closing else "ready"
        return Response(
            answers.to_json({"status": status}), 503 if closing else 200, media_type=JSON
        )

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        rendered = await asyncio.to_thread(observer.render)
        return Response(rendered, media_type=CONTENT_TYPE)

    return routes


def _answer_errors(app: FastAPI) -> None:
    """Answer every error by the JSON of `ErrorOut`."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return to_response(error)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return to_response(unusable(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        problem = Problem("", f"{request.method} {request.url.path[:100]}", "see /docs")
        return to_response(
            Refused(error.status_code, f"{error.detail}.", [problem], error.headers or {})
        )
