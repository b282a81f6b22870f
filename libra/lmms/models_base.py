"""What a model behind the plug-in is asked, and what it says of an answer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from libra.engine.transformers_api import cache_of
from libra.rows import Row

FRAMES = 8  # of a video, where the model itself has no number
MAX_NEW_TOKENS = 1024  # what the harness's own LLaVA model takes where a task says nothing


@dataclass(frozen=True)
class Sample:
    """One question: the harness's text, and what is shown with it, in order (a video is the list of its
    frames)."""

    name: str  # for sentences about it
    text: str
    shown: list[Image.Image | list[Image.Image]]

    @property
    def images(self) -> list[Image.Image]:
        """All that is shown as single images, frame by frame."""
        return [image for one in self.shown for image in (one if isinstance(one, list) else [one])]


class Engine(ABC):
    """A loaded model: it takes a row's compression and attention, then answers batches.

    ``frames`` is how many frames of a video it is to be shown.
    """

    model: Any  # a module of many families, whose attributes no one class declares
    tokenizer: Any
    frames: int = FRAMES
    stop: str | None = None  # what ends an answer, where it is not the checkpoint's own eos token

    @abstractmethod
    def set_row(self, row: Row, trace: bool) -> None:
        """Go over to a row; ValueError for a layer the model does not have."""

    @abstractmethod
    def remember_pictures(self, limit: int) -> None:
        """Keep at most ``limit`` bytes of the vision tower's features for batches of pictures that come
        again; 0 forgets them."""

    @abstractmethod
    def _inputs(self, samples: list[Sample]) -> dict:
        """The arguments of ``generate`` for samples of which either all show something or none does."""

    @abstractmethod
    def _told(self) -> tuple[dict | None, list | None]:
        """Statistics and traces of the last prefill, as :mod:`libra` gives them."""

    def _ids(self, sequences: torch.Tensor, inputs: dict) -> torch.Tensor:
        """The new token ids among those that ``generate`` returned."""
        return sequences

    @torch.inference_mode()
    def generate(self, samples: list[Sample], asked: dict) -> tuple[list[str], list[dict]]:
        """Texts, and what else a record holds, of samples that share the task's generation options ``asked``;
        greedy unless the task says otherwise."""
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **asked}
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        if not options["do_sample"]:
            options.update(temperature=None, top_p=None, top_k=None)
        if self.stop:
            stops.append(self.stop)
            options["eos_token_id"] = self._ends()
        inputs = self._inputs(samples)
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        texts = self.tokenizer.batch_decode(self._ids(output.sequences, inputs), skip_special_tokens=True)
        return [cut(text, stops) for text in texts], self._facts(samples, cache_of(output))

    def _ends(self) -> list[int] | None:
        """The ids that end an answer: the checkpoint's own, and ``stop`` where it is a token."""
        own = self.model.generation_config.eos_token_id
        ends = [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]
        token = self.tokenizer.get_vocab().get(self.stop)
        return [*ends, token] if token is not None and token not in ends else ends or None

    def _facts(self, samples: list[Sample], cache) -> list[dict]:
        """Of each row: the visual tokens that each layer saw, the bytes of its part of the KV cache at the
        end and, with a trace, [mean s^max, compensation share] of each compression layer (null where there is
        none). Lists are empty where nothing was compressed.
        """
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // len(samples)
        stats, traces = self._told() if samples[0].shown else (None, None)
        facts = []
        for row in range(len(samples)):
            tokens = [int(layer[row]) for layer in stats["visual_tokens"]] if stats is not None else []
            stages = traces[row].stages if traces else ()
            told = [[_number(stage.mean_similarity), _number(stage.compensation_share)] for stage in stages]
            facts.append({"tokens": tokens, "cache_bytes": held, "trace": told})
        return facts


def cut(text: str, stops: list[str]) -> str:
    """A text up to the first of ``stops``, without space around it."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _number(value: float) -> float | None:
    """A figure for JSON, which has no nan."""
    return None if value != value else round(value, 6)
