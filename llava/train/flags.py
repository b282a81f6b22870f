"""The flags of ``llava.train.train`` that are its own: the published LLaVA's, and ``--compression``. Needs no
torch."""

from dataclasses import dataclass, field, fields

from libra.config import ATTENTIONS
from libra.utils.cli import Parser

EXAMPLES = """examples:
  python -m llava.train.train --model_name_or_path mini/checkpoint --version mini --data_path data.json \\
      --image_folder images --compression configs/mini/r50.yaml --output_dir runs/try --max_steps 20
  deepspeed llava/train/train.py --deepspeed scripts/zero3.json --model_name_or_path lmsys/vicuna-7b-v1.5 \\
      --vision_tower openai/clip-vit-large-patch14-336 --data_path llava_v1_5_mix665k.json \\
      --image_folder playground/data …
scripts/pretrain.sh, finetune.sh and finetune_lora.sh hold the published settings."""

OTHERS = """The flags of transformers' TrainingArguments are taken as well: --num_train_epochs,
--learning_rate, --bf16, --per_device_train_batch_size, --deepspeed …; --help-all lists them too."""


def flag(help: str, default=None, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, **({"choices": choices} if choices else {})})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = flag(
        "LLaVA checkpoint to go on from, or a plain Llama or Mistral (with vision_tower)"
    )
    version: str | None = flag(
        "conversation template of the training texts, or 'chat' for the tokenizer's own; a checkpoint's own,"
        " else v1"
    )
    compression: str | None = flag("method, row or YAML file that is on while training, such as llava7b_r50")
    vision_tower: str | None = flag("CLIP folder or hub name, for a plain language model")
    pretrain_mm_mlp_adapter: str | None = flag("mm_projector.bin of the first stage")
    tune_mm_mlp_adapter: bool = flag("train only the projector (first stage)", False)
    freeze_backbone: bool = flag("do not train the decoder", False)
    mm_projector_type: str | None = flag("linear, mlp2x_gelu …; a checkpoint's own, else linear")
    mm_vision_select_layer: int | None = flag("the tower's layer; a checkpoint's own, else -1")
    mm_vision_select_feature: str | None = flag(
        "a checkpoint's own, else patch", choices=("patch", "cls_patch")
    )
    mm_patch_merge_type: str | None = flag("flat, spatial or spatial_unpad; a checkpoint's own, else flat")
    mm_use_im_start_end: bool = flag("put <im_start> and <im_end> around images", False)
    mm_use_im_patch_token: bool = flag("add <im_patch> to the vocabulary", False)
    unfreeze_mm_vision_tower: bool = flag("train the vision tower too", False)
    attn_implementation: str | None = flag("transformers' choice by default", choices=ATTENTIONS)


@dataclass
class DataArguments:
    data_path: str | None = flag("JSON list of samples, or .jsonl with one a line")
    image_folder: str = flag("where the samples' images lie", ".")
    video_folder: str | None = flag("where their videos lie (default: image_folder)")
    lazy_preprocess: bool = flag(
        "accepted for the published scripts' sake: samples are always read when needed", True
    )
    is_multimodal: bool = flag("accepted for the published scripts' sake: images decide it", True)
    image_aspect_ratio: str | None = flag("square, pad or anyres; a checkpoint's own, else square")
    image_grid_pinpoints: str | None = flag("resolutions of anyres, a list of [width, height]")
    num_frames: int | None = flag("frames of a video; a checkpoint's own, else 8")


@dataclass
class OwnTrainingArguments:
    """What transformers' TrainingArguments do not have, or have otherwise."""

    output_dir: str | None = flag("folder for checkpoints and the finished model")
    check_only: bool = flag("look at flags, data, files and headers, say what is wrong, and stop", False)
    cache_dir: str | None = flag("where downloads from the hub go")
    logging_steps: float = flag("log every N steps, or this share of all", 10)
    remove_unused_columns: bool = flag("has to stay False: the images would be gone", False)
    freeze_mm_mlp_adapter: bool = flag("do not train the projector", False)
    model_max_length: int | None = flag(
        "text and visual tokens of a sample; what comes after is cut; the model's own limit"
    )
    group_by_modality_length: bool = flag(
        "fill batches with samples of like length, with or without images", False
    )
    mm_projector_lr: float | None = flag("the projector's learning rate, if not learning_rate")
    mm_vision_tower_lr: float | None = flag("the vision tower's learning rate, if not learning_rate")
    bits: int = flag("hold the frozen weights in 4 or 8 bits (needs CUDA, bitsandbytes and LoRA)", 16)
    double_quant: bool = flag("of 4 bits", True)
    quant_type: str = flag("of 4 bits", "nf4", choices=("nf4", "fp4"))
    lora_enable: bool = flag("train LoRA adapters of the decoder's linear layers", False)
    lora_r: int = flag("rank", 64)
    lora_alpha: int = flag("scale, over the rank", 16)
    lora_dropout: float = flag("of the adapters' input", 0.05)
    lora_weight_path: str = flag("accepted for the published scripts' sake; must stay empty", "")
    lora_bias: str = flag("biases to train", "none", choices=("none", "all", "lora_only"))


def help_text() -> str:
    """What ``--help`` prints: these flags, and where the others are."""
    parser = Parser(
        takes_plugins=True,
        prog="python -m llava.train.train",
        usage="%(prog)s [flags]",
        epilog=f"{OTHERS}\n\n{EXAMPLES}",
        description="Train a LLaVA model, with its visual tokens compressed or without.",
    )
    parser.add_argument("--help-all", action="help", help="all flags, with transformers' own")
    for title, owner in (
        ("model", ModelArguments),
        ("data", DataArguments),
        ("training", OwnTrainingArguments),
    ):
        group = parser.add_argument_group(title)
        for one in fields(owner):
            default = "" if one.default in (None, "") else f" (default {one.default})"
            choices = one.metadata.get("choices")
            metavar = (
                f"{{{','.join(choices)}}}"
                if choices
                else getattr(one.type, "__name__", str(one.type)).upper()
            )
            group.add_argument(
                f"--{one.name}", metavar=metavar.removesuffix(" | NONE"), help=one.metadata["help"] + default
            )
    return parser.format_help()
