"""Classes with a way of their own to take pictures."""

import families
import torch
import transformers
from families import END, IMAGE, START, VIDEO, Kind, Picture, modalities, noise
from packaging.version import Version

from .parts import CODES, GRANITE, LINEAR, MOLMO, OPT, QFORMER, SLIDING, kind, nothing
from .pictures import tile
from .sizes import AUDIO, INTERLEAVED, TEXT, TINY_TOWER, WIDTH, has, recipe, small


def phi4_config(_):
    sizes = {name: size for name, size in TEXT.items() if has(transformers.Phi4MultimodalConfig(), name)}
    return transformers.Phi4MultimodalConfig(
        **sizes,
        vision_config=dict(**TINY_TOWER, image_size=28, crop_size=28, patch_size=7, image_token_id=IMAGE),
        audio_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_blocks=1,
            num_attention_heads=2,
            ext_pw_out_channel=16,
            nemo_conv_channels=16,
            depthwise_separable_out_channel=16,
            audio_token_id=AUDIO,
        ),
    )


def chameleon_config(_):
    """Its 16 codes are words of the vocabulary, with their numbers in letters."""
    letters = [str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for code in range(16)]
    words = {f"IMGIMG{one}Z": 60 + code for code, one in enumerate(letters)}
    changes = dict(vq_config={**CODES, "num_embeddings": 16}, vocabulary_map={**words, "<image>": IMAGE})
    return small(transformers.ChameleonConfig(), TEXT, changes)


EMU3 = dict(
    vq_config={**CODES, "codebook_size": 16, "hidden_size": 32, "temporal_downsample_factor": 2},
    vocabulary_map={
        **{f"<|visual token {code:06d}|>": 60 + code for code in range(16)},
        "<|extra_200|>": 80,
        "<image>": IMAGE,
    },
)
IMAGE_AND_POSITIONS = dict(patch_size=4, pooling_kernel_size=2, position_embedding_size=16)


def placed(side: int, values: int, tokens: int):
    """Patches with their places (x, y), as Gemma 4 takes them."""

    def image(draw):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([x, y], -1).view(1, -1, 2)
        return Picture(
            [IMAGE] * tokens,
            {"pixel_values": noise(draw, 1, side * side, values), "image_position_ids": places},
        )

    return image


def placed_video(side: int, values: int, tokens: int):
    """Two frames of the same."""

    def video(draw):
        frame = placed(side, values, tokens)(draw).given
        return Picture(
            [VIDEO] * (2 * tokens),
            {
                "pixel_values_videos": noise(draw, 2, side * side, values),
                "video_position_ids": frame["image_position_ids"].repeat(2, 1, 1),
                "num_frames_per_video": torch.tensor([2]),
            },
        )

    return video


def video_of_gemma(side: int, values: int, tokens: int):
    """None before transformers 5.23, whose forward leaves out the numbers of frames that it then asks for."""
    old = Version(transformers.__version__) < Version("5.23")
    return None if old else placed_video(side, values, tokens)


def packed(tokens: int):
    """A strip of 8 x 8 patches of 4 x 4 pixels, which MiniCPM's tower merges once or twice by 2 x 2."""
    return lambda draw: Picture(
        [START, *[IMAGE] * tokens, END],
        {"pixel_values": noise(draw, 1, 3, 4, 4 * 64), "target_sizes": torch.tensor([[8, 8]])},
    )


def join_strips(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, -1 if name == "pixel_values" else 0)


def pooled(draw):
    """One crop of 4 x 4 patches; each token pools 2 x 2 of them, which it names by number."""
    numbers = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    given = {
        "pixel_values": noise(draw, 1, 16, 3 * 7 * 7),
        "image_token_pooling": numbers,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }
    return Picture([IMAGE] * 4, given)


def join_pooled(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The numbers count the patches of the whole batch."""
    if name == "image_token_pooling":
        parts = [part + 16 * number for number, part in enumerate(parts)]
    return torch.cat(parts)


def spatial(draw):
    """Patches with the height and width of the image, as Lfm2-VL takes them."""
    given = {
        "pixel_values": noise(draw, 1, 16, 3 * 7 * 7),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    return Picture([IMAGE] * 4, given)


def radio(draw):
    return Picture(
        [IMAGE] * 24,
        {"pixel_values": noise(draw, 8 * 12, 3 * 4 * 4), "image_grid_hw": torch.tensor([[8, 12]])},
    )


def phi4(draw):
    """One crop and the whole, 2 x 2 tokens each with a newline a row, and a separator."""
    given = {
        "image_pixel_values": noise(draw, 1, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
    }
    return Picture([IMAGE] * (6 + 1 + 6), given)


def inkling(draw):
    return Picture([IMAGE] * 8, {"pixel_values": noise(draw, 8, 2, 4, 4, 3)})


def docling(draw):
    return Picture(
        [IMAGE] * 4,
        {
            "pixel_values": noise(draw, 1, 1, 3, 28, 28),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        },
    )


def fuyu(draw):
    """By its old name before transformers 5.23, which still takes it."""
    name = "image_patches" if Version(transformers.__version__) < Version("5.24") else "pixel_values"
    return Picture([IMAGE] * 16, {name: noise(draw, 1, 16, 48)})


def granite4(draw):
    """The overview's 2 x 2 tokens, then a tile's, with a newline a row."""
    return Picture(
        [IMAGE] * (4 + 2 * 3),
        {"pixel_values": noise(draw, 1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
    )


def queried(draw):
    """The eight queries of one image."""
    return Picture([IMAGE] * 8, {"pixel_values": noise(draw, 1, 3, 28, 28)})


def instructed(draw):
    """The same, which read an instruction too."""
    words = torch.randint(3, IMAGE, (1, 3), generator=draw)
    told = {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    return Picture(queried(draw).ids, {**queried(draw).given, **told})


def emu3(draw):
    """4 x 6 codes, and a word that ends a line after each row of them."""
    return Picture(
        [START, *[IMAGE] * (4 * 7), END],
        {"pixel_values": noise(draw, 1, 3, 8, 12), "image_sizes": torch.tensor([[8, 12]])},
    )


def llava_next_video_image(draw):
    return Picture(
        [IMAGE] * (16 + 4 * 9),
        {"pixel_values": noise(draw, 1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]])},
    )


def llava_next_video_video(draw):
    """Three frames, pooled to 2 x 2 each."""
    return Picture([VIDEO] * 12, {"pixel_values_videos": noise(draw, 1, 3, 3, 28, 28)})


MINICPM = dict(image_size=32, patch_size=4, insert_layer_id=0)
KINDS = {
    "ChameleonForConditionalGeneration": kind(chameleon_config, tile(16, 8)),
    "Emu3ForConditionalGeneration": kind(recipe("Emu3ForConditionalGeneration", **EMU3), emu3),
    "LlavaNextVideoForConditionalGeneration": kind(
        recipe("LlavaNextVideoForConditionalGeneration", image_grid_pinpoints=[[28, 56], [56, 28]]),
        llava_next_video_image,
        llava_next_video_video,
    ),
    "Gemma4ForConditionalGeneration": kind(
        recipe(
            "Gemma4ForConditionalGeneration",
            dict(layer_types=SLIDING, num_kv_shared_layers=2),
            vision_config=transformers.Gemma4VisionConfig(**TINY_TOWER, **IMAGE_AND_POSITIONS),
        ),
        placed(4, 48, 4),
        video_of_gemma(4, 48, 4),
        modalities,
    ),
    "Gemma4UnifiedForConditionalGeneration": kind(
        recipe(
            "Gemma4UnifiedForConditionalGeneration",
            dict(layer_types=SLIDING),
            vision_config=transformers.Gemma4UnifiedVisionConfig(
                patch_size=2,
                pooling_kernel_size=2,
                mm_embed_dim=32,
                mm_posemb_size=16,
                output_proj_dims=WIDTH,
            ),
        ),
        placed(3, 48, 9),
        video_of_gemma(3, 48, 9),
        modalities,
    ),
    "InklingForConditionalGeneration": kind(
        recipe(
            "InklingForConditionalGeneration",
            dict(layer_types=["hybrid_sliding", "hybrid"] * 3),
            dict(patch_size=4, temporal_patch_size=2),
        ),
        inkling,
    ),
    "Lfm2VlForConditionalGeneration": kind(
        recipe(
            "Lfm2VlForConditionalGeneration",
            dict(layer_types=["conv", "full_attention"] * 3, full_attn_idxs=None),
            dict(num_patches=16),
            projector_hidden_size=WIDTH,
        ),
        spatial,
    ),
    **{
        name: Kind(
            recipe(name, dict(rope_parameters=INTERLEAVED, layer_types=LINEAR), MINICPM, insert_layer_id=0),
            packed(tokens),
            texts=("own",),
            join=join_strips,
            marks=marks,
        )
        for name, tokens, marks in (
            ("MiniCPMV4_6ForConditionalGeneration", 4, nothing),
            ("MiniCPMV4_7ForConditionalGeneration", 4, modalities),
            ("MiniCPMOcrForConditionalGeneration", 16, nothing),
        )
    },
    "Molmo2ForConditionalGeneration": Kind(
        recipe(
            "Molmo2ForConditionalGeneration",
            dict(rope_scaling_layers=[0, 1]),
            dict(image_size=[28, 28], num_position_embeddings=16),
            adapter_config=MOLMO,
        ),
        pooled,
        texts=("own",),
        join=join_pooled,
        marks=modalities,
    ),
    "NemotronH_Omni_Reasoning_V3": kind(
        recipe(
            "NemotronH_Omni_Reasoning_V3",
            dict(layers_block_type=["linear_attention", "moe", "full_attention"] * 2),
            dict(patch_size=4, video_temporal_patch_size=2),
            vision_hidden_size=16,
            projector_hidden_size=WIDTH,
        ),
        radio,
    ),
    "Phi4MultimodalForCausalLM": kind(phi4_config, phi4),
    "GraniteDoclingForConditionalGeneration": kind(
        recipe("GraniteDoclingForConditionalGeneration", {}, dict(scale_factor=2)), docling
    ),
    "Granite4VisionForConditionalGeneration": kind(
        recipe(
            "Granite4VisionForConditionalGeneration",
            GRANITE,
            vision_config=transformers.CLIPVisionConfig(**{**families.CLIP, "hidden_size": 64}),
            qformer_config={**QFORMER, "hidden_size": 64, "encoder_hidden_size": 64},
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 0]],
            spatial_target_layers=[1, 2, 3, 4],
            image_grid_pinpoints=[[28, 28]],
        ),
        granite4,
    ),
    "Blip2ForConditionalGeneration": kind(
        recipe("Blip2ForConditionalGeneration", OPT, qformer_config=QFORMER, num_query_tokens=8), queried
    ),
    "InstructBlipForConditionalGeneration": kind(
        recipe("InstructBlipForConditionalGeneration", OPT, qformer_config=QFORMER, num_query_tokens=8),
        instructed,
    ),
    "FuyuForCausalLM": kind(recipe("FuyuForCausalLM", patch_size=4), fuyu),
}
