"""VidCom2 (Video Compression Commander, EMNLP 2025): more tokens for frames that stand out, in each frame the
ones that stand out.

Tokens are compared by the half of their channels that varies least, at length 1. A token's score is the sum
of exp(-d²/2a), a = 1/8 … 2, of its distance d to the mean over the video, and the same to the mean over its
frame; high scores are redundant. Frames share the budget by the softmax over -mean score / 0.01; in each
frame the tokens of lowest score stay.
"""

from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
SHARP = 0.01  # temperature of the frames' shares

METHOD = Method(
    "vidcom2",
    description="the tokens of a video that differ most from their frame and from the video, more of them"
    " from frames that differ",
    section="VidCom2, EMNLP 2025",
    keys={"select": "vidcom2", "merge": "drop"},
    places=(),
    place="input",
    cost="two distances a token, and three sorts of N scores",
    deviation="the released code rounds each frame's budget and misses the total by some; as in vLLM's port"
    " ours then drops the most redundant of the kept or adds the least redundant of the others, to exactly T",
    family="frames",
)


@register_select("vidcom2", reads=("hidden",), needs=("grid",), trusted=True, films=True)
def vidcom2(candidates, c):
    """The budgets of the frames, then exactly T by score."""
    rows = []
    for sizes in candidates.frames:
        rows.append([number for span in sizes for number, size in enumerate(span) for _ in range(size)])
    frame = candidates.per_token(rows, 0)
    count = 1 + max((max(row) for row in rows if row), default=0)

    def of_spans(k, x, frame):
        video, own = scores(x, frame, count)
        share = 1 - c.ratio if isinstance(c.ratio, float) else k / x.shape[1]
        kept = ops.rank_within(-(video + own), frame, count) < budgets(video, frame, count, share)
        return ops.preferred((video + own).argsort(dim=1, stable=True), kept, k)

    return candidates.choose(of_spans, candidates.hidden.detach(), frame)


def scores(x: "torch.Tensor", frame: "torch.Tensor", count: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(S, n) each: how redundant the tokens (S, n, D) are in the video and in their frame (S, n)."""
    x = x.float()
    calm = x.var(dim=1, correction=0).argsort(dim=1, stable=True)[:, : max(1, x.shape[2] // 2)]
    x = x.gather(2, calm[:, None].expand(-1, x.shape[1], -1))
    x = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
    centres = ops.group_mean(x, frame, count).gather(1, frame[:, :, None].expand_as(x))
    return _near(x, x.mean(1, keepdim=True)), _near(x, centres)


def _near(x, centre):
    squared = ((x - centre) ** 2).sum(2)
    return sum((-squared / (2 * width)).exp() for width in WIDTHS)


def budgets(video: "torch.Tensor", frame: "torch.Tensor", count: int, share: float) -> "torch.Tensor":
    """(S, n): the tokens that each one's frame may keep of its own."""
    size = ops.group_mean(video, frame, count).new_zeros(len(frame), count)
    size = size.scatter_add(1, frame, video.new_ones(frame.shape))
    there = size > 0
    logits = (-ops.group_mean(video, frame, count) / SHARP).masked_fill(~there, float("-inf"))
    stands_out = logits.softmax(1)
    mean = 1 / there.sum(1, keepdim=True)
    scale = (share * (1 + stands_out - mean)).clamp(max=1)
    return (scale * size).round().clamp(min=1).gather(1, frame)
