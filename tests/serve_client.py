"""The OpenAI-compatible server in a process of its own, questions for it, and the same answers by
libra.attach."""

import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import torch
from PIL import Image
from server_process import ServerProcess
from transformers import LlavaForConditionalGeneration

import libra
from libra.mini.benchmark import scene_sample
from libra.mini.questions import SCENE_TYPES
from libra.rows import EMBEDDED
from llava.convert import convert

ROOT = Path(__file__).parents[1]


class Served(ServerProcess):
    """``with Served(folder, *options) as server``; its log lies in the folder."""

    def __init__(self, folder: Path, *options: str):
        super().__init__(folder, "libra.serve", r"(http://127\.0\.0\.1:(\d+))/v1", options)

    def client(self, key: str = "none"):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)

    def metric(self, name: str, key: str = "none") -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
        return sum(float(line.split()[1]) for line in text.splitlines() if re.match(rf"libra_{name}\b", line))

    def wait_for(self, name: str, value: float, key: str = "none", seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while self.metric(name, key) != value:
            assert time.monotonic() < end, (name, self.metric(name, key))
            time.sleep(0.05)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def message(text: str, *images: Image.Image) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": data_uri(png(image))}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def questions(count: int) -> list[tuple[Image.Image, str]]:
    """The benchmark's held-out ones, of every type that is drawn."""
    kinds = list(SCENE_TYPES)
    samples = [scene_sample(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]
    return [(sample.image, sample.question) for sample in samples]


def endless(folder: Path) -> tuple[str, ...]:
    """The options that serve the embedded model without an end token: its answers go on to their limit."""
    place = folder / "endless"
    convert(str(EMBEDDED), str(place))
    settings = json.loads((place / "generation_config.json").read_text())
    del settings["eos_token_id"]
    (place / "generation_config.json").write_text(json.dumps(settings))
    return "--model", str(place), "--served-name", "mini"


@dataclass
class Reference:
    """The embedded model, converted and called in this process as anybody would."""

    model: LlavaForConditionalGeneration
    processor: object

    @torch.inference_mode()
    def answer(self, text: str, images: list, most: int = 12) -> tuple[str, int]:
        """The answer's text, and how many tokens it has."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(text=prompt, images=images or None, return_tensors="pt")
        said = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)
        new = said[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True), len(new)

    def answers(self, compression: dict, asked: list) -> list[tuple[str, int]]:
        with libra.attach(self.model, libra.Compression.from_dict(compression)):
            return [self.answer(text, [image]) for image, text in asked]


def ask_at_once(server: Served, jobs: list, clients: int, key: str = "none") -> list[tuple[str, int]]:
    """Texts and lengths of answers to (compression, image, question); every second one comes as a stream."""
    client = server.client(key)

    def ask(job):
        number, (compression, image, text) = job
        stream = number % 2 == 1
        answer = client.chat.completions.create(
            model="mini",
            messages=[message(text, image)],
            max_tokens=12,
            temperature=0,
            stream=stream,
            extra_body={"compression": compression},
        )
        if not stream:
            return answer.choices[0].message.content, answer.usage.completion_tokens
        chunks = list(answer)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        return "".join(pieces), chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, enumerate(jobs)))
