"""What the commands share: loading, and a conversation about images and videos on one KV cache."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from PIL import Image
from transformers import DynamicCache, StoppingCriteriaList, TextStreamer

from libra import Compression
from libra.checkpoints import find_checkpoint
from libra.engine.cache import bytes_at
from libra.media import COMMAND, open_image, split_names
from libra.rows import compression_from
from libra.utils import numbers
from libra.utils.devices import find_device

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from ..conversation import conv_templates, conversation_name
from ..mm_utils import (
    KeywordsStoppingCriteria,
    as_text,
    get_model_name_from_path,
    process_images,
    special_spellings,
    tokenizer_image_token,
)
from ..video import (
    DEFAULT_VIDEO_TOKEN,
    ChatConversation,
    process_image,
    process_video,
    prompt_ids,
)

PLACES = (DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, IMAGE_PLACEHOLDER)


@dataclass
class Loaded:
    """A model with what a conversation needs next to it; ``conversation`` None stands for the tokenizer's
    chat template."""

    tokenizer: object
    model: torch.nn.Module
    image_processor: object
    context_length: int
    conversation: str | None


def load_model(args, compression: Compression | None = None) -> Loaded:
    """The model of :func:`llava.serve.options.add_model_options`' arguments, of which all but ``model_path``
    may be missing.

    Raises:
        ValueError: for a template, device or checkpoint that cannot be used.
    """
    conv_mode = getattr(args, "conv_mode", None)
    conversation_name("", explicit=conv_mode)
    device = find_device(getattr(args, "device", None))
    quantised = [bits for bits in ("8bit", "4bit") if getattr(args, f"load_{bits}", False)]
    if quantised and device.type != "cuda":
        raise ValueError(f"--load-{quantised[0]} needs a GPU; leave it out")

    from ..model.builder import load_pretrained_model

    path = find_checkpoint(args.model_path)
    model_name = get_model_name_from_path(path)
    loaded = load_pretrained_model(
        path,
        getattr(args, "model_base", None),
        model_name,
        load_8bit="8bit" in quantised,
        load_4bit="4bit" in quantised,
        device=str(device),
        compression=compression,
    )
    model = loaded[1]
    if model.takes_videos and not (conv_mode or getattr(model.config, "conversation", None)):
        return Loaded(*loaded, None)
    conversation = conversation_name(model_name, model.config, conv_mode)
    if not conv_mode and conversation == "llava_v0":
        print(
            f"note: no conversation template matches {model_name}; using llava_v0 (--conv-mode changes it)",
            file=sys.stderr,
        )
    return Loaded(*loaded, conversation)


class AnswerStreamer(TextStreamer):
    """Says an answer while it is generated, without the text that ends a turn, and notes the time of its
    first token.

    Args:
        say: True prints; a function is given each piece of text, and an empty one before each token, so that
            it can stop the generation by raising; False only notes the time.
    """

    def __init__(self, tokenizer, stop: str | None, say: bool | Callable[[str], object] = True):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop, self.say = stop, say
        self.first_token_at: float | None = None

    def put(self, value):
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        if callable(self.say):
            self.say("")
        super().put(value)

    def end(self):
        self.first_token_at = (
            self.first_token_at or time.perf_counter()
        )  # an answer that is over at once may never be put
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text.removesuffix(self.stop) if stream_end and self.stop else text
        if callable(self.say):
            self.say(text)
        elif self.say:
            super().on_finalized_text(text, stream_end)


@dataclass
class Picture:
    """An image or a video in the model's form.

    Attributes:
        pixels: as ``model.image_features`` takes one entry.
        size: (width, height) of an image in pixels; None for a video.
        mark: what stands for it in a prompt, ``<image>`` or ``<video>``.
        tokens: how many visual tokens it becomes.
    """

    pixels: torch.Tensor | tuple[torch.Tensor, str]
    size: tuple[int, int] | None
    mark: str
    tokens: int


@dataclass
class Answer:
    """One answer.

    Attributes:
        text: without what ends a turn.
        first_token: seconds from the question to the first token, vision tower included; None with beams.
        seconds: from the question to the end.
        reread: whether the turns before had to be read again, because the new prompt does not go on from what
            is cached.
    """

    text: str
    first_token: float | None
    seconds: float
    reread: bool


class Session:
    """A loaded model in a conversation, which stays in its KV cache: a turn runs the new text and the new
    images only.

    With compression the visual tokens of a turn's images are compressed by that turn's question, and stay so
    in later turns.

    Args:
        conversation: name of the template; None for the tokenizer's own chat template (VideoLLaMA-2).
        images: shown with the first question; :meth:`show` adds more at any time.
        reprefill: run the whole conversation again for every question, so that compression follows the newest
            one.
        typed_places: whether ``<image>``, ``<video>`` and ``<image-placeholder>`` in a question are places
            for what is shown. Where the question comes from somebody else they are text. Other special tokens
            are always text.

    Raises:
        ValueError: for images that the checkpoint's configuration cannot take.
    """

    def __init__(
        self,
        tokenizer,
        model,
        image_processor,
        context_length: int,
        conversation: str | None,
        images: list[Image.Image] = (),
        reprefill: bool = False,
        typed_places: bool = True,
    ):
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.reprefill = reprefill
        self._spellings = special_spellings(tokenizer) | set(PLACES)
        self._typed = self._spellings - set(PLACES) if typed_places else self._spellings
        self._template = ChatConversation(tokenizer) if conversation is None else conv_templates[conversation]
        self.limit = context_length
        self.restart()
        for image in images:
            self.show(image)

    @classmethod
    def load(cls, args) -> "Session":
        """From command-line arguments; what is quick to check is checked before the model is loaded.

        Raises:
            ValueError: for an image, video, compression file, template, device or checkpoint that cannot be
                used.
        """
        compression = getattr(args, "compression", None)
        compression = compression_from(compression) if compression else None

        def names(option: str) -> list[str]:
            return split_names(getattr(args, option, None) or "", getattr(args, "sep", ","))

        images, videos = [open_image(name, COMMAND) for name in names("image_file")], names("video_file")
        for video in videos:
            if not Path(video).expanduser().exists():
                raise ValueError(
                    f"the video {video} does not exist; give the path of a video file or of a folder of"
                    " frames"
                )
        loaded = load_model(args, compression)
        session = cls(**vars(loaded), images=images, reprefill=getattr(args, "reprefill", False))
        for video in videos:
            session.show(video, "video")
        return session

    def restart(self) -> None:
        """Forget what was said and shown."""
        self.conversation = self._template.copy()
        self.pictures: list[Picture] = []  # all of the conversation, those of the next question last
        self._shown = 0  # how many of them belong to questions that were asked
        self._forget_cache()

    def _forget_cache(self) -> None:
        self._cache: DynamicCache | None = None
        self._held: list[int] = []  # the token ids in the cache
        self._asked = 0  # columns of the last prompt
        self._counts: list[list[int]] = []  # visual tokens of each layer, of each prefill in the cache

    def show(self, picture: str | Path | Image.Image, modal: str = "image") -> Picture:
        """Add an image (anything that :func:`libra.media.open_image` takes), or the file or folder of a
        "video", to the next question.

        Raises:
            ValueError: for what cannot be read, and for a video where the checkpoint takes images only.
        """
        if modal == "video" and not self.model.takes_videos:
            raise ValueError("this checkpoint takes images; videos are for VideoLLaMA-2 checkpoints")
        processor, config = self.image_processor, self.model.config
        if modal == "image":
            image = open_image(picture, COMMAND)
            size, mark = image.size, DEFAULT_IMAGE_TOKEN
            if self.model.takes_videos:
                pixels = process_image(
                    image, processor, aspect_ratio=None
                )  # as VideoLLaMA-2's own inference does
            else:
                pixels = process_images([image], processor, config)[0]
        else:
            size, mark = None, DEFAULT_VIDEO_TOKEN
            pixels = process_video(picture, processor, aspect_ratio=None, num_frames=config.num_frames)
        pixels = pixels.to(self.model.device, self.model.dtype)
        entry = (pixels, modal) if self.model.takes_videos else pixels
        tokens = self.model.visual_tokens(self._stacked([entry]), [size])[0]
        self.pictures.append(Picture(entry, size, mark, tokens))
        return self.pictures[-1]

    @staticmethod
    def _stacked(entries: list):
        """Entries of equal shape in one tensor, as ``process_images`` gives them; a list where they differ or
        name a modal."""
        if isinstance(entries[0], tuple) or len({entry.shape for entry in entries}) > 1:
            return entries
        return torch.stack(entries)

    def _with_places(self, question: str) -> str:
        """The question with a mark for every picture still to be shown: where it has placeholders, else in
        front."""
        marks = [picture.mark for picture in self.pictures[self._shown :]]
        written = marks
        if getattr(self.model.config, "mm_use_im_start_end", False):
            written = [DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN for mark in marks]
        if IMAGE_PLACEHOLDER in question:
            text, *parts = question.split(IMAGE_PLACEHOLDER)
            fill = iter(written)
            question = text + "".join(next(fill, DEFAULT_IMAGE_TOKEN) + part for part in parts)
        elif not self._marks(question):
            question = "\n".join([*written, question])
        places = self._marks(question)
        if places != marks:
            raise ValueError(
                f"images to show: {' '.join(marks) or 'none'}, places for them in the question: "
                f"{' '.join(places) or 'none'}; write {IMAGE_PLACEHOLDER} once for each of them, or leave it "
                "out"
            )
        return question

    def _marks(self, text: str) -> list[str]:
        """The marks in a text that this model takes for an image or a video."""
        return re.findall(
            f"{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}"
            if self.model.takes_videos
            else DEFAULT_IMAGE_TOKEN,
            text,
        )

    def _token_ids(self, conversation) -> list[int]:
        encode = prompt_ids if self.model.takes_videos else tokenizer_image_token
        return encode(conversation.get_prompt(), self.tokenizer)

    def _columns(self, ids: list[int]) -> int:
        """How many tokens the conversation's first ``ids`` are once the visual ones are in their places."""
        places = sum(token < 0 for token in ids)
        return len(ids) - places + sum(picture.tokens for picture in self.pictures[:places])

    def _reuse(self, ids: list[int]) -> int:
        """How many of ``ids`` the cache goes on from; what it holds besides is taken out. 0: it has to be
        filled anew."""
        if self._cache is None:
            return 0
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, ids[:-1])))
        surplus = self._held[same:]
        if any(token < 0 for token in surplus):  # a compressed image cannot be taken out
            return 0
        if surplus:
            self._cache.crop(-len(surplus))
        return same

    def _asking(self, question: str) -> tuple:
        """The conversation with one more question, its token ids, and how many columns they become. Raises
        ValueError as :meth:`ask`."""
        turn = self.conversation.copy()
        turn.append_message(turn.roles[0], self._with_places(as_text(question, self.tokenizer, self._typed)))
        turn.append_message(turn.roles[1], None)
        ids = self._token_ids(turn)
        length = self._columns(ids)
        if length >= self.limit:
            raise ValueError(
                f"the conversation has {length} tokens and the model takes {self.limit}; start a new one"
            )
        return turn, ids, length

    def check(self, question: str) -> None:
        """Whether a question can be asked now. Raises ValueError as :meth:`ask`."""
        self._asking(question)

    def recall(self, question: str, answer: str) -> None:
        """Add a turn that took place elsewhere; the next question reads it with the rest.

        Raises:
            ValueError: as :meth:`ask` for a question.
        """
        turn = self.conversation.copy()
        turn.append_message(turn.roles[0], self._with_places(as_text(question, self.tokenizer, self._typed)))
        turn.append_message(turn.roles[1], as_text(answer, self.tokenizer, self._spellings))
        self.conversation, self._shown = turn, len(self.pictures)
        self._forget_cache()

    def ask(
        self,
        question: str,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        stream: bool | Callable[[str], object] = False,
    ) -> Answer:
        """Put a question in the light of the conversation so far; ``stream`` prints the answer as it comes,
        or gives each piece to a function (not with beams).

        Raises:
            ValueError: if the question's places for images do not fit, it hides a special token, or the
                conversation is too long for the model.
                The conversation then stays as it was.
        """
        turn, ids, length = self._asking(question)
        start = time.perf_counter()
        lasting = num_beams == 1  # beams leave a cache of many rows
        go_on = lasting and not self.reprefill and len(self.conversation.messages) > self.conversation.offset
        held = self._reuse(ids) if go_on else 0
        if not held:
            self._forget_cache()
            self._cache = DynamicCache() if lasting else None
        stop = None if turn.stop == self.tokenizer.eos_token else turn.stop
        streamer = AnswerStreamer(self.tokenizer, stop, stream) if lasting else None
        options: dict = {"do_sample": False}
        if temperature >= numbers.COLDEST:
            options = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        options |= {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "streamer": streamer}
        new = self._generate(ids, held, stop, options)
        end = time.perf_counter()
        if lasting:
            self._held = ids + new.tolist()[: self._cache.get_seq_length() - length]
            self._asked = length
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        text = text.removesuffix(stop).strip() if stop else text
        turn.messages[-1][1] = as_text(text, self.tokenizer, self._spellings)
        self.conversation, self._shown = turn, len(self.pictures)
        first = streamer.first_token_at - start if streamer else None
        return Answer(text, first, end - start, reread=go_on and not held)

    def _generate(self, ids: list[int], held: int, stop: str | None, options: dict) -> torch.Tensor:
        """The ids of an answer to a conversation of which the cache holds the first ``held``; notes what its
        pictures became."""
        prompt = torch.tensor([ids[held:]], device=self.model.device)
        pictures = self.pictures[sum(token < 0 for token in ids[:held]) :]
        given = {}
        if pictures:
            given = {
                "images": self._stacked([picture.pixels for picture in pictures]),
                "image_sizes": [picture.size for picture in pictures],
            }
        criteria = [KeywordsStoppingCriteria([stop], self.tokenizer, prompt)] if stop else []
        try:
            new = self.model.generate(
                prompt,
                **given,
                cache=self._cache,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList(criteria),
                **options,
            )
        except BaseException:
            self._forget_cache()  # it may hold a part of this turn
            raise
        if pictures:
            stats = self.model.compression_stats
            plain = [sum(picture.tokens for picture in pictures)] * self.model.config.num_hidden_layers
            self._counts.append([row[0] for row in stats["visual_tokens"]] if stats else plain)
        return new[0]

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache after the last question, before its answer; for one row without compression."""
        return 0 if self._cache is None else bytes_at(self._cache, self._asked)

    @property
    def visual_tokens(self) -> list[int]:
        """How many of the conversation's visual tokens each layer has seen; empty before the first image."""
        return [sum(layer) for layer in zip(*self._counts)]

    def tokens_note(self) -> str | None:
        """:attr:`visual_tokens` in one line; None before the first image."""
        counts = self.visual_tokens
        stages = numbers.stages(counts)
        if len(stages) < 2:
            return f"visual tokens {stages[0]}" if stages else None
        average = sum(counts) / len(counts)
        return (
            f"visual tokens {' → '.join(map(str, stages))}, {average:.0f} on average over {len(counts)} "
            "layers"
        )
