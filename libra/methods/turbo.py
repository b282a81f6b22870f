"""Turbo (ECCV 2024), moved into the decoder as the paper's tables have it.

A token's information degree is its redundancy (highest cosine similarity to another token) minus λ times its
relative importance; tokens of low degree stay (:func:`libra.select.information`), each of the rest is
averaged into its most similar target (:func:`libra.merge.average`). Turbo's own code works in the vision
tower.
"""

from .registry import Method

METHOD = Method(
    "turbo",
    description="the tokens of lowest information degree; each of the rest is averaged into its most"
    " similar target",
    section="§3.1, §4.1",
    keys={"select": "information", "merge": "average"},
    family="merging",
)
