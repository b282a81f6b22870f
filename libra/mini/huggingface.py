"""The embedded model as transformers loads it, to try :func:`libra.attach` on without a download."""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)

from llava.convert import convert

from ..engine.relevance import ClipRelevance
from ..media import open_image
from ..media.asking import image_question
from ..rows import EMBEDDED


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A ``LlavaForConditionalGeneration`` and its processor, made from the embedded checkpoint."""
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "mini"))
        convert(str(EMBEDDED), folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    return model.eval(), processor


def relevance(processor: ProcessorMixin) -> ClipRelevance:
    """The embedded model's own CLIP, for ``libra.attach(model, "cdpruner", clip=relevance(processor))``."""
    return ClipRelevance.load(EMBEDDED / "vision_tower", processor.tokenizer)


def question(processor: ProcessorMixin, picture: str | Path | Image.Image, text: str) -> BatchFeature:
    """What a model is given for a question about a picture (a file's path, or the picture itself).

    Raises:
        ValueError: for a picture that cannot be opened.
    """
    image = picture if isinstance(picture, Image.Image) else open_image(str(picture))
    return image_question(processor, image, text)
