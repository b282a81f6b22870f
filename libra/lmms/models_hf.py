"""Checkpoints in transformers' own format, compressed through :func:`libra.attach`."""

import torch
import transformers
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import libra
from libra.engine.attach import Attachment
from libra.engine.families import TESTED, VIDEO_IDS
from libra.engine.structure import placeholder_ids
from libra.engine.transformers_api import PreTrainedConfig
from libra.media.asking import place_marks
from libra.rows import Row
from llava.model import huggingface

from .models_base import Engine, Sample


def class_of(path: str) -> str | None:
    """The class of transformers that a checkpoint (a folder or hub name) is for; None for LLaVA's own format,
    and where there is no config.json to read.

    Both formats know the type ``llava``; only in transformers' own does config.json hold the settings of the
    vision tower.

    Raises ValueError for a class that :func:`libra.attach` does not support.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        return None
    if "vision_config" not in config:
        return None
    kind = config.get("model_type")
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if name not in TESTED:
        raise ValueError(
            f"{path} is of type {kind!r}, which libra.attach does not support; it supports"
            f" {', '.join(TESTED)}"
        )
    return name


class HuggingFace(Engine):
    """Any class of ``libra.engine.families.TESTED``, with the checkpoint's own processor and chat
    template.

    Videos go to the families that take them as such, to the others as images, frame by frame.
    """

    def __init__(self, path: str, class_name: str, device: str, dtype: torch.dtype):
        """Raises ValueError for a checkpoint without a chat template, or one that does not load."""
        self.processor = huggingface.load_processor(path)
        if not self.processor.chat_template:
            raise ValueError(
                f"{path} has no chat template, which makes the prompts; add chat_template.jinja to it"
            )
        self.tokenizer = self.processor.tokenizer
        huggingface.pad_left(self.tokenizer)
        model_class = getattr(transformers, class_name)
        self.model = huggingface.load(model_class, path, dtype=dtype, device_map={"": device}).eval()
        self.takes_videos = bool(placeholder_ids(self.model.config, VIDEO_IDS))
        self.handle: Attachment | None = None

    def set_row(self, row: Row, trace: bool) -> None:
        if self.handle is not None:
            self.handle.detach()
            self.handle = None
        self.model.set_attn_implementation(row.attention)
        self.handle = libra.attach(self.model, row.compression, trace=trace)

    def remember_pictures(self, limit: int) -> None:
        """Nothing is kept: these models encode their pictures inside their own forward."""

    def _told(self):
        return self.handle.stats, self.handle.trace

    def _ids(self, sequences: torch.Tensor, inputs: dict) -> torch.Tensor:
        return sequences[:, inputs["input_ids"].shape[1] :]

    def _inputs(self, samples: list[Sample]) -> dict:
        shown = [sample.shown if self.takes_videos else sample.images for sample in samples]
        marks = place_marks(self.processor)
        for sample in samples:
            if written := [mark for mark in marks if mark in sample.text]:
                raise ValueError(
                    f"{sample.name}: its text has {written[0]}, which this model takes for a place of an"
                    " image"
                )
        prompts = [self._prompt(sample.text, own) for sample, own in zip(samples, shown, strict=True)]
        images = [[one for one in own if isinstance(one, Image.Image)] for own in shown]
        videos = [one for own in shown for one in own if isinstance(one, list)]
        given: dict = {"images": images} if any(images) else {}
        if videos:
            given |= {"videos": videos, "do_sample_frames": False}
        inputs = self.processor(text=prompts, **given, padding=True, return_tensors="pt")
        return dict(inputs.to(self.model.device, self.model.dtype)) | {
            "pad_token_id": self.tokenizer.pad_token_id
        }

    def _prompt(self, text: str, shown: list) -> str:
        content = [{"type": "video" if isinstance(one, list) else "image"} for one in shown]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
