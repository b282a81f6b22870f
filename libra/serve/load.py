"""Requests to a running server: in a closed loop or at random times, each with its times."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Question:
    """What is asked: the picture as a data URI, and its text."""

    picture: str
    text: str

    def messages(self) -> list[dict]:
        picture = {"type": "image_url", "image_url": {"url": self.picture}}
        return [{"role": "user", "content": [picture, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        question: its number.
        text: None where the server refused or broke off; ``error`` says why.
        first: seconds from sending to the first piece of text, or to the end of an answer without one.
        seconds: from sending to the end.
        tokens: of the answer, by the server's count.
        flops_saved: the share that the server says, of ``usage.compression``.
    """

    question: int
    text: str | None
    first: float
    seconds: float
    tokens: int = 0
    flops_saved: float | None = 0.0
    error: str = ""


@dataclass(frozen=True)
class Run:
    """The answers of one load in the order of the requests, and the seconds from the first request to the
    last answer."""

    answers: tuple[Answer, ...]
    seconds: float


class Caller:
    """Sends questions to one server with the stock client.

    Args:
        url: ends in /v1.
        most: tokens of an answer.
    """

    def __init__(self, url: str, key: str, questions: Sequence[Question], most: int):
        self.url, self.key, self.questions, self.most = url, key, questions, most

    def closed(self, clients: int, count: int) -> Run:
        """``count`` requests by ``clients``; each sends its next one when its last one is answered."""
        return asyncio.run(self._closed(clients, count))

    def open(self, rate: float, count: int, seed: int = 0) -> Run:
        """``count`` requests at random times, ``rate`` a second on average (a Poisson process), whether or
        not earlier ones are answered."""
        pauses = np.random.default_rng(seed).exponential(1 / rate, count)
        return asyncio.run(self._open(np.cumsum(pauses).tolist()))

    def _client(self):
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=600)

    async def _closed(self, clients: int, count: int) -> Run:
        numbers = iter(range(count))
        start = time.perf_counter()
        async with self._client() as client:

            async def one_client() -> list[tuple[int, Answer]]:
                return [(number, await self._ask(client, number)) for number in numbers]

            found = await asyncio.gather(*(one_client() for _ in range(clients)))
        answers = dict(pair for pairs in found for pair in pairs)
        return Run(tuple(answers[number] for number in range(count)), time.perf_counter() - start)

    async def _open(self, times: list[float]) -> Run:
        start = time.perf_counter()
        async with self._client() as client:

            async def at(number: int, when: float) -> Answer:
                await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
                return await self._ask(client, number)

            answers = await asyncio.gather(*(at(number, when) for number, when in enumerate(times)))
        return Run(tuple(answers), time.perf_counter() - start)

    async def _ask(self, client, number: int) -> Answer:
        from openai import OpenAIError

        which = number % len(self.questions)
        start, first, text, usage = time.perf_counter(), None, "", None
        try:
            stream = await client.chat.completions.create(
                model=None,
                messages=self.questions[which].messages(),
                max_tokens=self.most,
                temperature=0,
                stream=True,
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece and first is None:
                    first = time.perf_counter() - start
                text += piece or ""
            if usage is None:
                raise OpenAIError("the answer broke off")
        except OpenAIError as error:
            seconds = time.perf_counter() - start
            return Answer(which, None, seconds, seconds, error=" ".join(str(error).split()))
        seconds = time.perf_counter() - start
        saved = (getattr(usage, "compression", None) or {}).get("flops_saved", 0.0)
        return Answer(which, text, first or seconds, seconds, usage.completion_tokens, saved)
