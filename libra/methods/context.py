"""What a method may look at besides the hidden states and the attention of the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    cls_first: the first token of every span is the [CLS] token's own feature.
    relevance: (B, N): the mean cosine of CLIP's embedding of a token with those of the question's segments.
    text: for each row (P_i, D): embeddings of the text segments of its question.
    grid: for each row the (h, w) or (t, h, w) of each of its spans, whose product is the span's length.
    """

    tower_cls: "torch.Tensor | None" = None
    tower_received: "torch.Tensor | None" = None
    tower_keys: "torch.Tensor | None" = None
    tower_hidden: "torch.Tensor | None" = None
    cls_first: bool = False
    relevance: "torch.Tensor | None" = None
    text: "Sequence[torch.Tensor] | None" = None
    grid: Sequence[Sequence[tuple[int, ...]]] | None = None

    def cut(self, tokens: int) -> "Context":
        """The same for the first ``tokens`` tokens of each row.

        Raises ValueError where a field does not have at least as many.
        """
        changed = {}
        for name, first in (
            ("tower_cls", -1),
            ("tower_received", -1),
            ("tower_keys", 1),
            ("tower_hidden", 1),
            ("relevance", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                axis = value.ndim - 1 if first == -1 else first
                if value.shape[axis] < tokens:
                    raise ValueError(
                        f"context.{name} has {value.shape[axis]} tokens a row; give all {tokens}"
                    )
                changed[name] = value.narrow(axis, 0, tokens)
        return replace(self, **changed)

    def missing(self, needs: Sequence[str]) -> str:
        """The first of ``needs`` that is not given, or an empty string; "a|b" asks for one of the two."""
        lacking = (need for need in needs if all(getattr(self, name) is None for name in need.split("|")))
        return next(lacking, "")
