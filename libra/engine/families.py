"""The names of the Hugging Face models that were tested with :func:`libra.attach`, as plain data."""

# By class; what the test matrix runs. Other classes that look alike are accepted with a warning.
TESTED = (
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
)
# The names under which configurations keep the placeholder ids of visual tokens.
IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id")
VIDEO_IDS = ("video_token_id", "video_token_index", "frame_patch_id")
# The arguments of decoder layers that can be shortened, or have no columns; a layer that takes another one is
# refused, because nobody has looked at it.
LAYER_ARGUMENTS = (
    "attention_mask",
    "cache",
    "conv_mask",
    "hidden_states",
    "kwargs",
    "moe_mm_token_type_ids",
    "output_attentions",
    "output_router_logits",
    "past_key_values",
    "per_layer_input",
    "position_embeddings",
    "position_ids",
    "shared_kv_states",
    "use_cache",
)
