"""The command line of ``llava.train.train``: the published LLaVA's flags, transformers' own, and
``--compression``."""

import difflib
import importlib.util
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser
from transformers import TrainingArguments as BaseArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from libra.utils.cli import add_plugins

from .flags import EXAMPLES, DataArguments, ModelArguments, OwnTrainingArguments

# Flags of the published scripts that transformers 5 calls otherwise.
RENAMED = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}


@dataclass
class TrainingArguments(OwnTrainingArguments, BaseArguments):
    def __post_init__(self):
        if not torch.cuda.is_available():
            self.tf32 = None  # a way of CUDA GPUs; the scripts ask for it wherever they run
        super().__post_init__()


class _Parser(HfArgumentParser):
    """Errors are one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        exit_with(message)


def exit_with(message: str, status: int = 2) -> NoReturn:
    """``error: …`` and an exit status; of a machine's processes the first one speaks, and the others give it
    time to."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # a launcher ends all processes when one has ended: that should be the one that speaks
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def make_parser() -> HfArgumentParser:
    parser = _Parser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog="python -m llava.train.train",
        epilog=EXAMPLES,
        description="Train a LLaVA model, with its visual tokens compressed or without.",
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_plugins(parser)
    parser.add_argument(
        "--help-all", action="help", help="this text; --help leaves transformers' own flags out"
    )
    return parser


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the command line; an unknown flag, a missing one or a contradiction ends the program with a
    sentence."""
    argv = [
        RENAMED.get(name, name) + equals + value
        for name, equals, value in (
            word.partition("=") if word.startswith("--") else (word, "", "") for word in argv
        )
    ]
    parser = make_parser()
    if "--check_only" in argv:  # sharding takes a launcher's processes
        argv = _without_sharding(argv)
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


def _without_sharding(argv: list[str]) -> list[str]:
    kept, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--deepspeed", "--fsdp", "--fsdp_config"):
            kept.append(word)
        elif name == "--deepspeed":
            file = value if equals else next(words, "")
            if not Path(file).is_file():
                exit_with(
                    f"--deepspeed {file}: there is no such file; the scripts folder has zero2.json and"
                    " zero3.json"
                )
    return kept


def _prepare_cpu(parser, argv: list[str]) -> None:
    parser.set_defaults(use_cpu=True, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None)
    if any(word.partition("=")[0] == "--deepspeed" for word in argv):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        defaults = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        try:
            import deepspeed
        except ImportError as error:
            exit_with(f"--deepspeed needs DeepSpeed ({error}); install it: pip install deepspeed")
        deepspeed.init_distributed(
            dist_backend="gloo"
        )  # before transformers does it, which would ask for NCCL


def _check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("data_path", data.data_path),
        ("output_dir", training.output_dir),
    ):
        if not value:
            raise ValueError(f"--{name} is missing; --help shows an example")
    for name, value in (("model_max_length", training.model_max_length), ("num_frames", data.num_frames)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is not a number from 1 up")
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
        raise ValueError(
            "--lora_weight_path is not supported; --output_dir of an interrupted run goes on by itself"
        )
    if training.lora_enable and model.tune_mm_mlp_adapter:
        raise ValueError(
            "--lora_enable trains the decoder and --tune_mm_mlp_adapter only the projector; choose one"
        )
    if training.lora_enable and model.unfreeze_mm_vision_tower:
        raise ValueError("--unfreeze_mm_vision_tower does not go with --lora_enable; leave one out")
    if model.tune_mm_mlp_adapter and training.freeze_mm_mlp_adapter:
        raise ValueError(
            "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter together leave nothing to train; choose one"
        )
    if training.remove_unused_columns:
        raise ValueError("--remove_unused_columns would remove the images; leave it out")
    _check_of_transformers(model, training)
    # The older name is a deprecated alias of the newer one since transformers 5.20.
    names = [
        n
        for n in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        if hasattr(training, n)
    ]
    options = dict(next((given for n in names if (given := getattr(training, n))), {}))
    if options.setdefault("use_reentrant", False) and model.compression:
        raise ValueError(
            "gradient checkpointing with use_reentrant gives wrong gradients with compression; leave it out"
        )
    for name in names:
        setattr(training, name, options)


def _check_of_transformers(model: ModelArguments, training: TrainingArguments) -> None:
    """What transformers' own flags ask for in vain: it would stop with the weights in memory, or ignore
    them."""
    if training.eval_strategy != "no":
        raise ValueError(
            "nothing is evaluated while training; leave --eval_strategy out and evaluate what --output_dir"
            " holds"
        )
    if training.resume_from_checkpoint:
        raise ValueError(
            "--resume_from_checkpoint is not needed: a run goes on from the newest checkpoint in --output_dir"
        )
    if training.save_only_model:
        raise ValueError(
            "--save_only_model would leave nothing to go on from; use --save_total_limit 1 to save room"
        )
    if training.fsdp and training.deepspeed:
        raise ValueError("--fsdp and --deepspeed exclude each other; choose one")
    if training.fsdp and (training.use_cpu or training.parallel_mode != ParallelMode.DISTRIBUTED):
        raise ValueError(
            "--fsdp shards over the GPUs of a distributed run; start it with torchrun on GPUs, or leave it"
            " out"
        )
    if training.fp16 and training.use_cpu:
        raise ValueError("--fp16 True needs a GPU; on a CPU use --bf16 True")
    if model.attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise ValueError(
            "--attn_implementation flash_attention_2 needs a CUDA GPU and none is here; leave it out"
        )
    lacking = set(training.report_to) - set(get_available_reporting_integrations())
    if lacking:
        raise ValueError(
            f"--report_to {min(lacking)} names no package that is installed; install it, or use none"
        )
    output = Path(training.output_dir)
    near = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise ValueError(
            f"--output_dir {output}: {near} is not a folder that can be written to; name another"
        )
