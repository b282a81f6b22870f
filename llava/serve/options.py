"""The options that the commands share, which are read before anything large is imported."""

import argparse
import math

from libra.utils.cli import whole_from


def _number(allowed, what: str):
    """An argparse type for numbers within a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


def add_model_options(parser: argparse.ArgumentParser, model_path: str | None = None) -> None:
    """What every command takes, under the original's names; ``model_path`` is the default checkpoint."""
    add = parser.add_argument
    default = f" (default {model_path})" if model_path else ""
    add(
        "--model-path",
        "--model",
        default=model_path,
        required=not model_path,
        help=f"folder or hub name of a LLaVA checkpoint; mini is the embedded model{default}",
    )
    add("--model-base", help="the language model that a LoRA checkpoint belongs to")
    add(
        "--conv-mode",
        help="conversation template; by default the checkpoint's own or, where it names none, by its name",
    )
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto (default) takes the GPU where there is one",
    )
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=whole_from(1),
        default=512,
        help="length limit of an answer (default 512)",
    )
    add("--load-8bit", action="store_true", help="8-bit weights (GPU with bitsandbytes)")
    add("--load-4bit", action="store_true", help="4-bit weights (GPU with bitsandbytes)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the two commands in the terminal."""
    add_model_options(parser)
    add = parser.add_argument
    add("--image-file", help="image file or http(s) address; several with --sep between them")
    add(
        "--video-file",
        help="video file or folder of frames, for a VideoLLaMA-2 checkpoint; several with --sep between them",
    )
    add("--sep", default=",", help="what parts the names of several files (default ,)")
    add(
        "--compression",
        metavar="ROW",
        help="compress visual tokens: a method, a row such as llava7b_r50, or a YAML file",
    )
    add(
        "--temperature",
        type=_number(lambda value: 0 <= value < 1e4, "a number from 0 up"),
        default=0.0,
        help="of the sampling; 0 (default) takes the likeliest token",
    )
    add(
        "--top-p",
        "--top_p",
        type=_number(lambda value: 0 < value <= 1, "a number in (0, 1]"),
        help="sample among the likeliest tokens of this total probability",
    )
