"""The web application: transformers' own behind the gate, with this server's refusals, key and metrics."""

import asyncio
import hmac
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..utils.server import given_again, guarded, refusal, whole_body
from .handler import GONE, ChatHandler
from .metrics import Metrics
from .models import Model
from .refused import Refused
from .worker import FAILED

BODY_BYTES = 32 * 2**20  # a picture of libra.media's 20 MiB in base64, and room
CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
PATHS = (CHAT, MODELS, HEALTH, METRICS)


@dataclass(frozen=True)
class Rules:
    """Who may ask: names of this server, origins of pages, requests a minute (None: any number) and the key
    (None: everybody)."""

    hosts: Sequence[str]
    origins: Sequence[str] = ()
    per_minute: int | None = None
    api_key: str | None = None


def build_app(model: Model, handler: ChatHandler, metrics: Metrics, rules: Rules):
    """The ASGI application. transformers' other routes (loading other models, audio, …) are closed."""
    others = dict.fromkeys(
        ("completion_handler", "response_handler", "transcription_handler", "systemone_handler")
    )
    app = build_server(model.manager, handler, **others, generation_state=GenerationState())

    @app.get(MODELS + "/{name:path}")
    def one_model(name: str):
        [entry] = model.manager.get_gen_models()
        if name != entry["id"]:
            raise Refused(404, f"this server has the model {entry['id']} only")
        return JSONResponse(entry)

    @app.get(METRICS)
    def counted():
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    for kind, answer in _REFUSALS.items():
        app.add_exception_handler(kind, answer)
    return guarded(
        _Door(app, metrics, rules.api_key),
        rules.hosts,
        per_minute=rules.per_minute,
        body_bytes=64 * 2**10,
        larger={CHAT: BODY_BYTES},
        origins=rules.origins,
    )


async def _refused(request, error: Refused):
    return refusal(error.status, error.sentence, **error.headers)


async def _not_json(request, error):
    return refusal(400, "the body is not a JSON object, sent as application/json")


async def _http(request, error: HTTPException):
    if error.status_code == 400:
        return await _not_json(request, error)
    if error.status_code == 405:
        return refusal(405, f"{request.url.path} does not take {request.method}", **(error.headers or {}))
    return refusal(error.status_code, str(error.detail))


async def _failed(request, error):
    return refusal(500, FAILED)  # the application prints the traceback


_REFUSALS = {Refused: _refused, RequestValidationError: _not_json, HTTPException: _http, Exception: _failed}


class _Door:
    """Closes all other paths, asks for the key, and notes when the client of a chat request leaves."""

    def __init__(self, app, metrics: Metrics, api_key: str | None):
        self.app, self.metrics, self.api_key = app, metrics, api_key

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        path = scope["path"]
        if path not in PATHS and not path.startswith(MODELS + "/"):
            return await refusal(404, f"there is nothing here; the paths are {', '.join(PATHS)}")(
                scope, receive, send
            )
        if path != HEALTH and not self._may_ask(scope):
            answer = refusal(401, "the API key is missing or wrong", **{"WWW-Authenticate": "Bearer"})
            return await answer(scope, receive, send)
        if path == CHAT:
            return await self._chat(scope, receive, send)
        return await self.app(scope, receive, send)

    def _may_ask(self, scope) -> bool:
        if self.api_key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, b"Bearer " + self.api_key.encode())

    async def _chat(self, scope, receive, send):
        body = await whole_body(receive)
        if body is None:
            return
        gone, left = threading.Event(), asyncio.Event()

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            left.set()

        async def disconnected():
            await left.wait()
            return {"type": "http.disconnect"}

        async def counted(message):
            if message["type"] == "http.response.start":
                self.metrics.add("requests_total", labels=f'status="{message["status"]}"')
            await send(message)

        GONE.set(gone)
        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, given_again(body, disconnected), counted)
        finally:
            watcher.cancel()
            gone.set()  # an answer that broke off is not computed further
