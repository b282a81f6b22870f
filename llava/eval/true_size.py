"""LLaVA-1.5 at its true size with random weights: written in the original's format, loaded, compressed,
timed.

python -m llava.eval.true_size
"""

from pathlib import Path

from libra.utils.cli import Parser, whole_from

EXAMPLES = """examples:
  python -m llava.eval.true_size
  python -m llava.eval.true_size --layers 4 --keep slice --json slice.json"""


def parser() -> Parser:
    parser = Parser(
        prog="python -m llava.eval.true_size",
        epilog=EXAMPLES,
        description="LLaVA-1.5 of true size with random weights: written, loaded, one image, compressed against vanilla.",
    )
    add, positive = parser.add_argument, whole_from(1)
    add(
        "--config",
        default="llava7b_r50",
        metavar="ROW",
        help="the row to measure, its name or file (default %(default)s)",
    )
    add(
        "--layers",
        type=positive,
        metavar="N",
        help="only N layers; the row's compression layers move to the same depth",
    )
    add(
        "--pairs",
        type=positive,
        default=3,
        metavar="N",
        help="vanilla and compressed, in turns (default %(default)s)",
    )
    add(
        "--new-tokens",
        type=whole_from(2),
        default=8,
        metavar="N",
        help="tokens to generate (default %(default)s)",
    )
    add(
        "--text-tokens",
        type=whole_from(2),
        default=64,
        metavar="N",
        help="tokens around the image (default %(default)s)",
    )
    add(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep the checkpoint in this new folder; by default it is temporary",
    )
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto (default) takes the GPU where there is one",
    )
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        from .random_llava import run, table

        print(table(run(args)))
    except KeyboardInterrupt:
        options.error("stopped; the temporary files are gone")
    except (ValueError, OSError) as error:
        options.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
