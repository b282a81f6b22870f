"""Models that answer with and without compression: LLaVA's own format through its decoder, every other one
that :func:`libra.attach` supports through its hooks."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from libra.checkpoints import find_reachable
from libra.config import NOTHING, Compression
from libra.engine.attach import attach
from libra.engine.cache import bytes_at
from libra.engine.places_on_pictures import blocks_of, strip
from libra.engine.structure import is_dense, placeholder_ids
from libra.engine.trace import RowTrace
from libra.engine.transformers_api import PreTrainedConfig
from libra.flops import model_flops
from libra.media import asking
from libra.rows import spec_of
from libra.utils.devices import find_device

from ..mm_utils import as_text, special_spellings
from ..model import huggingface
from ..model.settings import is_original
from . import overlay
from .session import AnswerStreamer, Loaded, Session, load_model

Say = Callable[[str], object]


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        turns: the conversation so far, each question with its answer; the picture is shown with the first.
        most: tokens of the answer.
    """

    image: Image.Image
    text: str
    turns: tuple[tuple[str, str], ...] = ()
    most: int = 128


@dataclass(frozen=True)
class Spoken:
    """An answer and what it took.

    Attributes:
        tokens: visual tokens that each layer saw.
        cache: bytes of the KV cache after the question; None for a model that has none.
        trace: of the question's visual tokens, where it was asked for and something was compressed.
    """

    text: str
    tokens: list[int]
    cache: int | None
    trace: RowTrace | None


class Speaker(Protocol):
    """A loaded model.

    Attributes:
        config: of its decoder.
    """

    config: PreTrainedConfig

    def visual_tokens(self, question: Question) -> int:
        """Of the question's picture. Raises ValueError for a question that the model cannot take."""
        ...

    def views(self, question: Question) -> list[dict]:
        """Where they lie, as :mod:`llava.serve.overlay` describes it."""
        ...

    def ask(
        self, question: Question, compression: Compression, say: bool | Say = False, trace: bool = False
    ) -> Spoken:
        """Answer; ``say`` as of :class:`AnswerStreamer`.

        Raises:
            ValueError: for a compression that does not fit the model, and for a text that is too long or
                hides a special token.
        """
        ...


def flops_of(speaker: Speaker, tokens: list[int]) -> float | None:
    """Multiply-accumulates of one picture's visual tokens by §4.1's formula; None for a decoder that it does
    not describe."""
    if not is_dense(speaker.config):
        return None
    return model_flops(spec_of(speaker.config, ""), tokens)


class LlavaSpeaker:
    """A checkpoint in LLaVA's own format."""

    def __init__(self, loaded: Loaded):
        self.loaded, self.config = loaded, loaded.model.config

    def _session(self, question: Question) -> Session:
        session = Session(**vars(self.loaded), images=[question.image], typed_places=False)
        for asked, answered in question.turns:
            session.recall(asked, answered)
        return session

    def visual_tokens(self, question: Question) -> int:
        session = self._session(question)
        session.check(question.text)
        return session.pictures[0].tokens

    def views(self, question: Question) -> list[dict]:
        boxes = overlay.token_boxes(question.image.size, self.loaded.model)
        if boxes is None:
            return overlay.of_blocks([strip(self.visual_tokens(question))])
        return overlay.of_boxes(boxes, question.image.size)

    def ask(
        self, question: Question, compression: Compression, say: bool | Say = False, trace: bool = False
    ) -> Spoken:
        model, session = self.loaded.model, self._session(question)
        model.set_compression(compression if compression.compresses else None, trace=trace)
        given = session.ask(question.text, max_new_tokens=question.most, stream=say)
        stats = model.compression_stats
        cache = stats["cache"]["total"] if stats else session.cache_bytes
        rows = model.compression_trace
        return Spoken(given.text, session.visual_tokens, cache, rows[0] if rows else None)


class HookedSpeaker:
    """A model of transformers with its processor.

    Raises:
        ValueError: for a model that cannot be compressed.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        attach(model, NOTHING).detach()
        self.config = model.config.get_text_config()
        self._tokenizer = processor.tokenizer
        self._visual = torch.tensor(placeholder_ids(model.config))
        self._spellings = special_spellings(self._tokenizer).union(asking.place_marks(processor))

    def _inputs(self, question: Question):
        """Of one row. Raises ValueError as :meth:`Speaker.ask`."""
        asked = [*question.turns, (question.text, "")]
        messages = []
        for number, (text, answer) in enumerate(asked):
            parts = [{"type": "image", "image": question.image}] if number == 0 else []
            said = {"type": "text", "text": as_text(text, self._tokenizer, self._spellings)}
            messages.append({"role": "user", "content": [*parts, said]})
            answered = {"type": "text", "text": as_text(answer, self._tokenizer, self._spellings)}
            messages.append({"role": "assistant", "content": [answered]})
        if not getattr(self.processor, "chat_template", None):
            raise ValueError("the model has no chat template; add chat_template.jinja to its folder")
        inputs = asking.chat(self.processor, messages[:-1])
        length, limit = inputs["input_ids"].shape[1], getattr(self.config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(
                f"the conversation has {length} tokens and the model takes {limit}; start a new one"
            )
        return inputs

    def visual_tokens(self, question: Question) -> int:
        return self._visual_in(self._inputs(question))

    def _visual_in(self, inputs) -> int:
        return int(torch.isin(inputs["input_ids"].cpu(), self._visual).sum())

    def views(self, question: Question) -> list[dict]:
        inputs = self._inputs(question)
        spans = [self._visual_in(inputs)]
        return overlay.of_blocks(blocks_of(inputs, question.image, spans, self.processor, self.model.config))

    def ask(
        self, question: Question, compression: Compression, say: bool | Say = False, trace: bool = False
    ) -> Spoken:
        inputs = self._inputs(question).to(self.model.device, self.model.dtype)
        length = inputs["input_ids"].shape[1]
        visual = self._visual_in(inputs)
        compressing = nullcontext()
        if compression.compresses:
            compressing = attach(self.model, compression, trace=trace)
        with compressing as handle, torch.no_grad():
            said = self.model.generate(
                **inputs,
                max_new_tokens=question.most,
                do_sample=False,
                return_dict_in_generate=True,
                streamer=AnswerStreamer(self._tokenizer, None, say),
            )
            stats, rows = (handle.stats, handle.trace) if handle is not None else (None, None)
        text = self._tokenizer.decode(said.sequences[0, length:], skip_special_tokens=True).strip()
        if stats is None:
            tokens = [visual] * self.config.num_hidden_layers
            cache = said.past_key_values
            return Spoken(text, tokens, None if cache is None else bytes_at(cache, length), None)
        tokens = [int(row[0]) for row in stats["visual_tokens"]]
        held = stats["cache"]["total"] if stats["cache"] else None
        return Spoken(text, tokens, held, rows[0] if rows else None)


def load(args) -> Speaker:
    """The model of :func:`llava.serve.options.add_model_options`' arguments, in either format.

    Raises:
        ValueError: for one that cannot be loaded or compressed, and for options that it does not have.
    """
    path = find_reachable(args.model_path)
    if args.model_base or _in_llavas_format(path):
        return LlavaSpeaker(load_model(args))
    for option in ("load_8bit", "load_4bit", "conv_mode"):
        if getattr(args, option):
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for checkpoints in LLaVA's own format; leave it out")
    device = find_device(args.device)
    processor = huggingface.load_processor(path)
    dtype = "float32" if device.type == "cpu" else "auto"
    model = huggingface.load(AutoModelForImageTextToText, path, dtype=dtype).to(device).eval()
    huggingface.pad_by_end(model)
    return HookedSpeaker(model, processor)


def _in_llavas_format(path: str) -> bool:
    """Whether a checkpoint is in LLaVA's own format, or so damaged that its loader shall say so."""
    try:
        values = PreTrainedConfig.get_config_dict(path)[0]
    except Exception:  # whatever a damaged file raises
        return True
    return is_original(values) or not values
