"""Libra-Merging scored by all text tokens after the image: this package's own variant, in no paper.

Intervals (§3.2), importance-informed merging (§3.3) and the quarter points (§3.4) as in
:mod:`libra.methods.libra`, but the importance α is the mean attention row of the text tokens that follow the
image, up to the last one of the prompt, where the paper takes that last token's row only (eq. 4).
"""

from .registry import QUARTERS, Method

METHOD = Method(
    "libra-mean",
    description="Libra-Merging scored by all text tokens after the image, not by the last one only (ours)",
    section="not in the paper (ours)",
    keys={"select": "intervals", "merge": "igm", "importance": "mean"},
    places=QUARTERS,
    cost="as many attention rows as there are text tokens after the image, instead of one",
    deviation="importance is the mean over the text after the image; the paper's is the last token's",
    family="intervals and merging",
)
