"""What a method may look at besides the hidden states and the attention of the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


LAYERED = ("tower_cls", "tower_received")  # these may have a layer of the tower as their first axis
PER_TOKEN = (
    *LAYERED, "tower_keys", "tower_hidden", "tower_next", "tower_next_keys", "relevance", "outside",
    "layer_keys", "final_hidden",
)  # fmt: skip
PER_ROW = ("text", "grid", "text_keys", "final_text")


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
    tower_next, tower_next_keys: (B, N) and (B, N, C): the attention of the [CLS] token (without one, that
        received) and the keys of the layer that reads these hidden states, its heads taken as one; of the
        last layer where they are its output.
    cls_first: the first token of every span is the [CLS] token's own feature.
    relevance: (B, N): the mean cosine of CLIP's embedding of a token with those of the question's segments.
    text: for each row (P_i, D): embeddings of the text segments of its question.
    grid: for each row the (h, w) or (t, h, w) of each of its spans, whose product is the span's length; for a
        span of several parts (tiles) a tuple of theirs.
    outside: (B, N) bool, tokens that no patch of the picture made, such as the newlines of LLaVA-NeXT; the
        tower says nothing about them, and its merges leave them out.
    layer_keys: (B, N, C): the keys of the decoder layer after which is compressed, all heads side by side;
        text_keys: for each row (P_i, C), those of the text after the picture.
    final_hidden: (B, N, D): hidden states after that layer and the decoder's final norm; final_text: for each
        row (P_i, D), those of the text after the picture.
    """

    tower_cls: "torch.Tensor | None" = None
    tower_received: "torch.Tensor | None" = None
    tower_keys: "torch.Tensor | None" = None
    tower_hidden: "torch.Tensor | None" = None
    tower_next: "torch.Tensor | None" = None
    tower_next_keys: "torch.Tensor | None" = None
    cls_first: bool = False
    relevance: "torch.Tensor | None" = None
    text: "Sequence[torch.Tensor] | None" = None
    grid: "Sequence[Sequence[tuple[int, ...] | tuple[tuple[int, ...], ...]]] | None" = None
    outside: "torch.Tensor | None" = None
    layer_keys: "torch.Tensor | None" = None
    text_keys: "Sequence[torch.Tensor] | None" = None
    final_hidden: "torch.Tensor | None" = None
    final_text: "Sequence[torch.Tensor] | None" = None

    def _changed(self, change: Callable[[str, "torch.Tensor", int, int], "torch.Tensor"]) -> "Context":
        """With ``change(name, tensor, rows' axis, tokens' axis)`` of every field that has one number or more
        a token."""
        changed: dict[str, Any] = {}
        for name in PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                row = 1 if name in LAYERED and value.ndim == 3 else 0
                changed[name] = change(name, value, row, row + 1)
        return replace(self, **changed) if changed else self

    def _rows_of(self, name: str) -> int | None:
        """The rows of a field, None where it is not given."""
        value = getattr(self, name)
        if value is None:
            return None
        return len(value[0]) if name in LAYERED and value.ndim == 3 else len(value)

    @property
    def rows(self) -> int:
        """B, as the fields have it; 0 where none does."""
        given = map(self._rows_of, (*PER_TOKEN, "grid"))
        return next((rows for rows in given if rows is not None), 0)

    def check_rows(self, rows: int) -> None:
        """Raises ValueError where a field has not so many rows."""
        for name in (*PER_TOKEN, *PER_ROW):
            given = self._rows_of(name)
            if given not in (None, rows):
                raise ValueError(f"context.{name} has {given} rows, and there are {rows}; give one for each")

    def repeated(self, times: int) -> "Context":
        """Each row so many times, one after another, as beams and returned sequences repeat them."""
        again = self._changed(lambda name, value, row, _: value.repeat_interleave(times, row))
        given = {name: getattr(self, name) for name in PER_ROW if getattr(self, name) is not None}
        lists: dict[str, Any] = {
            name: [row for row in rows for _ in range(times)] for name, rows in given.items()
        }
        return replace(again, **lists)

    def at(self, tokens: "torch.Tensor") -> "Context":
        """What is known of only ``tokens`` (B, T); they are a grid no longer."""

        def gathered(name, value, row, axis):
            index = tokens if value.ndim == 2 else tokens[None] if row else tokens[:, :, None]
            shape = list(value.shape)
            shape[axis] = tokens.shape[1]
            return value.gather(axis, index.to(value.device).expand(shape))

        return replace(self._changed(gathered), grid=None, cls_first=False)

    def cut(self, tokens: int) -> "Context":
        """The same for the first ``tokens`` tokens of each row.

        Raises ValueError where a field does not have at least as many.
        """

        def cut(name, value, row, axis):
            if value.shape[axis] < tokens:
                raise ValueError(f"context.{name} has {value.shape[axis]} tokens a row; give all {tokens}")
            return value.narrow(axis, 0, tokens)

        return self._changed(cut)

    def missing(self, needs: Sequence[str]) -> str:
        """The first of ``needs`` that is not given, or an empty string; "a|b" asks for one of the two."""
        lacking = (need for need in needs if all(getattr(self, name) is None for name in need.split("|")))
        return next(lacking, "")
