"""What every server shares: who may ask, how often and how much, and an end in time."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from libra.utils.server import address_of, guarded, is_local, listen, names_of

ROOT = Path(__file__).parents[1]


async def echo(scope, receive, send):
    """Answers with the number of bytes of the body, which it reads as frameworks do: whatever happens
    meanwhile is a 400."""
    size, more, status = 0, True, 200
    try:
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
    except Exception:
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(app, method="POST", body=b"", parts=1, client="10.0.0.1", path="/", **headers):
    """Status, headers and body of an answer; the body comes in ``parts``, and its length is told where it is
    one."""
    headers = {
        "host": "localhost:80",
        **({"content-length": str(len(body))} if parts == 1 else {}),
        **headers,
    }
    step = -(-len(body) // parts) or 1
    pieces = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
    given = [
        {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces
    ]
    sent = []

    async def receive():
        return given.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "client": (client, 1),
        "query_string": b"",
        "scheme": "http",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(app(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    answer_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer_headers, sent[1]["body"]


def test_e8_a_name_that_begins_like_an_address_is_not_local():
    local = ("127.0.0.1", "127.8.9.1", "localhost", "LocalHost", "::1")
    assert all(map(is_local, local))
    for host in (
        "127.evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "0.0.0.0",
        "10.0.0.7",
        "::",
        "127",
    ):
        assert not is_local(host)
    assert names_of("127.0.0.1") == names_of("localhost") == ["127.0.0.1", "[::1]", "localhost"]
    assert "127.0.0.2" in names_of("127.0.0.2") and "[fd00::1]" in names_of("fd00::1")
    for host in ("127.0.0.1", "::1"):
        with suppress(ValueError), listen(host, 0) as listener:  # a machine may have no IPv6
            port = listener.getsockname()[1]
            assert address_of(listener) == f"{'[::1]' if ':' in host else host}:{port}"
    assert socket.gethostname() in names_of("0.0.0.0") and socket.gethostname() not in names_of("10.0.0.7")


def test_hosts_and_origins():
    app = guarded(echo, names_of("127.0.0.1"), per_minute=1000, body_bytes=10)
    for host, status in (
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("localhost.evil", 400),
        ("", 400),
    ):
        assert ask(app, host=host)[0] == status, host
    for origin in ("http://localhost:80", "https://LOCALHOST:80"):
        assert ask(app, origin=origin)[0] == 200, origin
    for origin in ("http://localhost", "null", "http://evil.example", "http://localhost:80.evil.example"):
        assert ask(app, origin=origin)[0] == 403, origin
    assert (
        ask(app, sec_fetch_site="cross-site")[0] == 403 and ask(app, sec_fetch_site="same-origin")[0] == 200
    )
    status, headers, _ = ask(app, "GET", origin="http://evil.example")
    assert (
        status == 200 and headers["cross-origin-resource-policy"] == "same-origin"
    )  # which the browser keeps from its page


@pytest.mark.parametrize("parts", [1, 7])
def test_bodies_have_a_limit(parts):
    app = guarded(echo, ["localhost"], per_minute=1000, body_bytes=100, larger={"/upload": 200})
    assert ask(app, body=b"x" * 100, parts=parts)[::2] == (200, b"100")
    status, _, body = ask(app, body=b"x" * 101, parts=parts)
    assert status == 413 and json.loads(body) == {"error": {"message": "the request has more than 100 bytes"}}
    assert ask(app, body=b"x" * 200, parts=parts, path="/upload")[0] == 200
    assert ask(app, body=b"x" * 201, parts=parts, path="/upload")[0] == 413


def test_requests_have_a_rate_a_client(monkeypatch):
    app = guarded(echo, ["localhost"], per_minute=6, body_bytes=100)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert [ask(app)[0] for _ in range(8)] == [200] * 6 + [429] * 2
    assert (
        ask(app)[1]["retry-after"] == "10"
        and ask(app, client="10.0.0.2")[0] == 200
        and ask(app, "GET")[0] == 200
    )
    now += 21
    assert [ask(app)[0] for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_e8_a_server_ends_in_time_whatever_its_threads_do(tmp_path, number):
    """One thread computes for ever, a request waits for it; what is to be cleaned up is."""
    script = tmp_path / "server.py"
    script.write_text(
        "import shutil, sys, threading, time\n"
        "from pathlib import Path\n"
        "from libra.utils.server import ends_in_time, guarded, listen, names_of, serve\n"
        "folder = Path(sys.argv[1])\n"
        "async def app(scope, receive, send):\n"
        "    if scope['type'] == 'lifespan':\n"
        "        return\n"
        "    threading.Thread(target=lambda: time.sleep(600)).start()\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': b'begun', 'more_body': True})\n"
        "    while True:\n"
        "        await receive()\n"
        "        time.sleep(600)\n"  # which stops the event loop itself
        "with ends_in_time(lambda: shutil.rmtree(folder, ignore_errors=True), seconds=1.0) as start_clock:\n"
        "    listener = listen('127.0.0.1', 0)\n"
        "    print(listener.getsockname()[1], flush=True)\n"
        "    serve(guarded(app, names_of('127.0.0.1'), per_minute=9, body_bytes=9), listener, start_clock)\n"
    )
    (tmp_path / "uploads").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "uploads")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n123")
        assert b"200 OK" in connection.recv(1000)
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == 0 and time.monotonic() - start < 5
    assert not (tmp_path / "uploads").exists()
