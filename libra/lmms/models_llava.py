"""Checkpoints in LLaVA's own format: LLaVA on Llama and Mistral, and VideoLLaMA-2."""

import torch
from PIL import Image

from libra.config import Compression
from libra.methods import SELECTORS
from libra.rows import Row
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.memory import FeatureMemory
from llava.video import (
    DEFAULT_VIDEO_TOKEN,
    ChatConversation,
    process_image,
    process_video,
    prompt_ids,
)

from .models_base import FRAMES, Engine, Sample

USUAL_FRAME = (640, 360)


class Llava(Engine):
    """LLaVA: images as the checkpoint's ``image_aspect_ratio`` says; the frames of a video are as many
    images.

    Where nothing is said they are the 8 frames, or as many as fit into three quarters of the model's length.
    """

    def __init__(self, path: str, conversation: str | None, device: str, dtype: torch.dtype):
        """Raises ValueError for a checkpoint that does not load, or one without a conversation template."""
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            path,
            None,
            get_model_name_from_path(path),
            device=device,
            torch_dtype=dtype,
        )
        self.model.eval()
        self.conversation: Conversation | ChatConversation
        self.compression: Compression | None = None
        if self.model.takes_videos:
            self.conversation = ChatConversation(self.tokenizer)
            self.frames = self.model.config.num_frames
        elif (conversation or getattr(self.model.config, "conversation", None)) in conv_templates:
            self.conversation = conv_templates[conversation or self.model.config.conversation]
            self.frames = self._fitting_frames()
        else:
            raise ValueError(
                f"{path} has no conversation template of llava.conversation: name one in the registry of"
                " models"
            )
        self.stop, self.trace = self.conversation.stop, False

    @property
    def limit(self) -> int:
        """Text and visual tokens of a prompt."""
        return self.model.context_length

    def _fitting_frames(self) -> int:
        pixels, sizes = self._pixels([Image.new("RGB", USUAL_FRAME)])
        return max(1, min(FRAMES, self.limit * 3 // 4 // self.model.visual_tokens(pixels, sizes)[0]))

    def set_row(self, row: Row, trace: bool) -> None:
        self.model.set_compression(row.compression)
        self.model.set_attn_implementation(row.attention)
        self.compression, self.trace = row.compression, trace

    def remember_pictures(self, limit: int) -> None:
        tower = self.model.get_vision_tower()
        if not limit:
            tower.memory = None
        elif tower.memory is None:
            tower.memory = FeatureMemory(limit)

    def _told(self):
        return self.model.compression_stats, self.model.compression_trace

    def _inputs(self, samples: list[Sample]) -> dict:
        """Raises ValueError for a prompt that the model would cut, or whose places are not as many as its
        images."""
        prompts = [self._prompt(sample) for sample in samples]
        for sample, prompt in zip(samples, prompts):
            shown = len(sample.shown if self._as_one else sample.images)
            places = sum(token < 0 for token in prompt)
            if places != shown:
                raise ValueError(
                    f"{sample.name}: it shows {shown} images and has places for {places} in its text"
                )
        if self.model.takes_videos:
            images, sizes = self._videos(samples)
        elif self._joins:
            images, sizes = self._films([one for sample in samples for one in sample.shown])
        else:
            images, sizes = self._pixels([i for s in samples for i in s.images])
        if images is not None:
            self._check_lengths(samples, prompts, self.model.visual_tokens(images, sizes))
        padding = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(samples), length), padding)
        mask = torch.zeros(len(samples), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt), True
        pictures = {} if images is None else {"images": images, "image_sizes": sizes}
        # It refuses what has nothing to compress.
        self.model.set_compression(None if images is None else self.compression, trace=self.trace)
        device = self.model.device
        return {
            "inputs": ids.to(device),
            "attention_mask": mask.to(device),
            "pad_token_id": padding,
            **pictures,
        }

    def _prompt(self, sample: Sample) -> list[int]:
        """Token ids, with a placeholder for each image or video."""
        if self.model.takes_videos:
            marks = [
                DEFAULT_VIDEO_TOKEN if isinstance(one, list) else DEFAULT_IMAGE_TOKEN for one in sample.shown
            ]
            text = "\n".join([*marks, sample.text])
        else:
            shown = sample.shown if self._as_one else sample.images
            places = " ".join([DEFAULT_IMAGE_TOKEN] * len(shown))
            text = sample.text
            if places and DEFAULT_IMAGE_TOKEN not in text:
                text = f"{places}\n{text}"
        encode = prompt_ids if self.model.takes_videos else tokenizer_image_token
        conversation = self.conversation.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return list(encode(conversation.get_prompt(), self.tokenizer))

    @property
    def _joins(self) -> bool:
        """Whether the frames of a video are one run of visual tokens, for a method that looks at them
        together."""
        parts = () if self.compression is None else self.compression.parts
        return any(part.acts and SELECTORS[part.select].films for part in parts)

    @property
    def _as_one(self) -> bool:
        """Whether a video has one place in the prompt."""
        return self.model.takes_videos or self._joins

    def _films(self, shown: list):
        """The same as :meth:`_pixels`, where each video is one entry of all its frames.

        Raises ValueError for a model that cuts pictures into tiles.
        """
        if getattr(self.model.config, "mm_patch_merge_type", "flat") != "flat":
            raise ValueError(
                f"{self.compression.name} looks at the frames of a video together, and this model cuts each"
                " into tiles; choose a method that looks at pictures"
            )
        entries, sizes = [], []
        for one in shown:
            frames = one if isinstance(one, list) else [one]
            pixels = process_images(frames, self.image_processor, self.model.config)
            stacked = torch.stack(pixels) if isinstance(pixels, list) else pixels
            entries.append(stacked.to(self.model.device, self.model.dtype))
            sizes.append(frames[0].size)
        return entries or None, sizes or None

    def _pixels(self, images: list[Image.Image]):
        """The model's ``images`` and ``image_sizes``; None twice where there are none."""
        if not images:
            return None, None
        pixels = process_images(images, self.image_processor, self.model.config)
        place = {"device": self.model.device, "dtype": self.model.dtype}
        pixels = [one.to(**place) for one in pixels] if isinstance(pixels, list) else pixels.to(**place)
        return pixels, [image.size for image in images]

    def _videos(self, samples: list[Sample]):
        """The same for VideoLLaMA-2, whose own inference cuts the middle out of each frame."""
        entries = []
        for one in (one for sample in samples for one in sample.shown):
            if isinstance(one, list):
                pixels, modal = (
                    process_video(one, self.image_processor, aspect_ratio=None, num_frames=self.frames),
                    "video",
                )
            else:
                pixels, modal = process_image(one, self.image_processor, aspect_ratio=None), "image"
            entries.append((pixels.to(self.model.device, self.model.dtype), modal))
        return entries or None, None

    def _check_lengths(self, samples: list[Sample], prompts: list[list[int]], tokens: list[int]) -> None:
        counts = iter(tokens)
        for sample, prompt in zip(samples, prompts, strict=True):
            length = sum(next(counts) if token < 0 else 1 for token in prompt)
            if length > self.limit:
                videos = any(isinstance(one, list) for one in sample.shown)
                mend = "show fewer frames (frames=N)" if videos else "use a model for longer prompts"
                raise ValueError(
                    f"{sample.name}: its prompt has {length} tokens and the model takes {self.limit}; {mend}"
                )
