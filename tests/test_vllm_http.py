"""scripts/serve_vllm.sh and what its server answers. Run by scripts/test_vllm.sh."""

import json
import os
import signal
import subprocess
import time

import httpx
import pytest

REASON = "vLLM has an environment of its own: bash scripts/test_vllm.sh"
pytest.importorskip("vllm", reason=REASON)

import torch  # noqa: E402
from serve_client import Reference, message, questions  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from vllm_server import VllmServer, command  # noqa: E402

import libra  # noqa: E402
from libra.budget import kept  # noqa: E402
from libra.rows import EMBEDDED  # noqa: E402
from llava.convert import convert  # noqa: E402

pytestmark = pytest.mark.slow
N, MOST = 256, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("http")
    convert(str(EMBEDDED), str(place / "mini"))
    return place


@pytest.fixture(scope="module")
def server(folder):
    """One that keeps half of the tokens; at the end SIGTERM leaves nothing of it running."""
    with VllmServer(folder, folder / "mini", "divprune") as started:
        yield started
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(60) in (0, -signal.SIGTERM), started.log()
        assert gone(started.process.pid, 60)


def gone(group: int, seconds: float) -> bool:
    """Whether no process of the group is left after so many seconds at most."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


def ask(server: VllmServer, image, text: str, **more) -> httpx.Response:
    """With the tokenizer's first token, which LLaVA's chat template leaves to the tokenizer."""
    body = {"model": "mini", "messages": [message(text, image)], "max_tokens": MOST, "temperature": 0}
    body |= {"add_special_tokens": True, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)


def test_answers_and_their_own_ratio_are_those_of_attach(server, folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "mini", dtype=torch.float32).eval()
    reference, asked = Reference(model, AutoProcessor.from_pretrained(folder / "mini")), questions(6)
    lengths = []
    for ratio in (None, 0, 0.25, 0.75):
        own = {} if ratio is None else {"mm_processor_kwargs": {"libra_ratio": ratio}}
        row = {"method": "divprune", "ratio": 0.5 if ratio is None else ratio} if ratio != 0 else {}
        expected = reference.answers(row or {"method": "vanilla"}, asked)
        lengths.append([])
        for (image, text), (answer, _) in zip(asked, expected):
            said = ask(server, image, text, **own).json()
            assert said["choices"][0]["message"]["content"].strip() == answer.strip(), (ratio, text)
            lengths[-1].append(said["usage"]["prompt_tokens"])
    for half, whole, quarter, most in zip(*lengths):
        removed = [whole - length for length in (half, quarter, most)]
        assert removed == [N - kept(N, ratio) for ratio in (0.5, 0.25, 0.75)]


@pytest.mark.parametrize("ratio", [1.5, "much"])
def test_a_bad_ratio_is_refused_and_the_server_lives(server, ratio):
    image, text = questions(1)[0]
    refused = ask(server, image, text, mm_processor_kwargs={"libra_ratio": ratio})
    assert refused.status_code == 400 and f"libra_ratio: {ratio}" in refused.text
    assert ask(server, image, text).status_code == 200


def test_its_second_name_says_what_it_does(server):
    names = [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]]
    told = json.loads(names[1])
    assert names[0] == "mini" and told.pop("libra") == libra.__version__
    assert told == libra.Compression(method="divprune").to_dict()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("divprun",), "divprun"),
        (("libra",), "one length of a sequence for all layers"),
        (("divprune", "--tensor-parallel-size", "2"), "tensor_parallel_size: 2: compression needs"),
    ],
)
def test_what_it_cannot_serve_is_said_at_the_start(folder, options, sentence):
    words, environment = command(folder / "mini", *options)
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=540)
    assert ended.returncode != 0 and sentence in ended.stderr + ended.stdout
