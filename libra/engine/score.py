"""Hybrid attention (§4.4): everybody attends as before, and at a compression layer one score row is computed
beside it.

transformers hands every attention function the finished queries and keys, and passes unknown keyword
arguments through a
decoder layer down to it. A :class:`Probe` travels that way to the compression layers; without one the
wrappers do nothing.
"""

import sys
from collections.abc import Callable
from functools import wraps

import torch
from torch.profiler import record_function

from ..ops.reference import score_row
from .transformers_api import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)

HYBRID_EAGER = "hybrid_eager"


class Answered(Exception):
    """Leaves an attention module that was only asked for its queries and keys."""


class Probe:
    """What one compression layer is asked: the attention (B, R, K) of the tokens ``rows`` (B, R) on all K
    keys.

    A fresh object for every layer and pass: gradient checkpointing runs a layer again when later stages are
    already shorter. With ``only`` the attention module is left as soon as the probe is answered;
    ``past_keys`` (B, H_kv, P, head_dim) then come
    before the keys of this call. No dataclass: FSDP copies those on their way into a layer, and the copy
    would get the answer.
    """

    def __init__(self, rows: torch.Tensor, key_mask: torch.Tensor | None):
        self.rows, self.key_mask = rows, key_mask
        self.attention: torch.Tensor | None = None
        self.only = False
        self.past_keys: torch.Tensor | None = None

    @torch.no_grad()
    def read(self, query, key, scaling, sliding_window=None) -> None:
        with record_function("libra.score"):
            if self.past_keys is not None:
                key = torch.cat([self.past_keys, key], 2)
            self.attention = score_row(query, key, self.rows, scaling, self.key_mask, sliding_window)
        if self.only:
            raise Answered


def _with_probe(attend: Callable) -> Callable:
    @wraps(attend)
    def hybrid(module, query, key, value, attention_mask, *args, score_probe: Probe | None = None, **kwargs):
        if score_probe is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            score_probe.read(query, key, scaling, kwargs.get("sliding_window"))
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


def next_layer_attention(
    layer, hidden: torch.Tensor, position_embeddings, probe: Probe, past_keys=None
) -> None:
    """Answer ``probe`` with the projections of the layer that comes next, as PyramidDrop scores.

    ``hidden`` (B, S, D) leaves the compression layer; ``position_embeddings`` are cosines and sines (B or 1,
    S, head_dim); ``past_keys`` (B, H_kv, P, head_dim) are the keys that the next layer already holds. The
    layer's own attention module makes queries and keys, whatever norms it has on them, and is left before it
    attends.
    """
    probe.only, probe.past_keys = True, past_keys
    try:
        with torch.no_grad():
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=position_embeddings,
                attention_mask=None,
                score_probe=probe,
            )
    except Answered:
        pass
