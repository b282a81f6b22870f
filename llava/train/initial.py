"""The model a training begins with: a LLaVA checkpoint, or a plain language model that gets a vision tower
and a projector."""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BitsAndBytesConfig, CLIPImageProcessor, CLIPVisionConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from libra import Compression
from libra.engine.transformers_api import PreTrainedConfig

from ..constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from ..model.anyres import MERGE_TYPES
from ..model.checkpoint import (
    MODELS,
    check_tower,
    expected_weights,
    inspect_checkpoint,
    load_tokenizer,
    read_tower,
    what_it_is,
)
from ..model.language_model.llava_llama import LlavaLlamaForCausalLM
from ..model.language_model.llava_mistral import LlavaMistralForCausalLM
from ..model.language_model.videollama2 import Videollama2MistralForCausalLM
from ..model.multimodal_encoder.builder import build_vision_tower
from ..model.multimodal_projector.builder import build_vision_projector
from ..model.multimodal_projector.stc_connector import PADDING
from ..model.settings import check_depth, check_pinpoints, check_select_layer, check_sizes, read_config
from ..model.weights import check_finite, check_weights, local_folder, read_additions, read_json, stored_in
from .arguments import DataArguments, ModelArguments, TrainingArguments

_PLAIN = {"llama": LlavaLlamaForCausalLM, "mistral": LlavaMistralForCausalLM}
ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NUM_FRAMES = 8
_VISION = re.compile(r"vision_tower|mm_projector|image_newline")
DEFAULT_VERSION = "v1"


@dataclass
class Start:
    """What is known before weights are read."""

    folder: Path  # of the language model
    model_class: type
    config: PreTrainedConfig
    tokenizer: object
    image_processor: object
    is_llava: bool  # whether the folder's weights hold a projector
    tower_inside: bool  # whether they hold the vision tower, because it was tuned
    tower_name: str  # for the trained model's configuration, which has a folder's path until then
    tower: CLIPVisionConfig
    projector: dict[str, torch.Tensor] | None  # weights to put on it
    version: str  # the conversation template
    limit: int  # tokens of a sample

    @property
    def takes_videos(self) -> bool:
        return self.model_class.takes_videos


def find_start(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, compression: Compression | None
) -> Start:
    """Look at configurations, tokenizer and file headers; ``config`` comes back complete.

    Raises:
        ValueError: with what is missing, damaged or does not fit together.
    """
    name, hub = model.model_name_or_path, {"cache_dir": training.cache_dir} if training.cache_dir else {}
    folder = local_folder(name, **hub)
    settings = read_json(folder / "config.json")
    is_llava = "mm_vision_tower" in settings or str(settings.get("model_type")) in MODELS
    if is_llava:
        found = inspect_checkpoint(name, None, compression, **hub)
        model_class, config, tokenizer, tower = found.model_class, found.config, found.tokenizer, found.vision
        tower_inside, tower_name = found.tower_inside, found.tower_name
        if (
            model.vision_tower
            and local_folder(model.vision_tower, **hub).resolve() != Path(config.mm_vision_tower).resolve()
        ):
            raise ValueError(
                f"{name} has a vision tower already ({config.mm_vision_tower}); leave --vision_tower out"
            )
    else:
        model_class, config, tokenizer, tower = _plain_model(folder, settings, model, hub)
        tower_inside, tower_name = False, model.vision_tower
        if compression is not None:
            compression.check_layers(config.num_hidden_layers)
    _complete(config, tower, model, data, is_llava)
    expected = expected_weights(model_class, config, folder)
    if not is_llava and getattr(config, "quantization_config", None) is None:
        language = {key: value for key, value in expected.items() if not _VISION.search(key)}
        check_weights(name, language, stored_in(folder))
    projector = None
    if model.pretrain_mm_mlp_adapter is not None:
        projector = _read_projector(model.pretrain_mm_mlp_adapter, expected)
    processor = CLIPImageProcessor.from_pretrained(config.mm_vision_tower)
    limit = training.model_max_length or own_limit(config, tokenizer)
    version = model.version or getattr(config, "conversation", None) or DEFAULT_VERSION
    _prepare_tokenizer(tokenizer, limit)
    config.tokenizer_padding_side, config.tokenizer_model_max_length = "right", limit
    _note_training(config, model, training, version, compression)
    return Start(
        folder,
        model_class,
        config,
        tokenizer,
        processor,
        is_llava,
        tower_inside,
        tower_name,
        tower,
        projector,
        version,
        limit,
    )


def _prepare_tokenizer(tokenizer, limit: int) -> None:
    tokenizer.model_max_length, tokenizer.padding_side = limit, "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _note_training(config, model: ModelArguments, training: TrainingArguments, version, compression) -> None:
    """What a checkpoint's config.json says of how it was trained."""
    config.tune_mm_mlp_adapter = model.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training.freeze_mm_mlp_adapter
    config.mm_projector_lr = training.mm_projector_lr
    if version != "plain":
        config.conversation = version
    if hasattr(config, "trained_with_compression"):  # of an earlier training
        del config.trained_with_compression
    if compression is not None:
        config.trained_with_compression = compression.at_depth(config.num_hidden_layers).to_dict()


def own_limit(config: PreTrainedConfig, tokenizer) -> int:
    """The tokens that a model takes by itself: a LLaVA's own limit, a plain model's tokenizer's, and no more
    than positions."""
    own = getattr(config, "tokenizer_model_max_length", None) or tokenizer.model_max_length
    return min(own, config.max_position_embeddings)


def _plain_model(folder: Path, settings: dict, model: ModelArguments, hub: dict):
    name, kind = model.model_name_or_path, settings.get("model_type")
    if kind not in _PLAIN:
        raise ValueError(
            f"{name} {what_it_is(folder, settings)}; give a LLaVA checkpoint, or a language model of type"
            f" {' or '.join(_PLAIN)}"
        )
    if model.vision_tower is None:
        raise ValueError(f"{name} is a plain language model; give its vision tower as --vision_tower")
    model_class = _PLAIN[kind]
    if model.mm_projector_type in PADDING:
        if kind != "mistral":
            raise ValueError(
                f"--mm_projector_type {model.mm_projector_type} is VideoLLaMA-2's, which needs a Mistral"
            )
        model_class = Videollama2MistralForCausalLM
    path = folder / "config.json"
    check_sizes(path, settings)
    check_depth(path, settings, stored_in(folder))  # damaged weights are found now
    kind = model_class.config_class.model_type
    config = read_config(model_class.config_class, path, {**settings, "model_type": kind})
    place = local_folder(model.vision_tower, **hub)
    tower = read_tower(place)
    check_tower(place, tower)
    config.mm_vision_tower, config.mm_hidden_size, config.use_mm_proj = str(place), tower.hidden_size, True
    return model_class, config, load_tokenizer(folder, config), tower


def _complete(
    config: PreTrainedConfig,
    tower: CLIPVisionConfig,
    model: ModelArguments,
    data: DataArguments,
    is_llava: bool,
) -> None:
    """What the flags say, else the checkpoint, else the published code's defaults."""
    fixed = {"mm_projector_type": "linear", "mm_patch_merge_type": "flat"}
    for name, default in (
        *fixed.items(),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "patch"),
    ):
        given, own = getattr(model, name), getattr(config, name, None)
        if is_llava and name in fixed and given is not None and own is not None and given != own:
            raise ValueError(f"--{name} {given} is not the checkpoint's {own!r}; leave it out")
        setattr(config, name, given if given is not None else own if own is not None else default)
    if config.mm_patch_merge_type not in MERGE_TYPES:
        raise ValueError(
            f"--mm_patch_merge_type {config.mm_patch_merge_type} is unknown; use one of"
            f" {', '.join(MERGE_TYPES)}"
        )
    config.image_aspect_ratio = (
        data.image_aspect_ratio or getattr(config, "image_aspect_ratio", None) or "square"
    )
    if config.image_aspect_ratio not in ("square", "pad", "anyres"):
        raise ValueError(
            f"--image_aspect_ratio {config.image_aspect_ratio} is unknown; use square, pad or anyres"
        )
    check_select_layer(config.mm_vision_select_layer, tower.num_hidden_layers, "--mm_vision_select_layer")
    if data.image_grid_pinpoints or config.image_aspect_ratio == "anyres":
        own = data.image_grid_pinpoints or getattr(config, "image_grid_pinpoints", None) or ANYRES
        config.image_grid_pinpoints = own
        check_pinpoints(own, tower.image_size)
    if data.num_frames or not hasattr(config, "num_frames"):
        config.num_frames = data.num_frames or NUM_FRAMES
    config.mm_use_im_start_end = model.mm_use_im_start_end or getattr(config, "mm_use_im_start_end", False)
    config.mm_use_im_patch_token = model.mm_use_im_patch_token or getattr(
        config, "mm_use_im_patch_token", False
    )


def _read_projector(path: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file {path}; --pretrain_mm_mlp_adapter is the mm_projector.bin of the first stage"
        )
    values = read_additions(Path(path))
    # Embeddings are in it where the first stage trained new tokens, which this model gets later.
    wrong = [
        name
        for name, value in values.items()
        if "embed_tokens" not in name and (name not in expected or expected[name].shape != value.shape)
    ]
    wrong += [name for name in expected if "mm_projector" in name and name not in values]
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {wrong[0]!r} is missing on one side or has another shape"
        )
    return values


def build_model(start: Start, model: ModelArguments, training: TrainingArguments):
    """The model with what is to be trained trainable, in peft's wrapper where adapters are trained."""
    config, options = start.config, {}
    low = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    # Trained weights stay in float32 unless DeepSpeed keeps float32 copies; frozen ones may be short.
    has_frozen_decoder = training.lora_enable or model.tune_mm_mlp_adapter
    dtype = low if training.deepspeed or has_frozen_decoder else torch.float32
    if training.bits < 16:
        options = {
            "device_map": {"": training.device},
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=training.bits == 4,
                load_in_8bit=training.bits == 8,
                bnb_4bit_compute_dtype=low,
                bnb_4bit_use_double_quant=training.double_quant,
                bnb_4bit_quant_type=training.quant_type,
                llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
            ),
        }
    if not start.is_llava:
        folder, config.mm_vision_tower = (
            config.mm_vision_tower,
            None,
        )  # what comes with it is not in these weights
    llava = start.model_class.from_pretrained(
        start.folder, config=config, dtype=dtype, attn_implementation=model.attn_implementation, **options
    )
    config = llava.config
    if start.is_llava:
        tower = llava.get_vision_tower()
        tower.is_loaded = start.tower_inside
        tower.load_model()
    else:
        config.mm_vision_tower = folder
        _add_vision(llava)
    llava.get_vision_tower().to(dtype=dtype, device=llava.device)
    config.mm_vision_tower, config.use_cache = start.tower_name, False
    config.unfreeze_mm_vision_tower = model.unfreeze_mm_vision_tower or start.tower_inside
    llava.train()
    if training.bits < 16:
        from peft import prepare_model_for_kbit_training

        llava = prepare_model_for_kbit_training(
            llava, use_gradient_checkpointing=training.gradient_checkpointing
        )
    _add_tokens(llava, start)
    if start.projector is not None:
        _load_weights(llava, start.projector)
    whole = _add_adapters(llava, training) if training.lora_enable else llava
    _choose_trainable(llava, model, training)
    if not training.deepspeed:
        for value in llava.parameters():
            if value.requires_grad:
                value.data = value.data.float()
    check_finite(f"the model {start.folder}", llava)
    return whole


def _add_vision(llava) -> None:
    """Tower, projector and newline, initialised as torch does it."""
    decoder, config = llava.get_model(), llava.config
    decoder.vision_tower = build_vision_tower(config)
    decoder.mm_projector = build_vision_projector(config).to(llava.dtype)
    if "unpad" in config.mm_patch_merge_type:
        decoder.image_newline = nn.Parameter(
            (torch.randn(config.hidden_size) * config.hidden_size**-0.5).to(llava.dtype)
        )


def _add_tokens(llava, start: Start) -> None:
    """The vocabulary's new words begin as the mean of the old ones."""
    config, tokenizer = llava.config, start.tokenizer
    if config.mm_use_im_patch_token:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if config.mm_use_im_start_end:
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    before = llava.get_input_embeddings().num_embeddings
    if len(tokenizer) > before:
        llava.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (llava.get_input_embeddings(), llava.get_output_embeddings()):
            with _whole([layer.weight]), torch.no_grad():
                layer.weight[before:] = layer.weight[:before].mean(0, keepdim=True)


def _whole(parameters: list[nn.Parameter]):
    """Under ZeRO-3, where parameters are in pieces: the whole of them for a moment, to be changed."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0)


def _load_weights(llava, values: dict[str, torch.Tensor]) -> None:
    own = dict(llava.named_parameters())
    with _whole([own[name] for name in values]), torch.no_grad():
        for name, value in values.items():
            if own[name].shape != value.shape:  # embeddings, which were not checked before
                raise ValueError(
                    f"the first stage had other new tokens ({name!r} has another shape); give the flags it"
                    " had"
                )
            own[name].copy_(value)


def _add_adapters(llava, training: TrainingArguments):
    from peft import LoraConfig, get_peft_model

    decoder = llava.get_model()
    tower = decoder.vision_tower
    del decoder.vision_tower  # its layers are named like the decoder's, and only those are meant
    layers = [
        name
        for name, module in llava.named_modules()
        if isinstance(module, nn.Linear) and "mm_projector" not in name
    ]
    wrapped = get_peft_model(
        llava,
        LoraConfig(
            r=training.lora_r,
            lora_alpha=training.lora_alpha,
            lora_dropout=training.lora_dropout,
            bias=training.lora_bias,
            target_modules=sorted({name.rpartition(".")[2] for name in layers} - {"lm_head"}),
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=not training.deepspeed,
    )  # ZeRO-3 wants one dtype for all that is trained
    decoder.vision_tower = tower
    return wrapped


def _choose_trainable(llava, model: ModelArguments, training: TrainingArguments) -> None:
    decoder = llava.get_model()
    if model.tune_mm_mlp_adapter:
        llava.requires_grad_(False)
    elif model.freeze_backbone:
        decoder.requires_grad_(False)
    decoder.mm_projector.requires_grad_(not training.freeze_mm_mlp_adapter)
    if hasattr(decoder, "image_newline"):
        decoder.image_newline.requires_grad_(not training.freeze_mm_mlp_adapter)
    if model.tune_mm_mlp_adapter and llava.config.mm_use_im_start_end:
        llava.get_input_embeddings().requires_grad_(True)
    decoder.vision_tower.requires_grad_(False)
    if model.unfreeze_mm_vision_tower:
        _train_tower(decoder.vision_tower)


def _train_tower(tower) -> None:
    """All that stands before the selected layer: what comes after gets no gradient, and DDP would wait for
    one."""
    layers = tower.config.num_hidden_layers
    used = tower.select_layer if tower.select_layer >= 0 else layers + 1 + tower.select_layer
    for name, value in tower.named_parameters():
        layer = re.search(r"encoder\.layers\.(\d+)\.", name)
        value.requires_grad_("post_layernorm" not in name and (layer is None or int(layer[1]) < used))


def picture_settings(config) -> SimpleNamespace:
    """What decides about an image's pixels, apart from the model, so that worker processes do not copy it."""
    return SimpleNamespace(
        image_aspect_ratio=config.image_aspect_ratio,
        image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
    )
