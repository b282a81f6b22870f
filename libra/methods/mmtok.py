"""MMTok (Multimodal Coverage Maximization for Efficient Inference of VLMs, ICLR 2026): tokens that cover the
question and the picture.

Each token of the question spreads a weight over the visual tokens, the softmax of its cosines with their
embeddings over 0.01; each visual token does the same with all visual tokens, by the tower's features over
0.2. Weights are divided by the number of tokens on their side, the picture's count half. A set covers the
sum, over all these rows, of the largest weight that one of its tokens has; tokens are picked greedily by what
they add.
"""

from typing import TYPE_CHECKING

from .. import ops
from .registry import Method, register_select

if TYPE_CHECKING:
    import torch

SHARP, SMOOTH = 0.01, 0.2  # temperatures of the question's and of the picture's softmax
ALPHA = 0.5  # weight of the picture's part

METHOD = Method(
    "mmtok",
    description="the tokens that together cover the question and the rest of the picture best (greedy)",
    section="MMTok, ICLR 2026, arXiv 2508.18264",
    keys={"select": "mmtok", "merge": "drop"},
    places=(),
    place="input",
    cost="one N × N similarity a span, then T steps over N × N of them: the most expensive choice here",
    deviation="the question's tokens are the language model's own embeddings of the text after the picture",
    family="diversity",
)


@register_select("mmtok", reads=("hidden",), needs=("text", "tower_hidden"), trusted=True)
def mmtok(candidates, c):
    """Greedy coverage, see :func:`libra.ops.choices.cover_most`."""
    hidden = candidates.hidden.detach().float()
    texts = [text.to(hidden) for text in candidates.context.text]
    most = max(len(text) for text in texts)
    cosines = hidden.new_zeros(*hidden.shape[:2], most)
    share = hidden.new_zeros(*hidden.shape[:2], most)  # of each token of the question; 0 in the padding
    for row, text in enumerate(texts):
        cosines[row, :, : len(text)] = ops.cosines(hidden[row][None], text[None])[0]
        share[row, :, : len(text)] = 1 / max(1, len(text))

    def of_spans(k, similarity, weight, features):
        return ops.cover_most(ops.cat([question_rows(similarity, weight), picture_rows(features)], 1), k)

    return candidates.choose(of_spans, cosines, share, candidates.context.tower_hidden)


def question_rows(cosines: "torch.Tensor", share: "torch.Tensor") -> "torch.Tensor":
    """(S, M, n) from the cosines of n visual tokens with M of the question (S, n, M), and its weights."""
    return ((cosines / SHARP).softmax(1) * share).transpose(1, 2)


def picture_rows(features: "torch.Tensor") -> "torch.Tensor":
    """(S, n, n) from features (S, n, C)."""
    return (ops.similarities(features) / SMOOTH).softmax(2) * (ALPHA / features.shape[1])
