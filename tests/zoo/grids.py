"""Classes whose towers take grids of patches."""

import torch
from families import END, IMAGE, START, VIDEO, Picture, modalities, noise

from .parts import FULL, LINEAR, MUSE_AUDIO, OMNI_AUDIO, OMNI_MOE_AUDIO, SLIDING, kind, nothing
from .pictures import grid_image, grid_video
from .sizes import GRIDS, INTERLEAVED, MROPE, WIDTH, recipe


def grids(name: str, text=None, vision=None, image=None, video=None, marks=nothing, **top):
    """A class whose images and videos are grids of patches of 4 x 4 pixels, merged by 2 x 2."""
    return {
        name: kind(
            recipe(name, text, {**GRIDS, **(vision or {})}, **top), image or grid_image(), video, marks
        )
    }


def ernie_video(draw):
    """Two steps in time, which its tower merges into one."""
    return Picture([START, *[VIDEO] * 8, END], grid_video((48,))(draw).given)


def inkling2(draw):
    """4 x 6 tokens of 8 x 8 pixels."""
    return Picture(
        [IMAGE] * 24, {"pixel_values": noise(draw, 24, 8, 8, 3), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    )


KINDS = {
    **grids(
        "Qwen3VLMoeForConditionalGeneration",
        dict(rope_parameters=INTERLEAVED, sliding_window=None),
        video=grid_video(apart=True),
        marks=modalities,
    ),
    **grids(
        "Qwen3_5ForConditionalGeneration",
        dict(rope_parameters=INTERLEAVED, layer_types=LINEAR),
        video=grid_video(apart=True),
        marks=modalities,
    ),
    **grids(
        "Qwen3_5MoeForConditionalGeneration",
        dict(rope_parameters=INTERLEAVED, layer_types=LINEAR),
        video=grid_video(apart=True),
        marks=modalities,
    ),
    **grids("Glm4vForConditionalGeneration", dict(rope_parameters=MROPE), marks=modalities),
    **grids("Glm46VForConditionalGeneration", dict(rope_parameters=MROPE), marks=modalities),
    **grids(
        "Glm4vMoeForConditionalGeneration",
        dict(rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        marks=modalities,
    ),
    **grids("GlmOcrForConditionalGeneration", dict(rope_parameters=MROPE), marks=modalities),
    **grids(
        "Ernie4_5_VLMoeForConditionalGeneration",
        dict(
            rope_parameters={**MROPE, "mrope_section": [1, 1, 2]},
            moe_intermediate_size=[32, 32],
            mlp_layer_types=["dense"] + ["sparse"] * 5,
        ),
        image=grid_image((48,)),
        video=ernie_video,
        marks=lambda ids: {**modalities(ids), "moe_mm_token_type_ids": (ids == IMAGE).int()},
    ),
    **grids(
        "Exaone4_5_ForConditionalGeneration",
        dict(layer_types=SLIDING),
        dict(fullatt_block_indexes=[1], window_size=16),
        video=grid_video(),
    ),
    **grids(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        {},
        dict(fullatt_block_indexes=[1], window_size=16),
        video=grid_video(),
    ),
    **grids(
        "HunYuanVLForConditionalGeneration",
        dict(rope_parameters={**MROPE, "mrope_section": [1, 1, 1, 1]}),
        dict(max_image_size=64),
        image=grid_image((48,), tokens=4 * (6 + 1) + 2),
        marks=modalities,
    ),
    **grids(
        "Kimi_K25ForConditionalGeneration",
        dict(num_key_value_heads=4),
        image=grid_image((3, 4, 4)),
        projection_hidden_size=16,
    ),
    **grids("MiniMaxM3SparseForConditionalGeneration", dict(layer_types=FULL), {}, video=grid_video()),
    **grids(
        "MuseGlimmerForConditionalGeneration",
        dict(layer_types=SLIDING),
        dict(merge_size=2, patch_temporal=2),
        video=grid_video(),
        out_hidden_size=64,
        projector_hidden_size=WIDTH,
    ),
    **grids(
        "MuseSparkForConditionalGeneration",
        dict(layer_types=SLIDING),
        dict(merge_size=2, patch_temporal=2),
        video=grid_video(),
        out_hidden_size=64,
        projector_hidden_size=WIDTH,
        audio_config=MUSE_AUDIO,
    ),
    **grids(
        "PaddleOCRVLForConditionalGeneration",
        dict(rope_parameters=MROPE),
        image=grid_image((3, 4, 4)),
        marks=modalities,
    ),
    **grids(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        dict(rope_parameters=MROPE, layer_types=FULL),
        dict(fullatt_block_indexes=[1], window_size=16),
        video=grid_video(video_second_per_grid=1.0),
        vision_start_token_id=START,
        audio_config=OMNI_AUDIO,
    ),
    **grids(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        dict(rope_parameters=INTERLEAVED, sliding_window=None),
        video=grid_video(video_second_per_grid=1.0),
        vision_start_token_id=START,
        audio_config=OMNI_MOE_AUDIO,
    ),
    **grids(
        "VideoLlama3ForConditionalGeneration",
        dict(layer_types=FULL),
        {},
        image=grid_image((48,), image_merge_sizes=2),
        video=grid_video((48,), video_merge_sizes=2),
    ),
    **grids(
        "Cosmos3EdgeForConditionalGeneration",
        dict(rope_parameters=MROPE),
        dict(num_patches=64),
        grid_image((48,)),
        grid_video((48,), apart=True),
        projector_hidden_size=WIDTH,
        marks=modalities,
    ),
    **grids(
        "Cosmos3OmniForConditionalGeneration",
        dict(rope_parameters=INTERLEAVED),
        {},
        video=grid_video(apart=True),
        marks=modalities,
    ),
    **grids(
        "Lfm3VlForConditionalGeneration",
        dict(layer_types=["conv", "full_attention", "sliding_attention"] * 2),
        {},
        video=grid_video(),
    ),
    **grids(
        "Inkling2ForConditionalGeneration",
        dict(
            layer_types=["hybrid_sliding", "hybrid"] * 3,
            unpadded_vocab_size=100,
            n_layers_per_attn_res_block=2,
        ),
        dict(posemb_grid_size=8, projection_hidden_dim=32),
        image=inkling2,
    ),
    **grids(
        "CohereCompassForConditionalGeneration",
        dict(layer_types=FULL, rope_parameters={"full_attention": INTERLEAVED}),
        marks=modalities,
    ),
}
