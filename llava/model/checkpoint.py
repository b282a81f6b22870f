"""What a checkpoint in the original's format is made of, checked before its weights are read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
)

from libra import Compression
from libra.checkpoints import find_tower
from libra.engine.transformers_api import PreTrainedConfig
from libra.utils.sentences import first_line, shortened

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from ..mm_utils import _pixels
from . import lora, settings, weights
from .language_model.llava_llama import LlavaLlamaForCausalLM
from .language_model.llava_mistral import LlavaMistralForCausalLM
from .language_model.videollama2 import Videollama2MistralForCausalLM
from .weights import Stored, local_folder, read_json, stored_as, stored_in

_CLASSES = (LlavaLlamaForCausalLM, LlavaMistralForCausalLM, Videollama2MistralForCausalLM)
MODELS = {model.config_class.model_type: model for model in _CLASSES}
TOWER = "model.vision_tower."
GENERATION = "generation_config.json"
_REQUIRED = ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer")
_LARGEST_EDGE = 4096  # pixels that an image processor may scale to
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
    vision: CLIPVisionConfig  # of the tower


def inspect_checkpoint(
    model_path: str, model_base: str | None, compression: Compression | None = None, **hub
) -> Checkpoint:
    """Find everything that belongs to a checkpoint and see that it fits together, from configurations and
    file headers.

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
    values = {} if addition is None else weights.read_additions(addition)
    stored = stored_in(base) | {name: stored_as(value, addition) for name, value in values.items()}
    settings.check_depth(folder / "config.json", read_json(folder / "config.json"), stored)
    tower, tower_name, vision = _find_tower(config, folder, stored, hub)
    tokenizer = load_tokenizer(base, config)
    if (base / GENERATION).is_file():
        settings.check_generation(base / GENERATION, read_json(base / GENERATION))
    expected = expected_weights(model_class, config, folder)
    tower_inside = any(name.startswith(TOWER) for name in expected) and any(
        name.startswith(TOWER) for name in stored
    )
    if not tower_inside:
        expected = {name: value for name, value in expected.items() if not name.startswith(TOWER)}
        check_tower(tower, vision)
    if getattr(config, "quantization_config", None) is None:  # packed weights have shapes of their own
        weights.check_weights(
            model_path if model_base is None else f"{model_path} on {model_base}", expected, stored
        )
    adapter = None
    if addition is not None and addition.name == weights.NON_LORA:
        adapter = lora.check_adapter(folder, expected)
    return Checkpoint(
        folder, base, model_class, config, tokenizer, values, adapter, tower_inside, tower_name, vision
    )


def _find_addition(folder: Path, model_base: str | None) -> Path | None:
    """The file whose weights go on top of a base model's; None for a checkpoint that holds the whole
    model."""
    adapted, projector = (folder / lora.CONFIG).is_file(), (folder / weights.PROJECTOR).is_file()
    if model_base is None:
        if adapted:
            own = read_json(folder / lora.CONFIG).get("base_model_name_or_path")
            raise ValueError(
                f"{folder} holds a LoRA adapter: give its language model as model_base (it was made for"
                f" {own})"
            )
        if projector and not weights.has_weights(folder):
            raise ValueError(f"{folder} holds only a projector: give its language model as model_base")
        return None
    if not adapted and not projector:
        raise ValueError(
            f"{folder} has neither {lora.CONFIG} nor {weights.PROJECTOR}, so nothing in it goes on a base "
            "model; leave model_base out"
        )
    addition = folder / (weights.NON_LORA if adapted else weights.PROJECTOR)
    if not addition.is_file():
        raise ValueError(
            f"{folder} lacks {weights.NON_LORA}, the projector that belongs to the adapter; download it again"
        )
    return addition


def _model_type(values: dict) -> str | None:
    """The ``model_type`` of a config.json; checkpoints from before transformers had a LLaVA of its own say
    just ``llava``."""
    kind = values.get("model_type")
    kind = kind if isinstance(kind, str) else shortened(repr(kind), 40)
    return "llava_llama" if kind == "llava" and "mm_vision_tower" in values else kind


def _read_config(folder: Path, base: Path) -> tuple[type, PreTrainedConfig]:
    path = folder / "config.json"
    values = read_json(path)
    kind = _model_type(values)
    if kind not in MODELS:
        raise ValueError(
            f"{folder} {what_it_is(folder, values)}; the types that load are {', '.join(MODELS)}"
        )
    lacking = [name for name in _REQUIRED if values.get(name) is None]
    if lacking:
        raise ValueError(f"{path} names no {lacking[0]}, so this is not a LLaVA checkpoint")
    settings.check_vision(path, values)
    settings.check_sizes(path, values)
    model_class = MODELS[kind]
    if base != folder:
        values.pop("quantization_config", None)  # of the training; the base model is not packed
        families = {
            parent.model_type
            for parent in model_class.config_class.mro()
            if getattr(parent, "model_type", "")
        }
        other = _model_type(read_json(base / "config.json"))
        if other not in families or (base / lora.CONFIG).is_file():
            what = "a LoRA adapter" if other in families else f"a {other!r} model"
            raise ValueError(
                f"{base} is {what}, and {folder} goes on one of type {' or '.join(sorted(families))}"
            )
    return model_class, settings.read_config(model_class.config_class, path, {**values, "model_type": kind})


def what_it_is(folder: Path | str, values: dict) -> str:
    """The end of a sentence on a folder that is not in LLaVA's format: what it is and, where that helps, how
    to convert it."""
    kind = _model_type(values)
    if "text_config" not in values or "vision_config" not in values:
        return f"is a {kind!r} checkpoint"
    if kind in ("llava", "llava_next"):
        return (
            f"is in Hugging Face's format ({kind}); convert it with python -m llava.convert"
            f" {folder} {Path(folder).name}-original"
        )
    return f"is in Hugging Face's format ({kind}), which libra.attach and eval.run take as it is"


def _find_tower(
    config: PreTrainedConfig, folder: Path, stored: Iterable[str], hub: dict
) -> tuple[Path, str, CLIPVisionConfig]:
    """The vision tower's folder, which ``config`` then names, the name to keep, and the tower's
    configuration.

    A relative ``mm_vision_tower`` lies in the checkpoint's folder or next to it; otherwise it is a path or a
    hub name.
    """
    name = config.mm_vision_tower
    near = find_tower(name, folder)
    try:
        tower = near or local_folder(name, **hub)
    except ValueError as error:
        raise ValueError(
            f"the vision tower {name}, which {folder / 'config.json'} names as mm_vision_tower, is neither "
            f"in this folder nor next to it nor on the hub; download it and name its folder there ({error})"
        ) from error
    vision = read_tower(tower, stored)
    if vision.hidden_size != config.mm_hidden_size:
        raise ValueError(
            f"the vision tower {tower} has width {vision.hidden_size}, and mm_hidden_size in "
            f"{folder / 'config.json'} is {config.mm_hidden_size}; name the tower that the checkpoint was "
            "trained with"
        )
    owner = f"{folder / 'config.json'} cannot be used: mm_vision_select_layer"
    settings.check_select_layer(config.mm_vision_select_layer, vision.num_hidden_layers, owner)
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        settings.check_pinpoints(getattr(config, "image_grid_pinpoints", None), vision.image_size)
    config.mm_vision_tower = str(tower)
    return tower, str(near or name), vision


def read_tower(folder: Path, stored: Iterable[str] = ()) -> CLIPVisionConfig:
    """The configuration of a vision tower.

    Args:
        stored: names of the weights, where they are not in ``folder``.

    Raises:
        ValueError: if it is not a CLIP, has values that cannot be used, or its image processor does not fit.
    """
    vision = settings.tower_config(folder, stored_in(folder) if weights.has_weights(folder) else stored)
    _check_processor(folder, vision.image_size)
    return vision


def _check_processor(folder: Path, edge: int) -> None:
    """Try a tower's image processor on a small image: it must give ``edge`` x ``edge`` pixels, all of them
    numbers."""
    path = folder / "preprocessor_config.json"
    read_json(path)
    try:
        processor = CLIPImageProcessor.from_pretrained(folder)
        if not 1 <= processor.size["shortest_edge"] <= _LARGEST_EDGE:
            raise ValueError(
                f"it scales images to {shortened(str(processor.size['shortest_edge']), 40)} pixels"
            )
        shape = processor.crop_size["height"], processor.crop_size["width"]
        if shape == (edge, edge) and not bool(_pixels(Image.new("RGB", (8, 8)), processor).isfinite().all()):
            raise ValueError("it makes pixels that are not numbers")
    except Exception as error:  # a value of a wrong type raises anything
        raise ValueError(f"{path} cannot be used: {first_line(error)}; download it again") from error
    if shape != (edge, edge):
        raise ValueError(
            f"{path} crops images to {shortened(str(shape), 40)} pixels and the vision tower takes {edge} x "
            f"{edge}; take both from the same checkpoint"
        )


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with LLaVA's own tokens where the configuration has them. Raises ValueError."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)}); copy it from the language model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        tokenizer.decode(tokenizer("What is this?").input_ids)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
        last = max(tokenizer.convert_tokens_to_ids([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]))
        if last >= config.vocab_size:
            raise ValueError(
                f"mm_use_im_start_end needs an embedding for token {last}, and the vocabulary ends at "
                f"{config.vocab_size - 1}; take tokenizer and weights from the same checkpoint"
            )
    return tokenizer


def expected_weights(model_class: type, config: PreTrainedConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model that ``folder``'s configuration describes, without their values.

    Raises:
        ValueError: if it describes no model that can be built.
    """
    try:
        with torch.device("meta"):
            expected = model_class(config).state_dict()
    except ValueError as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error
    except Exception as error:  # an unknown activation is a KeyError, no heads a division by zero …
        raise ValueError(
            f"{folder / 'config.json'} describes no model that can be built ({type(error).__name__}: "
            f"{first_line(error)}); download it again"
        ) from error
    if getattr(config, "tie_word_embeddings", False):
        expected.pop("lm_head.weight", None)
    return expected


def check_tower(folder: Path, vision: CLIPVisionConfig) -> None:
    """See that a vision tower's weights are those of its configuration; a folder may hold a whole CLIP.

    Raises:
        ValueError: with the weight that is missing or does not fit.
    """
    expected = {
        name.removeprefix("vision_model."): value
        for name, value in expected_weights(CLIPVisionModel, vision, folder).items()
    }
    stored = {name.removeprefix("vision_model."): value for name, value in stored_in(folder).items()}
    known = {name: value for name, value in stored.items() if name in expected}
    weights.check_weights(f"the vision tower {folder}", expected, known)
