"""Pieces of the configurations, and small helpers of the tables of classes."""

import torch
from families import IMAGE, Kind

from .sizes import DEPTH, TINY_TOWER, WIDTH

FULL = ["full_attention"] * DEPTH
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * (DEPTH // 3)
LINEAR = ["linear_attention", "full_attention"] * (DEPTH // 2)
CHUNKED = ["chunked_attention", "chunked_attention", "full_attention"] * (DEPTH // 3)

SAM = dict(
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1],
    mlp_dim=32,
)
DEEPSEEK_OCR = dict(
    sam_config={**SAM, "downsample_channels": [8, 16]},
    encoder_config={**TINY_TOWER, "vocab_size": 20},
)
PERCEIVER = dict(
    hidden_size=WIDTH,
    resampler_n_latents=4,
    resampler_depth=1,
    resampler_n_heads=2,
    resampler_head_dim=8,
    num_key_value_heads=2,
)
CODES = dict(embed_dim=8, base_channels=32, latent_channels=32, channel_multiplier=[1, 1], num_res_blocks=1)
VQ = {**CODES, "num_embeddings": 16, "num_patches": 4}
PERCEPTION = dict(
    architecture="vit_pe_core_large_patch14_336",
    model_args=dict(
        embed_dim=16,
        num_heads=2,
        depth=2,
        img_size=(28, 28),
        patch_size=7,
        global_pool="",
        use_post_transformer_norm=False,
        init_values=0.1,
        ref_feat_shape=(4, 4),
    ),
)
FASTVIT = dict(
    architecture="fastvit_mci3",
    hidden_size=2 * 16,
    model_args=dict(
        inference_mode=True,
        layers=(1, 1),
        embed_dims=(8, 16),
        mlp_ratios=(2, 2),
        se_downsamples=(False, False),
        downsamples=(False, True),
        pos_embs=(None, None),
        token_mixers=("repmixer", "repmixer"),
        lkc_use_act=True,
    ),
)
EFFICIENTNET = dict(architecture="test_efficientnet", hidden_size=256)
OMNI_AUDIO = dict(
    d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, output_dim=WIDTH
)
OMNI_MOE_AUDIO = {**OMNI_AUDIO, "downsample_hidden_size": 16}
MUSE_AUDIO = dict(out_hidden_size=WIDTH, hidden_sizes=[16] * 4, depths=[1] * 4)
GEMMA_AUDIO = dict(
    hidden_size=16, conf_num_attention_heads=2, conf_num_hidden_layers=1, sscp_conv_channel_size=[8, 8]
)
# Before transformers 5.23 the default of its text model is a Llama's, which has none of these.
GRANITE = dict(
    attention_multiplier=0.35, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0
)
OPT = dict(ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH)
QFORMER = dict(
    vocab_size=100,
    cross_attention_frequency=1,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    encoder_hidden_size=16,
)
MOLMO = dict(
    vision_feature_layer=[0, 1],
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    text_hidden_size=WIDTH,
)


def nothing(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {}


def kind(config, image, video=None, marks=nothing) -> Kind:
    return Kind(config, image, video, texts=("own",), marks=marks)


def ones_for_images(name: str):
    """Marks: an argument that is 1 at the tokens of images."""
    return lambda ids: {name: (ids == IMAGE).int()}


def prefix(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PaliGemma: the whole prompt is a prefix, which sees itself in both directions."""
    return {"token_type_ids": torch.zeros_like(ids)}
