"""What every command line of this project shares."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `error: …`, with exit status 2; the epilog keeps its line breaks.

    A main catches its own ValueErrors and hands their sentence to `error`, so nobody sees a traceback.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
