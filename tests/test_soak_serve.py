"""A thousand requests to the running server: its memory does not grow, and nobody's place stays taken."""

import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from serve_client import Served, data_uri, endless, message  # noqa: E402
from test_soak_page import held, photo  # noqa: E402

FIRST, LAST, MEGABYTES = 100, 1000, 50
COMPRESSIONS = (
    "mini/r50",
    "fastv",
    {"method": "turbo", "layers": [3], "ratio": 0.6},
    "vanilla",
    "pyramiddrop",
)


def leave(server: Served) -> None:
    """Ask for a long answer, read its beginning, and go."""
    body = json.dumps({"messages": [message("hello")], "max_tokens": 500, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert connection.recv(100)


@pytest.mark.soak
def test_a_thousand_requests_leave_the_memory_as_it_was(tmp_path):
    """Of every compression, as a stream or whole; every fifth is a mistake, every seventh client leaves."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    memory = {}
    with Served(tmp_path, *endless(tmp_path)) as server:
        client = server.client()
        for number in range(1, LAST + 1):
            if number % 7 == 0:
                leave(server)
            data = b"no image" if number % 5 == 0 else photo(number)
            part = {"type": "image_url", "image_url": {"url": data_uri(data)}}
            content = [part, {"type": "text", "text": f"how many digits ? {number}"}]
            named = dict(model="mini", max_tokens=8, stream=number % 2 == 0)
            named["extra_body"] = {"compression": COMPRESSIONS[number % len(COMPRESSIONS)]}
            try:
                answer = client.chat.completions.create(
                    messages=[{"role": "user", "content": content}], **named
                )
                told = list(answer)[-1].usage if number % 2 == 0 else answer.usage
                assert told.compression["visual_tokens"] == 256 and number % 5
            except openai.BadRequestError:
                assert number % 5 == 0
            memory[number] = held(server.process.pid)
        server.wait_for("held", 0)
        left = server.metric("disconnects_total")
        log = server.log()
    grown = memory[LAST] - memory[FIRST]
    after = ", ".join(f"{number}: {memory[number]:.0f}" for number in (1, FIRST, LAST))
    print(f"\nMB after request {after}; grown by {grown:.1f}; {left:.0f} clients left")
    assert grown <= MEGABYTES and left == LAST // 7 and "Traceback" not in log
