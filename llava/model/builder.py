"""Load a LLaVA checkpoint in the original's format: the whole model, or a projector or LoRA adapter for a
base model."""

import torch

from libra import Compression
from libra.utils.sentences import first_line

from . import lora
from .checkpoint import TOWER, Checkpoint, inspect_checkpoint
from .weights import check_finite, quiet_loading

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


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
    merge_lora: bool = True,
    **kwargs,
):
    """Load tokenizer, model, image processor and context length, as the original's function of this name
    does.

    The context length is the model's own, ``model.context_length``: text and visual tokens of a prompt.

    Whatever the configuration and the headers of the files tell is checked before weights are read.

    Args:
        model_path: folder or hub name of a checkpoint of type ``llava_llama``, ``llava_mistral`` or
            ``videollama2_mistral``; with ``model_base``, of a projector (``mm_projector.bin``) or a LoRA
            adapter (``adapter_config.json``).
        model_base: folder or hub name of the language model that ``model_path`` adds to; it gives the
            tokenizer.
        model_name: as in the original, and not needed: what lies in the folder says what to load.
        device: "cuda" or "cpu"; a device other than "cuda" takes the whole model.
        compression: applied from the first prompt on; ``model.set_compression`` changes it.
        merge_lora: add an adapter to the weights, as the original does; False returns a ``PeftModel`` with
            the adapter next to them, which generates and compresses alike.
        kwargs: more arguments for ``from_pretrained``, such as ``torch_dtype`` (float16 on a GPU, float32 on
            a CPU by default) and, for names on the hub, ``cache_dir, force_download, local_files_only,
            revision, token``.

    Raises:
        ValueError: if the checkpoint is missing, incomplete, damaged or of another type, its parts do not fit
            together, or a weight is not a finite number.
    """
    kwargs |= _quantisation(load_8bit, load_4bit)
    dtype = kwargs.pop(
        "torch_dtype", kwargs.pop("dtype", torch.float16 if device == "cuda" else torch.float32)
    )
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    kwargs.pop("multimodal", None)  # what lmms-eval's llava model passes for the sake of LLaVA-NeXT's code

    parts = inspect_checkpoint(model_path, model_base, compression, **hub)
    place = {"device_map": device_map if device == "cuda" else {"": device}, "dtype": dtype}
    model = _weights(model_path, parts, attn_implementation=attn_implementation, **place, **kwargs)
    if parts.adapter is not None:
        model = lora.add_adapter(model, parts.folder, parts.adapter, merge_lora)
    tower = _tower(model, parts)
    if not parts.tower_inside:
        model.name_clip(tower.vision_tower_name, parts.tokenizer)
    check_finite(f"the checkpoint {model_path}", model)
    model.eval()
    if compression is not None:
        model.set_compression(compression)
    return parts.tokenizer, model, tower.image_processor, model.context_length


def _quantisation(load_8bit: bool, load_4bit: bool) -> dict:
    """The argument of ``from_pretrained`` for weights of 8 or 4 bits."""
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; choose one")
    if not load_8bit and not load_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
    )
    return {"quantization_config": config}


def _weights(model_path: str, parts: Checkpoint, **given):
    """The model with a checkpoint's own weights on top of its base's; the vision tower's may still be
    missing."""
    try:
        with quiet_loading():
            model, info = parts.model_class.from_pretrained(
                parts.base,
                config=parts.config,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(parts.values),  # parts.values have the right sizes
                **given,
            )
    except Exception as error:  # of transformers, safetensors, a quantiser or the memory
        raise ValueError(f"the checkpoint {model_path} cannot be loaded: {first_line(error)}") from error
    missing = [
        name for name in info["missing_keys"] if name not in parts.values and not name.startswith(TOWER)
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} weights did not come out of {model_path}, {missing[0]!r} among them"
        )
    _fill(model, parts.values)
    return model


def _tower(model, parts: Checkpoint):
    """The model's vision tower, read from its own folder unless it was among the weights."""
    tower = model.get_vision_tower()
    tower.is_loaded = parts.tower_inside
    with quiet_loading():
        tower.load_model()
    if not parts.tower_inside:
        tower.to(device=model.device, dtype=model.dtype)
    model.config.mm_vision_tower = parts.tower_name
    return tower


def _fill(model, values: dict[str, torch.Tensor]) -> None:
    """Put weights on top of a base model's; a tower among them counts only if it was tuned, as in the
    original."""
    own = model.state_dict()
    away = [name for name in values if name in own and own[name].is_meta]
    if away:
        raise ValueError(
            f"{away[0]!r} is not in memory and cannot take the checkpoint's values; choose another device_map"
        )
    model.load_state_dict(values, strict=False)
