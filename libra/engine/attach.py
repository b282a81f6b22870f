"""Compression for stock Hugging Face models: ``with libra.attach(model, compression):`` touches one
instance only."""

import copy
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from ..config import Compression
from ..rows import compression_from, spec_of
from .history import Summary, summed
from .hooks import OWNER, Hooks
from .relevance import ClipRelevance
from .structure import is_dense, structure_of
from .trace import RowTrace
from .transformers_api import PreTrainedModel


class Attachment:
    """A compression on one model; ``detach`` (or leaving the ``with`` block) gives the model back as it was.

    The model stays compressed when a handle is dropped, and says so once when it is called next;
    :func:`detach` gives it back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compression: Compression,
        trace: bool = False,
        clip: ClipRelevance | None = None,
    ):
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "this is the wrapper of torch.compile; attach to the model in it first, then compile"
            )
        self._hold(Hooks(model, compression, trace, clip))

    def _hold(self, hooks: Hooks) -> None:
        self._hooks, self.compression = hooks, hooks.compression
        hooks.handle = weakref.ref(self)

    def __deepcopy__(self, memo) -> "Attachment":
        other = memo[id(self)] = object.__new__(type(self))
        other._hold(copy.deepcopy(self._hooks, memo))
        return other

    def mark_visual_tokens(self, mask: torch.Tensor) -> None:
        """Say for this thread's next call which columns of its ``inputs_embeds`` are visual tokens: (B, S)
        bool."""
        mask = torch.as_tensor(mask)
        if mask.ndim != 2:
            raise ValueError(
                f"the mask of visual tokens must be (batch, tokens), but it is {tuple(mask.shape)}"
            )
        self._hooks.mark_visual_tokens(mask.bool())

    @property
    def stats(self) -> dict | None:
        """Of the last prefill with visual tokens; None before one.

        ``visual_tokens`` and ``compensation_tokens``: [layer][row]; ``columns``: for each row those of its
        logits, ``padding``: on which side the others are; ``flops``: multiply-accumulates of each row's
        visual tokens, and of its reserved compensation tokens, by §4.1's formula for whole tokens;
        ``flops_ratio``: the same over those of the plain model (``flops_plain``), all None for a decoder that
        the formula does not describe (experts, linear
        attention); ``cache``: bytes of the KV cache after the prefill, ``total`` and what they are for, and
        ``cache_plain`` what it would hold otherwise
        (:meth:`libra.engine.forward.CompressedForward.stats`).
        """
        return None if self._hooks.stats is None else self._counted(self._hooks.stats)

    @property
    def history(self) -> list[dict]:
        """:attr:`stats` of the last prefills with visual tokens, the newest last; at most
        :data:`libra.engine.hooks.REMEMBERED`."""
        return [self._counted(stats) for stats in self._hooks.history]

    def summary(self) -> Summary:
        """:attr:`history` added up; as text it is a line to print."""
        return summed(self.history)

    def _counted(self, stats: dict) -> dict:
        """A call's statistics with its FLOPs."""
        # Here, so that `python -m libra.flops` finds its module not yet imported.
        from ..flops import model_flops

        hooks = self._hooks
        config = hooks.decoder.config
        if not is_dense(config):
            return {**stats, "flops": None, "flops_plain": None, "flops_ratio": None}
        spec = spec_of(config, type(hooks.base).__name__)
        rows = list(zip(*self._layer_tokens(stats)))
        flops = [model_flops(spec, row) for row in rows]
        plain = [model_flops(spec, [n] * len(row)) for n, row in zip(stats["given"], rows)]
        ratios = [part / whole if whole else 1.0 for part, whole in zip(flops, plain)]
        return {**stats, "flops": flops, "flops_plain": plain, "flops_ratio": ratios}

    def _layer_tokens(self, stats: dict) -> list[list[int]]:
        """[layer][row], what FLOPs are counted of: the visual tokens and the reserved compensation tokens."""
        layers = len(stats["visual_tokens"])
        reserving = {step.layer for step in self.compression.schedule(layers) if step.part.reserves}
        added = [stats["compensation_at_input"], *stats["compensation_tokens"]]
        held, tokens = [0] * len(stats["given"]), []
        for layer, visual in enumerate(stats["visual_tokens"]):
            if layer - 1 in reserving:
                held = [n + new for n, new in zip(held, added[layer])]
            tokens.append([n + own for n, own in zip(visual, held)])
        return tokens

    @property
    def trace(self) -> list[RowTrace] | None:
        """Of the last prefill with visual tokens, for each row what became of each of them; only with
        ``trace=True``."""
        return None if self._hooks.recorder is None else self._hooks.recorder.rows()

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing, whatever was attached since."""
        self._hooks.detach()

    def __repr__(self) -> str:
        hooks = self._hooks
        state = "" if hooks.attached else ", detached"
        return f"<{self.compression.name} on {type(hooks.base).__name__}{state}: {self.summary()}>"

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def attach(
    model: PreTrainedModel,
    compression: Compression | Mapping | str | Path | None = None,
    trace: bool = False,
    clip: ClipRelevance | None = None,
    **keys,
) -> Attachment:
    """Compress the visual tokens of a Hugging Face vision-language model between its decoder layers.

    >>> with libra.attach(model, ratio=0.5) as handle:
    ...     ids = model.generate(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    >>> print(handle.summary())

    compression, keys: Libra-Merging at its natural places where nothing is named; otherwise a method's name,
    a shipped row's, a YAML file, a dictionary or a :class:`libra.Compression`, and keys of it next to that,
    such as ``attach(model, "fastv", layers=(2,), ratio=0.75)`` (:func:`libra.rows.compression_from`).

    Batches may be padded on the left (for ``generate``) or on the right (for a forward pass and the loss).
    The model keeps its attention implementation. With ``trace`` the handle shows what became of each visual
    token. ``clip``, a :class:`libra.ClipRelevance`, says to methods such as cdpruner how relevant visual
    tokens are for the question; without it they compare text embeddings.

    Raises:
        ValueError: for a model that is not supported (the sentence lists those that are) or a layer it does
            not have.
    """
    if not hasattr(model, "forward") or not hasattr(model, "config"):  # a pipeline, or a name
        raise ValueError(
            f"libra.attach takes a loaded model of transformers, not {type(model).__name__}: load it with "
            "from_pretrained; of a pipeline give its .model"
        )
    return Attachment(model, compression_from(compression, **keys), trace, clip)


def detach(model: PreTrainedModel) -> None:
    """Give a model back as it was before :func:`attach`, where its handle is not at hand; without a
    compression do nothing."""
    try:
        decoder = structure_of(model).decoder
    except ValueError:  # which was never attached
        return
    hooks = vars(decoder).get(OWNER)
    if hooks is not None:
        hooks.detach()
