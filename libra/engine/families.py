"""The names of the Hugging Face models that were tested with :func:`libra.attach`, as plain data."""

# By class; what the test matrix runs. Other classes that look alike are accepted with a warning.
TESTED = (
    "AriaForConditionalGeneration",
    "AyaVisionForConditionalGeneration",
    "ChameleonForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "CohereCompassForConditionalGeneration",
    "Cosmos3EdgeForConditionalGeneration",
    "Cosmos3OmniForConditionalGeneration",
    "DeepseekOcr2ForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Exaone4_5_ForConditionalGeneration",
    "FastVlmForConditionalGeneration",
    "FuyuForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "Glm46VForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "Granite4VisionForConditionalGeneration",
    "GraniteDoclingForConditionalGeneration",
    "HunYuanVLForConditionalGeneration",
    "HyperCLOVAXVisionV2ForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InklingForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Lfm3VlForConditionalGeneration",
    "LightOnOcrForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
    "MiniMaxM3SparseForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MuseGlimmerForConditionalGeneration",
    "MuseSparkForConditionalGeneration",
    "NemotronH_Omni_Reasoning_V3",
    "Ovis2ForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "PerceptionLMForConditionalGeneration",
    "Phi4MultimodalForCausalLM",
    "QianfanOCRForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Step3p7ForConditionalGeneration",
    "VideoLlama3ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)
# The names of the norm between a decoder's last layer and the head.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "norm_f")
# The names under which configurations say how many streams of hidden states layers hand on, where it is not
# one.
STREAMS = ("altup_num_inputs", "hc_mult")
# The names under which configurations keep the placeholder ids of visual tokens.
IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id")
# Names under which models take pictures besides those with pixel_values in them.
PICTURES = ("image_patches",)
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

# How a model puts the features of its vision tower together: one visual token a patch ("plain"), tiles with
# newlines ("tiles"), groups of neighbours that are one token ("joined"), or one sequence for all pictures
# ("windows").
TOWERS = {
    "Idefics3ForConditionalGeneration": "joined",
    "InternVLForConditionalGeneration": "joined",
    "LlavaForConditionalGeneration": "plain",
    "LlavaNextForConditionalGeneration": "tiles",
    "LlavaOnevisionForConditionalGeneration": "tiles",
    "Qwen2VLForConditionalGeneration": "windows",
    "Qwen2_5_VLForConditionalGeneration": "windows",
    "SmolVLMForConditionalGeneration": "joined",
}
JOINING = (
    "joined",
    "windows",
)  # several features become one token: nothing goes back in front of the projector
