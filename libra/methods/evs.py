"""EVS (Efficient Video Sampling, arXiv 2510.14624, as vLLM has it): what changes from frame to frame.

A token's score is 1 - cosine with the token at the same place of the previous frame; all of the first frame
come before every other token. The T highest stay, in their order. A picture counts as the first frame.
"""

from .. import ops
from .registry import Method, register_select

FIRST = 255  # the score of the first frame's tokens

METHOD = Method(
    "evs",
    description="the tokens of a video that differ most from the same place of the frame before, and its"
    " whole first frame",
    section="EVS, arXiv 2510.14624",
    keys={"select": "evs", "merge": "drop"},
    places=(),
    place="input",
    cost="N similarities, and a sort of N scores",
    deviation="the released code keeps at least as many tokens as a frame has; ours keeps T, and where that"
    " is less the first frame is thinned out evenly",
    family="frames",
)


@register_select("evs", reads=("hidden",), needs=("grid",), trusted=True, films=True)
def evs(candidates, c):
    """The highest :func:`scores`, ties in order."""
    return candidates.top(scores(candidates))


def scores(candidates):
    """(B, N) float32: how much a token differs from the same place of the frame before."""
    hidden = candidates.hidden.detach().float()
    before, first = [], []
    for keeps, sizes_of_row in zip(candidates.layout.keeps, candidates.frames):
        start, row_before, row_first = 0, [], []
        for k, sizes in zip(keeps, sizes_of_row):
            row_first += _first_frame(sizes[0], k)
            row_before += [start] * sizes[0]
            for previous, size in zip(sizes, sizes[1:]):
                start += previous
                # A part of another size (a newline after the frames) has no place in the frame before.
                alike = size == previous
                row_before += range(start - previous, start) if alike else [0] * size
                row_first += [0 if alike else FIRST] * size
            start += sizes[-1]
        before.append(row_before)
        first.append(row_first)
    cosine = _cosine(hidden, ops.take(hidden, candidates.per_token(before, 0)))
    whole = candidates.per_token(first, 0).float()
    return whole.where(whole > 0, 1 - cosine)


def _cosine(x, y):
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / lengths.clamp(min=1e-8)


def _first_frame(size: int, k: int) -> list[int]:
    """Scores of the first frame: all alike, or where only ``k`` of it can stay, more for k even places."""
    found = [FIRST] * size
    for number in range(k if k < size else 0):
        found[(2 * number + 1) * size // (2 * k)] += 1
    return found
