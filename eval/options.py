"""Options that several commands of the tables share."""

from pathlib import Path

from libra.utils.cli import Parser, names


def add_benchmark(parser: Parser) -> None:
    parser.add_argument(
        "--benchmark",
        type=Path,
        default=Path("results/benchmark"),
        metavar="DIR",
        help="the embedded benchmark, written where it is missing (default %(default)s)",
    )


def add_tasks(parser: Parser) -> None:
    parser.add_argument("--tasks", type=names, metavar="A,B", help="only these tasks, such as reading,find")


def add_checkpoint(parser: Parser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="weights to use instead of the registry's")


def add_servers(parser: Parser) -> None:
    parser.add_argument(
        "--server",
        type=names,
        metavar="URL,URL",
        help="let libra.serve or vLLM servers answer, one cell at a time each, instead of a checkpoint here",
    )


def add_own(parser: Parser) -> None:
    """What a user brings, see :mod:`eval.own`."""
    parser.add_argument("--configs", type=Path, metavar="DIR", help="also the rows of your own folder")
    parser.add_argument(
        "--model",
        metavar="NAME=PATH[:TEMPLATE]",
        help="a model of your own, by a name for your rows; with the conversation template of a LLaVA"
        " checkpoint. Fills the table own",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="lmms-eval tasks of your own, by their files' names"
    )
