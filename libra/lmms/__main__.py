"""lmms-eval's own command line with the model ``libra`` and its task files known, also from a plain checkout.

    python -m libra.lmms --model_args config=mini/r50 --tasks mini_reading
"""

import sys
from collections.abc import Sequence

from ..cli import Parser
from . import TASKS

EXAMPLES = """examples:
  python -m libra.lmms --model_args config=mini/r50 --tasks mini_reading --limit 20
  python -m libra.lmms --model_args config=llava7b_r50,batch_size=8 --tasks gqa --output_path results/gqa
  python -m lmms_eval --model libra --include_path "$(python -m libra.lmms --task-folder)" …

All flags are lmms-eval's own: python -m lmms_eval --help lists them. --model libra and the folder of these tasks are filled in
where they are not given."""


def filled_in(words: Sequence[str]) -> list[str]:
    """lmms-eval's arguments with the model and the folder of the task files where they are missing."""
    given = {word.partition("=")[0] for word in words}
    missing = {"--model": "libra", "--include_path": str(TASKS)}
    return [*words, *(word for flag, value in missing.items() if flag not in given for word in (flag, value))]


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
        prog="python -m libra.lmms", usage="%(prog)s [lmms-eval's flags]", epilog=EXAMPLES,
        description="Evaluate with lmms-eval, with the model libra and its tasks known to it.",
    )
    parser.add_argument("--task-folder", action="store_true", help="print the folder of the task files and end")
    if parser.parse_known_args(words)[0].task_folder:
        print(TASKS)
        return
    from .plugin import register

    register()
    sys.argv[1:] = filled_in(words)  # where lmms-eval reads them
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
