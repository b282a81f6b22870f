"""Configurations of any class, made small: every size that a configuration has is set, by its name."""

import warnings

import transformers
from families import END, IMAGE, START, VIDEO, VOCABULARY

AUDIO = 94
WIDTH, DEPTH = 32, 6

TEXT = dict(
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    additional_vocab_size=0,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    intermediate_size_mlp=2 * WIDTH,
    dense_intermediate_size=2 * WIDTH,
    shared_intermediate_size=WIDTH,
    share_expert_dim=WIDTH,
    moe_intermediate_size=WIDTH,
    moe_shared_expert_intermediate_size=WIDTH,
    shared_expert_intermediate_size=WIDTH,
    moe_hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_global_key_value_heads=2,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    num_sliding_attention_heads=4,
    head_dim=8,
    global_head_dim=8,
    swa_head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    router_jitter_noise=0.0,
    # latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    # windows and chunks: shorter than the prompts, so that they matter
    sliding_window=10,
    sliding_window_size=10,
    attention_chunk_size=12,
    # linear attention, state spaces and convolutions
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    # Gemma's
    hidden_size_per_layer_input=8,
    laurel_rank=8,
    altup_num_inputs=2,
    query_pre_attn_scalar=8,
    # Inkling's
    d_rel=4,
    rel_extent=64,
    # sparse attention
    index_head_dim=8,
    index_n_heads=2,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
    rotary_dim=8,
)
TINY_TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)
VISION = dict(
    **TINY_TOWER,
    depth=2,
    num_heads=2,
    embed_dim=16,
    n_layers=2,
    image_size=28,
    patch_size=7,
    projection_dim=WIDTH,
    out_hidden_size=WIDTH,
    text_hidden_size=WIDTH,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1],
    initializer_range=0.2,
)
GRIDS = dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2)  # towers that take grids of patches
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
TOKENS = dict(
    image_token_id=IMAGE,
    image_token_index=IMAGE,
    image_patch_id=IMAGE,
    video_token_id=VIDEO,
    video_token_index=VIDEO,
    audio_token_id=AUDIO,
    audio_token_index=AUDIO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    image_start_token_id=START,
    image_end_token_id=END,
    video_start_token_id=START,
    video_end_token_id=END,
)


def has(config, name: str) -> bool:
    try:
        return hasattr(config, name)
    except (
        Exception
    ):  # Gemma 4's, which has another value for each layer: transformers asks which one is meant
        return True


def small(default, sizes: dict, changes: dict):
    """A configuration of the class of ``default``: the ``sizes`` that it has, then all ``changes``."""
    return type(default)(**{name: size for name, size in sizes.items() if has(default, name)} | changes)


def recipe(name: str, text: dict | None = None, vision: dict | None = None, **top):
    """A function that makes the small configuration of the model class ``name``; ``vision`` None leaves out
    the usual sizes of a tower, for classes that have none."""

    def config(_):
        made = getattr(transformers, name).config_class
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            default = made()
            parts = {}
            for part, sizes, changes in (("text_config", TEXT, text), ("vision_config", VISION, vision)):
                if getattr(default, part, None) is not None:
                    parts[part] = small(getattr(default, part), sizes, changes or {})
            tokens = {
                name: token
                for name, token in TOKENS.items()
                if has(default, name) and name not in made.attribute_map
            }
            return made(**{**tokens, **parts, **top})

    return config
