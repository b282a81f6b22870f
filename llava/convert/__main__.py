"""The command ``python -m llava.convert``."""

import argparse
import re
import warnings

from libra.utils.cli import Parser

from ..conversation import conv_templates

EXAMPLES = """example:
  python -m llava.convert liuhaotian/llava-v1.5-7b llava-1.5-7b-hf   # to transformers' class
  python -m llava.convert llava-1.5-7b-hf llava-v1.5-7b                   # and back
  python -m llava.convert mini/checkpoint mini-hf --max-shard-size 2MB"""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of a size such as 500MB, an argparse type."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text.upper())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m llava.convert",
        epilog=EXAMPLES,
        description="Convert a checkpoint from LLaVA's own format to a llava-hf folder for transformers, or "
        "back.",
    )
    parser.add_argument("source", help="folder or hub name of the checkpoint")
    parser.add_argument("destination", help="folder to make; it must not exist")
    parser.add_argument(
        "--to", choices=("hf", "original"), help="the format to write (default: the other than the source's)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of a weight file, such as 500MB (default 5GB)",
    )
    parser.add_argument(
        "--conversation",
        choices=tuple(conv_templates),
        metavar="NAME",
        help="prompt template to note down; by default the checkpoint's own or, where it names none, by its "
        "name",
    )
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of settings in old configurations
    try:
        from .converter import convert

        lines = convert(args.source, args.destination, args.to, args.max_shard_size, args.conversation)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
