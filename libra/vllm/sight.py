"""What a vision tower of vLLM says of its pictures, heard at its attention, for the methods that ask.

:class:`libra.engine.tower.Listener` is told the same as in a model of transformers: queries and keys after
the rotary embedding. Needs no vLLM: attention modules are recognised by what they have.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ..engine.tower import Listener, Look, Wants


class Sight:
    """Hooks on the attention of the tower's layers that a method looks at.

    Args:
        attentions: the module of each layer that is given queries, keys and values, with ``num_heads``,
            ``head_size`` and ``scale``; the last one belongs to the layer whose features are used.
        depth: layers of the whole tower, of which vLLM may leave out the last ones.
    """

    def __init__(self, wants: Wants, attentions: Sequence[torch.nn.Module], depth: int, has_cls: bool):
        self.new = partial(Listener.of, wants, has_cls, len(attentions) - 1, depth)
        self.listener: Listener | None = None
        for layer in self.new().layers:
            attentions[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int):
        def hear(module, args, kwargs):
            if self.listener is None:
                return
            query, key = (
                args[place] if len(args) > place else kwargs[name]
                for place, name in enumerate(("query", "key"))
            )
            borders = kwargs.get("cu_seqlens")
            if borders is not None and int(borders[-1]) != query.shape[1]:
                raise ValueError(
                    "this attention of the vision tower hides where pictures begin; start vLLM with"
                    " --mm-encoder-attn-backend TORCH_SDPA or FLASH_ATTN"
                )
            options = {"scaling": module.scale, "cu_seq_lens_q": borders}
            self.listener.hear(layer, *(_heads(module, x) for x in (query, key)), None, options)

        return hear


@contextmanager
def listening(sight: Sight | None):
    """Within it, one run of the tower; gives who hears it, or None where no method asks."""
    if sight is None:
        yield None
        return
    sight.listener = listener = sight.new()
    try:
        yield listener
    finally:
        sight.listener = None


def _heads(module, x: torch.Tensor) -> torch.Tensor:
    """(I, P, H·D) or (I, P, H, D) as (I, H, P, D)."""
    return x.reshape(*x.shape[:2], module.num_heads, module.head_size).transpose(1, 2)


def pictures(listener: Listener, hidden: torch.Tensor, grid: tuple[int, ...]) -> list[Look]:
    """Of a tower with one input a picture: what it said of each of I.

    hidden: (I, P, C) its features, with those of the [CLS] token first where there is one; grid: (h, w) of
    the patches.
    """
    return listener.view(hidden).looks([1] * len(hidden), lambda _, patches: patches[0], lambda *_: (grid,))


def windows(
    listener: Listener, hidden: torch.Tensor, grids: Sequence[tuple[int, ...]], order: torch.Tensor
) -> list[Look]:
    """Of a tower with one sequence for all pictures, where neighbouring patches are one token.

    Args:
        hidden: (P, C) of all patches; grids: (t, h, w) of each picture's tokens; order: (N,) for each of the
            tokens, picture after picture, its place in the tower's own order.
    """
    counts = [t * h * w for t, h, w in grids]

    def arranged(number: int, patches: torch.Tensor) -> torch.Tensor:
        """(1, P, W) of all to (n, W) of one picture, the mean of the patches of each token."""
        return patches[0].unflatten(0, (len(order), -1)).mean(1)[order.split(counts)[number]]

    view = listener.view(hidden[None]).expand(len(grids))
    return view.looks([1] * len(grids), arranged, lambda number, _: (grids[number],))
