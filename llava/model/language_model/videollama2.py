"""VideoLLaMA-2 on Mistral: the frames of a video through the vision tower and the spatial-temporal
connector."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ...constants import IMAGE_TOKEN_INDEX
from ...video import VIDEO_TOKEN_INDEX
from ..llava_arch import Picture
from ..multimodal_projector.stc_connector import PADDING
from .llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM, LlavaMistralModel


class Videollama2MistralConfig(LlavaMistralConfig):
    model_type = "videollama2_mistral"
    num_frames: int = 8
    unfreeze_mm_vision_tower: bool = True  # the published checkpoints hold the vision tower's weights


class Videollama2MistralModel(LlavaMistralModel):
    config_class = Videollama2MistralConfig

    def __init__(self, config):
        kind = getattr(config, "mm_projector_type", None)
        if getattr(config, "mm_vision_tower", None) and kind not in PADDING:
            raise ValueError(
                f"mm_projector_type {kind!r} is not supported for videos; the connectors are"
                f" {', '.join(PADDING)}"
            )
        super().__init__(config)


class Videollama2MistralForCausalLM(LlavaMistralForCausalLM):
    """Answers questions about videos (placeholder -201) and images (-200).

    ``images`` is a list of pairs (pixels, modal): (frames, 3, H, W) with "video", (1, 3, H, W) or (3, H, W)
    with "image"; one for each placeholder and one, ignored, for each row without any.
    """

    config_class = Videollama2MistralConfig
    decoder_class = Videollama2MistralModel
    placeholders = (IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX)
    takes_videos = True
    tells_of_tokens = False
    length_limit = None  # a checkpoint's tokenizer_model_max_length counts only its text

    def pictures(self, images, image_sizes=None) -> list[Picture]:
        return [Picture(tokens) for tokens in self.image_features(images, image_sizes)]

    def image_features(self, images, image_sizes=None) -> list[torch.Tensor]:
        """The visual tokens (N_i, D) of each video or image; an image is a video of ``config.num_frames``
        equal frames.

        Raises:
            ValueError: for an entry that is not such a pair.
        """
        videos, copies = self._videos(images)
        features = self.get_vision_tower()(torch.cat(videos)).split([len(frames) for frames in videos])
        return [
            self.get_model().mm_projector(part.repeat(n, 1, 1)[None])[0] for part, n in zip(features, copies)
        ]

    def visual_tokens(self, images, image_sizes=None) -> list[int]:
        connector, patches = self.get_model().mm_projector, self.get_vision_tower().num_patches
        return [connector.length(len(frames) * n, patches) for frames, n in zip(*self._videos(images))]

    def _videos(self, images) -> tuple[list[torch.Tensor], list[int]]:
        """The frames (n, 3, H, W) of each entry, and how often they are repeated."""
        for entry in images:
            if not isinstance(entry, (tuple, list)) or len(entry) != 2 or entry[1] not in ("image", "video"):
                raise ValueError('images must be a list of pairs (pixels, "video") or (pixels, "image")')
        videos = [pixels[None] if pixels.ndim == 3 else pixels for pixels, _ in images]
        return videos, [self.config.num_frames if modal == "image" else 1 for _, modal in images]


AutoConfig.register("videollama2_mistral", Videollama2MistralConfig)
AutoModelForCausalLM.register(Videollama2MistralConfig, Videollama2MistralForCausalLM)
