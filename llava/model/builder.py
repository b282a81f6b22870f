"""Load a LLaVA checkpoint in the original's format."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig

from libra import Compression

from .language_model.llava_llama import LlavaLlamaForCausalLM
from .language_model.llava_mistral import LlavaMistralForCausalLM
from .language_model.videollama2 import Videollama2MistralForCausalLM

_CLASSES = (LlavaLlamaForCausalLM, LlavaMistralForCausalLM, Videollama2MistralForCausalLM)
MODELS = {model.config_class.model_type: model for model in _CLASSES}


def _find_tower(name: str, checkpoint: str) -> str:
    """A relative ``mm_vision_tower`` lies in the checkpoint's folder or beside it; otherwise it is a path or a hub name."""
    for folder in (Path(checkpoint), Path(checkpoint).parent):
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    return name


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict = "auto",
    device: str = "cuda",
    attn_implementation: str | None = None,
    compression: Compression | None = None,
    **kwargs,
):
    """Load tokenizer, model, image processor and context length, as the original's function of this name does.

    Args:
        model_path: folder or hub name of a checkpoint of type ``llava_llama``, ``llava_mistral`` or ``videollama2_mistral``.
        model_base, model_name: as in the original; a separate base model is not supported by this version.
        device: "cuda" or "cpu"; a device other than "cuda" takes the whole model.
        compression: applied from the first prompt on; ``model.set_compression`` changes it.
        kwargs: more arguments for ``from_pretrained``, such as ``torch_dtype`` (float16 on a GPU, float32 on a CPU by default).

    Raises:
        ValueError: if the checkpoint is missing, incomplete, damaged or of another type.
    """
    if model_base is not None:
        raise ValueError("model_base is not supported yet: give a checkpoint that holds the whole model")
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; choose one")
    if load_8bit or load_4bit:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit, load_in_4bit=load_4bit, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
        )
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", torch.float16 if device == "cuda" else torch.float32))
    try:
        settings, _ = PreTrainedConfig.get_config_dict(model_path)
        kind = settings.get("model_type")
        if kind not in MODELS:
            raise ValueError(f"{model_path} is a {kind!r} checkpoint; the types that load are {', '.join(MODELS)}")
        model_class = MODELS[kind]
        config = model_class.config_class.from_pretrained(model_path)
        if not getattr(config, "mm_vision_tower", None):
            raise ValueError(f"{model_path}/config.json names no mm_vision_tower, so this is no LLaVA checkpoint")
        config.mm_vision_tower = _find_tower(config.mm_vision_tower, model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model, info = model_class.from_pretrained(
            model_path, config=config, dtype=dtype, device_map=device_map if device == "cuda" else {"": device},
            attn_implementation=attn_implementation, output_loading_info=True, **kwargs,
        )
        tower, missing = model.get_vision_tower(), list(info["missing_keys"])
        own = [key for key in missing if key.startswith("model.vision_tower.")]
        if own and len(own) == len(list(tower.parameters())):  # the checkpoint has no tower, whatever its configuration says
            missing, tower.is_loaded = [key for key in missing if key not in own], False
        tower.load_model()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {model_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if missing:
        raise ValueError(
            f"the checkpoint {model_path} lacks {len(missing)} weights, {missing[0]!r} among them; download it again"
        )
    tower.to(device=model.device, dtype=dtype)
    model.eval()
    if compression is not None:
        model.set_compression(compression)
    context_length = getattr(config, "max_sequence_length", 2048)
    return tokenizer, model, tower.image_processor, context_length
