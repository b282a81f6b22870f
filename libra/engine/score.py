"""Hybrid attention (§4.4): everybody attends as before, and at a compression layer one score row is computed
next to it.

transformers hands every attention function the finished queries and keys. A :class:`Probe` reaches it in one
of two ways: as a keyword argument ``score_probe`` that a decoder layer of llava passes down, or, in a model
with hooks, by :func:`ask`, which only the attention modules of one layer answer. Without a probe the wrappers
do nothing.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps

import torch

from ..ops.reference import PIECE, score_row
from ..utils.ranges import profiled
from .transformers_api import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)

HYBRID_EAGER = "hybrid_eager"
MARK = "libra_mark"  # attribute of the attention modules that can be asked; its value names their layer


class Answered(Exception):
    """Leaves an attention module that was only asked for its queries and keys."""


class Probe:
    """What one compression layer is asked: the attention (B, R, K) of the tokens ``rows`` (B, R), or of a
    range of them that goes for all rows of the batch, on all K keys.

    A fresh object for every layer and pass: gradient checkpointing runs a layer again when later stages are
    already shorter. With ``only`` the attention module is left as soon as the probe is answered;
    ``past_keys`` (B, H_kv, P, head_dim) then come before the keys of this call. No dataclass: FSDP copies
    those on their way into a layer, and the copy would get the answer. With ``by_mask`` the layer's own
    attention mask says which keys a token sees, instead of ``key_mask`` and the layer's window.
    ``over_heads`` makes (B, R, K) of the attention of each head (B, H, R, K); None for their mean. With
    ``wants_keys`` it also hears ``keys`` (B, K, H_kv · head_dim), those of all heads side by side, unless it
    knows them already.
    """

    def __init__(self, rows: torch.Tensor | range, key_mask: torch.Tensor | None):
        self.rows, self.key_mask = rows, key_mask
        self.attention: torch.Tensor | None = None
        self.only = self.by_mask = False
        self.past_keys: torch.Tensor | None = None
        self.over_heads: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.wants_keys = False
        self.keys: torch.Tensor | None = None

    @torch.no_grad()
    def read(self, query, key, attention_mask, options: dict) -> None:
        """Answer from an attention call: query (B, H, S, D), key (B, H_kv, K, D), its mask and its keyword
        arguments."""
        with profiled("libra.score"):
            if self.past_keys is not None:
                # Which the layer, asked without its cache, made for its own keys only.
                if options.get("position_bias") is not None:
                    raise ValueError(
                        "score_layer: next cannot score a later turn on the same cache where attention has a"
                        " bias by distance, as this model's has; choose score_layer: same, or start with an"
                        " empty cache"
                    )
                key = torch.cat([self.past_keys, key], 2)
            if self.wants_keys and self.keys is None:
                self.keys = key.transpose(1, 2).flatten(2)
            given = query, key, attention_mask, options
            if self.over_heads is None:
                parts = [self._mean_of_heads(rows, *given) for rows in self._pieces(query, key)]
                self.attention = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            else:  # which compares the heads by all their rows
                self.attention = self.over_heads(self._of_heads(self.rows, *given))
        if self.only:
            raise Answered

    def _pieces(self, query, key) -> list[torch.Tensor | range]:
        """The rows, in pieces whose scores of all heads are at most PIECE: a method that asks all text after
        a picture would hold (B, H, R, K) at a time."""
        rows = self.rows
        count = len(rows) if isinstance(rows, range) else rows.shape[1]
        step = max(1, PIECE // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
        if count <= step:
            return [rows]
        parts = (slice(start, start + step) for start in range(0, count, step))
        return [rows[part] if isinstance(rows, range) else rows[:, part] for part in parts]

    def _mean_of_heads(self, rows, query, key, attention_mask, options: dict) -> torch.Tensor:
        """(B, R, K) of the query columns ``rows``."""
        strange = options.get("softcap") is not None or options.get("position_bias") is not None
        if strange or self._reads(attention_mask):
            return self._of_heads(rows, query, key, attention_mask, options).mean(1)
        window = options.get("sliding_window")
        return score_row(query, key, rows, _scaling(query, options), self.key_mask, window)

    def _of_heads(self, rows, query, key, attention_mask, options: dict) -> torch.Tensor:
        """(B, H, R, K) of the query columns ``rows``."""
        keys, ahead = key.shape[2], key.shape[2] - query.shape[2]
        if isinstance(rows, range):
            rows = torch.arange(rows.start, rows.stop, device=key.device).expand(len(query), -1)
        if self._reads(attention_mask):
            seen = visible(attention_mask, rows, len(query), keys)
        else:
            seen = causally_visible(rows + ahead, keys, self.key_mask, options.get("sliding_window"))
        cap, bias = options.get("softcap"), options.get("position_bias")
        return masked_rows(query, key, rows, _scaling(query, options), seen, cap, bias)

    def _reads(self, attention_mask) -> bool:
        """True where the layer's own mask says which keys a token sees."""
        return self.by_mask and attention_mask is not None and not _is_padding(attention_mask)


def _scaling(query: torch.Tensor, options: dict) -> float:
    """The factor on the scores."""
    return options.get("scaling") or query.shape[-1] ** -0.5


def _is_padding(mask) -> bool:
    """True for the (B, K) mask of flash attention, which tells of padding only."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def visible(mask, rows: torch.Tensor, batch: int, keys: int) -> torch.Tensor:
    """(B, H or 1, R, K) bool: which keys the chosen queries ``rows`` (B, R) see by an attention mask.

    ``mask``: (B or 1, H or 1, S, K) bool, or 0 and a large negative number; or flex attention's block mask.
    """
    if isinstance(mask, torch.Tensor):
        seen = mask if mask.dtype == torch.bool else mask == 0
        seen = seen[..., -keys:].expand(batch, -1, -1, -1)
        return seen.gather(2, rows[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3]))
    row = torch.arange(batch, device=rows.device)[:, None, None]
    place = torch.arange(keys, device=rows.device)
    return mask.mask_mod(row, torch.zeros_like(row), rows[:, :, None], place)[:, None]


def causally_visible(at: torch.Tensor, keys: int, key_mask, window: int | None) -> torch.Tensor:
    """(B, 1, R, K) bool: the keys up to those at ``at`` (B, R), at most ``window`` back, that are valid."""
    place = torch.arange(keys, device=at.device)
    seen = place <= at[:, :, None]
    if window is not None:
        seen = seen & (place > at[:, :, None] - window)
    if key_mask is not None:
        seen = seen & key_mask.bool()[:, None, -keys:]
    return seen[:, None]


def masked_rows(query, key, rows, scaling: float, seen, cap: float | None, bias) -> torch.Tensor:
    """(B, H, R, K) float32: :func:`~libra.ops.reference.score_row` head by head, also for attention that is
    not just causal.

    ``seen`` (B, H or 1, R, K) bool; ``cap``: the scores are squeezed between -cap and cap; ``bias`` (B or 1,
    H, S, K) is added to them.
    """
    batch, heads, _, width = query.shape
    chosen = rows[:, None, :, None]
    picked = query.gather(2, chosen.expand(-1, heads, -1, width)).float() * scaling
    grouped = picked.reshape(batch, key.shape[1], -1, width)
    scores = (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows.shape[1], key.shape[2])
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if bias is not None:
        bias = bias.expand(batch, *bias.shape[1:]).float()
        scores = scores + bias.gather(2, chosen.expand(-1, bias.shape[1], -1, bias.shape[3]))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


class Mark:
    """Names a layer on its attention modules: one object for each layer of an attached model."""

    def read(self, query, key, attention_mask, options: dict) -> None:
        """An attention of this layer runs: answer, if this layer is the one that is asked."""
        asked = _ASKED.get()
        if asked is not None and asked[0] is self and asked[1].attention is None:
            asked[1].read(query, key, attention_mask, options)


_ASKED: ContextVar[tuple[Mark, Probe] | None] = ContextVar("libra_asked", default=None)


def ask(mark: Mark, probe: Probe) -> None:
    """The first attention of the layer ``mark`` that runs next in this thread answers ``probe``."""
    _ASKED.set((mark, probe))


def asked() -> tuple[Mark, Probe] | None:
    """What is asked in this thread."""
    return _ASKED.get()


def forget(until: tuple[Mark, Probe] | None = None) -> None:
    """Nothing is asked any longer in this thread, or again what was asked before an inner call."""
    _ASKED.set(until)


@torch.compiler.disable
def _answer(mark: Mark, query, key, attention_mask, options: dict) -> None:
    mark.read(query, key, attention_mask, options)


def _with_probe(attend: Callable) -> Callable:
    @wraps(attend)
    def hybrid(module, query, key, value, attention_mask, *args, score_probe: Probe | None = None, **kwargs):
        if score_probe is not None:
            score_probe.read(query, key, attention_mask, kwargs)
        else:
            # Not every attention module hands keyword arguments on, and a compiler cannot trace a context
            # variable: the modules that can be asked bear a mark, the others never look.
            mark = getattr(module, MARK, None)
            if mark is not None:
                _answer(mark, query, key, attention_mask, kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    hybrid.takes_probe = True
    return hybrid


def _eager(module, *args, **kwargs):
    """The eager attention of the module's own modelling file, which transformers keeps out of its
    registry."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def enable(config) -> None:
    """Make the attention implementation that ``config`` names able to answer probes; eager attention is
    renamed for it.

    Flash attention resolves its name again while it runs, so the built-in functions are wrapped under their
    own names.
    """
    name = config._attn_implementation
    if name == "eager":
        if HYBRID_EAGER not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(HYBRID_EAGER, _with_probe(_eager))
            AttentionMaskInterface.register(HYBRID_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        config._attn_implementation = HYBRID_EAGER
        return
    attend = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(attend, "takes_probe", False):
        AttentionInterface.register(name, _with_probe(attend))


def disable(config) -> None:
    """Give ``config`` back the name that :func:`enable` changed."""
    if config._attn_implementation == HYBRID_EAGER:
        config._attn_implementation = "eager"


def ask_layer(layer, hidden: torch.Tensor, given: dict, probe: Probe) -> None:
    """Answer ``probe``, which the layer's attention is to find, with a decoder layer that runs only up to
    that, whatever comes before it in the layer; no cache hears of it.

    ``hidden`` (B, S, D) goes into the layer; ``given``: its other arguments, by name.
    """
    probe.only = True
    try:
        with torch.no_grad():
            layer.forward(hidden, **given)
    except Answered:
        pass
