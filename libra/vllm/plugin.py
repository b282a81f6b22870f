"""What is registered with vLLM: the model classes, and how a server's configuration is completed."""

import os

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ..utils.sentences import ConfigError
from .settings import ENVIRONMENT, KEY, RATIO, compression_of, server_compression, with_request

# Of vLLM's classes, ours, and where it is.
CLASSES = {
    "LlavaForConditionalGeneration": "llava:LibraLlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "qwen:LibraQwen2_5_VLForConditionalGeneration",
}


def register_models() -> None:
    """Our classes by their own names and, where the variable says what to do, in place of vLLM's. Every other
    class is refused where something is to be compressed."""
    for theirs, place in CLASSES.items():
        module, ours = place.split(":")
        names = (ours, theirs) if os.environ.get(ENVIRONMENT) else (ours,)
        for name in names:
            ModelRegistry.register_model(name, f"{__package__}.{module}:{ours}")
            MODELS_CONFIG_MAP[name] = Completed
    for name in ModelRegistry.get_supported_archs():
        own = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if own is not Completed and not hasattr(own, "guarded_by_libra"):
            MODELS_CONFIG_MAP[name] = guarded(own)


def guarded(own: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """What vLLM does with the configuration of a class, which refuses a compression first: that class would
    give all tokens to the language model, whatever was said."""

    class Guarded(own):
        guarded_by_libra = True  # plug-ins are loaded more than once

        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            if server_compression(getattr(model_config.hf_config, KEY, None)).compresses:
                ours = " or ".join(place.split(":")[1] for place in CLASSES.values())
                raise ConfigError(
                    f"{model_config.architecture}: this class cannot shorten pictures; for LLaVA-1.5 or"
                    f" Qwen2.5-VL name {ours} in --hf-overrides, for others leave {ENVIRONMENT} unset"
                )
            own.verify_and_update_model_config(model_config)

    return Guarded


class Completed(VerifyAndUpdateConfig):
    """The compression is read and checked once, when a server starts, and goes with the model's configuration
    to every process."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        config, pictures = model_config.hf_config, model_config.multimodal_config
        compression = compression_of(config)
        own = dict(pictures.mm_processor_kwargs or {})
        if RATIO in own:
            compression = with_request(compression, own)
            own.pop(RATIO)
            pictures.mm_processor_kwargs = own
        setattr(config, KEY, compression.to_dict())
        if not compression.compresses:
            return
        if not model_config.uses_mrope:
            # With three axes vLLM asks our class for the positions; the language model is given one.
            config.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1, 1]}

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        if not compression_of(vllm_config.model_config.hf_config).compresses:
            return
        parallel, compiled = vllm_config.parallel_config, vllm_config.compilation_config
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(parallel, name) > 1:
                raise ConfigError(
                    f"{name}: {getattr(parallel, name)}: compression needs the whole model on one GPU; use"
                    " --data-parallel-size, or several servers behind a proxy"
                )
        if vllm_config.speculative_config is not None:
            raise ConfigError(
                "speculative_config: a draft model would see other positions than this one; leave it out"
            )
        for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
            if getattr(compiled, name, False):
                raise ConfigError(
                    f"{name}: the attention of a vision tower that is compiled or replayed cannot be heard;"
                    " leave it off"
                )
