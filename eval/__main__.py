"""lmms-eval's own command line with the model ``libra`` known, also from a plain checkout.

    python -m eval --model libra --model_args config=configs/mini/r50.yaml --include_path libra/lmms/tasks --tasks mini_reading
"""

import sys

from libra.lmms.plugin import register


def main() -> None:
    register()
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
