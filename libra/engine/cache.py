"""The KV cache of a compressed model: layers of different lengths, and with them each stage's own mask."""

from dataclasses import dataclass

import torch

from ..utils.once import once
from .transformers_api import CACHE, DynamicCache, empty_layers


@dataclass
class Stage:
    """The keys that the layers between two compression layers hold.

    Attributes:
        first_layer: the first of those layers.
        key_mask: (B, K) bool, False for padding; None if no row has any.
        shift: (B, 1), how many numbers the positions of a compact stage lag the original ones; None with
            original positions.
    """

    first_layer: int
    key_mask: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def apply(self, change) -> None:
        """Replace key mask and shift by ``change`` of them."""
        self.key_mask = None if self.key_mask is None else change(self.key_mask)
        self.shift = None if self.shift is None else change(self.shift)


def holds_keys(layer) -> bool:
    """True for a cache's layer with keys, which has columns; others hold the state of a recurrence, or
    nothing."""
    return hasattr(layer, "get_seq_length")


def bytes_of(layer) -> int:
    """What a layer of a cache occupies: keys, values, and the states of recurrences and convolutions."""
    parts = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        parts += states.values() if isinstance(states, dict) else [states]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def bytes_at(cache, columns: int) -> int:
    """Bytes that a cache without compression occupied when it held ``columns`` columns, before an answer's
    tokens were appended. Layers that hold fewer, those of a sliding window, count as they are."""
    total = 0
    for layer in cache.layers:
        held = layer.keys.shape[-2] if holds_keys(layer) else 0
        total += bytes_of(layer) * columns // held if held > columns else bytes_of(layer)
    return total


class StagedCache(DynamicCache):
    """A dynamic cache that carries the stages through everything that is done to its rows and its end.

    Each layer holds as many keys as its stage has columns: shorter stages append fewer keys, and nothing is
    ever cut out of a cache. What else differs between the stages stands in :class:`Stage`, and must follow
    the rows when beams are reordered, repeated or selected, and the end when guesses are taken back.
    """

    stages: list[Stage]
    # The compression that was asked for at the last call, the same with its layers, and its steps.
    plan: tuple = (None, None, ())
    lag = 0  # columns that were taken out of the calls' inputs, before the first layer
    compressed_until = 0  # columns of layer 0 up to the last visual token that was compressed
    # A compressed forward sets it before its first layer. Without one the model would give all layers one
    # mask, made for the length of the first.
    expects_a_call = False
    # While a model's body makes the masks itself, out of the caller's padding mask, which has all columns.
    tells_all_columns = False

    @classmethod
    def check(cls, cache) -> None:
        """Raise ValueError for a cache that cannot become a staged one."""
        if type(cache) is not DynamicCache and not isinstance(cache, cls):
            raise ValueError(
                f"compression needs a DynamicCache, whose layers can differ in length, but got"
                f" {type(cache).__name__}; leave cache_implementation and {CACHE} unset"
            )

    @classmethod
    def adopt(cls, cache, first_layers: list[int]) -> "StagedCache":
        """Turn a plain, empty or text-only DynamicCache into a staged one, in place: its owner keeps the same
        object. Other kinds are refused by :meth:`check`, before anything is changed.

        Raises:
            ValueError: for a cache that was filled under another compression.
        """
        if type(cache) is DynamicCache:
            cache.__class__ = cls
            cache.stages = [Stage(layer) for layer in first_layers]
        elif [stage.first_layer for stage in cache.stages] == first_layers:
            pass
        elif not cache.get_seq_length():  # emptied, or never filled
            cache.stages = [Stage(layer) for layer in first_layers]
        else:
            raise ValueError(
                "this KV cache was filled with compression after layers "
                f"{[s.first_layer - 1 for s in cache.stages[1:]]}, not "
                f"{[layer - 1 for layer in first_layers[1:]]}; start with an empty cache"
            )
        return cache

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns of the calls so far as they came in, also where the input was shortened; those that a layer
        holds where ``layer_idx`` names one."""
        return super().get_seq_length(layer_idx or 0) + (self.lag if layer_idx is None else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys a layer's mask is for, and the number of the first of them."""
        if not self.tells_all_columns or layer_idx >= len(self.layers):
            return super().get_mask_sizes(query_length, layer_idx)
        past, window = self.get_seq_length(), getattr(self.layers[layer_idx], "sliding_window", None)
        first = 0 if window is None else max(past - window + 1, 0)
        return past - first + query_length, first

    def get_query_offset(self, layer_idx: int = 0):
        """The number of the first column of a call in its mask."""
        if self.tells_all_columns:
            return self.get_seq_length()
        return super().get_query_offset(layer_idx)

    def columns_of(self, layers: range) -> int:
        """Columns that the first of ``layers`` which holds keys has of them; 0 where none does yet."""
        held = (self.layers[i] for i in layers if i < len(self.layers) and holds_keys(self.layers[i]))
        return next((layer.get_seq_length() for layer in held), 0)

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Append a layer's new keys and values.

        Raises:
            ValueError: at the first layer of a call without compression, which takes all layers to hold as
                many keys.
        """
        if layer_idx == self._first_with_keys:
            if not self.expects_a_call and self._is_shortened():
                raise ValueError(
                    "this KV cache was filled with compression after layers "
                    f"{[s.first_layer - 1 for s in self.stages[1:]]}, and now the model is called without "
                    "it; switch that compression on again or start with an empty cache"
                )
            self.expects_a_call = False
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @once
    def _first_with_keys(self) -> int:
        return next((i for i, layer in enumerate(self.layers) if holds_keys(layer)), 0)

    def _is_shortened(self) -> bool:
        """True where the layers do not all hold as many keys as the calls had columns."""
        held = {layer.get_seq_length() for layer in self.layers if holds_keys(layer)}
        return self.lag > 0 or len(held) > 1

    def _to_stages(self, change) -> None:
        for stage in self.stages:
            stage.apply(change)

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        self._to_stages(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._to_stages(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self._to_stages(lambda x: x[indices])

    def crop(self, tokens_to_remove: int):
        """Drop the newest ``-tokens_to_remove`` tokens, as transformers' caches do; 0 only trims sliding
        windows.

        Raises:
            ValueError: for a positive number, or if that would cut into a compressed prompt before the end of
                its visual tokens, which the later layers no longer hold one by one.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes how many tokens to remove as a negative number, but got {tokens_to_remove}"
            )
        if tokens_to_remove and self.get_seq_length() + tokens_to_remove < self.compressed_until:
            raise ValueError(
                f"crop keeps at least the {self.compressed_until} columns up to the last compressed visual"
                " token; start a new cache"
            )
        for layer in self.layers:
            layer.crop(tokens_to_remove)
        for stage in self.stages if tokens_to_remove else ():
            stage.key_mask = None if stage.key_mask is None else stage.key_mask[:, :tokens_to_remove]

    def reset(self):
        empty_layers(self)
        self.compressed_until = self.lag = 0
        self.stages = [Stage(stage.first_layer) for stage in self.stages]
