"""Qwen2.5-VL in vLLM, with compressed pictures. Their tokens keep their positions on all three axes."""

import torch
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from ..engine.tower import Wants
from . import sight
from .positions import AXES, Distances, Placed, append, numbered
from .processing import KEPT, Info, Processor, longest_piece
from .settings import compression_of
from .shorten import shorten


class QwenInfo(Info, Qwen2_5_VLProcessingInfo):
    pass


class QwenProcessor(Processor, Qwen2_5_VLMultiModalProcessor):
    def tokens(self, tensors):
        joined = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return [int(grid.prod()) // joined for grid in tensors["image_grid_thw"]]

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        if not self.info.compression.compresses:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        token = self.info.get_hf_config().image_token_id

        def replacement(number: int) -> list[int]:
            grid = out_mm_kwargs["image"][number]["image_grid_thw"].data
            (n,) = self.tokens({"image_grid_thw": [grid]})
            return [token] * self._columns(n, hf_processor_mm_kwargs)

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]


@MULTIMODAL_REGISTRY.register_processor(
    QwenProcessor, info=QwenInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class LibraQwen2_5_VLForConditionalGeneration(Placed, Qwen2_5_VLForConditionalGeneration):
    """vLLM's own class but for what stands for a picture, and where it stands."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compression, self.sight = compression_of(self.config), None
        self.distances = Distances(AXES, longest_piece(vllm_config))
        wants = Wants.of(self.compression, has_cls=False)
        if wants is not None:
            attentions = [block.attn.attn for block in self.visual.blocks]
            self.sight = sight.Sight(wants, attentions, len(attentions), has_cls=False)
            # Not the merger itself: modules that vLLM may compile are called past their hooks.
            self.visual.merger.ln_q.register_forward_pre_hook(self._hear_features)

    def _hear_features(self, norm, args):
        """What goes into the merger, and first into its norm, are the features of all patches."""
        self.features = args[0].flatten(0, 1)

    def embed_multimodal(self, **kwargs):
        kept = kwargs.pop(KEPT, None)
        if kept is None:
            return super().embed_multimodal(**kwargs)
        given = self._parse_and_validate_image_input(**kwargs)
        grids = [self._grid(*grid) for grid in given["image_grid_thw"].tolist()]
        metadata = self.visual.prepare_encoder_metadata(given["image_grid_thw"].tolist())
        with sight.listening(self.sight) as listener:
            joined = self.visual(given["pixel_values"], None, encoder_metadata=metadata)
        looks = None
        if listener is not None:
            looks = sight.windows(listener, self.features, grids, metadata["reverse_indices"])
            self.features = None
        embeddings = joined.split([t * h * w for t, h, w in grids])
        left = shorten(self.compression, embeddings, looks, kept.flatten().tolist(), lambda tokens: tokens)
        return [
            append(one.tokens, max(grid) - _coordinates(grid, one.places)) for one, grid in zip(left, grids)
        ]

    def _grid(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """Of tokens, from that of patches."""
        side = self.visual.spatial_merge_size
        return t, h // side, w // side

    def get_mrope_input_positions(self, input_tokens, mm_features):
        if not self.compression.compresses:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        pictures = []
        for one in sorted(mm_features, key=lambda one: one.mm_position.offset):
            grid = self._grid(*one.data["image_grid_thw"].data.tolist())
            pictures.append((one.mm_position.offset, one.mm_position.length, max(grid)))
        return numbered(len(input_tokens), pictures)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if self.compression.compresses:
            positions = self.distances.applied(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


def _coordinates(grid: tuple[int, int, int], places: torch.Tensor) -> torch.Tensor:
    """(T, 3): frame, row and column of the tokens at ``places`` (T,) of a picture."""
    _, h, w = grid
    return torch.stack([places // (h * w), places // w % h, places % w], 1)
