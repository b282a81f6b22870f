"""What every command line of this project shares."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .sentences import one_line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `error: …`, with exit status 2; the epilog keeps its line breaks.

    A main catches its own ValueErrors and hands their sentence to `error`, so nobody sees a traceback.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(2)


def only_commands(package: str, *commands: str) -> None:
    """Called by a package when it is imported: end ``python -m package.module`` where that module is not a command of it.

    Python would run such a module and say nothing. Exit status 2 with a sentence; nothing happens in an ordinary import.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv[:-1]:  # so it reads only while Python looks for the module to run
        return
    asked = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    known = [f"{package}.{command}" for command in commands]
    if asked.split(".")[0] == package and asked.removesuffix(".__main__") not in known:
        print(f"error: {asked} is not a command; use python -m {' | '.join(known)}", file=sys.stderr)
        raise SystemExit(2)


def names(text: str) -> list[str]:
    """An argparse type: names with commas between them."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def whole_from(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from ``least`` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} up")
        return int(text)

    return parse


def wholes_from(least: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers from ``least`` up, with commas between them."""
    whole = whole_from(least)
    return lambda text: tuple(whole(part.strip()) for part in text.split(","))
