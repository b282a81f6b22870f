"""What the two commands share: their options, loading, and a conversation about some images."""

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextStreamer

from libra import Compression

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from ..conversation import conv_templates, conversation_name
from ..mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, load_image, process_images, tokenizer_image_token


def _number(kind, allowed, what: str):
    """An argparse type for numbers within a range."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


whole_number = _number(int, lambda value: value >= 1, "a whole number from 1 up")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands, under the original's names."""
    add = parser.add_argument
    add("--model-path", required=True, help="folder or hub name of a LLaVA checkpoint")
    add("--model-base", help="the language model that a LoRA checkpoint belongs to")
    add("--image-file", required=True, help="image file or http(s) address; several with --sep between them")
    add("--sep", default=",", help="what parts the names in --image-file (default ,)")
    add("--conv-mode", help="conversation template; by default the checkpoint's own or, where it names none, by its name")
    add("--compression", metavar="YAML", help="compress visual tokens as this file says, e.g. configs/llava7b_r50.yaml")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto (default) takes the GPU where there is one")
    add("--temperature", type=_number(float, lambda value: 0 <= value < 1e4, "a number from 0 up"), default=0.0,
        help="of the sampling; 0 (default) takes the likeliest token")
    add("--top-p", "--top_p", type=_number(float, lambda value: 0 < value <= 1, "a number in (0, 1]"),
        help="sample among the likeliest tokens of this total probability")
    add("--max-new-tokens", "--max_new_tokens", type=whole_number, default=512, help="length limit of an answer (default 512)")
    add("--load-8bit", action="store_true", help="8-bit weights (GPU with bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (GPU with bitsandbytes)")


class AnswerStreamer(TextStreamer):
    """Prints an answer while it is generated, without the text that ends a turn, and notes the time of its first token."""

    def __init__(self, tokenizer, stop: str | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop
        self.first_token_at: float | None = None

    def put(self, value):
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def end(self):
        self.first_token_at = self.first_token_at or time.perf_counter()  # an answer that is over at once may never be put
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(text.removesuffix(self.stop) if stream_end and self.stop else text, stream_end)


@dataclass
class Answer:
    """One answer; ``first_token`` in seconds from the question on, vision tower included; None if it was not streamed."""

    text: str
    first_token: float | None


class Session:
    """A loaded model in a conversation about ``images``; the first question carries them."""

    def __init__(self, tokenizer, model, image_processor, context_length: int, conversation: str, images: list[Image.Image]):
        self.tokenizer, self.model = tokenizer, model
        self.conversation = conv_templates[conversation].copy()
        self.image_sizes = [image.size for image in images]
        pixels = process_images(images, image_processor, model.config)
        if isinstance(pixels, list):
            self.pixels = [picture.to(model.device, model.dtype) for picture in pixels]
        else:
            self.pixels = pixels.to(model.device, model.dtype)
        self.limit = getattr(model.config, "tokenizer_model_max_length", None) or context_length

    @classmethod
    def load(cls, args) -> "Session":
        """From command-line arguments; what is quick to check is checked before the model is loaded.

        Raises:
            ValueError: for an image, compression file, template, device or checkpoint that cannot be used.
        """
        compression = getattr(args, "compression", None)
        compression = Compression.from_yaml(compression) if compression else None
        images = [load_image(name.strip()) for name in args.image_file.split(getattr(args, "sep", ","))]
        conv_mode = getattr(args, "conv_mode", None)
        conversation_name("", explicit=conv_mode)
        device = getattr(args, "device", "auto")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        quantised = [bits for bits in ("8bit", "4bit") if getattr(args, f"load_{bits}", False)]
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; use --device cpu")
        if quantised and device != "cuda":
            raise ValueError(f"--load-{quantised[0]} needs a GPU; leave it out")

        from ..model.builder import load_pretrained_model

        model_name = get_model_name_from_path(args.model_path)
        tokenizer, model, image_processor, context_length = load_pretrained_model(
            args.model_path, getattr(args, "model_base", None), model_name,
            load_8bit="8bit" in quantised, load_4bit="4bit" in quantised, device=device, compression=compression,
        )
        conversation = conversation_name(model_name, model.config, conv_mode)
        if not conv_mode and conversation == "llava_v0":
            print(f"note: the name {model_name} tells no template; llava_v0 it is, --conv-mode sets another", file=sys.stderr)
        return cls(tokenizer, model, image_processor, context_length, conversation, images)

    def _with_images(self, question: str) -> str:
        """The question with one ``<image>`` for every image still to be shown: where it has placeholders, else in front."""
        count = 0 if self._asked else len(self.image_sizes)
        token = DEFAULT_IMAGE_TOKEN
        if getattr(self.model.config, "mm_use_im_start_end", False):
            token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
        if IMAGE_PLACEHOLDER in question:
            question = question.replace(IMAGE_PLACEHOLDER, token)
        elif DEFAULT_IMAGE_TOKEN not in question:
            question = "\n".join([token] * count + [question])
        places = question.count(DEFAULT_IMAGE_TOKEN)
        if places != count:
            raise ValueError(
                f"images to show: {count}, places for them in the question: {places};"
                f" write {IMAGE_PLACEHOLDER} once for each image, or leave it out"
            )
        return question

    @property
    def _asked(self) -> bool:
        return len(self.conversation.messages) > self.conversation.offset

    def ask(
        self, question: str, *, temperature: float = 0.0, top_p: float | None = None, max_new_tokens: int = 512,
        num_beams: int = 1, stream: bool = False,
    ) -> Answer:
        """Put a question in the light of the conversation so far; ``stream`` prints the answer as it comes (not with beams).

        The whole conversation goes through the model again, so that compression follows the newest question.

        Raises:
            ValueError: if the question's places for images do not fit, or the conversation is too long for the model.
                The conversation then stays as it was.
        """
        turn = self.conversation.copy()
        turn.append_message(turn.roles[0], self._with_images(question))
        turn.append_message(turn.roles[1], None)
        ids = tokenizer_image_token(turn.get_prompt(), self.tokenizer, return_tensors="pt")[None].to(self.model.device)
        length = ids.shape[1] + len(self.image_sizes) * (self.model.get_vision_tower().num_patches - 1)
        if length >= self.limit:
            raise ValueError(f"the conversation has {length} tokens and the model takes {self.limit}; start a new one")

        stop = None if turn.stop == self.tokenizer.eos_token else turn.stop
        criteria = [KeywordsStoppingCriteria([stop], self.tokenizer, ids)] if stop else []
        streamer = AnswerStreamer(self.tokenizer, stop) if stream else None
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        start = time.perf_counter()
        new = self.model.generate(
            ids, images=self.pixels, image_sizes=self.image_sizes, num_beams=num_beams, max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id, stopping_criteria=StoppingCriteriaList(criteria), streamer=streamer,
            **sampling,
        )
        text = self.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        text = text.removesuffix(stop).strip() if stop else text
        turn.messages[-1][1] = text
        self.conversation = turn
        return Answer(text, streamer.first_token_at - start if streamer else None)

    def compression_note(self) -> str | None:
        """How many visual tokens the layers saw in the last prefill, in one line; None without compression."""
        if not self.model.compression_stats:
            return None
        counts = [row[0] for row in self.model.compression_stats["visual_tokens"]]
        stages = [n for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]]
        average = sum(counts) / len(counts)
        return f"visual tokens {' → '.join(map(str, stages))}, {average:.0f} on average over {len(counts)} layers"
