"""Tables that OpenAI-compatible servers answer."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from vllm_server import VllmServer

import libra
from eval import served
from eval.suites import get_table
from libra import Compression
from libra.lmms.samples import SampleLog
from libra.rows import EMBEDDED, Row
from llava.convert import convert

ROOT = Path(__file__).parents[1]
DIVPRUNE = Compression(method="divprune", ratio=0.5)


class Stub:
    """A server that says what a test wants and remembers what it was asked. ``down``: how many requests it
    turns away with a 503 first."""

    def __init__(self, owner: str = "libra", names=("mini",), usage: dict | None = None):
        self.asked, self.down, self.refuses = [], 0, ""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def say(self, status: int, content: dict):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                if self.path == "/version":
                    return self.say(200, {"version": "0.32.0"})
                data = [{"id": name, "owned_by": owner, "version": "7"} for name in names]
                self.say(200, {"object": "list", "data": data})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(body)
                if stub.down:
                    stub.down -= 1
                    return self.say(503, {"error": {"message": "no room"}})
                if stub.refuses:
                    return self.say(400, {"error": {"message": stub.refuses}})
                text = body["messages"][0]["content"][0]["text"]
                message = {"role": "assistant", "content": f" {text}! and more"}
                told = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                if "compression" in body:
                    told["compression"] = usage or {"settings": body["compression"]}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.say(
                    200,
                    {"id": "a", "object": "chat.completion", "created": 0, "model": "mini",
                     "choices": [choice], "usage": told},
                )  # fmt: skip

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def name_of(c: Compression | None) -> str:
    return json.dumps({"libra": libra.__version__, **(c.to_dict() if c else {})})


def row(c: Compression, attention: str = "sdpa") -> Row:
    return Row("mini", c, name="r", attention=attention)


# --- what a server says of itself, and what it can do ---


def test_a_server_says_what_it_is():
    with Stub() as ours, Stub("vllm", ("big", name_of(DIVPRUNE))) as theirs, Stub("openai") as other:
        assert served.ask(ours.url + "/v1/") == served.Server(ours.url, "libra.serve", "7", "mini")
        found = served.ask(theirs.url)
        assert (found.engine, found.model, found.compression) == ("vLLM", "big", DIVPRUNE.to_dict())
        assert found.version == f"0.32.0, libra {libra.__version__}"
        with pytest.raises(ValueError, match="neither"):
            served.ask(other.url)
        with pytest.raises(ValueError, match="the servers differ"):
            served.ask_all([ours.url, theirs.url])
    with Stub("vllm", ("big",)) as silent, pytest.raises(ValueError, match="serve_vllm.sh"):
        served.ask(silent.url)
    with pytest.raises(ValueError, match="does not answer"):
        served.ask(ours.url)


def test_a_vllm_server_may_have_the_name_of_its_compression_only():
    with Stub("vllm", (name_of(DIVPRUNE),)) as theirs:
        found = served.ask(theirs.url)
    assert (found.model, found.compression) == (name_of(DIVPRUNE), DIVPRUNE.to_dict())


def test_what_answers_no_object_is_refused(monkeypatch):
    request = httpx.Request("GET", "http://one")
    answers = iter([httpx.Response(200, json=["mini"], request=request), httpx.ReadTimeout("")])

    def get(*_, **__):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with monkeypatch.context() as context:
        context.setattr(httpx, "get", get)
        with pytest.raises(ValueError, match="^http://one/v1/models answers with something else than"):
            served.ask("http://one")
        with pytest.raises(ValueError, match=r"does not answer \(ReadTimeout\)"):
            served.ask("http://one")
    with pytest.raises(ValueError, match=r"^http://\[/v1/models does not answer \("):
        served.ask("http://[")


def test_what_a_request_adds_for_a_row():
    ours = served.Server("u", "libra.serve", "1", "mini")
    assert served.body(ours, row(DIVPRUNE)) == {"compression": DIVPRUNE.to_dict()}
    assert served.body(ours, row(Compression(method="vanilla"))) == {"compression": "vanilla"}
    theirs = served.Server("u", "vLLM", "1", "big", DIVPRUNE.to_dict())
    assert served.body(theirs, row(DIVPRUNE)) == {}
    assert served.body(theirs, row(Compression(method="vanilla"))) == {
        "mm_processor_kwargs": {"libra_ratio": 0}
    }
    more = Compression(method="divprune", ratio=0.75)
    assert served.body(theirs, row(more)) == {"mm_processor_kwargs": {"libra_ratio": 0.75}}
    counted = Compression(method="divprune", keep=57)  # of 256
    assert served.body(theirs, row(counted)) == {"mm_processor_kwargs": {"libra_ratio": 1 - 57 / 256}}
    assert served.extra(theirs, row(DIVPRUNE)) == {"add_special_tokens": True}
    assert served.extra(ours, row(DIVPRUNE)) == {"compression": DIVPRUNE.to_dict()}
    plain = served.Server("u", "vLLM", "1", "big", {})
    assert served.body(plain, row(Compression(method="vanilla"))) == {}
    for server, c in (
        (theirs, Compression(method="visionzip", ratio=0.5)),
        (theirs, Compression(method="divprune", keep=57, positions="compact")),
        (plain, DIVPRUNE),
    ):
        with pytest.raises(ValueError, match="which is not this row"):
            served.body(server, row(c))
    with pytest.raises(ValueError, match="attention: eager"):
        served.body(ours, row(DIVPRUNE, "eager"))


def test_tokens_that_each_picture_decides_are_not_counted_beforehand():
    """Its cells failed: the field's rows of PruMerge are such."""
    adaptive = {"method": "prumerge", "keep": "adaptive"}
    assert served.tokens(Row("mini", Compression.from_dict(adaptive))) == []
    two = {"steps": [adaptive, {"method": "libra", "layers": [5]}]}
    assert served.tokens(Row("mini", Compression.from_dict(two))) == []
    assert served.tokens(Row("mini", Compression(method="divprune", keep=9))) == [9] * 12


def test_tables_that_take_times_or_trained_checkpoints_need_this_machine():
    server = served.Server("u", "libra.serve", "1", "mini")
    assert served.check_rows(get_table("1"), {"r": row(DIVPRUNE)}, [server]) == server.identity
    for name, rows in (("7", ["vanilla"]), ("E", [f"{get_table('E').trained[0]}_r50"])):
        with pytest.raises(ValueError, match="without --server"):
            served.check_rows(get_table(name), dict.fromkeys(rows, row(DIVPRUNE)), [server])


def test_options_that_the_servers_choose(capsys):
    from eval import run

    for option in (["--dtype", "float16"], ["--checkpoint", "x"], ["--device", "cpu"]):
        with pytest.raises(SystemExit) as stop:
            run.main(["--table", "1", "--server", "http://127.0.0.1:9", *option])
        assert stop.value.code == 2
        assert "is the servers' to choose" in capsys.readouterr().err


# --- answers ---


def requests(texts) -> list:
    def shown(document):
        return [Image.new("RGB", (8, 8), (255, 0, 0))]

    options = {"max_new_tokens": 5, "until": ["!"]}
    return [SimpleNamespace(args=(text, options, shown, i, "t", "test")) for i, text in enumerate(texts)]


@pytest.fixture
def asking(tmp_path):
    """A model of a stub: (stub, row, blind) → the model, and what it was told of samples."""
    from eval.served_model import ServedModel

    logs = []

    def make(stub, c: Compression = DIVPRUNE, blind: bool = False):
        if logs:
            logs[-1].close()  # of one file, which one process at a time holds
        server, heard = served.ask(stub.url), []
        harness = object.__new__(served.ServedHarness)
        harness.url = stub.url
        logs.append(SampleLog(tmp_path / "log.jsonl", "settings", lambda record: True))
        model = ServedModel(server, "none", 2)
        model.client = harness._client(model.client, server, row(c))
        model.sees = SimpleNamespace(log=logs[-1], on_samples=heard.append, blind=blind, tokens=[3.0])
        model.task_dict = {"t": {"test": [None] * 9}}
        return model, heard

    yield make
    for log in logs:
        log.close()


def test_answers_come_in_order_and_are_not_asked_twice(asking):
    with Stub() as stub:
        model, heard = asking(stub)
        assert model.generate_until(requests(["one", "two", "three"])) == ["one", "two", "three"]
        assert heard == [2, 1] and len(stub.asked) == 3
        assert all(body["compression"] == DIVPRUNE.to_dict() for body in stub.asked)
        assert all(body["max_tokens"] == 5 and body["temperature"] == 0 for body in stub.asked)
        assert model.records["t", 1]["tokens"] == [3.0]
        again, heard = asking(stub)
        assert again.generate_until(requests(["one", "other", "three", "four"])) == [
            "one", "other", "three", "four"
        ]  # fmt: skip
        assert heard == [2, 2] and len(stub.asked) == 5


def test_grey_pictures_of_the_blind_run(asking):
    with Stub() as stub:
        asking(stub)[0].generate_until(requests(["one"]))
        seen = stub.asked[-1]["messages"][0]["content"][1]["image_url"]["url"]
    with Stub() as stub:
        model, _ = asking(stub, blind=True)
        model.sees.log = SimpleNamespace(get=lambda *_: None, append=lambda records: None)
        model.generate_until(requests(["one"]))
        assert stub.asked[-1]["messages"][0]["content"][1]["image_url"]["url"] != seen


@pytest.mark.slow
def test_a_server_that_is_down_is_waited_for(asking, monkeypatch):
    monkeypatch.setattr(served, "PAUSE", 0.01)
    with Stub() as stub:
        model, _ = asking(stub)
        stub.down = 6  # the client itself tries three times
        assert model.generate_until(requests(["one"])) == ["one"]
        monkeypatch.setattr(served, "PATIENCE", -1.0)
        stub.down = 6
        with pytest.raises(served.Refusal, match="does not answer any more"):
            model.generate_until(requests(["other"]))


def test_a_refusal_ends_the_cell_at_once(asking):
    with Stub() as stub:
        model, _ = asking(stub)
        stub.refuses = "the text is too long"
        with pytest.raises(served.Refusal, match="the text is too long"):
            model.generate_until(requests(["one"]))
        assert len(stub.asked) == 1


def test_a_server_that_does_something_else_is_not_believed(asking):
    with Stub(usage={"settings": {"method": "fastv"}}) as stub:
        with pytest.raises(served.Refusal, match="not what was asked"):
            asking(stub)[0].generate_until(requests(["one"]))


# --- a table ---


class OurServer:
    """libra.serve, as :class:`vllm_server.VllmServer`: it can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0

    def start(self) -> None:
        command = [sys.executable, "-m", "libra.serve", "--port", str(self.port), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def wait(self) -> None:
        line = self.process.stdout.readline()
        assert "/v1" in line, line + (self.folder / "server.log").read_text()
        self.url, _, _ = line[line.index("http") :].partition("/v1")
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def two_servers(kind: str, folder: Path) -> list:
    if kind == "libra.serve":
        return [OurServer(folder) for _ in range(2)]
    if not (ROOT / ".venv-vllm").exists():
        pytest.skip("vLLM has an environment of its own: bash scripts/test_vllm.sh makes it")
    convert(str(EMBEDDED), str(folder / "mini"))
    return [VllmServer(folder, folder / "mini", "mini/field/c33_divprune_original") for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "table", "rows"),
    [
        ("libra.serve", "1", "vanilla,r50,fastv,blind"),
        ("vLLM", "field", "vanilla,c33_divprune_original,c22_divprune_original"),
    ],
)
def test_a_table_of_two_servers_one_killed_and_restarted_is_the_pools(kind, table, rows, tmp_path):
    servers = two_servers(kind, tmp_path)
    asked = ["--table", table, "--rows", rows, "--tasks", "reading,position", "--limit", "24"]
    run = [sys.executable, "-m", "eval.run", *asked, "--benchmark", str(tmp_path / "benchmark")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pool, output = tmp_path / "pool", tmp_path / "apart" / "served"
    subprocess.run([*run, "--processes", "1", "--output", str(pool)], check=True, cwd=ROOT, env=environment)
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        own = ["--server", ",".join(server.url for server in servers), "--batch-size", "4"]
        filling = subprocess.Popen([*run, *own, "--output", str(output)], cwd=ROOT, env=environment)
        while not list((output / "samples").glob("*.jsonl")) and filling.poll() is None:
            time.sleep(0.2)
        servers[0].kill()
        time.sleep(3)
        servers[0].start()
        servers[0].wait()
        assert filling.wait() == 0
    finally:
        for server in servers:
            if hasattr(server, "process"):
                server.kill()
    names = sorted(path.name for path in (pool / "cells").glob("*.json"))
    assert len(names) == 2 * len(rows.split(",")) == len(list((output / "cells").glob("*.json")))
    for name in names:
        own, other = (json.loads((folder / "cells" / name).read_text()) for folder in (output, pool))
        for key in ("score", "stderr", "n", "correct", "groups", "tokens_per_layer"):
            assert own[key] == other[key], (name, key)
        assert own["server"]["engine"] == kind and libra.__version__ in own["server"]["version"]
        assert own["config_hash"] != other["config_hash"]
        does, asked_for = own["server"]["does"], own["server"]["asked"]
        assert does["keep"] == 85 if kind == "vLLM" else asked_for["compression"]
    (page,) = output.glob("*.md")
    assert f"answered by servers: {kind}" in page.read_text()
