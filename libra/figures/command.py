"""The command line: which picture and which model, or which trace; where the figure goes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..rows import compression_from
from ..utils.cli import Parser, whole_from
from ..utils.plotting import figure_class, save

if TYPE_CHECKING:
    from .drawing import Record

EXAMPLES = """examples:
  python -m libra.figures --model llava-hf/llava-1.5-7b-hf --image street.jpg \\
      --prompt "How many cars are there?" --config configs/llava7b_r50.yaml \\
      --output tokens.png --save-trace trace.json
  python -m libra.figures --from-trace trace.json --output tokens.svg

A checkpoint in LLaVA's own format is converted first: python -m llava.convert mini/checkpoint mini-hf"""

FORMATS = (".png", ".svg", ".pdf")


def parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.figures",
        epilog=EXAMPLES,
        description="Draw on an image which of its visual tokens each compression kept and where the others "
        "went.",
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_HUB", help="a model in Hugging Face's format that libra.attach supports"
    )
    parser.add_argument("--image", metavar="FILE")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the question; the chat template adds the image and the rest"
    )
    parser.add_argument(
        "--config",
        metavar="ROW",
        help="a method or a row by name, or a YAML file of a row or of a compression",
    )
    parser.add_argument("--from-trace", metavar="FILE", help="draw a trace of --save-trace, without a model")
    parser.add_argument(
        "--save-trace", metavar="FILE", help="also write the trace, with the picture, as JSON"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=f"the figure: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dpi",
        type=whole_from(1, 2400),
        default=130,
        help="pixels of an inch, for .png (default %(default)s)",
    )
    return parser


def _record(args: argparse.Namespace) -> "Record":
    """From the arguments. Raises ValueError."""
    needed = {name: getattr(args, name) for name in ("model", "image", "prompt", "config")}
    if args.from_trace:
        given = [name for name in needed if needed[name] is not None]
        if given or args.save_trace:
            raise ValueError(
                f"--from-trace draws a file as it is; leave out --{(given or ['save-trace'])[0]}"
            )
        from .drawing import Record

        return Record.load(args.from_trace)
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; give a model, an image, a prompt and a configuration, or"
            " --from-trace"
        )
    compression = compression_from(args.config)
    if not compression.compresses:
        raise ValueError(f"{args.config} compresses nothing; give a configuration with compression layers")
    from ..media import COMMAND, open_image

    image = open_image(args.image, COMMAND)
    from . import prefill

    model, processor = prefill.load(args.model)
    return prefill.trace_image(model, processor, compression, image, args.prompt)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        if args.output.suffix.lower() not in FORMATS:
            raise ValueError(f"--output: {args.output} must end in {', '.join(FORMATS)}")
        from .drawing import draw

        figure_class()
        record = _record(args)
        figure = draw(record)
        if args.save_trace:
            record.save(args.save_trace)
            print(f"{args.save_trace}: written")
        save(figure, args.output, args.dpi)
        print(f"{args.output}: written")
    except (ValueError, OSError) as error:
        options.error(str(error))
    return 0
