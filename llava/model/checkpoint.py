"""What a checkpoint in the original's format is made of, checked before its weights are read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase

from libra import Compression
from libra.transformers_api import PreTrainedConfig

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from . import lora, weights
from .language_model.llava_llama import LlavaLlamaForCausalLM
from .language_model.llava_mistral import LlavaMistralForCausalLM
from .language_model.videollama2 import Videollama2MistralForCausalLM
from .weights import Stored, local_folder, read_json, stored_in

_CLASSES = (LlavaLlamaForCausalLM, LlavaMistralForCausalLM, Videollama2MistralForCausalLM)
MODELS = {model.config_class.model_type: model for model in _CLASSES}
TOWER = "model.vision_tower."
_REQUIRED = ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass
class Checkpoint:
    """What a checkpoint is made of; the weights of language model and vision tower are not read yet."""

    folder: Path  # of the checkpoint
    base: Path  # of the language model; the same folder where the checkpoint holds the whole model
    model_class: type
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    values: dict[str, torch.Tensor]  # what is put on the base model
    adapter: dict[str, Stored] | None
    tower_inside: bool  # whether the vision tower's weights are among the model's
    tower_name: str  # for the loaded model's configuration


def inspect_checkpoint(model_path: str, model_base: str | None, compression: Compression | None = None, **hub) -> Checkpoint:
    """Find everything that belongs to a checkpoint and see that it fits together, from configurations and file headers.

    Args:
        model_path, model_base, compression: as in :func:`~llava.model.builder.load_pretrained_model`.
        hub: arguments of ``snapshot_download``; ``revision`` is ``model_path``'s.

    Raises:
        ValueError: with the file or weight that is missing, damaged or does not fit.
    """
    folder = base = local_folder(model_path, **hub)
    hub.pop("revision", None)
    if model_base is not None:
        base = local_folder(model_base, **hub)
    addition = _find_addition(folder, model_base)
    model_class, config = _read_config(folder, base)
    if compression is not None:
        compression.check_layers(config.num_hidden_layers)
    tower, tower_name = _find_tower(config, folder, hub)
    tokenizer = _load_tokenizer(base, config)

    values = {} if addition is None else weights.read_additions(addition)
    stored = stored_in(base) | {name: Stored(tuple(value.shape), addition) for name, value in values.items()}
    expected = _expected_weights(model_class, config, folder)
    tower_inside = any(name.startswith(TOWER) for name in expected) and any(name.startswith(TOWER) for name in stored)
    if not tower_inside:
        expected = {name: value for name, value in expected.items() if not name.startswith(TOWER)}
        _check_tower(tower)
    if getattr(config, "quantization_config", None) is None:  # packed weights have shapes of their own
        weights.check_weights(model_path if model_base is None else f"{model_path} on {model_base}", expected, stored)
    adapter = None
    if addition is not None and addition.name == weights.NON_LORA:
        adapter = lora.check_adapter(folder, expected)
    return Checkpoint(folder, base, model_class, config, tokenizer, values, adapter, tower_inside, tower_name)


def _find_addition(folder: Path, model_base: str | None) -> Path | None:
    """The file whose weights go on top of a base model's; None for a checkpoint that holds the whole model."""
    adapted, projector = (folder / lora.CONFIG).is_file(), (folder / weights.PROJECTOR).is_file()
    if model_base is None:
        if adapted:
            own = read_json(folder / lora.CONFIG).get("base_model_name_or_path")
            raise ValueError(f"{folder} holds a LoRA adapter: give its language model as model_base (it was made for {own})")
        if projector and not weights.has_weights(folder):
            raise ValueError(f"{folder} holds a projector alone: give its language model as model_base")
        return None
    if not adapted and not projector:
        raise ValueError(
            f"{folder} has neither {lora.CONFIG} nor {weights.PROJECTOR}, so nothing in it goes on a base model;"
            " leave model_base out"
        )
    addition = folder / (weights.NON_LORA if adapted else weights.PROJECTOR)
    if not addition.is_file():
        raise ValueError(f"{folder} lacks {weights.NON_LORA}, the projector that belongs to the adapter; download it again")
    return addition


def _model_type(settings: dict) -> str | None:
    """The ``model_type`` of a config.json; checkpoints from before transformers had a LLaVA of its own say just ``llava``."""
    kind = settings.get("model_type")
    return "llava_llama" if kind == "llava" and "mm_vision_tower" in settings else kind


def _read_config(folder: Path, base: Path) -> tuple[type, PreTrainedConfig]:
    path = folder / "config.json"
    settings = read_json(path)
    kind = _model_type(settings)
    if kind not in MODELS and "vision_config" in settings and "text_config" in settings:
        raise ValueError(f"{folder} is in Hugging Face's format ({kind}); convert it with python -m llava.convert")
    if kind not in MODELS:
        raise ValueError(f"{folder} is a {kind!r} checkpoint; the types that load are {', '.join(MODELS)}")
    lacking = [name for name in _REQUIRED if settings.get(name) is None]
    if lacking:
        raise ValueError(f"{path} names no {lacking[0]}, so this is no LLaVA checkpoint")
    model_class = MODELS[kind]
    if base != folder:
        settings.pop("quantization_config", None)  # of the training; the base model is not packed
        families = {parent.model_type for parent in model_class.config_class.mro() if getattr(parent, "model_type", "")}
        other = _model_type(read_json(base / "config.json"))
        if other not in families or (base / lora.CONFIG).is_file():
            what = "a LoRA adapter" if other in families else f"a {other!r} model"
            raise ValueError(f"{base} is {what}, and {folder} goes on one of type {' or '.join(sorted(families))}")
    try:
        return model_class, model_class.config_class.from_dict({**settings, "model_type": kind})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def _find_tower(config: PreTrainedConfig, folder: Path, hub: dict) -> tuple[Path, str]:
    """The vision tower's folder, which ``config`` then names, and the name to keep.

    A relative ``mm_vision_tower`` lies in the checkpoint's folder or beside it; otherwise it is a path or a hub name.
    """
    name = config.mm_vision_tower
    near = next((place / name for place in (folder, folder.parent) if (place / name / "config.json").is_file()), None)
    try:
        tower = near or local_folder(name, **hub)
    except ValueError as error:
        raise ValueError(
            f"the vision tower {name}, which {folder / 'config.json'} names as mm_vision_tower, is neither in this folder nor"
            f" beside it nor on the hub; download it and name its folder there ({error})"
        ) from error
    kind = read_json(tower / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower {tower} is a {kind!r} model; only CLIP's are supported")
    read_json(tower / "preprocessor_config.json")
    width = CLIPVisionConfig.from_pretrained(tower).hidden_size
    if width != config.mm_hidden_size:
        raise ValueError(
            f"the vision tower {tower} has width {width}, and mm_hidden_size in {folder / 'config.json'} is"
            f" {config.mm_hidden_size}; name the tower that the checkpoint was trained with"
        )
    config.mm_vision_tower = str(tower)
    return tower, str(near or name)


def _load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}); copy it from the language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError(f"the tokenizer in {folder} cannot be read: {weights.first_line(error)}") from error
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        last = max(tokenizer.convert_tokens_to_ids([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]))
        if last >= config.vocab_size:
            raise ValueError(
                f"mm_use_im_start_end needs an embedding for token {last}, and the vocabulary ends at {config.vocab_size - 1};"
                " take tokenizer and weights from the same checkpoint"
            )
    return tokenizer


def _expected_weights(model_class: type, config: PreTrainedConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights without their values."""
    try:
        with torch.device("meta"):
            expected = model_class(config).state_dict()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    return expected


def _check_tower(folder: Path) -> None:
    """A folder may hold the vision side alone or a whole CLIP."""
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder))
    expected = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    stored = {name.removeprefix("vision_model."): value for name, value in stored_in(folder).items()}
    known = {name: value for name, value in stored.items() if name in expected}
    weights.check_weights(f"the vision tower {folder}", expected, known)
