"""How errors are worded: one line, whatever the input held, with values shown short; and which known
word a user means by another."""

import difflib
from collections.abc import Iterable
from typing import Any

MOST = 80  # characters of a value that are shown


class ConfigError(ValueError):
    """One sentence that names the key, its value, the file if there is one, and what to write instead."""

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


def one_line(text: str) -> str:
    """A text with line breaks and everything else that is not printable written as escapes, such as
    ``\\n``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, cut where it repeats a long value."""
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0])


def shortened(text: str, limit: int = 200) -> str:
    """A text in one line of at most ``limit`` letters."""
    text = one_line(text)
    return text if len(text) <= limit else f"{text[: limit - 2]} …"


def check_characters(text: str, what: str) -> None:
    """Raises ValueError for half of a surrogate pair in a text, which no tokenizer takes: JSON can say one,
    and a command's argument has one for each byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} has half of a surrogate pair, which is not a character; correct it (as UTF-8)"
        ) from None


def show(value: Any) -> str:
    """A value as it stands in a file, no longer than a line: text without quotes as long as it can be told
    from nothing."""
    if isinstance(value, str):
        text = value if value.strip() and value.isprintable() else repr(value[:MOST])
    elif (
        isinstance(value, int) and value.bit_length() > 4 * MOST
    ):  # Python refuses to write out very long numbers
        return f"a whole number of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(_show_part, value[:MOST])) + "]"
    elif isinstance(value, dict):
        pairs = [(key, value[key]) for _, key in zip(range(MOST), value)]
        text = "{" + ", ".join(f"{_show_part(key)}: {_show_part(part)}" for key, part in pairs) + "}"
    else:
        text = repr(value)
    return one_line(text if len(text) <= MOST else text[:MOST] + "…")


def _show_part(value: Any) -> str:
    """A value within another one: text with its quotes."""
    return repr(value[:MOST]) if isinstance(value, str) else show(value)


def spelled(word: Any, known: Iterable[str]) -> str | None:
    """The known name (of a method, a row, a model or a task) that a word is, in its own spelling: - and _
    count as the same. None where it is none of them."""
    known = list(known)
    if not isinstance(word, str):
        return None
    if word in known:
        return word
    return next((name for name in known if name.replace("_", "-") == word.replace("_", "-")), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " did you mean …?" with the known word nearest to a wrong one, or nothing where none is near."""
    near = difflib.get_close_matches(word[:MOST], list(known), n=1)
    return f" did you mean {near[0]}?" if near else ""
