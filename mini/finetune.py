"""Fine-tune the embedded model with its visual tokens compressed and without: ``python -m mini.finetune --output DIR``.

Everything that is finished is kept; call it again to go on after an interruption.
"""

import sys
from pathlib import Path

from libra.cli import Parser
from libra.provenance import cores


def parser() -> Parser:
    options = Parser(prog="python -m mini.finetune", description="Fine-tune with and without compression; fill Table E.",
                     epilog="example: python -m mini.finetune --steps 20 --limit 20 --pairs 3 --output results/tableE-try")
    options.add_argument("--output", type=Path, default=Path("results/tableE"), metavar="DIR", help="default %(default)s")
    options.add_argument("--benchmark", type=Path, default=Path("results/benchmark"), metavar="DIR",
                         help="the held-out questions, written where they are missing (default %(default)s)")
    options.add_argument("--steps", type=int, default=200, help="of each fine-tuning run (default %(default)s)")
    options.add_argument("--batch", type=int, default=8, help="images per process and step (default %(default)s)")
    options.add_argument("--learning-rate", type=float, default=3e-4, help="default %(default)s")
    options.add_argument("--processes", type=int, default=min(2, cores()), help="of one thread each (default %(default)s)")
    options.add_argument("--pairs", type=int, default=20, help="measured pairs of steps (default %(default)s)")
    options.add_argument("--limit", type=int, help="only the first N held-out questions of a type (to try things out)")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--publish", action="store_true", help="copy the finished page to docs/results/training.md")
    return options


def main(argv: list[str] | None = None) -> int:
    options = (commands := parser()).parse_args(argv)
    for name in ("steps", "batch", "processes", "pairs"):
        if getattr(options, name) < 1:
            commands.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    from .table_e import run  # here: it needs torch, and --help does not

    return run(options, commands)


if __name__ == "__main__":
    sys.exit(main())
