"""The Hugging Face models that :func:`libra.attach` knows, and where each keeps what the plug-in needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a model class keeps what the plug-in needs.

    Attributes:
        token_ids: names of the configuration's placeholder ids of visual tokens.
        body: dotted path to the module that puts text and images together; it takes ``input_ids``.
        decoder: dotted path to the text decoder (``layers``, ``norm``, ``rotary_emb``).
    """

    token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    body: str = "model"
    decoder: str = "model.language_model"


_ONLY_IMAGES = Family(token_ids=("image_token_id",))
FAMILIES = {
    "LlavaForConditionalGeneration": _ONLY_IMAGES,
    "LlavaNextForConditionalGeneration": _ONLY_IMAGES,
    "LlavaOnevisionForConditionalGeneration": Family(),
    "VideoLlavaForConditionalGeneration": Family(),
    "Qwen2VLForConditionalGeneration": Family(),
    "Qwen2_5_VLForConditionalGeneration": Family(),
    "Qwen3VLForConditionalGeneration": Family(),
    "InternVLForConditionalGeneration": _ONLY_IMAGES,
}
# Decoders whose forward is the plain loop of CompressedDecoder.
DECODERS = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen3Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
)
