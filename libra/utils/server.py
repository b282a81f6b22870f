"""What every server of this project needs: who may ask, how often and how much, and an end in time.

A server in front of a model listens where a browser can reach it, and so can every page that the browser
shows. The gate answers only to the names that the server was bound to (a foreign site's name that resolves
here is refused), takes changes only from its own pages, and limits requests and their bodies. It knows
nothing of what is served.

Starlette and uvicorn come with a server's own packages, so they are imported when they are needed.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

SECONDS_TO_END = 3.0  # between SIGTERM and the end of the process, whatever its threads do
_READING = ("GET", "HEAD", "OPTIONS")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
)
_ADDRESSES = 10_000  # that the rate limit remembers


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server at that address; a name that merely begins like one is not
    local."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def names_of(host: str) -> list[str]:
    """The names by which a browser may call a server that listens at ``host``, as they stand in a Host
    header."""
    names = {"localhost", "127.0.0.1", "::1", host}
    if host in ("0.0.0.0", "::"):  # all of this machine's addresses
        names |= {socket.gethostname(), socket.getfqdn(), *_addresses(socket.gethostname())}
    return sorted(map(_in_url, names))


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _addresses(name: str) -> set[str]:
    try:
        return {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None)}
    except OSError:
        return set()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError where there can be none."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{_in_url(host)}:{port} cannot be used ({reason}); choose another --port or --host"
        ) from None


def address_of(listener: socket.socket) -> str:
    """Where a listening socket is reached, as it stands in a URL: ``127.0.0.1:8000`` or ``[::1]:8000``."""
    host, port = listener.getsockname()[:2]
    return f"{_in_url(host)}:{port}"


def refusal(status: int, sentence: str, **headers: str):
    """An ASGI answer that says in a sentence why there is no other."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"message": sentence}}, status, headers or None)


def guarded(
    app,
    hosts: Sequence[str],
    *,
    per_minute: int | None,
    body_bytes: int,
    larger: Mapping[str, int] | None = None,
    origins: Sequence[str] = (),
):
    """An ASGI application behind the gate.

    Args:
        hosts: names that a request may be addressed to (see :func:`names_of`); others get 400.
        per_minute: requests that change or compute something (not GET) which one client may send; more get
            429. None: any number.
        body_bytes: of a request; more get 413.
        larger: beginnings of paths with another limit.
        origins: other sites, such as ``https://chat.example``, whose pages may send requests and read the
            answers.
    """
    from starlette.middleware.cors import CORSMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    origins = tuple(origin.lower().rstrip("/") for origin in origins)
    gate: Callable = _Gate(app, _Rate(per_minute), body_bytes, larger or {}, origins)
    if origins:
        gate = CORSMiddleware(gate, origins, allow_methods=("GET", "POST"), allow_headers=("*",))
    return TrustedHostMiddleware(gate, list(hosts), www_redirect=False)


class _Gate:
    def __init__(
        self, app, rate: "_Rate", body_bytes: int, larger: Mapping[str, int], origins: tuple[str, ...]
    ):
        self.app, self.rate, self.body_bytes, self.larger = app, rate, body_bytes, larger
        self.origins = origins

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["type"] == "websocket" or scope["method"] not in _READING:
            refused = self._foreign(headers) or self._too_often(scope)
            if refused is not None:
                return await refused(scope, receive, send)
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        limit = next(
            (size for start, size in self.larger.items() if scope["path"].startswith(start)), self.body_bytes
        )
        too_large = refusal(413, f"the request has more than {limit:,} bytes")
        if int(headers.get("content-length") or 0) > limit:
            return await too_large(scope, receive, send)
        body = _CountedBody(receive, limit)
        answer = _Answer(send, body, too_large, scope)
        try:
            await self.app(scope, body.receive, answer.send)
        except _TooLarge:
            await answer.refuse()

    def _foreign(self, headers: dict[str, str]):
        """The refusal of a request on behalf of another site's page. Browsers say so; other programs need
        not."""
        origin = headers.get("origin")
        if origin is not None and origin.lower() in self.origins:
            return None
        same = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
        if same and headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return None
        return refusal(403, "requests from pages of other sites are refused")

    def _too_often(self, scope):
        seconds = self.rate.wait((scope.get("client") or ("", 0))[0])
        if not seconds:
            return None
        return refusal(
            429, f"too many requests; try again in {seconds:.0f} s", **{"Retry-After": f"{seconds:.0f}"}
        )


class _TooLarge(Exception):
    pass


class _CountedBody:
    def __init__(self, receive, limit: int):
        self._receive, self.left = receive, limit

    async def receive(self):
        message = await self._receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise _TooLarge
        return message


class _Answer:
    """The application's answer with the gate's headers; the refusal in its place where the body was too
    large."""

    def __init__(self, send, body: _CountedBody, too_large, scope):
        self._send, self._body, self._too_large, self._scope = send, body, too_large, scope
        self._started = self._replaced = False

    async def send(self, message):
        if (
            self._body.left < 0 and not self._started
        ):  # frameworks answer an exception while they read with their own words
            return await self.refuse()
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._started = True
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await self._send(message)

    async def refuse(self):
        if not self._started and not self._replaced:
            self._replaced = True
            await self._too_large(self._scope, None, self._send)


class _Rate:
    """A bucket of requests for each client, refilled over a minute; None is a bucket without a bottom."""

    def __init__(self, per_minute: int | None):
        self.per_minute = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = (
            OrderedDict()
        )  # client → requests left, at this time

    def wait(self, client: str) -> float:
        """Takes one request; the seconds until there is one again, 0 where it is granted."""
        if self.per_minute is None:
            return 0.0
        now = time.monotonic()
        left, then = self._left.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        granted = left >= 1
        self._left[client] = (left - granted, now)
        if len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if granted else max(1.0, (1 - left) * 60 / self.per_minute)


async def whole_body(receive) -> bytes | None:
    """A request's body, read to its end; None where the client has gone before it."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def given_again(body: bytes, receive):
    """A ``receive`` that gives a body that was read already, and then what follows."""
    given = False

    async def again():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body}

    return again


@contextmanager
def ends_in_time(
    clean_up: Callable[[], None], seconds: float = SECONDS_TO_END
) -> Iterator[Callable[[], None]]:
    """SIGTERM and Ctrl-C end the process with exit status 0: what runs inside is left, then ``clean_up`` is
    called.

    Threads that still compute are not waited for, and after ``seconds`` nothing is. ``clean_up`` is called in
    any case, perhaps twice. Gives a function that starts the clock, for whoever handles the signals in
    between.
    """
    signalled = threading.Event()

    def end_now():
        clean_up()
        sys.stdout.flush()
        os._exit(0)

    def start_clock():
        signalled.set()
        clock = threading.Timer(seconds, end_now)
        clock.daemon = True
        clock.start()

    def on_signal(number, frame):
        start_clock()
        raise SystemExit(0)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield start_clock
    finally:
        if signalled.is_set():
            end_now()
        clean_up()
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(app, listener: socket.socket, start_clock: Callable[[], None], grace: int = 1) -> None:
    """Answer requests until SIGTERM or Ctrl-C; inside :func:`ends_in_time`, whose clock it starts then.

    Args:
        grace: seconds in which answers that have begun may still come to their end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, number, frame):
            start_clock()
            # Answers that are cut off from now on are no errors, and need no traceback.
            for name in ("uvicorn.error", "asyncio"):  # the latter: an answer for a request that was cut off
                logging.getLogger(name).setLevel(logging.CRITICAL)
            super().handle_exit(number, frame)

    settings = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=grace,
        limit_concurrency=256,
        server_header=False,
        date_header=False,
    )
    Server(settings).run(sockets=[listener])
