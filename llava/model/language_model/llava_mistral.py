"""LLaVA on Mistral (LLaVA-NeXT's Mistral models, and the base of VideoLLaMA-2)."""

from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from .decoder import LlavaCausalLM, LlavaDecoder


class LlavaMistralConfig(MistralConfig):
    model_type = "llava_mistral"


class LlavaMistralModel(LlavaDecoder, MistralModel):
    config_class = LlavaMistralConfig

    def __init__(self, config):
        if config.sliding_window is not None:
            raise ValueError(
                f"sliding_window is {config.sliding_window}, and this decoder attends to all tokens before; "
                "set it to null in the checkpoint's config.json, which changes nothing while prompt and "
                "answer together fit into the window"
            )
        super().__init__(config)


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """LLaVA with a language-model head."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel


AutoConfig.register("llava_mistral", LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
