"""A decoder's prefill as one function of tensors, which ``torch.compile(fullgraph=True)`` takes whole.

Hooks, as :func:`libra.attach` sets them, keep what they know of a call in a context variable, which no
compiler traces; here the same engine runs as a visible loop over the layers of any decoder, llava's or a
stock one of transformers.
"""

from collections.abc import Callable

import torch

from ..config import Compression
from ..places import BEFORE
from . import score
from .forward import CompressedForward
from .structure import final_norm, fitted, layers_of
from .tokens import Prefill

Run = Callable[..., torch.Tensor]


def prefill_of(decoder: torch.nn.Module, compression: Compression) -> Run:
    """The prefill of a text model without what is around it: no tower, no embeddings, no head.

    The decoder must not be attached to. Its attention is set to the one that can be asked for scores, and
    stays so; what it computes is the same.

    >>> run = torch.compile(prefill_of(model.model.language_model, c), fullgraph=True, dynamic=False)
    >>> hidden = run(embeds, Prefill(visual).surveyed())

    Args:
        decoder: with ``layers``, ``rotary_emb``, a final norm and ``config``; its layers take hidden states
            and the keyword arguments of Llama's, and pass on those that they do not know to their attention.
        compression: a graph is whole where no length depends on a number: ``compensation: reserved``, or a
            merge that never compensates.

    Returns:
        a function of the embeddings (B, S, D), the surveyed :class:`~libra.engine.tokens.Prefill` and, where
        they are needed, ``padding_mask`` (B, S), 0 for padding, ``position_ids`` as
        :class:`~libra.engine.forward.CompressedForward` takes them, and an empty ``cache``. It returns the
        hidden states (B, S', D) of the columns that are left, after the decoder's norm. The places of the
        visual tokens are constants of a graph: prompts of another layout are traced anew.

    Raises:
        ValueError: for a layer that the decoder does not have, for renumbered positions where it has several
            axes of them, for a decoder without a final norm; at the call for a method that reads the vision
            tower.
    """
    compression = fitted(decoder, compression)
    layers, norm = layers_of(decoder), final_norm(decoder)
    score.enable(decoder.config)  # a registry of functions: not in the graph

    def run(
        inputs_embeds: torch.Tensor, prefill: Prefill, padding_mask=None, position_ids=None, cache=None
    ) -> torch.Tensor:
        forward = CompressedForward(
            decoder, compression, inputs_embeds, padding_mask, position_ids, cache, prefill
        )
        hidden = forward.compress(BEFORE, inputs_embeds)
        for i, layer in enumerate(layers):
            hidden = forward.compress(i, layer(hidden, **forward.inputs(i, hidden)))
        return norm(hidden)

    return run
