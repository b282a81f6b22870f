"""Names of methods, rows, models and tasks: `windowed-fastv` and `windowed_fastv` are one name."""

from collections.abc import Iterable
from typing import Any


def spelled(word: Any, known: Iterable[str]) -> str | None:
    """The known name that a word is, in its own spelling: - and _ count as the same. None where there is
    none."""
    known = list(known)
    if not isinstance(word, str):
        return None
    if word in known:
        return word
    return next((name for name in known if name.replace("_", "-") == word.replace("_", "-")), None)
