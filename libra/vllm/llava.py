"""LLaVA-1.5 in vLLM, with compressed pictures."""

from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from ..engine.tower import Wants
from . import sight
from .positions import Distances, Placed, append, numbered
from .processing import KEPT, Info, Processor, longest_piece
from .settings import compression_of
from .shorten import shorten, width


class LlavaInfo(Info, LlavaProcessingInfo):
    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        """A request may ask for no compression."""
        return {"image": self.get_max_image_tokens()}


class LlavaProcessor(Processor, LlavaMultiModalProcessor):
    def tokens(self, tensors):
        return [self.info.get_max_image_tokens()] * len(tensors["pixel_values"])

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        token = self.info.get_hf_config().image_token_index
        columns = self._columns(self.info.get_max_image_tokens(), hf_processor_mm_kwargs)
        return [PromptReplacement(modality="image", target=[token], replacement=[token] * columns)]


def _info(ctx):
    """Ours where something is compressed, vLLM's own otherwise: LLaVA's class also serves Pixtral."""
    return (
        LlavaInfo(ctx)
        if compression_of(ctx.get_hf_config()).compresses
        else _build_llava_or_pixtral_hf_info(ctx)
    )


def _processor(info, dummy_inputs):
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class LibraLlavaForConditionalGeneration(Placed, LlavaForConditionalGeneration, SupportsMRoPE):
    """vLLM's own class but for what stands for a picture, and where it stands."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.compression, self.sight = compression_of(self.config), None
        if not self.compression.compresses:
            return
        self.distances = Distances(1, longest_piece(vllm_config))
        vision = self.config.vision_config
        self.side = vision.image_size // vision.patch_size
        wants = Wants.of(self.compression, has_cls=True)
        if wants is not None:
            layers = self.vision_tower.vision_model.encoder.layers
            attentions = [layer.self_attn.attn for layer in layers]
            self.sight = sight.Sight(wants, attentions, vision.num_hidden_layers, has_cls=True)

    def embed_multimodal(self, **kwargs):
        kept = kwargs.pop(KEPT, None)
        if kept is None:
            return super().embed_multimodal(**kwargs)
        pixels = self._parse_and_validate_image_input(**kwargs)["pixel_values"]
        with sight.listening(self.sight) as listener:
            features = self.vision_tower(pixels, feature_select_strategy="full")
        looks = sight.pictures(listener, features, (self.side, self.side)) if listener else None
        embeddings = list(self.multi_modal_projector(features[:, 1:]))
        left = shorten(
            self.compression, embeddings, looks, kept.flatten().tolist(), self.multi_modal_projector
        )
        widths = (self._width(len(one.tokens)) for one in left)
        return [append(one.tokens, wide - one.places[:, None]) for one, wide in zip(left, widths)]

    def _width(self, columns: int) -> int:
        """How many positions a picture takes that has so many columns."""
        return width(self.side**2, columns, self.compression.positions)

    def get_mrope_input_positions(self, input_tokens, mm_features):
        places = sorted((one.mm_position for one in mm_features), key=lambda place: place.offset)
        pictures = [(place.offset, place.length, self._width(place.length)) for place in places]
        return numbered(len(input_tokens), pictures)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if positions.ndim == 2:  # all axes say the same, and the language model has one
            positions = self.distances.applied(positions[0])
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
