"""What a config.json can say that no model can be built or run with, found before anything is built.

transformers checks the types of the values it knows. What is checked here are the values themselves, so that
a damaged or hostile file is answered with a sentence at once, and not with a traceback, a division by zero or
an hour of building layers.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPVisionConfig

from libra.engine.transformers_api import PreTrainedConfig
from libra.utils.numbers import is_whole
from libra.utils.sentences import shortened, show

from ..mm_utils import _pinpoints
from .anyres import MERGE_TYPES
from .weights import read_json

_MOST_LAYERS, _LARGEST = 1000, 10**8
_MOST_TILES, _MOST_FRAMES, _DEEPEST_PROJECTOR = 64, 1024, 16
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "mm_hidden_size",
    "image_size",
    "patch_size",
    "num_channels",
)
_MAY_BE_PAIRS = ("image_size", "patch_size")  # of height and width, in some families
_RANGES = {
    "rms_norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "rope_theta": (1e-6, 1e15),
    "initializer_range": (0, 1e3),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_CHOICES = {
    "mm_patch_merge_type": MERGE_TYPES,
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "image_aspect_ratio": ("square", "pad", "anyres"),
    "tokenizer_padding_side": ("left", "right"),
}


# No model here has labels, of which transformers would make a list; the others could name weights or code
# that nobody has checked.
_IGNORED = ("num_labels", "id2label", "label2id", "transformers_weights", "auto_map", "sub_configs")


def is_original(config: dict) -> bool:
    """Whether the values of a config.json are those of a checkpoint in LLaVA's own format. Both formats know
    the type ``llava``; in transformers' own the sizes of the language model lie in a dictionary of theirs."""
    if isinstance(config.get("text_config"), dict):
        return False
    kind = str(config.get("model_type"))
    return "mm_vision_tower" in config or kind.startswith(("llava_", "videollama2"))


def read_config(config_class: type[PreTrainedConfig], path: Path, values: dict) -> PreTrainedConfig:
    """The configuration of a config.json with these values.

    Raises:
        ValueError: for values that the class refuses.
    """
    values = {name: value for name, value in values.items() if name not in _IGNORED}
    for name in ("dtype", "torch_dtype"):
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"{path} cannot be used: {name} is {show(values[name])}, not the name of a type")
    try:
        return config_class.from_dict(values)
    except Exception as error:  # a value of a wrong type raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be used: {shortened(reason)}") from error


def tower_config(folder: Path, names: Iterable[str] = ()) -> CLIPVisionConfig:
    """The configuration of a CLIP tower, or of the vision side of a whole CLIP; ``names`` are those of its
    weights.

    Raises:
        ValueError: for another model, or values that cannot be used.
    """
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") not in ("clip", "clip_vision_model"):
        kind = shortened(repr(values.get("model_type")), 60)
        raise ValueError(f"the vision tower {folder} is a {kind} model; only CLIP's are supported")
    own = values.get("vision_config") if isinstance(values.get("vision_config"), dict) else values
    check_sizes(path, own)
    check_depth(path, own, names)
    return read_config(CLIPVisionConfig, path, {**own, "model_type": "clip_vision_model"})


def check_sizes(path: Path, settings: dict) -> None:
    """Look at the sizes in a config.json and in its parts (``text_config``, ``vision_config`` …); ``path`` is
    for the sentence.

    Raises:
        ValueError: for a size that is not a whole number from 1 up, or that no model has.
    """
    for part in _parts(settings):
        for name in _SIZES:
            value = part.get(name)
            if value is None or name in _MAY_BE_PAIRS and isinstance(value, list):
                continue
            if not is_whole(value) or not 1 <= value <= (
                _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
            ):
                raise ValueError(
                    f"{path} cannot be used: {name} is {show(value)}, which is not a size; download it again"
                )
        for name, (low, high) in _RANGES.items():
            value = part.get(name)
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(
                    f"{path} cannot be used: {name} is {show(value)}, not a number from {low:g} to {high:g}"
                )
        heads, width = part.get("num_attention_heads"), part.get("hidden_size")
        if heads and width and not part.get("head_dim") and width % heads:
            raise ValueError(
                f"{path} cannot be used: hidden_size {width} is not a multiple of num_attention_heads {heads}"
            )


def check_depth(path: Path, settings: dict, names: Iterable[str]) -> None:
    """Raises ValueError where a config.json has more layers than the weights of these names: building them
    takes for ever."""
    stored = 1 + max(
        (int(match[1]) for name in names for match in _LAYER.finditer(name)), default=_MOST_LAYERS
    )
    for layers in (part.get("num_hidden_layers") or 0 for part in _parts(settings)):
        if layers > stored:
            raise ValueError(
                f"{path} cannot be used: num_hidden_layers is {layers} and the weights have {stored} layers; "
                "take both from the same checkpoint"
            )


def _parts(settings: dict) -> list[dict]:
    return [settings, *(part for part in settings.values() if isinstance(part, dict))]


def check_vision(path: Path, settings: dict) -> None:
    """Look at what a LLaVA's config.json says about images.

    Raises:
        ValueError: for a value that no image could be prepared or encoded with.
    """
    tower = settings.get("mm_vision_tower")
    if not isinstance(tower, str) or not tower.strip() or "\0" in tower:
        raise ValueError(
            f"{path} cannot be used: mm_vision_tower is {show(tower)}, not the name of a folder or of the hub"
        )
    if not is_whole(settings.get("mm_vision_select_layer")):
        shown = show(settings.get("mm_vision_select_layer"))
        raise ValueError(
            f"{path} cannot be used: mm_vision_select_layer is {shown}, not the number of a layer"
        )
    for name, known in _CHOICES.items():
        value = settings.get(name)
        if value is not None and value not in known:
            raise ValueError(
                f"{path} cannot be used: {name} is {show(value)}; it is one of {', '.join(known)}"
            )
    kind = settings.get("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d{1,9})x_gelu", kind) if isinstance(kind, str) else None
    if not isinstance(kind, str) or depth and int(depth[1]) > _DEEPEST_PROJECTOR:
        raise ValueError(f"{path} cannot be used: mm_projector_type is {show(kind)}, not a projector")
    limit = settings.get("tokenizer_model_max_length")
    if limit is not None and not (is_whole(limit) and limit >= 1):
        raise ValueError(
            f"{path} cannot be used: tokenizer_model_max_length is {show(limit)}, not a number of tokens"
        )
    if not isinstance(settings.get("conversation", ""), str):
        shown = show(settings["conversation"])
        raise ValueError(f"{path} cannot be used: conversation is {shown}, not the name of a template")
    frames = settings.get("num_frames")
    if frames is not None and not (is_whole(frames) and 1 <= frames <= _MOST_FRAMES):
        raise ValueError(
            f"{path} cannot be used: num_frames is {show(frames)}, not a number from 1 to {_MOST_FRAMES}"
        )


def check_generation(path: Path, values: dict) -> None:
    """Raises ValueError where a generation_config.json names token ids that are not numbers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        if not all(
            is_whole(token) for token in (value if isinstance(value, list) else [value]) if token is not None
        ):
            raise ValueError(
                f"{path} cannot be used: {name} is {show(value)}, not the id of a token or a list of them"
            )


def check_select_layer(layer: int, layers: int, owner: str) -> None:
    """Raises ValueError where a vision tower of ``layers`` layers has no hidden state ``layer``."""
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"{owner} {show(layer)} is out of range: the vision tower has {layers} layers")


def check_pinpoints(pinpoints: str | list, tile: int) -> None:
    """Raises ValueError where the resolutions of anyres are not made of a few tiles of ``tile`` pixels."""
    for resolution in _pinpoints(pinpoints):
        counts = [edge / tile for edge in resolution]
        if any(count < 1 or count % 1 for count in counts):
            raise ValueError(
                f"image_grid_pinpoints {show(pinpoints)} are not made of the vision tower's tiles of {tile} "
                "pixels; give multiples of that as --image_grid_pinpoints"
            )
        if math.prod(counts) > _MOST_TILES:
            raise ValueError(
                f"image_grid_pinpoints {list(resolution)} has more than {_MOST_TILES} tiles; give smaller"
                " ones"
            )
