"""What every command line of this project shares."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from . import plugins
from .sentences import one_line

LARGEST = 10**9  # of the whole numbers that a flag takes
LONGEST_WORD = 400  # characters of a word that an error repeats
DTYPES = ("float32", "float16", "bfloat16")  # that models are computed in


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, `error: …`, with exit status 2; the epilog keeps its line
    breaks.

    A main catches its own ValueErrors and hands their sentence to `error`, so nobody sees a traceback.
    ``takes_plugins``: the command reads compressions, so it also takes the user's own methods.
    """

    def __init__(self, takes_plugins: bool = False, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        if takes_plugins:
            add_plugins(self)

    def error(self, message: str) -> NoReturn:
        short = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: word[0][:80] + "…", one_line(message))
        print(f"error: {short}", file=sys.stderr)
        raise SystemExit(2)


class _Import(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None):
        try:
            plugins.load(value)
        except ValueError as error:
            parser.error(f"--import: {error}")


class _Allow(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None):
        plugins.allow()


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """`--import` and `--allow-plugins`, obeyed while the command line is read."""
    group = parser.add_argument_group("your own methods")
    group.add_argument(
        "--import",
        action=_Import,
        dest=argparse.SUPPRESS,
        metavar="MODULE",
        help="import a module, or a .py file, that registers a select or a merge; may be repeated",
    )
    group.add_argument(
        "--allow-plugins",
        action=_Allow,
        nargs=0,
        dest=argparse.SUPPRESS,
        help="import the modules that a row's `plugins` names; only for rows you trust",
    )


def only_commands(package: str, *commands: str) -> None:
    """Called by a package when it is imported: end ``python -m package.module`` where that module is not a
    command of it.

    Python would run such a module and say nothing. Exit status 2 with a sentence; nothing happens in an
    ordinary import.
    """
    if (
        sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv[:-1]
    ):  # so it reads only while Python looks for the module to run
        return
    asked = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    known = [f"{package}.{command}" for command in commands]
    if asked.split(".")[0] == package and asked.removesuffix(".__main__") not in known:
        print(f"error: {asked} is not a command; use python -m {' | '.join(known)}", file=sys.stderr)
        raise SystemExit(2)


def names(text: str) -> list[str]:
    """An argparse type: names with commas between them."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def whole_from(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: whole numbers from ``least`` up to ``most``."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) <= 10 and int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} up")
        if len(text) > 10 or int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is too large; give at most {most}")
        return int(text)

    return parse


def wholes_from(least: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: whole numbers from ``least`` up, with commas between them."""
    whole = whole_from(least)
    return lambda text: tuple(whole(part.strip()) for part in text.split(","))
