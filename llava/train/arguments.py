"""The command line of ``llava.train.train``: the published LLaVA's flags, transformers' own, and ``--compression``."""

import difflib
import importlib.util
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser
from transformers import TrainingArguments as BaseArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from libra.config import ATTENTIONS

EXAMPLES = """examples:
  python -m llava.train.train --model_name_or_path mini/checkpoint --version mini --data_path data.json --image_folder images \\
      --compression configs/mini/r50.yaml --output_dir runs/try --max_steps 20
  deepspeed llava/train/train.py --deepspeed scripts/zero3.json --model_name_or_path lmsys/vicuna-7b-v1.5 \\
      --vision_tower openai/clip-vit-large-patch14-336 --data_path llava_v1_5_mix665k.json --image_folder playground/data …
scripts/pretrain.sh, finetune.sh and finetune_lora.sh hold the published settings."""

# Flags of the published scripts that transformers 5 calls otherwise.
RENAMED = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}


def _flag(help: str, default=None, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, **({"choices": choices} if choices else {})})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _flag("LLaVA checkpoint to go on from, or a plain Llama or Mistral (with vision_tower)")
    version: str = _flag("conversation template of the training texts, or 'chat' for the tokenizer's own", "v1")
    compression: str | None = _flag("YAML file whose compression is on while training (configs/…)")
    vision_tower: str | None = _flag("CLIP folder or hub name, for a plain language model")
    pretrain_mm_mlp_adapter: str | None = _flag("mm_projector.bin of the first stage")
    tune_mm_mlp_adapter: bool = _flag("train the projector alone (first stage)", False)
    freeze_backbone: bool = _flag("do not train the decoder", False)
    mm_projector_type: str | None = _flag("linear, mlp2x_gelu …; a checkpoint's own, else linear")
    mm_vision_select_layer: int | None = _flag("the tower's layer; a checkpoint's own, else -1")
    mm_vision_select_feature: str | None = _flag("a checkpoint's own, else patch", choices=("patch", "cls_patch"))
    mm_patch_merge_type: str | None = _flag("flat, spatial or spatial_unpad; a checkpoint's own, else flat")
    mm_use_im_start_end: bool = _flag("put <im_start> and <im_end> around images", False)
    mm_use_im_patch_token: bool = _flag("add <im_patch> to the vocabulary", False)
    unfreeze_mm_vision_tower: bool = _flag("train the vision tower too", False)
    attn_implementation: str | None = _flag("transformers' choice by default", choices=ATTENTIONS)


@dataclass
class DataArguments:
    data_path: str | None = _flag("JSON list of samples, or .jsonl with one a line")
    image_folder: str = _flag("where the samples' images lie", ".")
    video_folder: str | None = _flag("where their videos lie (default: image_folder)")
    lazy_preprocess: bool = _flag("accepted for the published scripts' sake: samples are always read when needed", True)
    is_multimodal: bool = _flag("accepted for the published scripts' sake: images decide it", True)
    image_aspect_ratio: str | None = _flag("square, pad or anyres; a checkpoint's own, else square")
    image_grid_pinpoints: str | None = _flag("resolutions of anyres, a list of [width, height]")
    num_frames: int | None = _flag("frames of a video; a checkpoint's own, else 8")


@dataclass
class TrainingArguments(BaseArguments):
    output_dir: str | None = _flag("folder for checkpoints and the finished model")
    cache_dir: str | None = _flag("where downloads from the hub go")
    remove_unused_columns: bool = _flag("transformers' own; has to stay False here", False)
    freeze_mm_mlp_adapter: bool = _flag("do not train the projector", False)
    model_max_length: int = _flag("text and visual tokens of a sample; what is behind is cut", 512)
    group_by_modality_length: bool = _flag("fill batches with samples of like length, with or without images", False)
    mm_projector_lr: float | None = _flag("the projector's learning rate, if not learning_rate")
    mm_vision_tower_lr: float | None = _flag("the vision tower's learning rate, if not learning_rate")
    bits: int = _flag("hold the frozen weights in 4 or 8 bits (needs CUDA, bitsandbytes and LoRA)", 16)
    double_quant: bool = _flag("of 4 bits", True)
    quant_type: str = _flag("of 4 bits", "nf4", choices=("nf4", "fp4"))
    lora_enable: bool = _flag("train LoRA adapters of the decoder's linear layers", False)
    lora_r: int = _flag("rank", 64)
    lora_alpha: int = _flag("scale, over the rank", 16)
    lora_dropout: float = _flag("of the adapters' input", 0.05)
    lora_weight_path: str = _flag("accepted for the published scripts' sake; must stay empty", "")
    lora_bias: str = _flag("biases to train", "none", choices=("none", "all", "lora_only"))

    def __post_init__(self):
        if not torch.cuda.is_available():
            self.tf32 = None  # a way of CUDA GPUs; the scripts ask for it wherever they run
        super().__post_init__()


class _Parser(HfArgumentParser):
    """Errors are one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        exit_with(message)


def exit_with(message: str) -> NoReturn:
    """``error: …`` and exit status 2; of a machine's processes the first one speaks, and the others give it time to."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # a launcher ends all processes when one has ended: that should be the one that speaks
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser() -> HfArgumentParser:
    return _Parser(
        (ModelArguments, DataArguments, TrainingArguments), prog="python -m llava.train.train", epilog=EXAMPLES,
        description="Train a LLaVA model, with its visual tokens compressed or without.", allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )


def parse(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the command line; an unknown flag, a missing one or a contradiction ends the program with a sentence."""
    argv = [RENAMED.get(name, name) + equals + value for name, equals, value in
            (word.partition("=") if word.startswith("--") else (word, "", "") for word in argv or sys.argv[1:])]
    parser = make_parser()
    if not torch.accelerator.is_available():
        _prepare_cpu(parser, argv)
    known = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            exit_with(f"the flag {name} is unknown; {hint}")
    try:
        model, data, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        _check(model, data, training)
    except (ValueError, ImportError, OSError) as error:
        exit_with(" ".join(str(error).split()))
    return model, data, training


def _prepare_cpu(parser, argv: list[str]) -> None:
    parser.set_defaults(use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None)
    if any(word.partition("=")[0] == "--deepspeed" for word in argv):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        try:
            import deepspeed
        except ImportError as error:
            exit_with(f"--deepspeed needs DeepSpeed ({error}); install it: pip install deepspeed")
        deepspeed.init_distributed(dist_backend="gloo")  # before transformers does it, which would ask for NCCL


def _check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    for name, value in (
        ("model_name_or_path", model.model_name_or_path), ("data_path", data.data_path), ("output_dir", training.output_dir),
    ):
        if not value:
            raise ValueError(f"--{name} is missing; --help shows an example")
    if training.bits not in (4, 8, 16):
        raise ValueError(f"--bits {training.bits} is unknown; use 4, 8 or 16")
    if training.bits < 16 and not torch.cuda.is_available():
        raise ValueError(f"--bits {training.bits} needs a CUDA GPU and none is here; leave it out")
    if training.bits < 16 and not training.lora_enable:
        raise ValueError(f"--bits {training.bits} freezes the decoder; add --lora_enable True")
    for flag, package in (("lora_enable True", "peft"), (f"bits {training.bits}", "bitsandbytes")):
        needed = training.lora_enable if package == "peft" else training.bits < 16
        if needed and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{flag} needs {package}; install it: pip install {package}")
    if training.lora_weight_path:
        raise ValueError("--lora_weight_path is not supported; --output_dir of an interrupted run goes on by itself")
    if training.lora_enable and model.tune_mm_mlp_adapter:
        raise ValueError("--lora_enable trains the decoder and --tune_mm_mlp_adapter the projector alone; choose one")
    if training.lora_enable and model.unfreeze_mm_vision_tower:
        raise ValueError("--unfreeze_mm_vision_tower does not go with --lora_enable; leave one out")
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        raise ValueError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train; choose one")
    if training.remove_unused_columns:
        raise ValueError("--remove_unused_columns would remove the images; leave it out")
    _check_of_transformers(model, training)
    # The older name is a deprecated alias of the newer one since transformers 5.20.
    names = [n for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if hasattr(training, n)]
    options = dict(next((given for n in names if (given := getattr(training, n))), {}))
    if options.setdefault("use_reentrant", False) and model.compression:
        raise ValueError("gradient checkpointing with use_reentrant gives wrong gradients with compression; leave it out")
    for name in names:
        setattr(training, name, options)


def _check_of_transformers(model: ModelArguments, training: TrainingArguments) -> None:
    """What transformers' own flags ask for in vain: it would stop with the weights in memory, or ignore them."""
    if training.eval_strategy != "no":
        raise ValueError("nothing is evaluated while training; leave --eval_strategy out and evaluate what --output_dir holds")
    if training.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint is not needed: a run goes on from the newest checkpoint in --output_dir")
    if training.fsdp and training.deepspeed:
        raise ValueError("--fsdp and --deepspeed exclude each other; choose one")
    if training.fsdp and (training.use_cpu or training.parallel_mode != ParallelMode.DISTRIBUTED):
        raise ValueError("--fsdp shards over the GPUs of a distributed run; start it with torchrun on GPUs, or leave it out")
    if training.fp16 and training.use_cpu:
        raise ValueError("--fp16 True needs a GPU; on a CPU use --bf16 True")
    if model.attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise ValueError("--attn_implementation flash_attention_2 needs a CUDA GPU and none is here; leave it out")
    lacking = set(training.report_to) - set(get_available_reporting_integrations())
    if lacking:
        raise ValueError(f"--report_to {min(lacking)} names no package that is installed; install it, or use none")
    output = Path(training.output_dir)
    near = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise ValueError(f"--output_dir {output}: {near} is no folder that can be written to; name another")
