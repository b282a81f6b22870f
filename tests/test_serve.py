"""The OpenAI-compatible server, asked with the stock client."""

import base64
import json
import signal
import socket
import threading
import time
from importlib import metadata
from io import BytesIO

import numpy as np
import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from PIL import Image  # noqa: E402
from serve_client import Reference, Served, ask_at_once, data_uri, endless, message, png, questions  # noqa: E402

import libra  # noqa: E402
from libra.mini.huggingface import load  # noqa: E402
from libra.serve import command  # noqa: E402
from libra.serve.usage import figures  # noqa: E402

try:
    command.check_packages()
except ValueError as wrong_version:
    pytest.skip(str(wrong_version), allow_module_level=True)

KEY = "a-key-of-the-test"
METHODS = [
    {"method": "libra", "ratio": 0.5},
    {"method": "fastv", "ratio": 0.75},
    {"method": "divprune", "keep": 64},
    {"method": "pyramiddrop"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ("--api-key", KEY, "--allow-origin", "https://chat.example", "--compression", "mini/r50")
    with Served(tmp_path_factory.mktemp("serve"), *options) as running:
        yield running
        assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def long_server(tmp_path_factory):
    """Its answers end at their limit only."""
    folder = tmp_path_factory.mktemp("endless")
    with Served(folder, *endless(folder)) as running:
        yield running
        assert "Traceback" not in running.log()


@pytest.fixture(scope="module")
def reference():
    return Reference(*load())


@pytest.fixture
def ask(server):
    """Asks with the stock client: (messages, compression …) → the answer."""
    client = server.client(KEY)

    def asking(*messages, compression=None, **named):
        extra = {} if compression is None else {"extra_body": {"compression": compression}}
        named = {"model": "mini", "max_tokens": 12, "temperature": 0, **named}
        return client.chat.completions.create(messages=list(messages), **named, **extra)

    return asking


@pytest.fixture
def post(server):
    """Status and sentence of a raw request."""

    def posting(body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=120
        )
        return answer.status_code, answer.json().get("error", {}).get("message")

    return posting


def picture(side: int = 96, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def check_equal(server, reference, count: int, clients: int = 8) -> None:
    """Four methods, mixed among the clients, against the same in one process."""
    asked = questions(count)
    expected = {i: reference.answers(method, asked) for i, method in enumerate(METHODS)}
    jobs = [(i, number) for number in range(count) for i in range(len(METHODS))]
    left = server.metric("disconnects_total", KEY)
    got = ask_at_once(server, [(METHODS[i], *asked[number]) for i, number in jobs], clients, KEY)
    server.wait_for("held", 0, KEY)
    assert server.metric("disconnects_total", KEY) == left
    assert got == [expected[i][number] for i, number in jobs]
    answers = [[text for text, _ in expected[i]] for i in expected]
    assert any(one != answers[0] for one in answers)  # so the methods do not all say the same


def test_answers_are_those_of_attach_in_one_process(server, reference):
    check_equal(server, reference, 16)


@pytest.mark.slow
def test_two_hundred_questions_have_the_answers_of_attach(server, reference):
    check_equal(server, reference, 200)


def test_usage_tells_what_became_of_the_tokens(ask, reference):
    image, text = questions(1)[0]
    compression = libra.Compression(method="libra", layers=(2, 5), ratio=2 / 3)
    with libra.attach(reference.model, compression) as handle:
        reference.answer(text, [image])
        stats = handle.stats
    answer = ask(message(text, image), compression={"method": "libra", "layers": [2, 5], "ratio": "2/3"})
    usage, told = answer.usage, answer.usage.compression
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = reference.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert usage.prompt_tokens == reference.processor(text=prompt, images=[image]).input_ids[0].__len__()
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert told["settings"] == compression.to_dict() and told["visual_tokens"] == 256
    seen = [row[0] for row in stats["visual_tokens"]]
    assert [(place["at"], place["visual"]) for place in told["tokens"]] == [(2, seen[3]), (5, seen[6])]
    assert told["average_tokens"] == round(sum(seen) / 12, 2)
    assert told["flops_saved"] == round(1 - stats["flops_ratio"][0], 4)
    whole = usage.prompt_tokens * 12
    per_column = 2 * 128 * 4  # keys and values of a layer in float32
    assert told["cache_saved_bytes"] == whole * per_column - stats["cache"]["total"]
    assert told["cache_saved"] == pytest.approx(told["cache_saved_bytes"] / whole / per_column, abs=1e-4)


def test_usage_of_a_decoder_whose_flops_are_not_known():
    """The formula does not describe experts, for example."""
    stats = {
        "visual_tokens": [[8], [4]],
        "compensation_tokens": [[0], [0]],
        "flops_ratio": None,
        "cache": None,
    }
    told = figures(libra.Compression(method="fastv", layers=(0,), ratio=0.5), stats, 8, 12, 2)
    assert told["flops_saved"] is None and told["average_tokens"] == 6


def test_visual_tokens_are_counted_where_the_tower_has_their_id():
    """As in Phi-4-multimodal; a request without visual tokens would have no figures of its compression."""
    from types import SimpleNamespace

    import torch

    from libra.serve.prompt import Prompter

    config = SimpleNamespace(vision_config=SimpleNamespace(image_token_id=90))
    model = SimpleNamespace(model=SimpleNamespace(config=config), processor=SimpleNamespace(), context=8)
    prompter = Prompter(model)
    assert prompter.visual({"input_ids": torch.tensor([[90, 90, 3]])}) == 2
    assert not prompter.takes_videos


def test_a_request_without_a_compression_has_the_servers_and_vanilla_has_none(ask):
    image, text = questions(1)[0]
    own = ask(message(text, image)).usage.compression
    assert own["settings"] == libra.Compression.named("mini/r50").at_depth(12).to_dict()
    assert ask(message(text, image), compression="mini/r50").usage.compression == own
    told = ask(message(text, image), compression={"method": "visionzip", "keep": 64}).usage.compression
    assert told["tokens"] == [{"at": "input", "visual": 64, "compensation": 0}]
    assert told["average_tokens"] == 64 and told["cache_saved_bytes"] == 192 * 12 * 2 * 128 * 4
    for vanilla in ("vanilla", {"method": "vanilla"}):
        told = ask(message(text, image), compression=vanilla).usage.compression
        assert (told["tokens"], told["average_tokens"], told["flops_saved"]) == ([], 256, 0)


def test_text_only_several_pictures_and_turns(ask, reference):
    libra_half = METHODS[0]
    answer = ask(message("what is it ?"), compression=libra_half)
    with libra.attach(reference.model, libra.Compression.from_dict(libra_half)):
        assert answer.choices[0].message.content == reference.answer("what is it ?", [])[0]
        told = answer.usage.compression
        assert (told["visual_tokens"], told["tokens"], told["cache_saved"]) == (0, [], 0)
        two = [picture(seed=1), picture(seed=2)]
        answer = ask(message("which digit is larger ?", *two), compression=libra_half)
        assert answer.choices[0].message.content == reference.answer("which digit is larger ?", two)[0]
    assert answer.usage.compression["visual_tokens"] == 512
    turns = [message("how many ?", two[0]), {"role": "assistant", "content": "3"}, message("and now ?")]
    assert ask(*turns).usage.compression["visual_tokens"] == 256


def video_file(frames: list[Image.Image]) -> bytes:
    av = pytest.importorskip("av")
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=5)
        track.width, track.height = frames[0].size
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_image(frame)))
        container.mux(track.encode())
    return file.getvalue()


def test_a_video_is_shown_as_frames(ask):
    frames = [picture(seed=seed) for seed in range(10)]

    def asked(url, **more):
        part = {"type": "video_url", "video_url": {"url": url, **more}}
        return ask({"role": "user", "content": [part, {"type": "text", "text": "how many ?"}]}).usage

    file = data_uri(video_file(frames), "video/mp4")
    assert asked(file, frames=3).compression["visual_tokens"] == 3 * 256
    pieces = ",".join(base64.b64encode(jpeg(frame)).decode() for frame in frames[:2])
    listed = asked(f"data:video/jpeg;base64,{pieces}")
    assert listed.compression["visual_tokens"] == 2 * 256
    for url, sentence in (
        (data_uri(b"no video", "video/mp4"), "the video cannot be read"),
        ("data:video/jpeg;base64,AAAA,AAAA", "the image no. 1 of a video is in no known format"),
        ("/etc/passwd", "files of this machine are not read here"),
        ("http://127.0.0.1/a.mp4", "is an address, which is not taken here"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence) as refused:
            asked(url)
        assert "libra-serve-" not in str(refused.value)


def jpeg(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def test_a_stream_ends_with_usage_and_done(server, ask):
    image, text = questions(1)[0]
    whole = ask(message(text, image))
    body = {"messages": [message(text, image)], "max_tokens": 12, "temperature": 0, "stream": True}
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[-1]["choices"][0]["finish_reason"] == whole.choices[0].finish_reason
    assert chunks[-1]["usage"]["compression"] == whole.usage.compression
    assert chunks[-1]["usage"]["prompt_tokens"] == whole.usage.prompt_tokens


def test_an_answer_ends_at_its_limit_and_before_a_stop(long_server):
    def ask(**named):
        named = {"model": "mini", "messages": [message("hello")], "max_tokens": 30, "temperature": 0, **named}
        return long_server.client().chat.completions.create(**named)

    long = ask()
    text = long.choices[0].message.content
    assert long.usage.completion_tokens == 30 and long.choices[0].finish_reason == "length"
    stop = text[5:8]
    cut = ask(stop=[stop, "never"]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = list(ask(stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut.message.content
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens < 30


def test_a_seed_repeats_a_sampled_answer(ask):
    def said(seed):
        named = dict(temperature=1.5, max_tokens=20, seed=seed)
        return ask(message("hello"), **named).choices[0].message.content

    assert said(1) == said(1) and len({said(seed) for seed in range(4)}) > 1
    greedy, cold = (ask(message("hello"), temperature=number, max_tokens=20) for number in (0, 1e-300))
    assert cold.choices[0].message.content == greedy.choices[0].message.content


WRONG = [
    ({"compression": "nope"}, "compression: nope is neither a method nor a row"),
    ({"compression": "/etc/passwd"}, "compression: /etc/passwd is neither a method nor a row"),
    ({"compression": "configs/mini/r50.yaml"}, "is neither a method nor a row"),
    ({"compression": "llava7b_r50"}, "layers: 15 is out of range: the model has layers 0 to 11"),
    ({"compression": {"method": "libra", "layers": [99]}}, "layers: 99 is out of range"),
    ({"compression": {"metod": "libra"}}, "did you mean method?"),
    ({"compression": {"method": "libra", "select": "/tmp/mine.py"}}, "select: /tmp/mine.py is unknown"),
    ({"compression": {"method": "libra", "ratio": "1e9999"}}, "ratio"),
    ({"compression": [1]}, "compression: [1] is not a mapping"),
    ({"model": "gpt-5"}, "this server has the model mini only"),
    ({"messages": []}, "messages: give a list such as"),
    ({"messages": "hello"}, "messages: give a list such as"),
    ({"messages": [{"role": "user", "content": "a"}] * 300}, "messages: there are 300"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role: wizard is not one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "is not one of text, image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "with a data URI"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, "the model's template refuses them"),
    ({"messages": [{"role": "user", "content": "see <image> here"}]}, "the text has <image>"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "the text has half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": "long " * 2000}]}, "the model takes 1,024"),
    ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "the texts have more than 65,536 characters"),
    ({"messages": [{"role": "user", "content": [], "tool_calls": [1]}]}, "tools are not offered"),
    ({"max_tokens": 0}, "max_tokens: 0 is not a whole number from 1"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": float("nan")}, "temperature: nan is not a number"),
    ({"temperature": "hot"}, "temperature: hot is not a number"),
    ({"top_p": 0}, "top_p: 0 is not a number"),
    ({"seed": -1}, "seed: -1 is not a whole number"),
    ({"stop": [""]}, "stop: [''] is not a text"),
    ({"stop": ["a"] * 9}, "stop: there are 9"),
    ({"stream": "yes"}, "stream: yes is not true or false"),
    ({"n": 2}, "n: 2 is not offered"),
    ({"logprobs": True}, "logprobs: True is not offered"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"generation_config": "{}"}, "generation_config is not a field of a request"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs is not a field"),
]


@pytest.mark.parametrize("wrong, sentence", WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_what_is_wrong_is_said_in_a_sentence(post, wrong, sentence):
    for stream in (False, True):
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 2,
            "stream": stream,
            **wrong,
        }
        status, said = post(body)
        assert status == (404 if "model" in wrong else 400) and sentence in said and "\n" not in said


PICTURES = [
    (data_uri(b"no picture"), "the image no. 1 is in no known format"),
    (data_uri(png(picture())[:500]), "is damaged"),
    (data_uri(png(Image.new("1", (8000, 8000)))), "is too large"),
    (data_uri(png(Image.new("1", (1, 9000)))), "too narrow"),
    ("data:image/png;base64,!!!", "is damaged"),
    ("data:image/png", "is damaged"),
    ("/etc/passwd", "files of this machine are not read here"),
    ("file:///etc/passwd", "files of this machine are not read here"),
    ("~/.ssh/id_rsa", "files of this machine are not read here"),
    ("http://127.0.0.1:1/a.png", "is an address, which is not taken here"),
    ("http://169.254.169.254/latest/meta-data", "is an address, which is not taken here"),
    ("\x00", "files of this machine are not read here"),
]


@pytest.mark.parametrize("url, sentence", PICTURES, ids=[f"{url[:24]!r}" for url, _ in PICTURES])
def test_a_picture_passes_the_gate_or_is_refused(post, url, sentence):
    part = {"type": "image_url", "image_url": {"url": url}}
    status, said = post({"messages": [{"role": "user", "content": [part]}], "max_tokens": 2})
    assert status == 400 and sentence in said


def test_too_many_pictures_and_too_large_a_body(post):
    small = {"type": "image_url", "image_url": {"url": data_uri(png(Image.new("RGB", (8, 8))))}}
    status, said = post({"messages": [{"role": "user", "content": [small] * 33}]})
    assert (status, said) == (400, "the request has more than 32 pictures and frames; send fewer")
    status, said = post({"messages": [{"role": "user", "content": [small] * 5}]})
    assert status == 400 and "send fewer pictures" in said  # 5 × 256 tokens of 1024
    wide = {"type": "image_url", "image_url": {"url": data_uri(png(Image.new("1", (5500, 5500))))}}
    status, said = post({"messages": [{"role": "user", "content": [wide] * 4}]})
    assert status == 400 and "100,000,000 pixels together" in said
    status, said = post({"messages": [{"role": "user", "content": "x" * (33 * 2**20)}]})
    assert (status, said) == (413, "the request has more than 33,554,432 bytes")


def test_broken_bodies(post):
    for body in (b"", b"{", b"[1]", b"null", b"\xff", b'{"messages":' + b"[" * 100_000, b'"text"'):
        status, said = post(body)
        assert (status, said) == (400, "the body is not a JSON object, sent as application/json"), body[:20]


def test_only_the_paths_of_the_interface_are_open(server):
    key = {"Authorization": f"Bearer {KEY}"}
    for path in (
        "/",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/v1/completions",
        "/v1/responses",
        "/load_model",
        "/reset",
    ):
        for method in ("GET", "POST"):
            answer = httpx.request(method, server.url + path, headers=key, json={"model": "x"})
            assert (
                answer.status_code == 404 and "/v1/chat/completions" in answer.json()["error"]["message"]
            ), path
    assert httpx.get(f"{server.url}/v1/chat/completions", headers=key).status_code == 405
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_key_is_asked_for(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(server.url + path, headers=headers)
            assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").chat.completions.create(model="mini", messages=[message("hello")])
    models = server.client(KEY).models
    assert [model.id for model in models.list()] == ["mini"] and models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="mini only"):
        models.retrieve("other/model")


def test_foreign_hosts_and_origins_are_refused_and_an_allowed_origin_is_not(server, post):
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 400
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert post(body, Origin="https://evil.example")[0] == 403
    assert post(body, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert post(body, Origin="https://chat.example", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization"
    allowed = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    refused = httpx.options(
        f"{server.url}/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(long_server, stream):
    left, generated = long_server.metric("disconnects_total"), long_server.metric("generated_tokens_total")
    body = {"messages": [message("hello")], "max_tokens": 1000, "temperature": 0, "stream": stream}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", long_server.port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        else:
            long_server.wait_for("running", 1)
    long_server.wait_for("disconnects_total", left + 1)
    long_server.wait_for("held", 0)
    assert long_server.metric("generated_tokens_total") - generated < 900
    named = dict(model="mini", messages=[message("hello")], max_tokens=3)
    assert long_server.client().chat.completions.create(**named).usage.completion_tokens == 3


@pytest.mark.slow
def test_too_many_requests_at_once_are_told_to_come_later(tmp_path):
    """And SIGTERM ends the server within 5 seconds, while it answers one and another waits."""
    with Served(tmp_path, *endless(tmp_path), "--most-waiting", "2", "--max-tokens", "1000") as running:
        client = running.client()
        ended = []

        def long():
            try:
                client.chat.completions.create(model="mini", messages=[message("hello")], temperature=0)
            except openai.OpenAIError as error:
                ended.append(error)

        threads = [threading.Thread(target=long) for _ in range(2)]
        for thread in threads:
            thread.start()
        running.wait_for("held", 2)
        with pytest.raises(openai.RateLimitError, match="2 requests wait already") as refused:
            client.chat.completions.create(model="mini", messages=[message("hello")])
        assert refused.value.response.headers["retry-after"] == "5"
        start = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0 and time.monotonic() - start < 5
        for thread in threads:
            thread.join(30)
        assert not list(tmp_path.glob("libra-serve-*")) and "Traceback" not in running.log()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--compression", "nope"], "compression: nope is neither a method nor a row"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "llava-1.5-7"], "did you mean llava-1.5-7b?"),
        (["--port", "99999"], "99999 is too large"),
        (["--host", "256.0.0.1", "--port", "0"], "cannot be used"),
    ],
)
def test_a_server_that_cannot_start_says_why(options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--port", "0", *options])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    "version, fits", [("5.22.4", False), ("5.24.0", False), ("5.23.1", True), ("6.0", False)]
)
def test_other_versions_of_transformers_are_refused_in_a_sentence(monkeypatch, version, fits):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if fits:
        command.check_packages()
        return
    with pytest.raises(
        ValueError, match=f"needs transformers from 5.23 up and below 5.24, .* {version}; install"
    ):
        command.check_packages()
