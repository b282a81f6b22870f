"""Classes whose towers take square tiles."""

import torch
from families import IMAGE, Picture, noise

from .parts import (
    CHUNKED,
    DEEPSEEK_OCR,
    DEPTH,
    EFFICIENTNET,
    FASTVIT,
    FULL,
    GEMMA_AUDIO,
    PERCEIVER,
    PERCEPTION,
    SAM,
    SLIDING,
    VQ,
    kind,
    nothing,
    ones_for_images,
    prefix,
)
from .pictures import nested, tile
from .sizes import WIDTH, recipe


def with_high_resolution(draw):
    picture = tile(16)(draw)
    return Picture(picture.ids, {**picture.given, "high_res_pixel_values": noise(draw, 1, 3, 64, 64)})


def with_a_crop(draw):
    """A crop and the whole, 144 queries each whatever the number of patches, and a separator."""
    given = {
        "pixel_values": noise(draw, 1, 3, 64, 64),
        "pixel_values_local": noise(draw, 1, 3, 64, 64),
        "num_local_patches": torch.tensor([1]),
    }
    return Picture([IMAGE] * (144 + 144 + 1), given)


def fixed(name: str, tokens: int, text=None, vision=None, image=None, marks=nothing, **top):
    """A class whose image is one tile of 28 x 28 pixels."""
    return {name: kind(recipe(name, text, vision, **top), image or tile(tokens), marks=marks)}


PIXTRAL = dict(image_size=28, patch_size=7, head_dim=8)
KINDS = {
    **fixed("AriaForConditionalGeneration", 4, projector_patch_to_query_dict={16: 4}),
    **fixed("AyaVisionForConditionalGeneration", 4, dict(layer_types=SLIDING)),
    **fixed(
        "Cohere2VisionForConditionalGeneration", 4, dict(layer_types=SLIDING), alignment_intermediate_size=32
    ),
    **fixed(
        "DeepseekOcr2ForConditionalGeneration",
        289,
        # All experts: of some 300 tokens one has two that rounding, as of a batch, would choose between.
        dict(mlp_layer_types=["dense"] + ["sparse"] * 5, num_experts_per_tok=4),
        image=with_a_crop,
        vision_config=DEEPSEEK_OCR,
    ),
    **fixed("DeepseekVLForConditionalGeneration", 16),
    **fixed(
        "DeepseekVLHybridForConditionalGeneration", 16, image=with_high_resolution, high_res_vision_config=SAM
    ),
    **fixed(
        "Gemma3ForConditionalGeneration",
        4,
        dict(layer_types=SLIDING),
        mm_tokens_per_image=4,
        marks=ones_for_images("token_type_ids"),
    ),
    **fixed("GotOcr2ForConditionalGeneration", 16, dict(layer_types=FULL), SAM, image=tile(16, 64)),
    **fixed(
        "Idefics2ForConditionalGeneration",
        4,
        dict(sliding_window=None),
        image=nested(4),
        perceiver_config=PERCEIVER,
    ),
    **fixed("Idefics3ForConditionalGeneration", 4, image=nested(4)),
    **fixed("SmolVLMForConditionalGeneration", 4, image=nested(4)),
    **fixed("JanusForConditionalGeneration", 16, vq_config=VQ),
    **fixed(
        "Llama4ForConditionalGeneration",
        4,
        dict(layer_types=CHUNKED, no_rope_layers=[1, 1, 0] * 2, moe_layers=[1, 3, 5]),
        dict(intermediate_size=64, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
    ),
    **fixed(
        "LightOnOcrForConditionalGeneration",
        4,
        dict(layer_types=FULL),
        PIXTRAL,
        image=tile(4, image_sizes=[28, 28]),
    ),
    **fixed(
        "Mistral3ForConditionalGeneration",
        4,
        dict(sliding_window=None),
        PIXTRAL,
        image=tile(4, image_sizes=[28, 28]),
    ),
    **fixed(
        "Ovis2ForConditionalGeneration",
        16,
        dict(layer_types=FULL),
        dict(hidden_stride=1, vocab_size=20),
        visual_indicator_token_ids=[95, 96, 97, 98, 99],
        hidden_size=WIDTH,
        vocab_size=100,
    ),
    **fixed("PaliGemmaForConditionalGeneration", 16, marks=prefix, projection_dim=WIDTH, hidden_size=WIDTH),
    **fixed("PerceptionLMForConditionalGeneration", 16, {}, PERCEPTION, image=nested(16)),
    **fixed(
        "QianfanOCRForConditionalGeneration",
        4,
        dict(layer_types=FULL),
        dict(image_size=[28, 28], patch_size=[7, 7]),
    ),
    **fixed(
        "Step3p7ForConditionalGeneration",
        16,
        dict(layer_types=SLIDING),
        dict(image_size=32, patch_size=2),
        image=tile(16, 32),
    ),
    **fixed("VipLlavaForConditionalGeneration", 16, vision=dict(num_hidden_layers=12)),
    **fixed("FastVlmForConditionalGeneration", 16, dict(layer_types=FULL), FASTVIT, image=tile(16, 32)),
    **fixed(
        "Gemma3nForConditionalGeneration",
        4,
        dict(layer_types=SLIDING, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * DEPTH),
        EFFICIENTNET,
        image=tile(4, 64),
        vision_soft_tokens_per_image=4,
        audio_config=GEMMA_AUDIO,
    ),
}
