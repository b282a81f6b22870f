"""What a vision tower says about a picture's tokens, and the compression of its features before the
projector.

The tower runs as it is, with its own attention implementation; only the queries and keys of the layers that a
method looks at are computed once more, from the hidden states that went into them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..budget import keeps
from ..config import Compression, Step
from ..methods import SELECTORS, Context
from ..ops.reference import PIECE
from ..ops.spans import Spans
from ..places import TOWER
from ..step import compress_spans
from .tokens import TowerLeft, context_score

NOTHING = -1  # the group of a token that was dropped
RELEVANCE = "relevance|text"  # of a question: by CLIP where it is at hand, by text embeddings otherwise
OF_LAYERS = {"tower_cls", "tower_received", "tower_keys"}
OF_THE_READER = {"tower_next", "tower_next_keys"}


@dataclass(frozen=True)
class Wants:
    """What the methods of a compression ask of a tower: names of :class:`libra.Context`'s fields, and the
    depths of layers to look at besides the one whose features the model takes, as fractions."""

    fields: frozenset[str]
    earlier: tuple[Fraction, ...] = ()

    @classmethod
    def of(cls, c: Compression | None, has_cls: bool, clip: bool = False) -> "Wants | None":
        """Of a compression and a tower with or without a [CLS] token; None where nothing is asked.

        clip: the tower's features are compared with the question (:mod:`libra.engine.relevance`) where a
        method asks for it.

        Raises ValueError for a method that needs what the tower does not have.
        """
        if c is None or not c.compresses:
            return None
        fields, earlier = set(), set()
        for part in c.parts:
            for need in part.needs:
                names = [name for name in need.split("|") if has_cls or name != "tower_cls"]
                if not names:
                    raise ValueError(
                        f"{part.name} needs the attention of a [CLS] token, and this model's vision tower has"
                        " none; choose a method that goes by the attention received"
                    )
                fields.add(names[0])
            earlier |= {*SELECTORS[part.select].tower_layers}
            if part.at == TOWER or clip and RELEVANCE in part.needs:
                fields.add("tower_hidden")
        fields = {name for name in fields if name.startswith("tower_") or name == "grid"}
        shrinking = next((part for part in c.parts if SELECTORS[part.select].shrinks), None)
        if shrinking is not None and (earlier or fields - {"tower_hidden", "grid"}):
            raise ValueError(
                f"{shrinking.name} gives the vision tower a smaller picture, so no other step can read the"
                " tower; remove one of them"
            )
        return cls(frozenset(fields), tuple(sorted(earlier))) if fields else None

    def layers(self, used: int, depth: int) -> list[int]:
        """The numbers of the layers whose attention is looked at, of ``depth``; ``used`` is the one whose
        output the model takes, and comes last."""
        return [max(0, round(share * depth) - 1) for share in self.earlier] + [used]

    def reader(self, used: int, depth: int) -> int | None:
        """The number of the layer that reads these features, where a method looks at it; the last one reads
        what goes into it."""
        return min(used + 1, depth - 1) if self.fields & OF_THE_READER else None


@dataclass(frozen=True)
class View:
    """What a tower says about I pictures of P patches; None what nobody asked for.

    hidden: (I, P, C) the features; cls, received: (L, I, P) float32 scores of the layers looked at; keys:
    (I, P, K) mean over the heads; cls_hidden, cls_keys: (I, C) and (I, K) of the [CLS] token; next: (I, P)
    and next_keys: (I, P, C) of the layer that reads the features, with its heads as one.
    """

    hidden: torch.Tensor
    cls: torch.Tensor | None = None
    received: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    cls_hidden: torch.Tensor | None = None
    cls_keys: torch.Tensor | None = None
    next: torch.Tensor | None = None
    next_keys: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if value is not None)

    def expand(self, pictures: int) -> "View":
        """The same of each of so many, from what one sequence says of all of them; without a [CLS] token."""
        names = ("hidden", "received", "keys", "next", "next_keys")
        of_all = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        shapes = {"received": (-1, pictures, -1), "next": (pictures, -1)}
        return View(**{n: x.expand(shapes.get(n, (pictures, -1, -1))) for n, x in of_all.items()})

    def looks(self, counts: Sequence[int], arrange: Callable, grid: Callable | None) -> list["Look"]:
        """One :class:`Look` a picture: ``counts`` are the tower's inputs (tiles, frames) of each.

        arrange: takes the number of a picture and a tensor (n, P, W) of something about its patches, and
            returns (N, W) of its visual tokens; a token that no patch made gets zeros.
        grid: takes the number of a picture and its ``outside``, and returns the grids of its parts; None
            where nobody asks.
        """
        per_token = {
            "hidden": self.hidden,
            "keys": self.keys,
            "next": None if self.next is None else self.next[..., None],
            "next_keys": self.next_keys,
            "inside": torch.ones_like(self.hidden[..., :1]),
        }
        for name in ("cls", "received"):
            scores = getattr(self, name)
            per_token[name] = None if scores is None else scores.permute(1, 2, 0)
        first, found = 0, []
        for number, count in enumerate(counts):
            of = slice(first, first + count)
            own = {name: arrange(number, value[of]) for name, value in per_token.items() if value is not None}
            heads = {
                name: None if value is None else value[first]
                for name, value in (("cls_hidden", self.cls_hidden), ("cls_keys", self.cls_keys))
            }
            outside = own.pop("inside")[:, 0] == 0
            for name in own.keys() & {"cls", "received"}:
                own[name] = own[name].transpose(0, 1)
            if "next" in own:
                own["next"] = own["next"][:, 0]
            parts = None if grid is None else grid(number, outside)
            found.append(Look(outside=outside, grid=parts, **own, **heads))
            first += count
        return found


@dataclass(frozen=True)
class Look:
    """What a tower says about one picture of N visual tokens: :class:`View` with N in place of (I, P).

    outside: (N,) bool, tokens that no patch made. grid: the (h, w) of its parts, one after another.
    """

    hidden: torch.Tensor
    outside: torch.Tensor
    grid: tuple[tuple[int, ...], ...] | None = None
    cls: torch.Tensor | None = None
    received: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    cls_hidden: torch.Tensor | None = None
    cls_keys: torch.Tensor | None = None
    next: torch.Tensor | None = None
    next_keys: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def with_cls(self) -> "Look":
        """With the [CLS] token itself as the first one."""

        def first(value, row):
            return None if value is None else torch.cat([row.to(value.dtype), value])

        def zeros(scores):
            return None if scores is None else torch.nn.functional.pad(scores, (1, 0))

        return replace(
            self,
            hidden=first(self.hidden, self.cls_hidden[None]),
            keys=first(self.keys, None if self.keys is None else self.cls_keys[None]),
            outside=torch.nn.functional.pad(self.outside, (1, 0)),
            cls=zeros(self.cls),
            received=zeros(self.received),
            next=zeros(self.next),
            next_keys=None
            if self.next_keys is None
            else torch.nn.functional.pad(self.next_keys, (0, 0, 1, 0)),
        )


def scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    cls: bool,
    received: bool,
    piece: int = PIECE,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Attention of a tower's layer that a method reads, without ever building all of it.

    queries, keys: (I, H, P, D), where the first of P is the [CLS] token if there is ``cls``. mask: (I, 1, P,
    P) or (I, 1, 1, P), bool or added, of towers that leave patches out.

    Returns:
        the row of [CLS] (I, P), averaged over the heads, or None without ``cls``; and the attention received
        (I, P), averaged over heads and queries, or None unless asked for; both float32, over all P keys. A
        block of queries has at most ``piece`` numbers of attention (64 MB), or those of one query.
    """
    images, heads, count, _ = queries.shape
    turned = keys.float().transpose(2, 3)

    seen = None if mask is None or mask.ndim != 4 else mask if mask.dtype == torch.bool else mask == 0

    def attention(start, stop):
        logits = queries[:, :, start:stop].float() @ turned * scaling
        if seen is not None:
            rows = seen if seen.shape[2] == 1 else seen[:, :, start:stop]
            logits = logits.masked_fill(~rows, torch.finfo(logits.dtype).min)
        return logits.softmax(-1)

    row = attention(0, 1).mean(1)[:, 0] if cls else None
    if not received:
        return row, None
    total = turned.new_zeros(images, count)
    step = max(1, piece // (images * heads * count))
    for start in range(0, count, step):
        total += attention(start, start + step).sum((1, 2))
    return row, total / (heads * count)


@torch.no_grad()
def heads_of(attention: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys (I, H, P, D) of an attention module of CLIP's or SigLIP's kind, from its own input
    (I, P, C), and its scaling."""
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    queries, keys = (project(hidden).view(shape) for project in (attention.q_proj, attention.k_proj))
    return queries.transpose(1, 2), keys.transpose(1, 2), attention.scale


def one_head(
    queries: torch.Tensor, keys: torch.Tensor, has_cls: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer's queries and keys (I, H, P, D), with all heads taken as one: the row of [CLS], the first of
    P, or without one the attention received, (I, P), and the keys (I, P, H · D)."""
    queries, keys = (x.transpose(1, 2).flatten(2)[:, None] for x in (queries, keys))
    row, received = scores(queries, keys, keys.shape[-1] ** -0.5, has_cls, not has_cls, mask=mask)
    return (row if has_cls else received), keys[:, 0]


@dataclass
class Listener:
    """Collects the scores of one run of a tower: ``cls``, ``received`` and ``keys`` of each layer, in
    pieces; ``next`` and ``next_keys`` of the layer ``reader``, which reads the features.

    scored: the numbers of the layers whose scores are wanted, in the order of :meth:`Wants.layers`; None: all
        that are heard.
    """

    wants: Wants
    has_cls: bool
    used: int
    cls: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    received: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    reader: int | None = None
    next: list[torch.Tensor] = field(default_factory=list)
    next_keys: list[torch.Tensor] = field(default_factory=list)
    scored: Sequence[int] | None = None

    @classmethod
    def of(cls, wants: Wants, has_cls: bool, used: int, depth: int) -> "Listener":
        """To a tower of ``depth`` layers; ``used`` is the one whose output are the features."""
        scored = wants.layers(used, depth) if wants.fields & OF_LAYERS else []
        return cls(wants, has_cls, used, reader=wants.reader(used, depth), scored=scored)

    @property
    def layers(self) -> set[int]:
        """The numbers of the layers that it wants to hear."""
        return {*(self.scored or ()), *(() if self.reader is None else (self.reader,))}

    @torch.no_grad()
    def hear(self, layer: int, query, key, mask, options: dict) -> None:
        """Queries and keys (I, H, P, D) of an attention call, which may be one window of the picture only."""
        fields, scaling = self.wants.fields, options.get("scaling") or query.shape[-1] ** -0.5
        borders = options.get("cu_seq_lens_q")
        lengths = [query.shape[2]] if borders is None else borders.diff().tolist()
        scored = self.scored is None or layer in self.scored
        for q, k in zip(query.split(lengths, 2), key.split(lengths, 2)):
            row, received = scores(
                q,
                k,
                scaling,
                scored and self.has_cls and "tower_cls" in fields,
                scored and "tower_received" in fields,
                mask=mask,
            )
            for found, score in ((self.cls, row), (self.received, received)):
                if score is not None:
                    found.setdefault(layer, []).append(score)
            if layer == self.used and "tower_keys" in fields:
                self.keys.append(k.float().mean(1))
            if layer == self.reader:
                score, keys = one_head(q, k, self.has_cls, mask)
                self.next.append(score)
                self.next_keys.append(keys)

    def joined(self, found: dict[int, list[torch.Tensor]]) -> torch.Tensor | None:
        """(L, I, P), layer by layer; the one whose features are used comes last."""
        if not found:
            return None
        order = sorted(found) if self.scored is None else self.scored
        return torch.stack([torch.cat(found[layer], 1) for layer in order])

    def view(self, hidden: torch.Tensor) -> View:
        """All that was heard, with the features ``hidden`` (I, P [+ 1], C)."""
        first = int(self.has_cls)
        cls, received = (self.joined(found) for found in (self.cls, self.received))
        keys, following, following_keys = (
            torch.cat(found, 1) if found else None for found in (self.keys, self.next, self.next_keys)
        )

        def patches(found, axis=1):
            return None if found is None else found.narrow(axis, first, found.shape[axis] - first)

        return View(
            hidden[:, first:],
            cls=patches(cls, 2),
            received=patches(received, 2),
            keys=patches(keys),
            cls_hidden=hidden[:, 0] if first else None,
            cls_keys=keys[:, 0] if first and keys is not None else None,
            next=patches(following),
            next_keys=patches(following_keys),
        )


def look(
    layers: Sequence[torch.nn.Module], states: Sequence[torch.Tensor], used: int, wants: Wants, has_cls: bool
) -> View:
    """What a tower of CLIP's or SigLIP's kind says.

    layers: its encoder layers; states: its hidden states (I, P [+ 1], C), what goes into layer i at place i;
    used: the number of the layer whose output are the features; has_cls: whether the first token is [CLS].
    """
    listener = Listener.of(wants, has_cls, used, len(layers))
    for number in sorted(listener.layers):
        with torch.no_grad():
            normed = layers[number].layer_norm1(states[number])
        queries, keys, scaling = heads_of(layers[number].self_attn, normed)
        listener.hear(number, queries, keys, None, {"scaling": scaling})
    return listener.view(states[used + 1])


def context_of(rows: Sequence[Sequence[Look]], cls_first: bool = False) -> Context:
    """The context of B rows with these pictures, one after another."""

    def joined(name, layered=False):
        parts = [[getattr(one, name) for one in row] for row in rows]
        some = next((part for row in parts for part in row), None)
        if some is None:
            return None
        if layered:
            return torch.stack(
                [joined_rows([[part[i] for part in row] for row in parts]) for i in range(len(some))]
            )
        return joined_rows(parts)

    def joined_rows(parts):
        like = next(part for row in parts for part in row)
        whole = [torch.cat(row) if row else like[:0] for row in parts]
        return pad_sequence(whole, batch_first=True)

    grid = [[one.grid for one in row] for row in rows]
    return Context(
        tower_cls=joined("cls", layered=True),
        tower_received=joined("received", layered=True),
        tower_keys=joined("keys"),
        tower_hidden=joined("hidden"),
        tower_next=joined("next"),
        tower_next_keys=joined("next_keys"),
        outside=joined("outside"),
        cls_first=cls_first,
        grid=None if any(one.grid is None for row in rows for one in row) else grid,
    )


@dataclass(frozen=True)
class Left:
    """What a compression in the tower left of one picture of N visual tokens.

    tokens: (T, C) features for the projector; columns: (T,), where among the N they stand, ascending;
    outside: (T,) bool, those that no patch made. groups, weights, importance: (N,), as in :class:`TowerLeft`.
    """

    tokens: torch.Tensor
    columns: torch.Tensor
    outside: torch.Tensor
    groups: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor


def compress_pictures(step: Step, pictures: Sequence[Look]) -> list[Left | None]:
    """The step of a compression at the tower, on the features of each picture; None where all are kept."""
    part = step.part
    if part.adaptive:
        counts = [SELECTORS[part.select].own_count(one.next) for one in pictures]  # this waits for the device
    else:
        counts = [keeps([[len(one)]], part, step.left)[0][0] for one in pictures]
    shortened = [i for i, one in enumerate(pictures) if counts[i] < len(one)]
    found: list[Left | None] = [None] * len(pictures)
    if not shortened:
        return found
    takes_cls = SELECTORS[part.select].takes_cls and pictures[0].cls_hidden is not None
    chosen = [pictures[i].with_cls() if takes_cls else pictures[i] for i in shortened]
    context = context_of([[one] for one in chosen], cls_first=takes_cls)
    layout = Spans.build(
        [[len(one)] for one in chosen], [[counts[i]] for i in shortened], chosen[0].hidden.device
    )
    importance = context_score(part, context, context.tower_hidden)
    outcome = compress_spans(context.tower_hidden, importance, part, layout, context=context)
    for row, i in enumerate(shortened):
        found[i] = _left(outcome, row, chosen[row], counts[i], int(takes_cls))
    return found


def _left(outcome, row: int, one: Look, count: int, extra: int) -> Left:
    """``extra``: 1 where the first candidate was the [CLS] token, which has no column of its own: it takes
    the first one, and whoever stands there moves on."""
    targets = outcome.targets[row, :count]
    number = torch.arange(count, device=targets.device)
    columns = (targets - extra).maximum(number)
    tokens, outside = outcome.tokens[row, :count], one.outside[targets]
    groups = outcome.groups[row, : len(one)]
    if outcome.order is not None:
        order = outcome.order[row, :count]  # the place of each slot
        inverse = order.argsort()
        tokens, outside = tokens[inverse], outside[inverse]
        groups = torch.where(groups < 0, groups, order[groups.clamp(min=0)])
    groups = groups[extra:].clone()
    groups[columns] = number
    weights, importance = (x[row, extra : len(one)] for x in (outcome.token_weights, outcome.importance))
    return Left(tokens, columns, outside, groups, weights, importance)


def left_of_rows(rows: Sequence[Sequence[tuple[int, Left | None]]], device) -> TowerLeft:
    """Of B rows, for each of their pictures its N visual tokens and what was left of them."""
    names = ("kept", "groups", "weights", "importance")
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for row in rows:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        slots = 0
        for count, left in row:
            kept = torch.ones(count, dtype=torch.bool, device=device)
            groups = torch.arange(count, device=device)
            weights, importance = torch.ones(count, device=device), torch.zeros(count, device=device)
            if left is not None:
                kept = torch.zeros_like(kept).index_fill(0, left.columns, True)
                groups, weights, importance = left.groups, left.weights, left.importance
            parts["kept"].append(kept)
            parts["groups"].append(torch.where(groups < 0, NOTHING, groups + slots))
            parts["weights"].append(weights.float())
            parts["importance"].append(importance.float())
            slots += count if left is None else len(left.columns)
        for name, some in parts.items():
            dtype = {"kept": torch.bool, "groups": torch.long}.get(name, torch.float32)
            columns[name].append(torch.cat(some) if some else torch.zeros(0, dtype=dtype, device=device))
    padded: dict[str, Any] = {name: pad_sequence(some, batch_first=True) for name, some in columns.items()}
    return TowerLeft(**padded)


def grids_of(outside: torch.Tensor, tiles: int, side: int) -> tuple[tuple[int, int], ...]:
    """The grids of one image in tiles: the whole image, then its tiles' one map with a newline after each
    row.

    Args:
        outside: (N,) bool, the tokens that are newlines.
        tiles: how many pictures of ``side`` × ``side`` patches the tower saw.
    """
    rest = len(outside) - side * side
    newlines = outside.nonzero().flatten().tolist()
    if not newlines:  # tile after tile; in one map without newlines, neighbours in another tile are not seen
        return ((side, side),) * tiles
    width = newlines[0] - side * side + 1
    return (side, side), (rest // width, width)
