"""From LLaVA's own format to a llava-hf folder."""

import json
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
)

from libra.rows import patches_across

from ..constants import DEFAULT_IMAGE_TOKEN
from ..conversation import conv_templates, conversation_name
from ..mm_utils import _pinpoints
from ..model.checkpoint import inspect_checkpoint
from ..model.weights import has_weights, read_json
from .check import CLASSES, check_complete
from .folder import write_json
from .keys import EMBEDDINGS, HEAD, hf_from_held
from .record import Part, write_record
from .text import chat_template, with_image_token
from .weights import DTYPES, read_folder, write_folder

_TEXT_CONFIGS = {
    "llava_llama": LlamaConfig,
    "llava": LlamaConfig,
    "llava_mistral": MistralConfig,
}  # "llava": before v1.2
_NOT_TEXT = ("mm_", "image_", "tokenizer_", "tune_", "freeze_", "unfreeze_", "use_mm", "vision_")
_NOT_TEXT_NAMES = {
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "_name_or_path",
    "conversation",
    "torch_dtype",
    "dtype",
}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
PIXEL_KEYS = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


def _config_class(source: Path, settings: dict) -> type:
    """transformers' configuration class for a checkpoint. Raises ValueError where none computes the same."""
    kind = settings.get("model_type")
    if str(kind).startswith("videollama2"):
        raise ValueError(
            f"{source} is a VideoLLaMA-2 checkpoint, for which transformers has no class; use it as it is"
        )
    if kind not in _TEXT_CONFIGS:
        raise ValueError(
            f"{source} is a {kind!r} checkpoint; the types that convert are llava_llama and llava_mistral"
        )
    if (
        (source / "adapter_config.json").is_file()
        or not has_weights(source)
        and (source / "mm_projector.bin").is_file()
    ):
        raise ValueError(
            f"{source} is a part of a model; load it with its base model, save the whole, and convert that"
        )
    projector = settings.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"{source} has the projector {projector!r}; transformers' classes have only mlp2x_gelu"
        )
    feature = settings.get("mm_vision_select_feature", "patch")
    if feature not in _STRATEGIES:
        raise ValueError(
            f"mm_vision_select_feature {feature!r} of {source} is unknown; it is patch or cls_patch"
        )
    merge, aspect = (
        settings.get("mm_patch_merge_type", "flat"),
        settings.get("image_aspect_ratio") or "square",
    )
    if aspect in ("pad", "square") and merge == "flat":
        return LlavaConfig
    if aspect == "anyres" and merge == "spatial_unpad" and feature == "patch":
        return LlavaNextConfig
    raise ValueError(
        f"{source} has image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} and features "
        f"{feature!r}; transformers' classes have pad or square with flat, and anyres with spatial_unpad and "
        "patch"
    )


def to_hf(
    source: Path, stage: Path, max_shard_size: int, conversation: str | None, model_name: str
) -> list[str]:
    """Write a llava-hf folder into ``stage``; returns what was written, in sentences.

    Raises:
        ValueError: if the checkpoint is incomplete, damaged, or transformers has no class that computes the
            same.
    """
    settings = read_json(source / "config.json")
    config_class = _config_class(source, settings)
    template = conversation_name(model_name, SimpleNamespace(**settings), conversation)
    checkpoint = inspect_checkpoint(str(source), None)
    tower = Path(checkpoint.config.mm_vision_tower)
    parts = [
        Part("checkpoint", source, read_folder(source)),
        Part("tower", tower, [] if checkpoint.tower_inside else read_folder(tower)),
    ]
    tensors = (
        parts[0].tensors | parts[1].tensors
    )  # a tower of its own is read, whatever tower the checkpoint has inside
    tokenizer = with_image_token(checkpoint.tokenizer)
    image_token = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)

    config = _config(source, settings, config_class, tower, image_token, DTYPES[tensors[EMBEDDINGS].dtype])
    check_complete(source, tensors, config)
    as_read = dict(tensors)
    added = max(image_token + 1 - config.text_config.vocab_size, 0)
    if added:
        config.text_config.vocab_size += added
        tensors |= {name: tensors[name].grown(added) for name in (EMBEDDINGS, HEAD) if name in tensors}

    config.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    has_template = _write_processor(stage, settings, config, tower, template)
    _write_generation_config(stage, source, settings, tokenizer, template)
    write_record(stage, parts, as_read, settings["mm_vision_tower"])
    count = write_folder(
        stage, {hf_from_held(name): stored for name, stored in tensors.items()}, max_shard_size
    )
    rows = (
        f"{added} row{'s were' if added > 1 else ' was'} added, the mean of the others"
        if added
        else "no row was added"
    )
    return [
        f"{CLASSES[config_class].__name__}: {count} weight file{'s' * (count > 1)}",
        f"{DEFAULT_IMAGE_TOKEN} is token {image_token}; to embeddings and head {rows}",
        f"the chat template is that of {template}"
        if has_template
        else f"no chat template: {template} is for training",
    ]


def _config(
    source: Path, settings: dict, config_class: type, tower: Path, image_token: int, dtype
) -> LlavaConfig:
    vision = CLIPVisionConfig.from_pretrained(tower)
    text_class = _TEXT_CONFIGS[settings["model_type"]]
    text = {
        name: value
        for name, value in settings.items()
        if not name.startswith(_NOT_TEXT)
        and name not in _NOT_TEXT_NAMES
        and (name, value) != ("rope_scaling", None)
    }
    feature = settings.get("mm_vision_select_feature", "patch")
    patches = patches_across(vision) ** 2
    own = {}
    if config_class is LlavaNextConfig:  # (height, width) there, (width, height) here
        own["image_grid_pinpoints"] = [[h, w] for w, h in _pinpoints(settings.get("image_grid_pinpoints"))]
    try:
        return config_class(
            text_config=text_class(**text),
            vision_config=vision,
            image_token_id=image_token,
            image_seq_length=patches + (feature == "cls_patch"),
            projector_hidden_act="gelu",
            dtype=dtype,
            vision_feature_layer=settings.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=_STRATEGIES[feature],
            tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
            architectures=[CLASSES[config_class].__name__],
            **own,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source / 'config.json'} cannot be expressed for transformers: {reason}"
        ) from error


def _write_processor(stage: Path, settings: dict, config: LlavaConfig, tower: Path, template: str) -> bool:
    """Image processor, processor and chat template; returns whether there is a chat template."""
    pixels = json.loads(CLIPImageProcessor.from_pretrained(tower).to_json_string())
    following = isinstance(config, LlavaNextConfig)
    own = {"image_grid_pinpoints": config.image_grid_pinpoints} if following else {}
    write_json(
        stage / "preprocessor_config.json",
        {
            **{name: pixels[name] for name in PIXEL_KEYS if name in pixels},
            **own,
            "do_pad": following or settings.get("image_aspect_ratio") == "pad",
            "image_processor_type": "LlavaNextImageProcessor" if following else "LlavaImageProcessor",
            "processor_class": "LlavaNextProcessor" if following else "LlavaProcessor",
        },
    )
    write_json(
        stage / "processor_config.json",
        {
            "image_token": DEFAULT_IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": config.vision_config.patch_size,
            "processor_class": "LlavaNextProcessor" if following else "LlavaProcessor",
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )
    text = chat_template(template, start_end=bool(settings.get("mm_use_im_start_end")))
    if text is not None:
        (stage / "chat_template.jinja").write_text(text, encoding="utf-8")
    return text is not None


def _write_generation_config(stage: Path, source: Path, settings: dict, tokenizer, template: str) -> None:
    """The checkpoint's own; what ends a turn of the template ends generation too, where it is a token."""
    path = source / "generation_config.json"
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = (
        read_json(path) if path.is_file() else {name: settings[name] for name in names if name in settings}
    )
    ends = content.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    stop = tokenizer.get_vocab().get(conv_templates[template].stop)
    if stop is not None and stop not in ends:
        content["eos_token_id"] = [*ends, stop]
    write_json(stage / "generation_config.json", content)
