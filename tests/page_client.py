"""The page in a process of its own, and a client that speaks to it as a browser does, or as an attacker."""

import base64
import json
from http.client import HTTPConnection
from pathlib import Path

from server_process import ServerProcess

ROOT = Path(__file__).parents[1]
WAYS = ({"choice": "libra"}, {"choice": "fastv"})


def data_uri(picture: bytes) -> str:
    """A picture's bytes as the page sends them."""
    return f"data:;base64,{base64.b64encode(picture).decode('ascii')}"


def fields(picture, question="how many digits are there ?", ways=WAYS, share=50, **others) -> dict:
    """What the page's fields are set to; ``picture``: bytes of an upload, or the field's value."""
    given = data_uri(picture) if isinstance(picture, bytes) else picture
    return {"picture": given, "question": question, "ways": ways, "share": share, **others}


class RunningPage(ServerProcess):
    """``with RunningPage(folder) as page``; its log lies in the folder.

    Attributes:
        refusals: the texts of all answers so far that refused something.
    """

    def __init__(self, folder: Path, *options: str):
        self.refusals = []
        options = options or ("--per-minute", "100000")
        line = r"^open (http://127\.0\.0\.1:(\d+)) in a browser"
        super().__init__(folder, "libra.mini.page", line, options)

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        return self._request("GET", path, None, headers)

    def post(self, path: str, body, **headers: str) -> tuple[int, bytes]:
        return self._request("POST", path, body, {"Content-Type": "application/json", **headers})

    def _request(self, method: str, path: str, body, headers: dict) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            try:
                connection.request(method, path, body, headers)
            except (
                BrokenPipeError,
                ConnectionResetError,
            ):  # refused before all was sent; the answer is there
                pass
            response = connection.getresponse()
            status, content = response.status, response.read()
        finally:
            connection.close()
        if status >= 400 or b'"error"' in content[:20]:
            self.refusals.append(content.decode(errors="replace"))
        return status, content

    def ask(self, *values, path: str = "/ask", **others) -> list[dict]:
        """The events of an answer, or of a measurement, to :func:`fields`' arguments."""
        status, answer = self.post(path, json.dumps(fields(*values, **others)))
        assert status == 200, answer
        return [json.loads(line) for line in answer.splitlines()]

    def begun(self, *values) -> HTTPConnection:
        """The connection of a question that is being answered."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/ask", json.dumps(fields(*values)), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert b'"begin"' in response.readline()
        return connection
