"""DivPrune (Diversity-based Visual Token Pruning, CVPR 2025): the tokens that are farthest from one another.

Distance is 1 - cosine of the embeddings that enter the language model. The first pick is the token whose
nearest other token is farthest, each next one the token whose nearest picked token is farthest. Nothing is
merged, and neither the question nor any attention is read. Distances are float32: in half precision the
original code keeps only 61 of its own 64 tokens.
"""

from .. import ops
from .registry import Method, register_select

METHOD = Method(
    "divprune",
    description="the tokens that are farthest from one another (max-min diversity); the rest is dropped",
    section="DivPrune, CVPR 2025",
    keys={"select": "divprune", "merge": "drop"},
    places=(),
    place="input",
    cost="one N × N similarity a span, then T steps over N distances",
    family="diversity",
)


@register_select("divprune", reads=("hidden",), trusted=True)
def divprune(candidates, c):
    """Max-min diversity of the hidden states, see :func:`libra.ops.greedy.farthest_first`."""
    return candidates.choose(lambda k, x: ops.farthest_first(x, k), candidates.hidden.detach())
