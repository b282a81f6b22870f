"""FasterVLM (arXiv 2412.01818, whose later versions are VisPruner): what the tower's [CLS] token attends to.

The score is the [CLS] row of the tower's second last layer, averaged over the heads; the T highest stay in
their order, the rest is dropped. The projector has run on all tokens before.
"""

from .registry import Method

METHOD = Method(
    "fastervlm",
    description="the tokens with the most attention of the vision tower's [CLS] token; the rest is dropped",
    section="FasterVLM, arXiv 2412.01818",
    keys={"select": "topk", "merge": "drop", "importance": "tower"},
    places=(),
    place="input",
    cost="a sort of N scores",
    deviation="where a tower has no [CLS] token, the attention that a token receives stands for its row",
    family="attention",
)
