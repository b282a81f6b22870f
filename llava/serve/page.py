"""The page that answers a question about a picture with all visual tokens and with two ways to keep a part of
them: what it computes, and the application that a browser speaks to."""

import asyncio
import json
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from libra.config import Compression
from libra.media import SERVED, png
from libra.utils.server import guarded, refusal
from libra.utils.timing import median_interval, paired_ratio, run_in_turns

from . import overlay
from .asked import METHODS_OFFERED, Asked, Example, Mistake, Reader, fitting_rows, in_words
from .speakers import Speaker, Spoken, flops_of

# The page's own host only, nothing written into the page itself, and in no other page's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REQUEST_BYTES = SERVED.bytes * 4 // 3 + 256 * 1024  # a picture in base64, and the conversation around it
WAITING = 20  # questions that wait for their turn
ROUNDS = 9  # of a measurement
SHARE = 47  # percent at the start: what 50% after each quarter of the depth leaves in an average layer
FIRST = ("libra", "fastv")
STATIC = Path(__file__).with_name("static")
_KINDS = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
Emit = Callable[[dict], None]


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Desk:
    """Answers for one model, one question at a time.

    Args:
        name: of the model, as the page shows it.
        most: tokens of an answer.
    """

    def __init__(self, speaker: Speaker, name: str, most: int, examples: Sequence[Example] = ()):
        self.speaker, self.name, self.examples = speaker, name, list(examples)
        self.read = Reader(speaker, fitting_rows(speaker.config), self.examples, most)
        self._alone = threading.Lock()  # a model has one compression
        self._waiting = 0

    def answer(self, asked: Asked, emit: Emit, check: Callable[[], object] = lambda: None) -> None:
        """Tell ``emit`` the answers piece by piece: ``begin``, then ``text`` and ``done`` of each.

        Args:
            check: called before each token; may raise to stop.

        Raises:
            Mistake: for what the model refuses.
        """
        hows = [f"{asked.visual} of {asked.visual} in every layer", *map(in_words, asked.compressions[1:])]
        titles = [{"name": name, "how": how} for name, how in zip(asked.names, hows)]
        views = self.speaker.views(asked.questions[0])
        emit({"begin": {"visual": asked.visual, "views": views, "titles": titles, "note": asked.note}})
        plain = None
        for number, (question, c) in enumerate(zip(asked.questions, asked.compressions)):

            def say(piece: str, number: int = number) -> None:
                check()
                if piece:
                    emit({"text": [number, piece]})

            try:
                spoken = self.speaker.ask(question, c, say, trace=number > 0)
            except ValueError as error:
                raise Mistake("question" if number == 0 else f"way{number - 1}", str(error)) from error
            plain = plain or spoken
            emit({"done": [number, self._figures(spoken, plain, c)]})

    def _figures(self, spoken: Spoken, plain: Spoken, c: Compression) -> dict:
        """What the page shows of an answer next to the plain model's."""
        flops, whole = flops_of(self.speaker, spoken.tokens), flops_of(self.speaker, plain.tokens)
        return {
            "text": spoken.text,
            "tokens": spoken.tokens,
            "flops": flops,
            "flops_ratio": flops / whole if flops is not None and whole else None,
            "cache": spoken.cache,
            "stages": [] if spoken.trace is None else overlay.stages_of(spoken.trace, c),
        }

    def measure(self, asked: Asked, emit: Emit, check: Callable[[], object] = lambda: None) -> None:
        """Time all three from the question to its first token, in turns; ``round`` after each, then
        ``times``."""
        first = [replace(question, turns=(), most=1) for question in asked.questions]
        done = 0

        def seconds(number: int) -> float:
            start = time.perf_counter()
            self.speaker.ask(first[number], asked.compressions[number])
            return time.perf_counter() - start

        def after_each(_: int) -> None:
            nonlocal done
            check()
            done += 1
            emit({"round": [done, 3 * (ROUNDS + 1)]})

        ways = {number: lambda number=number: seconds(number) for number in range(3)}
        try:
            run_in_turns(ways, 1, after_each)
            rounds = run_in_turns(ways, ROUNDS, after_each)
        except ValueError as error:
            raise Mistake("question", str(error)) from error
        times = []
        for number in ways:
            spread = median_interval([one[number] for one in rounds])
            ratio = paired_ratio(rounds, number, 0)
            times.append(
                {
                    "seconds": [spread.median, spread.low, spread.high],
                    "ratio": [ratio.median, ratio.low, ratio.high],
                }
            )
        emit({"times": times, "rounds": ROUNDS, "coverage": ratio.coverage})

    def warm_up(self) -> dict | None:
        """A first call is slow, so make it now: the answers to the first example, which the page begins with;
        None without examples, and for a model that refuses one of the first two methods."""
        grey = Example(Image.new("RGB", (96, 96), "grey"), "what is this ?")
        read = self.read if self.examples else Reader(self.speaker, {}, [grey], 4)
        events: list[dict] = []
        try:
            self.answer(read(self._first(read.examples[0].question)), events.append)
        except Mistake:
            return None
        return {"example": 0, "events": events} if self.examples else None

    @staticmethod
    def _first(question: str) -> bytes:
        ways = [{"choice": name} for name in FIRST]
        fields = {"picture": "example:0", "question": question, "ways": ways, "share": SHARE}
        return json.dumps(fields).encode()

    def about(self, shown: dict | None) -> dict:
        """What the page has to know at its start; ``shown``: of :meth:`warm_up`."""
        examples = [{"question": one.question, "answer": one.answer} for one in self.examples]
        return {
            "model": self.name,
            "layers": self.speaker.config.num_hidden_layers,
            "methods": [{"name": name, "about": one.description} for name, one in METHODS_OFFERED.items()],
            "rows": [{"name": name, "about": in_words(c)} for name, c in self.read.rows.items()],
            "share": SHARE,
            "first": FIRST,
            "rounds": ROUNDS,
            "examples": examples,
            "shown": shown,
        }

    async def stream(self, work: Callable[[Emit, Callable[[], None]], None]) -> AsyncIterator[bytes]:
        """The events of ``work(emit, check)``, one JSON a line, from a thread that stops when nobody reads
        them any more."""
        loop, events, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def emit(event: dict | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        def check() -> None:
            if gone.is_set():
                raise Gone

        threading.Thread(target=self._work, args=(work, emit, check), daemon=True, name="answer").start()
        self._waiting += 1
        try:
            while (event := await events.get()) is not None:
                yield json.dumps(event).encode() + b"\n"
        finally:
            self._waiting -= 1
            gone.set()

    def _work(self, work, emit, check) -> None:
        try:
            with self._alone:
                check()
                work(emit, check)
        except Gone:
            pass
        except Mistake as mistake:
            emit({"error": {"field": mistake.field, "message": str(mistake)}})
        except Exception:
            traceback.print_exc()
            sentence = "this did not work, through no fault of yours; the server's log says why"
            emit({"error": {"field": "question", "message": sentence}})
        finally:
            emit(None)

    async def respond(self, request: Request, work: Callable) -> Response:
        """The events of ``work(asked, emit, check)`` for what a request asks."""
        try:
            body = await request.body()
        except ClientDisconnect:
            return refusal(400, "the request broke off")
        if self._waiting >= WAITING:
            return refusal(503, "too many questions wait already; try again in a minute")
        lines = self.stream(lambda emit, check: work(self.read(body), emit, check))
        return StreamingResponse(lines, media_type="application/x-ndjson")


def build_app(desk: Desk, shown: dict | None, hosts: Sequence[str], per_minute: int):
    """The page as an ASGI application behind the gate, which lets a browser load from nowhere else."""
    about = json.dumps(desk.about(shown))
    pictures = [png(one.image) for one in desk.examples]

    def static(name: str) -> Route:
        content = (STATIC / name).read_bytes()

        async def give(request: Request) -> Response:
            return Response(content, media_type=_KINDS[name])

        return Route("/" if name == "page.html" else f"/{name}", give)

    async def start(request: Request) -> Response:
        return Response(about, media_type="application/json")

    async def example(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(pictures):
            return refusal(404, "there is nothing here")
        return Response(pictures[number], media_type="image/png")

    async def ask(request: Request) -> Response:
        return await desk.respond(request, desk.answer)

    async def measure(request: Request) -> Response:
        return await desk.respond(request, desk.measure)

    async def nothing(request: Request, error: Exception) -> Response:
        return refusal(404, "there is nothing here")

    app = Starlette(
        routes=[
            *map(static, _KINDS),
            Route("/start", start),
            Route("/example/{number:int}", example),
            Route("/ask", ask, methods=["POST"]),
            Route("/time", measure, methods=["POST"]),
        ],
        exception_handlers={404: nothing, 405: nothing},
    )
    return guarded(_AtHome(app), hosts, per_minute=per_minute, body_bytes=REQUEST_BYTES)


class _AtHome:
    """Sends the policy with every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, sending)
