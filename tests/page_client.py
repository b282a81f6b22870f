"""The page in a process of its own, and a client that speaks to it as a browser does, or as an attacker."""

import json
import uuid
from http.client import HTTPConnection
from pathlib import Path

from server_process import ServerProcess

ROOT = Path(__file__).parents[1]


class RunningPage(ServerProcess):
    """``with RunningPage(folder) as page``; its uploads and its log lie in the folder.

    Attributes:
        refusals: the texts of all answers so far that refused something.
    """

    def __init__(self, folder: Path, *options: str):
        self.refusals = []
        options = options or ("--per-minute", "100000")
        line = r"^open (http://127\.0\.0\.1:(\d+)) in a browser"
        super().__init__(folder, "libra.mini.page", line, options)

    def __enter__(self):
        super().__enter__()
        config = json.loads(self.get("/config")[1])
        self.ask_index = next(one["id"] for one in config["dependencies"] if one["api_name"] == "ask")
        return self

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
        if status >= 400:
            self.refusals.append(content.decode(errors="replace"))
        return status, content

    def upload(self, data: bytes, name: str = "a.png", chunked: bool = False, refused: bool = False):
        """The path that the server gives an upload; the status where it is to be refused."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
        sent = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
        status, answer = self.post(
            "/gradio_api/upload", sent, **{"Content-Type": f"multipart/form-data; boundary={mark}"}
        )
        return status if refused else json.loads(answer)[0]

    def join(self, values: list, session: str | None = None) -> tuple[int, bytes]:
        body = {"data": values, "fn_index": self.ask_index, "session_hash": session or uuid.uuid4().hex}
        return self.post("/gradio_api/queue/join", json.dumps(body))

    def ask(
        self,
        image,
        question="how many digits are there ?",
        choice="mini/r50.yaml",
        method="libra",
        layers="2",
        ratio=0.5,
    ):
        """What the page's fields are set to, as Gradio's events tell it."""
        session = uuid.uuid4().hex
        if isinstance(image, dict) and "path" in image:
            image = {"meta": {"_type": "gradio.FileData"}, **image}
        status, answer = self.join([image, question, choice, method, layers, ratio], session)
        assert status == 200, answer
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        response = connection.getresponse()
        try:
            for line in response:
                event = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if event.get("msg") == "process_completed":
                    assert event["success"], event
                    return event["output"]
        finally:
            connection.close()
        raise AssertionError("the page did not answer")
