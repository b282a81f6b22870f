"""``/v1/chat/completions``: transformers' handler, with a request's own compression."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

from fastapi.responses import Response, StreamingResponse
from openai.types.completion_usage import CompletionUsage
from transformers import BatchFeature
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, _GenerationCancelled

from ..media import Limits
from ..utils.numbers import COLDEST
from .models import Model
from .pictures import Album
from .prompt import Prompter
from .refused import Refused, as_refusals
from .request import Request, read_request
from .stops import Cut
from .usage import figures
from .worker import FAILED, TOO_LARGE, Turn, Worker

PREPARING = 2  # requests whose pictures are opened at a time; more would only fill the memory
DONE = "data: [DONE]\n\n"
# Set while a request is handled: whether its client has gone. The application around this handler knows it.
GONE: ContextVar[threading.Event] = ContextVar("libra_serve_gone")


class ChatHandler(ChatCompletionHandler):
    """Answers one request at a time; the others wait in the order in which they came.

    Args:
        model: as :func:`libra.serve.models.load` gives it.
        longest: tokens of an answer whose request names no limit.
    """

    def __init__(self, model: Model, worker: Worker, limits: Limits, longest: int):
        super().__init__(model.manager, GenerationState())
        self.model, self.worker, self.limits, self.longest = model, worker, limits, longest
        self._prompter = Prompter(model)
        self._preparing = ThreadPoolExecutor(PREPARING, "preparing")
        self._one_prompt = threading.Lock()  # tokenizers are not made for several threads
        self.turn: Turn | None = None
        self.cut = Cut(())

    async def handle_request(self, body: dict, request_id: str) -> Response:
        """The answer to a request's JSON. Raises Refused."""
        self._check_model(body.get("model"))
        with as_refusals():
            asked = read_request(body)
        compression = asked.compression or self.worker.default
        self.worker.take_place()
        turn = Turn(self.worker, compression, asked.seed, asked.stops, GONE.get())
        try:
            await self.worker.check(compression)
            inputs, settings = await self._prepared(asked, turn)
            one = copy.copy(self)  # what transformers' handler calls back for belongs to this request
            one.turn, one.cut = turn, Cut(asked.stops)
            rest = (
                request_id,
                self.model.model,
                self.model.processor,
                self.model.name,
                inputs,
                settings,
                turn,
            )
            if asked.stream:
                answer = one._streaming(*rest)
                return StreamingResponse(_ended(answer.body_iterator), media_type=answer.media_type)
            return await one._non_streaming(*rest)
        except _GenerationCancelled:
            return Response(status_code=499)  # for the log: nobody reads it
        except RuntimeError as error:
            if str(error) in (FAILED, TOO_LARGE):
                raise Refused(503 if str(error) == TOO_LARGE else 500, str(error)) from None
            raise
        finally:
            if not turn.submitted:
                self.worker.leave_place()

    def _check_model(self, name) -> None:
        if name is not None and name != self.model.name:
            raise Refused(
                404, f"this server has the model {self.model.name} only; write that, or leave model out"
            )

    async def _prepared(self, asked: Request, turn: Turn):
        """The arguments of ``generate`` and the generation's settings."""
        loop = asyncio.get_running_loop()
        with as_refusals():
            inputs = await loop.run_in_executor(self._preparing, self._inputs, asked)
            turn.prompt, turn.visual = inputs["input_ids"].shape[1], self._prompter.visual(inputs)
            room = self.model.context - turn.prompt
            if room < 1:
                raise ValueError(
                    f"the prompt has {turn.prompt:,} tokens and the model takes {self.model.context:,},"
                    " with its answer; shorten it or send fewer pictures"
                )
        settings = self._build_generation_config(dict(asked.sampling), self.model.model.generation_config)
        settings.max_new_tokens = min(asked.sampling.get("max_tokens", self.longest), room)
        settings.max_length = None
        if "temperature" in asked.sampling:
            settings.do_sample = asked.sampling["temperature"] >= COLDEST
        if not settings.do_sample:
            settings.temperature = settings.top_p = settings.top_k = None
        return inputs, settings

    def _inputs(self, asked: Request) -> BatchFeature:
        """The prompt's tensors, pictures included; on another thread. Raises ValueError."""
        album, shown = Album(self.limits), []
        for _, parts in asked.messages:
            for kind, *source in parts:
                if kind != "text":
                    shown.append(album.picture(*source) if kind == "image" else album.video(*source))
        with self._one_prompt:
            return self._prompter(asked.messages, shown)

    # --- what transformers' handler calls back for ---

    def _build_completion(self, request_id, content, model_id, finish_reason, usage=None, **named):
        content = self.cut(content) + self.cut.rest()
        reason = "stop" if self.cut.ended else finish_reason
        return super()._build_completion(
            request_id, content, model_id, reason, usage=self._told(usage), **named
        )

    def _build_chunk_sse(self, request_id="", content=None, finish_reason=None, usage=None, **named):
        if content is not None:
            content = self.cut(content)
        if finish_reason is not None:
            content = self.cut.rest() or None
            finish_reason = "stop" if self.cut.ended else finish_reason
        return super()._build_chunk_sse(
            request_id, content=content, finish_reason=finish_reason, usage=self._told(usage), **named
        )

    def _told(self, usage: CompletionUsage | None) -> CompletionUsage | None:
        """The usage with what became of the visual tokens."""
        if usage is None:
            return None
        turn = self.turn
        told = figures(turn.ran, turn.stats, turn.visual, turn.prompt, self.worker.layers)
        self.worker.metrics.add("visual_tokens_average_total", told["average_tokens"])
        return CompletionUsage.model_validate({**usage.model_dump(), "compression": told})


async def _ended(pieces):
    """The pieces of an answer, and what ends it in the protocol."""
    async for piece in pieces:
        yield piece
    yield DONE
