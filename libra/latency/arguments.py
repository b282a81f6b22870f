"""The flags of the command, read before anything large is imported."""

from pathlib import Path

from ..config import ConfigError
from ..utils.cli import DTYPES, Parser, whole_from, wholes_from
from ..utils.plotting import figure_class

EXAMPLES = """examples:
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8
  python -m libra.latency --config configs/llava7b_fastv.yaml --random-weights --layers 8 --peer \\
      --plot fastv.png
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8 --vision --decode 16
  python -m libra.latency --config configs/llava7b_r67.yaml --checkpoint path/to/llava-1.5-7b-hf \\
      --json latency.json
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8 --grow --output growth
  python -m libra.latency --true-size
  python -m libra.latency --true-size --layers 4 --keep slice --json slice.json
  python -m libra.latency --check"""

PAIRS, PAIRS_OF_ANSWERS = 9, 3  # an answer of true size takes half a minute on a CPU
# The grid of --grow: visual tokens × rows, but no cell with more visual tokens in all its rows.
VISUAL = (144, 576, 1024, 2880, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32)
MAX_TOKENS = 16384
# Options that mean nothing to the other ways of measuring.
NOT_WITH_GROW = ("json", "plot", "peer", "vision", "decode", "images")
NOT_WITH_TRUE_SIZE = (
    *("compression_layers", "visual_tokens", "batch", "images", "decode", "vision", "peer", "dtype", "attn"),
    *("plot", "grow", "output"),
)


def parser() -> Parser:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.latency",
        epilog=EXAMPLES,
        description="Prefill of the decoder, compressed against plain, in turns, next to what the FLOPs "
        "promise.",
    )
    add = parser.add_argument
    add("--config", metavar="ROW", help="a row: its name, such as llava7b_r50, or its YAML file")
    _add_model(parser)
    _add_prompt(parser)
    add(
        "--pairs",
        type=whole_from(1),
        metavar="N",
        help=f"vanilla and compressed, in turns (default {PAIRS}; with --true-size {PAIRS_OF_ANSWERS})",
    )
    add(
        "--decode",
        type=whole_from(0),
        default=0,
        metavar="N",
        help="also time N decoding steps after every prefill",
    )
    add("--vision", action="store_true", help="also time the vision tower and the projector, at true size")
    add(
        "--peer",
        action="store_true",
        help="also time FastV as plain transformers runs it, with output_attentions, at the row's one layer "
        "and ratio",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default %(default)s)")
    add("--attn", default="sdpa", help="attention: sdpa, eager, flash_attention_2 (default %(default)s)")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--threads", type=whole_from(1), metavar="N", help="CPU threads (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    add("--plot", type=Path, metavar="FILE", help="also draw it, as PNG")
    _add_growth(parser.add_argument_group("how cost grows"))
    _add_true_size(parser.add_argument_group("true size"))
    _add_guard(parser.add_argument_group("regression guard"))
    return parser


def _add_model(parser: Parser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--random-weights", action="store_true", help="the row's model at its true width with random weights"
    )
    weights.add_argument(
        "--checkpoint", metavar="DIR", help="a model in Hugging Face's format that libra.attach supports"
    )
    weights.add_argument(
        "--true-size",
        action="store_true",
        help="LLaVA-1.5 with random weights, written in its original format, loaded, and asked; see below",
    )
    parser.add_argument(
        "--layers",
        type=whole_from(1),
        metavar="N",
        help="with random weights: only N layers; the row's compression layers move to the same fraction of "
        "the depth",
    )
    parser.add_argument(
        "--compression-layers",
        type=wholes_from(0),
        metavar="A,B",
        help="compress after these layers instead of the row's",
    )


def _add_prompt(parser: Parser) -> None:
    add, wholes = parser.add_argument, wholes_from(1)
    add(
        "--visual-tokens",
        type=wholes,
        metavar="N",
        help="tokens of the image (default: the model's own number); with --grow a list",
    )
    add(
        "--text-tokens",
        type=whole_from(2),
        default=64,
        metavar="N",
        help="half before, half after the image (default %(default)s)",
    )
    add("--batch", type=wholes, metavar="N", help="rows (default 1); with --grow a list")
    add(
        "--images",
        type=wholes_from(0),
        default=(1,),
        metavar="A,B",
        help="pictures of each row, over and over, such as 0,1,2; shorter rows are padded (default 1)",
    )


def _add_growth(group) -> None:
    group.add_argument(
        "--grow",
        action="store_true",
        help=f"visual tokens {', '.join(map(str, VISUAL))} × batch {', '.join(map(str, BATCHES))}, one file"
        " per cell; a run that was stopped goes on",
    )
    group.add_argument(
        "--output", type=Path, metavar="DIR", help="with --grow: where cells, growth.md and growth.png go"
    )
    group.add_argument(
        "--max-tokens",
        type=whole_from(1),
        default=MAX_TOKENS,
        metavar="N",
        help="with --grow: leave cells with more visual tokens in all their rows empty (default %(default)s)",
    )


def _add_true_size(group) -> None:
    group.add_argument(
        "--new-tokens",
        type=whole_from(2),
        default=8,
        metavar="N",
        help="with --true-size: tokens of the answer (default %(default)s)",
    )
    group.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="with --true-size: keep the checkpoint (7B: 14 GB) in this new folder; by default it is "
        "temporary",
    )


def _add_guard(group) -> None:
    group.add_argument(
        "--check",
        action="store_true",
        help="compare a small slice's operations, bytes and time ratios with the committed ones; exit "
        "status 1 if they deviate",
    )
    group.add_argument(
        "--update", action="store_true", help="with --check: write this machine's figures instead"
    )


def check_arguments(args) -> None:
    """Fills in the defaults that depend on what is measured. Raises ValueError for what does not go
    together."""
    if args.update and not args.check:
        raise ValueError("--update rewrites the figures of --check; give both")
    if args.check:
        return
    args.config = args.config or ("llava7b_r50" if args.true_size else None)
    args.pairs = args.pairs or (PAIRS_OF_ANSWERS if args.true_size else PAIRS)
    if not args.config:
        raise ValueError("the argument --config is required")
    if not (args.random_weights or args.checkpoint or args.true_size):
        raise ValueError("one of the arguments --random-weights --checkpoint --true-size is required")
    if args.layers and args.checkpoint:
        raise ConfigError("--layers cuts a model of random weights; leave it out, or use --random-weights")
    if args.true_size:
        _refuse(args, NOT_WITH_TRUE_SIZE, "--true-size, which answers one image in bfloat16")
    else:
        _refuse(args, ("new_tokens", "keep"), "a measured prefill, only with --true-size")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json: {args.json} is a folder; give a file's name")
    if args.grow:
        if not args.output:
            raise ValueError("--grow writes one file per cell; name a folder with --output")
        figure_class()  # before anything long: a picture comes in the end
        _refuse(args, NOT_WITH_GROW, "--grow, which measures the prefill")
        return
    if args.output:
        raise ValueError("--output is the folder of --grow; give both, or --json for one file")
    for name in ("visual_tokens", "batch"):
        if len(getattr(args, name) or ()) > 1:
            raise ValueError(f"--{name.replace('_', '-')} takes one number, and a list only with --grow")
    if args.plot:
        figure_class()
        if args.plot.suffix.lower() != ".png" or args.plot.is_dir():
            raise ValueError(f"--plot: {args.plot} is not a picture's name; give a file that ends in .png")


def _refuse(args, names: tuple[str, ...], what: str) -> None:
    """Raises ValueError where one of these options was given."""
    plain = parser()
    for name in names:
        if getattr(args, name) != plain.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {what}; leave it out")


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, 1 where --check deviates, SystemExit with status 2 after one `error: …`
    line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        check_arguments(args)
        from .command import run

        return run(args)
    except KeyboardInterrupt:
        after = {"grow": "; the finished cells are kept, and the same command goes on"}
        after["true_size"] = "; the temporary files are gone"
        options.error("stopped" + "".join(text for name, text in after.items() if getattr(args, name)))
    except (ValueError, OSError) as error:
        options.error(str(error))
