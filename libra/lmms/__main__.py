"""lmms-eval's own command line with the model ``libra`` and its task files known, also from a plain checkout.

python -m libra.lmms --model_args config=mini/r50 --tasks mini_reading
"""

import sys
import traceback
from collections.abc import Sequence

from ..utils.cli import Parser
from . import TASKS

EXAMPLES = """examples:
  python -m libra.lmms --model_args config=mini/r50 --tasks mini_reading --limit 20
  python -m libra.lmms --model_args config=llava7b_r50,batch_size=8 --tasks gqa --output_path results/gqa
  python -m lmms_eval --model libra --include_path "$(python -m libra.lmms --task-folder)" …

All flags are lmms-eval's own: python -m lmms_eval --help lists them. --model libra and the folder of these
tasks are filled in where they are not given."""


def filled_in(words: Sequence[str]) -> list[str]:
    """lmms-eval's arguments with the model and the folder of the task files where they are missing."""
    given = {word.partition("=")[0] for word in words}
    missing = {"--model": "libra", "--include_path": str(TASKS)}
    return [*words, *(word for flag, value in missing.items() if flag not in given for word in (flag, value))]


def evaluate(words: Sequence[str]) -> int:
    """Run lmms-eval with these arguments; 0 when all was evaluated, 1 after an error that cost a run (others
    of a --config file go on), 2 where none began. lmms-eval itself prints such errors and exits with 0."""
    from lmms_eval import __main__ as harness

    failures: list[Exception] = []
    plain = harness.cli_evaluate_single

    def single(args):
        try:
            if args.tasks is None:
                raise ValueError("name tasks with --tasks, such as mini_reading; --tasks list shows all")
            return plain(args)
        except Exception as error:
            failures.append(error)
            if not isinstance(error, ValueError) or args.verbosity == "DEBUG":
                traceback.print_exc()
            return None, None

    sys.argv[1:] = words  # where lmms-eval reads them
    harness.cli_evaluate_single = single
    try:
        harness.cli_evaluate()
    except ValueError as error:  # of its own arguments
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        harness.cli_evaluate_single = plain
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
        takes_plugins=True,
        prog="python -m libra.lmms",
        usage="%(prog)s [lmms-eval's flags]",
        epilog=EXAMPLES,
        description="Evaluate with lmms-eval, with the model libra and its tasks known to it.",
    )
    parser.add_argument(
        "--task-folder", action="store_true", help="print the folder of the task files and end"
    )
    known, words = parser.parse_known_args(words)
    if known.task_folder:
        print(TASKS)
        return 0
    from .plugin import register

    register()
    return evaluate(filled_in(words))


if __name__ == "__main__":
    sys.exit(main())
