"""Fine-tune the embedded model with its visual tokens compressed and without: ``python -m mini.finetune
--output DIR``.

Everything that is finished is kept; call it again to go on after an interruption.
"""

import sys
from pathlib import Path

from eval.options import add_benchmark
from libra.utils.cli import Parser, whole_from
from libra.utils.provenance import cores


def parser() -> Parser:
    count = whole_from(1)
    options = Parser(
        prog="python -m mini.finetune",
        description="Fine-tune with and without compression; fill Table E.",
        epilog="example: python -m mini.finetune --steps 20 --limit 20 --pairs 3 --output results/tableE-try",
    )
    options.add_argument(
        "rows", nargs="*", metavar="ROW", help="only these of Table E's rows, such as whole_r50"
    )
    options.add_argument(
        "--output", type=Path, default=Path("results/tableE"), metavar="DIR", help="default %(default)s"
    )
    add_benchmark(options)
    options.add_argument(
        "--steps", type=count, default=200, help="of each fine-tuning run (default %(default)s)"
    )
    options.add_argument(
        "--batch", type=count, default=8, help="images per process and step (default %(default)s)"
    )
    options.add_argument("--learning-rate", type=float, default=3e-4, help="default %(default)s")
    options.add_argument(
        "--processes", type=count, default=min(2, cores()), help="of one thread each (default %(default)s)"
    )
    options.add_argument(
        "--pairs", type=count, default=20, help="measured pairs of steps (default %(default)s)"
    )
    options.add_argument(
        "--limit", type=count, help="only the first N held-out questions of a type (to try things out)"
    )
    options.add_argument("--seed", type=whole_from(0), default=1)
    options.add_argument(
        "--dry-run", action="store_true", help="only say what would be trained and computed, and how long"
    )
    options.add_argument("--publish", action="store_true", help="copy the finished table to docs/results/")
    return options


def main(argv: list[str] | None = None) -> int:
    options = (commands := parser()).parse_intermixed_args(argv)
    if not 0 < options.learning_rate < 1:
        commands.error(f"--learning-rate {options.learning_rate} is not a number between 0 and 1")
    from .finetuning import run  # here: it needs torch, and --help does not

    return run(options, commands)


if __name__ == "__main__":
    sys.exit(main())
