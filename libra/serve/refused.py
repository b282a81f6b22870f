"""What a client is told instead of an answer."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A request that is not answered: an HTTP status and the sentence that says why, and what to do."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


@contextmanager
def as_refusals() -> Iterator[None]:
    """A ValueError inside, which this project raises for a user's mistakes, becomes a 400."""
    try:
        yield
    except ValueError as error:
        raise Refused(400, " ".join(str(error).split())) from error
