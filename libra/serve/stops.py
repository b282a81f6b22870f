"""Texts that end an answer, cut off it while it comes."""

from collections.abc import Sequence


class Cut:
    """Takes an answer piece by piece and returns what may be shown: nothing from the first of ``stops`` on.

    Attributes:
        ended: whether one of them has come.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.ended = tuple(stops), "", False

    def __call__(self, piece: str) -> str:
        """What is certain now. The beginning of what may become a stop is held back."""
        if self.ended:
            return ""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held, self.ended = "", True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
