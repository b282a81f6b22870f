"""What a method may look at besides the hidden states and the attention of the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """What the vision tower, the question and the picture say about a batch of B rows of N visual tokens.

    Everything is optional; a method names the fields that it needs. Rows are padded on the right like the
    hidden states; what stands in the padding is not looked at.

    tower_cls: (B, N), or (L, B, N) for L layers of the tower: the attention that its [CLS] token pays to each
        token, averaged over the heads, the one that the method reads last.
    tower_received: (B, N), or (L, B, N): the attention that each token receives, averaged over heads and
        queries.
    tower_keys: (B, N, C): attention keys of the tower, averaged over the heads.
    tower_hidden: (B, N, C): hidden states of the tower, before the projector.
    tower_cls_hidden: (B, C'): the [CLS] token itself, as wide as the hidden states that are compressed.
    relevance: (B, N): how relevant a token is for the question, larger for more.
    text: for each row (P_i, D): embeddings of the text segments of its question.
    grid: for each row the (h, w) or (t, h, w) of each of its spans, whose product is the span's length.
    frames: for each row and span the number of video frames.
    layer_keys: (B, N, C): keys of a decoder layer, averaged over the heads.
    """

    tower_cls: "torch.Tensor | None" = None
    tower_received: "torch.Tensor | None" = None
    tower_keys: "torch.Tensor | None" = None
    tower_hidden: "torch.Tensor | None" = None
    tower_cls_hidden: "torch.Tensor | None" = None
    relevance: "torch.Tensor | None" = None
    text: "Sequence[torch.Tensor] | None" = None
    grid: Sequence[Sequence[tuple[int, ...]]] | None = None
    frames: Sequence[Sequence[int]] | None = None
    layer_keys: "torch.Tensor | None" = None
