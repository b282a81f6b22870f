"""Videos to pixels and prompts to token ids, as the published VideoLLaMA-2 checkpoints expect them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from libra.media import COMMAND, FOLDER_RATE, Video, clip, open_image, picture_files

from .constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .mm_utils import _encode, load_image, process_images

DEFAULT_VIDEO_TOKEN = "<video>"
VIDEO_TOKEN_INDEX = -201
NUM_FRAMES = 8
MAX_FRAMES = 32

_TOKENS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
_PLACEHOLDERS = {DEFAULT_IMAGE_TOKEN: IMAGE_TOKEN_INDEX, DEFAULT_VIDEO_TOKEN: VIDEO_TOKEN_INDEX}
_SYSTEM = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in "
    "nature.\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false "
    "information.\n<</SYS>>"
)


def frame_sample(
    duration: int, mode: str = "uniform", num_frames: int | None = None, fps: float | None = None
) -> np.ndarray:
    """Which of ``duration`` frames are shown.

    "uniform": the middles of ``num_frames`` equal parts; frames repeat where there are fewer. "fps": about
    one a second of a video with ``fps`` frames a second, the first in the middle of its second.

    Raises:
        ValueError: for another mode, a missing number, or no frames.
    """
    if duration < 1:
        raise ValueError(
            "there are no frames to choose from; give a video, or a part of one, with at least one frame"
        )
    if mode == "uniform" and num_frames:
        return np.round((np.arange(num_frames) + 0.5) * (duration - 1) / num_frames + 1e-6).astype(int)
    if mode == "fps" and fps:
        step = max(1, min(int(fps), duration))
        return np.arange(step // 2, duration, step)
    raise ValueError(f"frame_sample needs mode 'uniform' and num_frames, or 'fps' and fps; got mode {mode!r}")


def load_frames(
    video: str | Path, num_frames: int | None = NUM_FRAMES, s: float | None = None, e: float | None = None
) -> list[Image.Image]:
    """Frames of a video file, or of a folder's images in the natural order of their names.

    Args:
        num_frames: how many, spread evenly; None for one a second, at most ``MAX_FRAMES``.
        s, e: where the part to show begins and ends, in seconds.

    Raises:
        ValueError: if it is missing, no video, or has no frame in that part.
    """
    path = Path(video).expanduser()
    if path.is_dir():
        files, rate = picture_files(path), FOLDER_RATE
        times = [number / rate for number in range(len(files))]
    else:
        file = Video(path)
        times, rate = file.times, file.rate
    part = clip(times, rate, s, e)
    if not part:
        seconds = len(times) / rate
        raise ValueError(
            f"the video {video} has no frame in the part asked for (it has {len(times)} in {seconds:.1f}"
            " seconds)"
        )
    if num_frames is None:
        chosen = frame_sample(len(part), "fps", fps=rate)[:MAX_FRAMES]
    else:
        chosen = frame_sample(len(part), "uniform", num_frames)
    numbers = [part[i] for i in chosen]
    if path.is_dir():
        return [load_image(files[number]) for number in numbers]
    return file.frames(numbers)


def process_video(
    video,
    processor,
    s: float | None = None,
    e: float | None = None,
    aspect_ratio: str | None = "pad",
    num_frames: int | None = NUM_FRAMES,
) -> torch.Tensor:
    """Pixels (frames, 3, H, W) of a video; at most ``MAX_FRAMES`` frames.

    Args:
        video: a file or folder (see :func:`load_frames`), or frames: an array or tensor whose first axis
            counts them, or a list of whatever :func:`libra.media.open_image` takes. Black ones follow where
            there are fewer than ``num_frames``.
        processor: the vision tower's.
        aspect_ratio: "pad" to a square of the mean colour; None cuts the middle out, as VideoLLaMA-2's own
            inference does.

    Raises:
        ValueError: for what cannot be read, or no frames.
    """
    if isinstance(video, (str, Path)):
        frames = load_frames(video, num_frames, s, e)
    else:
        frames = [open_image(frame, COMMAND) for frame in video]
        if not frames:
            raise ValueError("the list of frames is empty; give at least one")
        frames += [Image.new("RGB", frames[-1].size)] * ((num_frames or 0) - len(frames))
    return process_images(frames[:MAX_FRAMES], processor, SimpleNamespace(image_aspect_ratio=aspect_ratio))


def process_image(
    image: str | Path | Image.Image, processor, aspect_ratio: str | None = "pad"
) -> torch.Tensor:
    """Pixels (1, 3, H, W) of one image; ``aspect_ratio`` as for :func:`process_video`."""
    return process_images(
        [open_image(image, COMMAND)], processor, SimpleNamespace(image_aspect_ratio=aspect_ratio)
    )


def prompt_ids(prompt: str, tokenizer, marks: tuple[str, ...] = tuple(_PLACEHOLDERS)) -> list[int]:
    """Token ids of a prompt with -200 for every ``<image>`` and -201 for every ``<video>`` that is among
    ``marks``; no special tokens are added."""
    ids = []
    for piece in re.split("(" + "|".join(marks) + ")", prompt) if marks else [prompt]:
        if piece in marks:
            ids.append(_PLACEHOLDERS[piece])
            continue
        encoded = _encode(tokenizer, piece)
        ids += encoded[1:] if encoded[:1] == [tokenizer.bos_token_id] else encoded
    return ids


def tokenizer_multimodal_token(
    prompt: str,
    tokenizer,
    multimodal_token: str | None = DEFAULT_IMAGE_TOKEN,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of a prompt with -200 for every ``<image>`` or -201 for every ``<video>``, as
    ``multimodal_token`` says; the other stays text. No special tokens are added. An int64 tensor (S,) for
    "pt".

    Raises:
        ValueError: for other values of ``return_tensors``.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(
            f"return_tensors {return_tensors!r} is unknown; use 'pt' for a tensor or None for a list"
        )
    ids = prompt_ids(prompt, tokenizer, (multimodal_token,) if multimodal_token in _PLACEHOLDERS else ())
    return torch.tensor(ids, dtype=torch.long) if return_tensors else ids


@dataclass
class ChatConversation:
    """A conversation in VideoLLaMA-2's prompts: its system text and the chat template of the checkpoint's
    tokenizer.

    It is used as a :class:`llava.conversation.Conversation` is: ``messages`` are [role, text] in order, the
    text is None where the model is to answer.
    """

    tokenizer: object
    messages: list[list] = field(default_factory=list)
    roles: tuple[str, str] = ("user", "assistant")
    offset: int = 0

    @property
    def stop(self) -> str:
        """What the model writes when its turn is over."""
        return self.tokenizer.eos_token

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def copy(self) -> "ChatConversation":
        return ChatConversation(
            self.tokenizer, [list(message) for message in self.messages], self.roles, self.offset
        )

    def get_prompt(self) -> str:
        """The whole conversation as one text.

        Raises:
            ValueError: for a tokenizer without a template, or one whose template refuses these messages.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat_template; use the one of a VideoLLaMA-2 checkpoint")
        said = [{"role": role, "content": text} for role, text in self.messages if text is not None]
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "system", "content": _SYSTEM}, *said],
                tokenize=False,
                add_generation_prompt=len(said) < len(self.messages),
            )
        except TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat_template refuses this conversation: {error}; choose another"
            ) from error


def chat_prompt(question: str, tokenizer, modal: str = "video") -> str:
    """VideoLLaMA-2's prompt for a question about a "video" or an "image": its system text and the tokenizer's
    chat template.

    Raises:
        ValueError: for another modal, or a tokenizer without a template.
    """
    if modal not in _TOKENS:
        raise ValueError(f"modal {modal!r} is unknown; use 'video' or 'image'")
    return ChatConversation(
        tokenizer, [["user", f"{_TOKENS[modal]}\n{question}"], ["assistant", None]]
    ).get_prompt()


def mm_infer(pixels: torch.Tensor, question: str, model, tokenizer, modal: str = "video", **options) -> str:
    """A VideoLLaMA-2 model's answer to a question about the pixels of :func:`process_video` or
    :func:`process_image`.

    ``options`` go to ``generate``; the default is greedy with at most 2048 new tokens.
    """
    prompt = chat_prompt(question, tokenizer, modal)
    ids = tokenizer_multimodal_token(prompt, tokenizer, _TOKENS[modal], return_tensors="pt")[None].to(
        model.device
    )
    images = [(pixels.to(model.device, model.dtype), modal)]
    new = model.generate(ids, images=images, **{"do_sample": False, "max_new_tokens": 2048, **options})
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()
