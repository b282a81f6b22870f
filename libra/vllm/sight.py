"""What a vision tower of vLLM says of its pictures, heard at its attention, for the methods that ask.

:class:`libra.engine.pictures.Listener` is told the same as in a model of transformers: queries and keys after
the rotary embedding. Needs no vLLM: attention modules are recognised by what they have.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch

from ..engine.pictures import Listener
from ..engine.tower import Look, Wants


class Sight:
    """Hooks on the attention of the tower's layers that a method looks at.

    Args:
        attentions: the module of each layer that is given queries, keys and values, with ``num_heads``,
            ``head_size`` and ``scale``; the last one belongs to the layer whose features are used.
        depth: layers of the whole tower, of which vLLM may leave out the last ones.
    """

    def __init__(self, wants: Wants, attentions: Sequence[torch.nn.Module], depth: int, has_cls: bool):
        self.wants, self.has_cls, self.used = wants, has_cls, len(attentions) - 1
        self.listener: Listener | None = None
        if wants.fields - {"tower_hidden", "grid"}:
            for layer in sorted({*wants.layers(self.used, depth)}):
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
    sight.listener = listener = Listener(sight.wants, sight.has_cls, sight.used)
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
    first = int(listener.has_cls)
    cls, received = (listener.joined(scores) for scores in (listener.cls, listener.received))
    keys = torch.cat(listener.keys, 1) if listener.keys else None
    found = []
    for i, own in enumerate(hidden):
        found.append(
            Look(
                hidden=own[first:],
                outside=torch.zeros(len(own) - first, dtype=torch.bool, device=own.device),
                grid=(grid,),
                cls=None if cls is None else cls[:, i, first:],
                received=None if received is None else received[:, i, first:],
                keys=None if keys is None else keys[i, first:],
                cls_hidden=own[0] if first else None,
                cls_keys=keys[i, 0] if first and keys is not None else None,
            )
        )
    return found


def windows(
    listener: Listener, hidden: torch.Tensor, grids: Sequence[tuple[int, ...]], order: torch.Tensor
) -> list[Look]:
    """Of a tower with one sequence for all pictures, where neighbouring patches are one token.

    Args:
        hidden: (P, C) of all patches; grids: (t, h, w) of each picture's tokens; order: (N,) for each of the
            tokens, picture after picture, its place in the tower's own order.
    """

    def arranged(patches: torch.Tensor) -> torch.Tensor:
        """(P, W) to (N, W), the mean of the patches of each token."""
        return patches.unflatten(0, (len(order), -1)).mean(1)[order]

    counts = [t * h * w for t, h, w in grids]
    features = arranged(hidden).split(counts)
    received = listener.joined(listener.received)
    scores = None if received is None else arranged(received[:, 0].T).T.split(counts, 1)
    keys = arranged(torch.cat(listener.keys, 1)[0]).split(counts) if listener.keys else None
    return [
        Look(
            hidden=features[i],
            outside=torch.zeros(n, dtype=torch.bool, device=hidden.device),
            grid=(grids[i],),
            received=None if scores is None else scores[i],
            keys=None if keys is None else keys[i],
        )
        for i, n in enumerate(counts)
    ]
