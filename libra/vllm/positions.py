"""Where a picture's tokens stand: known only when the picture has been seen, while vLLM numbers a prompt
before.

A prompt is numbered with a mark in the columns of a picture, which says where the picture ends. The
embeddings of its tokens carry, as further columns, how far from that end each of them stands. When a piece of
the prompt is computed these are split off (:meth:`Distances.taken`), and the marks of its columns become
positions (:meth:`Distances.applied`). Positions are whole numbers.
"""

from collections.abc import Iterable, Sequence

import torch

DIGIT = 128  # two digits a number: whole numbers up to 256 are exact in bfloat16
AXES = 3  # of vLLM's positions, even where a model's rotary embedding has one


def append(tokens: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """(T, D + 2·A): tokens (T, D) with their distances (T, A) from the end of the picture.

    Raises ValueError for a distance of DIGIT² or more.
    """
    if int(back.max()) >= DIGIT**2:
        raise ValueError(f"a picture takes {int(back.max())} positions; at most {DIGIT**2 - 1} are possible")
    digits = torch.cat([back // DIGIT, back % DIGIT], 1)
    return torch.cat([tokens, digits.to(tokens.dtype)], 1)


def split(embeddings: torch.Tensor, axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`append`: tokens (T, D) and distances (T, A) as int64."""
    digits = embeddings[:, -2 * axes :].long()
    return embeddings[:, : -2 * axes], digits[:, :axes] * DIGIT + digits[:, axes:]


def mark(end):
    """What stands in a picture's columns until its tokens are there: negative, unlike a position. Its own
    inverse."""
    return -1 - end


def numbered(length: int, pictures: Iterable[tuple[int, int, int]]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt whose pictures nobody has seen yet.

    Args:
        length: columns of the prompt.
        pictures: of each, in their order, its first column, how many columns it has, and how many positions
            it takes.

    Returns:
        (AXES, length) int64, and what the position of a later column is more than its number.
    """
    numbers: list[int] = []
    following = 0  # the position of the next text
    for first, columns, width in pictures:
        text = first - len(numbers)
        numbers += range(following, following + text)
        following += text + width
        numbers += [mark(following)] * columns
    rest = length - len(numbers)
    numbers += range(following, following + rest)
    positions = torch.tensor(numbers, dtype=torch.long).expand(AXES, -1).clone()
    return positions, following + rest - length


class Distances:
    """Between the embeddings of a piece of a prompt and its positions, which a model is given one after the
    other.

    They lie in one place, as a CUDA graph needs it: what reads them may be a replay.

    Args:
        axes: A, how many numbers tell where a token stands.
        most: columns of the longest piece.
    """

    def __init__(self, axes: int, most: int):
        self.axes = axes
        self.back = torch.zeros(axes, most, dtype=torch.long)

    def taken(self, embeddings: Sequence[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
        """The embeddings (T, D + 2·A) of parts of pictures without their distances, which go to the columns
        (S,) that are True, in order."""
        parts = [split(embedding, self.axes) for embedding in embeddings]
        back = torch.cat([back for _, back in parts])
        where = columns.nonzero()[:, 0].to(self.back.device)
        self.back[:, where] = back.T.to(self.back.device)
        return [tokens for tokens, _ in parts]

    def applied(self, positions: torch.Tensor) -> torch.Tensor:
        """``positions`` (A or AXES, S), or (S,) of one axis, with places instead of marks."""
        back = self.back[:, : positions.shape[-1]]
        return torch.where(positions < 0, mark(positions) - back.view(-1, *positions.shape[1:]), positions)


class Placed:
    """In front of a model class of vLLM with a ``compression`` and its ``distances``, which are split off the
    pictures' embeddings before these go to their columns."""

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        if multimodal_embeddings and self.compression.compresses:
            multimodal_embeddings = self.distances.taken(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
