"""One call of a decoder, seen layer by layer: what each layer gets, and what happens behind it.

Both drivers (``llava``'s decoder and :func:`libra.attach`) run the same loop::

    passage = Passage(decoder, compression, hidden, …)
    for i, layer in enumerate(decoder.layers):
        hidden = layer(hidden, **passage.inputs(i))
        hidden = passage.compress(i, hidden)
"""

import torch
from transformers.masking_utils import create_causal_mask

from . import hybrid
from .cache import Stage, StagedCache
from .config import Compression
from .stream import VisualTokenStream


class Passage:
    """The stages of one forward call, whether it is a prefill (with visual tokens or without) or a decoding step.

    Args:
        decoder: the text model: ``layers``, ``rotary_emb`` and ``config``.
        compression: None or one without layers leaves everything as the plain model does it.
        inputs_embeds: (B, S, D).
        attention_mask: (B, past + S) with 0 for padding, or None; a ready 4D mask only without compression.
        position_ids: (B or 1, S), or more leading dimensions for multi-axis rotary embeddings; None counts on from the cache.
        cache: the KV cache or None.
        visual: (B, S) bool, the columns of visual tokens; None or none: nothing is compressed in this call.
        labels, score_columns, keys: see :class:`VisualTokenStream`.
    """

    def __init__(
        self, decoder, compression: Compression | None, inputs_embeds, attention_mask=None, position_ids=None, cache=None,
        visual=None, labels=None, score_columns=None, keys=None,
    ):
        self.decoder, self.cache = decoder, cache
        self.compression = compression if compression is not None and compression.layers else None
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        self._positions = position_ids
        self._rotary = decoder.rotary_emb(inputs_embeds, position_ids)
        self._first: torch.Tensor | None = None  # (B, 1), the position of each row's first column, where they are compact
        self.stream: VisualTokenStream | None = None
        if self.compression is None:
            self._mask = self._causal_mask(inputs_embeds, attention_mask, position_ids, 0)
            return

        self.compression.check_layers(decoder.config.num_hidden_layers)
        hybrid.enable(decoder.config)
        starts = [0, *(layer + 1 for layer in self.compression.layers)]
        used_before = past > 0 and not isinstance(cache, StagedCache)
        self._stages = [Stage(start) for start in starts] if cache is None else StagedCache.adopt(cache, starts).stages
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("compression needs a 2D attention mask (batch, tokens): a ready 4D mask cannot be shortened")
        if used_before and attention_mask is not None:
            for stage in self._stages:  # filled without compression: all layers hold the same keys
                stage.mask = attention_mask[:, :past].bool()
        self._new_mask = None if attention_mask is None else attention_mask[:, past:].bool()
        if visual is not None and bool(visual.any()):
            self.stream = VisualTokenStream(self.compression, visual, self._new_mask, labels, score_columns, keys)
            self._new_mask = self.stream.mask
            if cache is not None:
                cache.compressed_until = past + inputs_embeds.shape[1]
        elif inputs_embeds.shape[1] == 1 and self._stages[0].mask is None:
            self._new_mask = None  # a decoding step adds a valid token to every row
        self._enter(0, inputs_embeds)

    def _causal_mask(self, hidden, mask, position_ids, layer: int):
        return create_causal_mask(
            config=self.decoder.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=self.cache,
            position_ids=position_ids, layer_idx=layer,
        )

    def _enter(self, number: int, hidden: torch.Tensor) -> None:
        """Make stage ``number`` the current one: its keys are those its layers already hold and this call's columns."""
        self._number, stage = number, self._stages[number]
        if stage.first_layer == self.decoder.config.num_hidden_layers:
            return  # compressed behind the last layer: nobody is left to attend
        stage.mask = self._key_mask(stage, hidden)
        # No position ids: their gaps would be taken for packed sequences.
        self._mask = self._causal_mask(hidden, stage.mask, None, stage.first_layer)
        if self.compression.positions == "compact":
            self._renumber(stage, hidden)

    def _key_mask(self, stage: Stage, hidden: torch.Tensor) -> torch.Tensor | None:
        """(B, K) for the keys that a stage's layers hold and this call's columns; None if no row has padding."""
        if stage.mask is None and self._new_mask is None:
            return None
        past = 0 if self.cache is None else self.cache.get_seq_length(stage.first_layer)
        whole = [torch.ones(len(hidden), n, dtype=torch.bool, device=hidden.device) for n in (past, hidden.shape[1])]
        return torch.cat([ones if mask is None else mask for ones, mask in zip(whole, (stage.mask, self._new_mask))], 1)

    def _renumber(self, stage: Stage, hidden: torch.Tensor) -> None:
        """Compact positions: a stage counts its own columns on from where it stood, and remembers how far it fell behind."""
        positions = self._compact_positions(stage, hidden)
        if self.stream is not None:
            original = self._positions.expand(len(hidden), -1)
            valid = torch.ones_like(original, dtype=torch.bool) if self._new_mask is None else self._new_mask
            last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).amax(1, keepdim=True)
            stage.shift = (original - positions).gather(1, last)
        self._rotary = self.decoder.rotary_emb(hidden, positions)

    def _compact_positions(self, stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        original = self._positions.expand(len(hidden), -1)
        behind = 0 if stage.shift is None else stage.shift
        if self.stream is None:
            return original - behind
        valid = torch.ones_like(original) if self._new_mask is None else self._new_mask.long()
        if self._first is None:  # of the whole call: a later stage may have lost its first columns
            self._first = original.gather(1, valid.argmax(1, keepdim=True))
        return self._first - behind + (valid.cumsum(1) - 1).clamp(min=0)

    def inputs(self, layer: int) -> dict:
        """Keyword arguments of decoder layer ``layer``: mask, positions and, at a compression layer, the probe."""
        given = {"attention_mask": self._mask, "position_embeddings": self._rotary}
        if self.compression is None:
            return {**given, "position_ids": self._positions}
        self._probe = None
        if self.stream is not None and layer in self.compression.layers:
            self._probe = hybrid.Probe(self.stream.queries, self._stages[self._number].mask)
            if self.compression.score_layer == "same":
                given["score_probe"] = self._probe
        return {**given, "position_ids": None}

    def compress(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the next layer gets: ``hidden`` (B, S, D) itself, or a shorter sequence behind a compression layer."""
        if self.compression is None or layer not in self.compression.layers:
            return hidden
        if self.stream is not None:
            if self.compression.score_layer == "next":
                self._score_with(layer + 1, hidden)
            hidden, shortened, _ = self.stream.compress(hidden, self._probe.attention[:, :, -hidden.shape[1] :])
            self._rotary = tuple(shortened.gather(table) for table in self._rotary)
            self._positions = shortened.gather(self._positions, dim=-1)
            self._new_mask = shortened.mask
        self._enter(self._number + 1, hidden)
        return hidden

    def _score_with(self, layer: int, hidden: torch.Tensor) -> None:
        """Answer the probe with the next layer, whose keys of earlier calls are those of its own, shorter stage."""
        stage, rotary, past_keys = self._stages[self._number + 1], self._rotary, None
        if self.cache is not None and self.cache.get_seq_length(layer):
            past_keys = self.cache.layers[layer].keys
            if self.compression.positions == "compact":
                rotary = self.decoder.rotary_emb(hidden, self._compact_positions(stage, hidden))
        self._probe.key_mask = self._key_mask(stage, hidden)
        hybrid.next_layer_attention(self.decoder.layers[layer], hidden, rotary, self._probe, past_keys)

    def stats(self) -> dict:
        """Visual tokens of each row at each layer, without compensation tokens, and the compensation tokens added behind it."""
        layers = self.decoder.config.num_hidden_layers
        counts, added = self.stream.counts, dict(zip(self.compression.layers, self.stream.compensated))
        stage_of = [sum(layer > boundary for boundary in self.compression.layers) for layer in range(layers)]
        return {
            "visual_tokens": [counts[stage] for stage in stage_of],
            "compensation_tokens": [[int(c) for c in added.get(layer, [])] for layer in range(layers)],
        }

    @property
    def labels(self) -> torch.Tensor | None:
        """(B, S'): the labels of the columns that are left, None where none were given or nothing was compressed."""
        return None if self.stream is None else self.stream.labels
