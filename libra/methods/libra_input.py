"""Libra-Merging before the language model: this package's own variant, in no paper.

Intervals (§3.2) and importance-informed merging (§3.3) as in :mod:`libra.methods.libra`, but once, on the
embeddings that enter the language model, and with the vision tower's scores as importance: the question has
no part in it.
"""

from .registry import Method

METHOD = Method(
    "libra-input",
    description="Libra-Merging before the language model, with the vision tower's attention as importance"
    " (ours)",
    section="not in the paper (ours)",
    keys={"select": "intervals", "merge": "igm", "importance": "tower"},
    places=(),
    place="input",
    cost="T × N similarities a span",
    deviation="importance is the vision tower's score and does not know the question; the paper's is the"
    " decoder's",
    family="intervals and merging",
)
