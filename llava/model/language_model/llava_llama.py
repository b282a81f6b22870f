"""LLaVA on Llama (LLaVA-1.5-7B and 13B on Vicuna, LLaVA-NeXT-8B on Llama 3)."""

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from .decoder import LlavaCausalLM, LlavaDecoder


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaModel(LlavaDecoder, LlamaModel):
    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):
    """LLaVA with a language-model head."""

    config_class = LlavaConfig
    decoder_class = LlavaLlamaModel


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
