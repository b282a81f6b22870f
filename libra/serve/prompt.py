"""A request's messages as the arguments of ``generate``."""

import copy

import torch
from jinja2 import TemplateError
from transformers import BatchFeature

from ..engine.families import VIDEO_IDS
from ..engine.structure import placeholder_ids
from ..media import asking
from ..utils.sentences import check_characters
from .models import Model

CHARACTERS = 64  # of text for each token of the model's context; more are refused before they are counted


class Prompter:
    """The model's own processor and chat template; called on one thread at a time.

    Videos go to models that take them as such, to the others as pictures, frame by frame.
    """

    def __init__(self, model: Model):
        # A copy: the thread that generates reads the original's tokenizer at the same time.
        self._processor = copy.deepcopy(model.processor)
        self._most = CHARACTERS * model.context
        config = model.model.config
        self._ids = torch.tensor(placeholder_ids(config))
        self.takes_videos = (
            bool(placeholder_ids(config, VIDEO_IDS))
            and getattr(self._processor, "video_processor", None) is not None
        )
        self._marks = asking.place_marks(self._processor)

    def __call__(self, messages, shown: list) -> BatchFeature:
        """Tensors of one row, on the CPU.

        Args:
            messages: as in :class:`libra.serve.request.Request`.
            shown: a picture or a list of frames for each part that is not text, in order.

        Raises:
            ValueError: for a text that hides a place for a picture or holds what is not a character, and what
                the model's template or processor does not take.
        """
        texts = [part[1] for _, parts in messages for part in parts if part[0] == "text"]
        if sum(map(len, texts)) > self._most:
            raise ValueError(
                f"the texts have more than {self._most:,} characters, which no prompt of this model holds"
            )
        for text in texts:
            check_characters(text, "the text")
        for mark in self._marks:
            if any(mark in text for text in texts):
                raise ValueError(
                    f"the text has {mark}, which this model takes for a picture; write it differently"
                )
        rest = iter(shown)
        chat = [{"role": role, "content": self._parts(parts, rest)} for role, parts in messages]
        videos = any(part["type"] == "video" for message in chat for part in message["content"])
        try:
            return asking.chat(self._processor, chat, **({"do_sample_frames": False} if videos else {}))
        except TemplateError as error:
            raise ValueError(f"messages: the model's template refuses them: {error}") from error

    def _parts(self, parts, shown) -> list[dict]:
        found = []
        for kind, *content in parts:
            if kind == "text":
                found.append({"type": "text", "text": content[0]})
                continue
            one = next(shown)
            if kind == "video" and self.takes_videos:
                found.append({"type": "video", "video": one})
            else:
                pictures = one if isinstance(one, list) else [one]
                found += [{"type": "image", "image": picture} for picture in pictures]
        return found

    def visual(self, inputs: BatchFeature) -> int:
        """How many of a prompt's tokens are visual."""
        return int(torch.isin(inputs["input_ids"], self._ids).sum())
