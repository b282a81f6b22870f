"""The one thread that generates: each request in its turn, with its own compression attached."""

import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Sequence

import torch
from transformers import StoppingCriteria
from transformers.cli.serving.utils import GenerateManager, InferenceThread, _GenerationCancelled

import libra
from libra.engine.attach import Attachment

from ..config import NOTHING, Compression
from .metrics import Metrics
from .refused import Refused, as_refusals

FAILED = "the server failed to answer; its log says why"
TOO_LARGE = "the request does not fit into the device's memory; send fewer or smaller pictures"
_REMEMBERED = 256  # compressions that are known to fit


class Worker:
    """A model and the only thread that it runs on.

    Args:
        default: the compression of requests that name none.
        most_waiting: requests that may wait or run at a time; more are refused with 429.
    """

    def __init__(self, model, tokenizer, default: Compression, most_waiting: int, metrics: Metrics):
        self.model, self.tokenizer, self.default, self.metrics = model, tokenizer, default, metrics
        self.thread = InferenceThread()
        self.layers = model.config.get_text_config().num_hidden_layers
        self._most, self._places, self._lock = most_waiting, 0, threading.Lock()
        self._handle: Attachment | None = None
        self._attached = NOTHING
        self._fitting: OrderedDict[Compression, None] = OrderedDict()

    def take_place(self) -> None:
        """Count a request in. Raises Refused where too many wait already."""
        with self._lock:
            if self._places >= self._most:
                raise Refused(
                    429, f"{self._places} requests wait already; try again later", **{"Retry-After": "5"}
                )
            self._places += 1
        self.metrics.add("held")

    def leave_place(self) -> None:
        with self._lock:
            self._places -= 1
        self.metrics.add("held", -1)

    async def check(self, compression: Compression) -> None:
        """Refuse what does not fit the model, before an answer begins. A new one waits for the thread."""
        with as_refusals():
            compression.at_depth(self.layers)
            if compression not in self._fitting:
                await self.thread.async_submit(self.attach, compression)
        self._fitting[compression] = None
        self._fitting.move_to_end(compression)
        if len(self._fitting) > _REMEMBERED:
            self._fitting.popitem(last=False)

    def attach(self, compression: Compression):
        """Make it the model's compression; on the worker's thread. Returns the handle, None for vanilla.

        Raises:
            ValueError: where it does not fit the model, which then has none.
        """
        if compression != self._attached:
            if self._handle is not None:
                self._handle.detach()
            self._handle, self._attached = None, NOTHING
            if compression.compresses:
                self._handle = libra.attach(self.model, compression)
            self._attached = compression
        return self._handle


class Turn(GenerateManager):
    """One request's answer on the worker's thread, in the shape in which transformers' handler asks for it.

    Attributes:
        visual, prompt: numbers of the prompt's tokens, set before the answer begins.
        stats: what the prefill's compression was, from the first token on.
        ran: the compression with its layers.
        counted: tokens of the answer so far.
        submitted: whether the worker's thread has it, which then gives its place back.
        left: whether its client was gone before the last token. ``gone`` itself is also set after an answer.
    """

    def __init__(
        self,
        worker: Worker,
        compression: Compression,
        seed: int | None,
        stops: Sequence[str],
        gone: threading.Event,
    ):
        # No call to super().__init__: it would start a thread of its own.
        self._thread, self.worker = worker.thread, worker
        self.compression, self.seed, self.stops, self.gone = compression, seed, stops, gone
        self.started = time.monotonic()
        self.submitted = self.left = False
        self.visual = self.prompt = self.counted = 0
        self.stats: dict | None = None
        self.ran = compression

    def generate_streaming(self, model, *rest, **named):
        self.submitted = True
        return super().generate_streaming(self, *rest, **named)

    async def generate_non_streaming(self, model, *rest, **named):
        self.submitted = True
        return await super().generate_non_streaming(self, *rest, **named)

    def generate(self, **inputs):
        """What transformers' handler calls in place of ``model.generate``, on the worker's thread."""
        metrics = self.worker.metrics
        metrics.add("running")
        try:
            return self._generate(inputs)
        except _GenerationCancelled:
            self.left = True
            raise
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            torch.cuda.empty_cache()
            raise RuntimeError(TOO_LARGE) from None
        except Exception:
            traceback.print_exc()
            raise RuntimeError(FAILED) from None
        finally:
            metrics.add("running", -1)
            metrics.add("prompt_tokens_total", self.prompt)
            metrics.add("generated_tokens_total", self.counted)
            metrics.add("visual_tokens_total", self.visual)
            metrics.took("request_seconds", time.monotonic() - self.started)
            if self.left:
                metrics.add("disconnects_total")
            self.worker.leave_place()

    @torch.inference_mode()
    def _generate(self, inputs: dict):
        if self.gone.is_set():
            raise _GenerationCancelled
        model = self.worker.model
        handle = self.worker.attach(self.compression)
        self.ran = self.compression if handle is None else handle.compression
        if self.seed is not None:
            torch.manual_seed(self.seed)
        watch = _Watch(self, handle if self.visual else None)
        inputs = {name: _placed(value, model) for name, value in inputs.items()}
        return model.generate(**inputs, stopping_criteria=[watch])


class _Watch(StoppingCriteria):
    """Called after each token, before the answer's end is told: reads the statistics while they are this
    request's, and ends the answer of a client that has gone, or that has said one of its stops.

    transformers' own criterion of stops looks at the whole vocabulary for each new one, and fails with some
    tokenizers.
    """

    def __init__(self, turn: Turn, handle):
        self.turn, self.handle = turn, handle

    def __call__(self, input_ids, scores, **kwargs):
        turn = self.turn
        if not turn.counted:
            turn.worker.metrics.took("first_token_seconds", time.monotonic() - turn.started)
            turn.stats = None if self.handle is None else self.handle.stats
        turn.counted += 1
        turn.left = turn.gone.is_set()
        ends = turn.left or bool(turn.stops) and self._stopped(input_ids)
        return torch.full((len(input_ids),), ends, device=input_ids.device)

    def _stopped(self, input_ids) -> bool:
        new = input_ids[0, self.turn.prompt :]
        text = self.turn.worker.tokenizer.decode(new, skip_special_tokens=True)
        return any(stop in text for stop in self.turn.stops)


def _placed(value, model):
    """A tensor on the model's device, numbers with a fraction in its type."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
