"""The command ``python -m libra.vllm``: can vLLM serve a row, and what is it then called?"""

from ..rows import compression_from
from ..utils.cli import Parser

EXAMPLES = """example:
  python -m libra.vllm field/llava7b_c33_divprune_original"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.vllm",
        description="Check a compression for vLLM, and print the name under which its server is listed.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "compression", nargs="?", metavar="NAME|ROW|YAML", help="a method, a row or a file (default: none)"
    )
    args = parser.parse_args(argv)
    from .settings import NOTHING, cache_key, qualified

    try:
        given = compression_from(args.compression) if args.compression else NOTHING
        print(cache_key(qualified(given)))
    except ValueError as error:
        parser.error(str(error))
