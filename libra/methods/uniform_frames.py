"""A control: whole frames at even distances, as a video model that samples fewer frames would see them.

As many frames as T tokens fill are taken from the middles of even parts of the video. What the last of them
is short of its tokens is thinned out evenly. A picture counts as one frame.
"""

from .registry import Method, register_select

METHOD = Method(
    "uniform-frames",
    description="whole frames at even distances; the rest of a video is dropped (a control)",
    section="not in the paper",
    keys={"select": "uniform-frames", "merge": "drop"},
    places=(),
    place="input",
    cost="nothing",
    family="control",
)


@register_select("uniform-frames", reads=(), needs=("grid",), trusted=True, films=True)
def uniform_frames(candidates, c):
    """All tokens of the frames that are taken, up to T."""
    layout, rows = candidates.layout, []
    for keeps, sizes_of_row in zip(layout.keeps, candidates.frames):
        row = [one for k, sizes in zip(keeps, sizes_of_row) for one in chosen(sizes, k)]
        rows.append(row)
    return layout.valid & candidates.per_token(rows, False).bool()


def chosen(sizes: list[int], k: int) -> list[bool]:
    """Which of the tokens of frames of these sizes stay, exactly ``k``."""
    for count in range(1, len(sizes) + 1):
        taken = [(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)]
        if sum(sizes[frame] for frame in taken) >= k:
            break
    left, found = k, []
    quota = dict.fromkeys(range(len(sizes)), 0)
    for frame in taken:
        quota[frame] = min(left, sizes[frame])
        left -= quota[frame]
    for frame, size in enumerate(sizes):
        own = quota[frame]
        found += [(i + 1) * own // size > i * own // size for i in range(size)]
    return found
