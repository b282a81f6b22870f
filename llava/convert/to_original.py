"""From a llava-hf folder to LLaVA's own format."""

import json
import shutil
from pathlib import Path

from transformers import AutoImageProcessor, LlavaConfig, LlavaNextConfig

from libra.utils.sentences import first_line

from ..conversation import conv_templates
from ..model.settings import check_sizes, read_config
from ..model.weights import read_json
from .check import check_complete
from .folder import write_json
from .keys import TOWER, held_from_hf, is_buffer, original_from_held, tower_from_held
from .record import read_record
from .text import chat_template
from .to_hf import PIXEL_KEYS
from .weights import read_folder, write_folder

_CONFIGS = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOWER_FOLDER = "vision_tower"
_NAMED_ANEW = {
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "rope_parameters",
    "_name_or_path",
}


def to_original(
    source: Path, stage: Path, max_shard_size: int, conversation: str | None, model_name: str
) -> list[str]:
    """Write a checkpoint in LLaVA's own format into ``stage``; returns what was written, in sentences.

    A folder that :func:`to_hf` made and nobody changed gives the files it was made from. Otherwise the vision
    tower goes to a folder ``vision_tower`` of its own, and the row of ``<image>`` stays in embeddings and
    head.

    Raises:
        ValueError: if the folder is incomplete, damaged, or the format has no words for it.
    """
    kind = read_json(source / "config.json").get("model_type")
    if kind not in _CONFIGS:
        raise ValueError(f"{source} is a {kind!r} model; the types that convert are {', '.join(_CONFIGS)}")
    path = source / "config.json"
    check_sizes(path, read_json(path))
    config = read_config(_CONFIGS[kind], path, read_json(path))
    _check_expressible(source, config)
    tensors = {
        held_from_hf(key): stored
        for file in read_folder(source)
        for key, stored in file.tensors.items()
        if not is_buffer(key)
    }
    check_complete(source, tensors, config)
    record = read_record(source, tensors)
    tower = {tower_from_held(name): stored for name, stored in tensors.items() if name.startswith(TOWER)}
    if record is not None:
        record.write(stage)
        if record.lacks_tower:
            write_folder(stage / record.tower_place, tower, max_shard_size)
        return [f"the original's own files, the vision tower in {record.tower_place}"]
    rest = {
        original_from_held(name): stored for name, stored in tensors.items() if not name.startswith(TOWER)
    }
    template = conversation or _known_template(source)
    settings = _settings(source, config, template)
    write_json(stage / "config.json", settings)
    _write_tower(source, stage / _TOWER_FOLDER, config)
    _copy_text_files(source, stage)
    count = write_folder(stage, rest, max_shard_size)
    write_folder(stage / _TOWER_FOLDER, tower, max_shard_size)
    return [
        f"{settings['architectures'][0]}: {count} weight file{'s' * (count > 1)}, the vision tower in"
        f" {_TOWER_FOLDER}",
        f"images are prepared with image_aspect_ratio {settings['image_aspect_ratio']!r}, as by the folder's"
        " image processor",
        f"the prompt template is {template}"
        if template
        else "no prompt template was noted down; --conversation sets one",
    ]


def _check_expressible(source: Path, config: LlavaConfig) -> None:
    text, vision = config.text_config.model_type, config.vision_config.model_type
    if text not in _TYPES:
        raise ValueError(
            f"the language model of {source} is of type {text!r}; those that convert are {', '.join(_TYPES)}"
        )
    if vision != "clip_vision_model":
        raise ValueError(
            f"the vision tower of {source} is of type {vision!r}; the towers that convert are CLIP's"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(
            f"the projector of {source} is not two layers with biases and gelu between, which mlp2x_gelu"
            " means"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{source} takes features of the vision layers {config.vision_feature_layer}; LLaVA takes one"
            " layer's"
        )
    if isinstance(config, LlavaNextConfig) and config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{source} keeps the class token in tiles (strategy 'full'), which LLaVA's anyres does not"
        )


def _settings(source: Path, config: LlavaConfig, template: str | None) -> dict:
    """The original's config.json."""
    text = json.loads(config.to_json_string())["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", 10000.0)
    model_type, architecture = _TYPES[config.text_config.model_type]
    tokenizer = read_json(source / "tokenizer_config.json")
    longest = config.text_config.max_position_embeddings
    following = isinstance(config, LlavaNextConfig)
    pads = following or getattr(_image_processor(source), "do_pad", False)
    settings = {
        **{name: value for name, value in text.items() if name not in _NAMED_ANEW},
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": str(config.dtype or "float32").split(".")[-1],
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "image_aspect_ratio": "anyres" if following else "pad" if pads else "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "spatial_unpad" if following else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch"
        if config.vision_feature_select_strategy == "full"
        else "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": _TOWER_FOLDER,
        "tokenizer_model_max_length": int(min(tokenizer.get("model_max_length") or longest, longest)),
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }
    if following:
        settings["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
    if template:
        settings["conversation"] = template
    return dict(sorted(settings.items()))


def _image_processor(source: Path):
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"the image processor of {source} cannot be read ({first_line(error)})") from error


def _known_template(source: Path) -> str | None:
    """The name of the prompt template whose prompts the folder's chat template gives, if it is one of
    ours."""
    path = source / "chat_template.jinja"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return next((name for name in conv_templates if chat_template(name) == text), None)


def _write_tower(source: Path, folder: Path, config: LlavaConfig) -> None:
    """The tower's folder without its weights."""
    folder.mkdir()
    config.vision_config.architectures = ["CLIPVisionModel"]
    config.vision_config.save_pretrained(folder)
    pixels = json.loads(_image_processor(source).to_json_string())
    kept = {name: pixels[name] for name in PIXEL_KEYS if name in pixels}
    write_json(folder / "preprocessor_config.json", {**kept, "image_processor_type": "CLIPImageProcessor"})


def _copy_text_files(source: Path, stage: Path) -> None:
    names = [name for name in (*_TOKENIZER_FILES, "generation_config.json") if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise ValueError(f"{source} has neither tokenizer.json nor tokenizer.model; get it again")
    for name in names:
        shutil.copyfile(source / name, stage / name)
