"""One call of an unmodified decoder, as the hooks on its layers see it.

Before the first layer after a compression layer the hidden states become shorter; so what the decoder does
between two layers is done at full length. Every argument of the later layers follows: masks by kind of
attention, the others by shape. Decoders hand their layers rotary tables, position ids, type ids, inputs of
single layers, each under names of its own; what is as long as the call's columns where columns belong is
gathered.
"""

from dataclasses import dataclass

import torch

from ..ops.reference import take, take_last
from . import score
from .forward import CompressedForward
from .masks import POINTWISE, RECURRENT, mask_of, shortened_mask, step_mask
from .tokens import Shortened
from .transformers_api import CACHES


@dataclass(frozen=True)
class Given:
    """What the decoder was given, as far as its layers do not tell.

    Attributes:
        padding_mask: (B, past + S), 0 for padding, or None.
        ready: True where the model's body made the attention masks, for the decoder to hand on.
        position_ids: as the caller or the body gave them, or None.
        shape: (B, S) of the call.
    """

    padding_mask: torch.Tensor | None = None
    ready: bool = False
    position_ids: torch.Tensor | None = None
    shape: tuple[int, int] = (0, 0)


def gathered(value: torch.Tensor, source: torch.Tensor, length: int) -> torch.Tensor:
    """``value`` for fewer columns, or itself where it has none.

    Args:
        value: whole numbers (…, S), with all dimensions before the last two kept, or others (B or 1, S, …)
            and (axes, B or 1, S, …).
        source: (B, S'), the column of the call that each column left comes from.
        length: S, the call's columns.
    """
    batch = len(source)
    if not (value.is_floating_point() or value.is_complex()):
        if value.ndim == 0 or value.shape[-1] != length:
            return value
        return take_last(value[None] if value.ndim == 1 else value, source)
    for axis in (1, 2):
        if value.ndim >= axis + 2 and value.shape[axis] == length and value.shape[axis - 1] in (1, batch):
            tables = [value] if axis == 1 else list(value)
            taken = [take(table, source) for table in tables]
            return taken[0] if axis == 1 else torch.stack(taken)
    return value


class Arguments:
    """Shortens the arguments of a call's layers, each once a stage.

    Args:
        length: the columns of the call.
    """

    def __init__(self, length: int):
        self._length = length
        self.source: torch.Tensor | None = None  # (B, S'), None as long as nothing was shortened
        # By the identity of an argument, which is kept with it: decoders hand all their layers the same ones.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def shorten(self, source: torch.Tensor) -> None:
        """``source`` (B, S'): the old column of each new one."""
        self.source = source if self.source is None else self.source.gather(1, source)
        self._known.clear()

    def fit(self, value):
        """An argument of a layer, for the columns that are left."""
        if self.source is None:
            return value
        if isinstance(value, torch.Tensor):
            if id(value) not in self._known:
                self._known[id(value)] = value, gathered(value, self.source, self._length)
            return self._known[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self.fit, value))
        if type(value) is dict:
            return {name: self.fit(part) for name, part in value.items()}
        return value

    def earlier(self, value, shift: torch.Tensor):
        """An argument of a layer, of the columns ``shift`` (B, 1) before those that are left."""
        columns = torch.arange(self._length, device=shift.device) if self.source is None else self.source
        before = Arguments(self._length)
        before.shorten((columns - shift).clamp(min=0))
        return before.fit(value)


class HookedForward(CompressedForward):
    """The stages of one call of a decoder whose own forward runs.

    Args:
        hidden: what the first layer gets, (B, S, D), or with several streams (B, S, streams, D) or (streams,
            B, S, D).
        given: what the decoder was given.
        marks: of each layer that can be asked for its attention.
        cache, prefill: as for :class:`~libra.engine.forward.CompressedForward`.
    """

    def __init__(
        self, decoder, compression, hidden, given: Given, marks: dict[int, score.Mark], cache, prefill
    ):
        self._given, self._marks = given, marks
        self._flash = "flash" in decoder.config._attn_implementation
        self._batch: int
        self._columns: int
        # Of the layer that is being called: the hidden states as they are now, all else as it is handed.
        self._full: dict = {}
        self._batch, self._columns = hidden.shape[:2] if hidden.ndim == 3 else given.shape
        flat, _ = self._flat(hidden)
        self._arguments = Arguments(flat.shape[1])
        super().__init__(decoder, compression, flat, given.padding_mask, given.position_ids, cache, prefill)
        # In a plain decoding step what the decoder hands its layers fits all of them, but for a mask, which
        # is as long as the first layer's keys. (Flash attention must not see position ids.)
        self.is_idle = not self._schedule and not self._flash

    # --- what the engine keeps for each column ---

    def _number_columns(self, position_ids, past: int, hidden: torch.Tensor) -> None:
        """Only positions that change are counted here; original ones are in the layers' arguments."""
        self._text_positions = self._positions = self._rotary = None
        if self.compression.positions != "original":
            self._text_positions, self._positions = self._split(position_ids, past, hidden)

    def _follow(self, shortened: Shortened, hidden: torch.Tensor) -> None:
        self._arguments.shorten(shortened.source)
        super()._follow(shortened, hidden)

    def _masks_of(self, layers: range, hidden: torch.Tensor, key_mask) -> dict:
        """Made when the first layer of a stage and a kind is handed its own; until then none."""
        self._columns = hidden.shape[1]
        return {}

    def _flat(self, hidden: torch.Tensor):
        """(B, S, D) of what a decoder hands from layer to layer, and the way back."""
        if hidden.ndim == 3:
            return hidden, lambda x: x
        if hidden.shape[:2] == (self._batch, self._columns):
            return hidden.flatten(2), lambda x: x.unflatten(2, hidden.shape[2:])
        streams, width = hidden.shape[0], hidden.shape[-1]
        flat = hidden.permute(1, 2, 0, 3).flatten(2)
        return flat, lambda x: x.unflatten(2, (streams, width)).permute(2, 0, 1, 3)

    def shorten(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer after compression layer ``layer`` gets."""
        flat, back = self._flat(hidden)
        return back(self.compress(layer, flat))

    # --- a layer ---

    def before(self, layer: int, given: dict) -> dict:
        """The arguments of decoder layer ``layer`` that change, by name; ``given``: all, the hidden states
        first."""
        changed, first = {}, next(iter(given))
        self._full = given
        if any(step.layer == layer - 1 for step in self._schedule):
            changed[first] = self.shorten(layer - 1, given[first])
            self._full = {**given, **changed}
        columns = self._full[first]
        for name, value in given.items():
            if name != first:
                new = self._argument(layer, name, value, columns)
                if new is not value:
                    changed[name] = new
        if self._asks(layer, columns):
            score.ask(self._marks[layer], self._probe)
        self._full = {}
        return changed

    def _argument(self, layer: int, name: str, value, columns: torch.Tensor):
        if name == "attention_mask":
            return self._mask(layer, value, columns)
        if name == "conv_mask":
            return self._recurrent_mask(value)
        if name == "position_ids" and self._flash:
            return None  # flash attention takes their gaps for the borders of packed sequences
        if name == "position_embeddings" and self._rotary is not None:
            return self._rotary
        return self._arguments.fit(value)

    def _asks(self, layer: int, hidden: torch.Tensor) -> bool:
        asks = super()._asks(layer, hidden)
        if self._probe is not None:
            # A window counts the keys that are left, as the score row does; any other mask is read itself.
            kind = self._kinds[layer]
            self._probe.by_mask = self._given.ready or kind == "chunked_attention"
        return asks

    def _ask_layer(self, layer: int, hidden: torch.Tensor, rotary, probe: score.Probe) -> None:
        """As the layer's own arguments have it, but for the mask, the cache and, where they are counted here,
        positions."""
        first, *others = self._full
        given = dict.fromkeys(others)
        for name in given.keys() - {"attention_mask", *CACHES}:
            value = self._full[name]
            given[name] = self._recurrent_mask(value) if name == "conv_mask" else self._arguments.fit(value)
        if rotary is not None and "position_embeddings" in given:  # Inkling's layers have none
            given["position_embeddings"] = rotary
        score.ask(self._marks[layer], probe)
        try:
            score.ask_layer(self.decoder.layers[layer], self._full[first], given, probe)
        finally:
            score.forget()

    def _rotary_alone(self, hidden: torch.Tensor):
        """None where a layer is given none, as Inkling's are."""
        if self._positions is not None:
            return super()._rotary_alone(hidden)
        return self._arguments.earlier(self._full.get("position_embeddings"), self._counted)

    # --- masks ---

    def _mask(self, layer: int, handed, columns: torch.Tensor):
        """The mask of a layer that gets the hidden states ``columns`` and that the decoder hands
        ``handed``."""
        kind, stage = self._kinds[layer], self._stage_of(layer)
        if kind in POINTWISE:
            return handed
        if kind in RECURRENT:
            return self._recurrent_mask(handed)
        known = self._given.padding_mask is not None or stage.key_mask is None
        if stage is self._stages[0] and known:
            return handed  # all columns are there
        hidden, _ = self._flat(columns)
        which = stage.first_layer, kind
        if which not in self._masks:
            self._masks[which] = self._new_mask(layer, kind, handed, hidden)
        mask = self._masks[which]
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and hidden.shape[1] < mask.shape[2]:
            return mask[:, :, -hidden.shape[1] :]  # Gemma 4 goes on with the last columns of the call
        return mask

    def _new_mask(self, layer: int, kind: str, handed, hidden: torch.Tensor):
        config, stage = self.decoder.config, self._stage_of(layer)
        if self.tokens is None and hidden.shape[1] == 1:
            if stage.key_mask is None and (handed is None or kind == "full_attention"):
                return None  # one token sees every key there is
            if kind == "full_attention" and isinstance(handed, torch.Tensor) and handed.ndim == 4:
                return step_mask(stage.key_mask, handed)
        elif self._given.ready and handed is not None and not isinstance(handed, torch.Tensor):
            raise ValueError(
                "flex attention's masks cannot be shortened where a model makes them itself, say for images "
                "that"
                " see all of themselves; choose attn_implementation sdpa or eager"
            )
        elif self._given.ready and isinstance(handed, torch.Tensor) and handed.ndim == 4:
            window = config.sliding_window if kind == "sliding_attention" else None
            keys = None if self.cache is None else self.cache.get_mask_sizes(hidden.shape[1], layer)[0]
            source = self._arguments.source
            # The cache may hold this call's keys too, those of other layers of the stage; the key mask knows
            # how many there were before. (Without one, too many ones in front do no harm.)
            whole = stage.key_mask
            past = self._past(stage) if whole is None else whole.shape[1] - self._columns
            mask = shortened_mask(handed, source, self._valid, whole, past, window)
            return mask if keys is None else mask[..., -keys:]
        return mask_of(config, kind, layer, hidden, stage.key_mask, None, self.cache)

    def _recurrent_mask(self, handed):
        """(B, S) of a layer whose state runs along the sequence: which columns are valid."""
        if self._number == 0 or self.tokens is None and self._columns == 1:
            return handed
        return self._valid
