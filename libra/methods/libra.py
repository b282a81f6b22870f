"""Libra-Merging (CVPR 2025), the method of this package.

Targets (§3.2, :func:`libra.select.intervals`): a span is cut into N_t even intervals, and the most important
token of each is a target. The rest (§3.3, :func:`libra.merge.igm`): a token whose highest cosine similarity
to a target exceeds τ = 0.7 merges into that target, weighted by the softmax of importance within the group;
the others form one compensation token. Compressing after the quarter points of the depth is §3.4.
"""

from .registry import QUARTERS, Method

METHOD = Method(
    "libra",
    description="the most important token of each interval; similar tokens merge by importance, the"
    " others form one token",
    section="§3.2–3.4",
    keys={"select": "intervals", "merge": "igm"},
    places=QUARTERS,
    family="intervals and merging",
)
