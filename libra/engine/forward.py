"""One call of a decoder, seen layer by layer: what each layer gets, and what happens behind it.

Both drivers (``llava``'s decoder and :func:`libra.attach`) run the same loop::

    passage = Passage(decoder, compression, hidden, …)
    for i, layer in enumerate(decoder.layers):
        hidden = layer(hidden, **passage.inputs(i))
        hidden = passage.compress(i, hidden)
"""

import torch
from torch.profiler import record_function

from ..config import Compression
from . import score
from .cache import Stage, StagedCache
from .tokens import VisualTokenStream
from .trace import Recorder
from .transformers_api import cache_argument, create_causal_mask, create_sliding_window_causal_mask

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def attention_kind(config, layer: int) -> str:
    """Which keys a decoder layer sees, by the names of transformers' ``layer_types``."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def position_axes(decoder) -> int:
    """How many position numbers a token has: 3 with multi-axis rotary embeddings (time, height, width),
    otherwise 1."""
    return 3 if hasattr(decoder.rotary_emb, "mrope_section") else 1


def fitted(decoder, compression: Compression) -> Compression:
    """The compression with its layers in this decoder, the natural ones where none are named.

    Raises ValueError for a layer that the decoder does not have, and for positions that cannot be renumbered.
    """
    compression = compression.at_depth(decoder.config.num_hidden_layers)
    if compression.positions == "compact" and position_axes(decoder) > 1:
        raise ValueError(
            f"positions: compact cannot renumber the multi-axis positions of {type(decoder).__name__};"
            " add `positions: original`"
        )
    return compression


class Passage:
    """The stages of one forward call, whether it is a prefill (with visual tokens or without) or a decoding
    step.

    Args:
        decoder: the text model: ``layers``, ``rotary_emb`` and ``config``.
        compression: None or one without layers leaves everything as the plain model does it.
        inputs_embeds: (B, S, D).
        attention_mask: (B, past + S) with 0 for padding, or None; a ready 4D mask, or a mask for each kind of
            attention, only without compression.
        position_ids: (B or 1, S); multi-axis rotary embeddings also take (3, B, S), and (4, B, S) with the
            text's numbers in front, by which the plain model tells packed sequences. None counts on from the
            cache.
        cache: the KV cache or None.
        visual: (B, S) bool, the columns of visual tokens; None or none: nothing is compressed in this call.
        labels, score_columns, keys, padding_side: see :class:`VisualTokenStream`.
        trace: whether to record what becomes of each visual token.
    """

    def __init__(
        self,
        decoder,
        compression: Compression | None,
        inputs_embeds,
        attention_mask=None,
        position_ids=None,
        cache=None,
        visual=None,
        labels=None,
        score_columns=None,
        keys=None,
        trace=False,
        padding_side=None,
    ):
        self.decoder, self.cache = decoder, cache
        self.compression = (
            None if compression is None or not compression.compresses else fitted(decoder, compression)
        )
        past = 0 if cache is None else cache.get_seq_length()
        self._text_positions, self._positions = self._split(position_ids, past, inputs_embeds)
        self._rotary = decoder.rotary_emb(inputs_embeds, self._positions)
        # (B, 1), the positions of each row's first and last column, where they are compact: later stages may
        # have lost them.
        self._first: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self.stream: VisualTokenStream | None = None
        self.recorder: Recorder | None = None
        layers = decoder.config.num_hidden_layers
        if self.compression is None:
            self._masks = self._make_masks(range(layers), inputs_embeds, attention_mask, self._text_positions)
            return

        score.enable(decoder.config)
        starts = [0, *(layer + 1 for layer in self.compression.layers)]
        used_before = past > 0 and not isinstance(cache, StagedCache)
        self._stages = (
            [Stage(start) for start in starts] if cache is None else StagedCache.adopt(cache, starts).stages
        )
        if cache is not None:
            cache.expects_a_call = True
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
            raise ValueError(
                "compression needs a 2D attention mask (batch, tokens): a ready 4D mask cannot be shortened"
            )
        if used_before and attention_mask is not None:
            for stage in self._stages:  # filled without compression: all layers hold the same keys
                stage.mask = attention_mask[:, :past].bool()
        self._new_mask = None if attention_mask is None else attention_mask[:, past:].bool()
        self._held: list[
            tuple[int, list[int], int]
        ] = []  # of each stage: columns, valid tokens of this call, earlier columns
        if visual is not None and bool(visual.any()):
            self.stream = VisualTokenStream(
                self.compression, visual, self._new_mask, labels, score_columns, keys, padding_side
            )
            self._new_mask = self.stream.mask
            self.recorder = Recorder() if trace else None
            if cache is not None:
                cache.compressed_until = past + self.stream.last_visual + 1
        elif inputs_embeds.shape[1] == 1 and self._stages[0].mask is None:
            self._new_mask = None  # a decoding step adds a valid token to every row
        self._enter(0, inputs_embeds)

    def _split(self, position_ids, past: int, hidden: torch.Tensor):
        """Positions for the masks, None where the plain model gives none, and those for the rotary
        embeddings."""
        axes = position_axes(self.decoder)
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
            if axes == 1:
                return position_ids, position_ids
            return None, position_ids.expand(axes, len(hidden), -1)
        if axes == 1:
            return position_ids, position_ids
        if position_ids.ndim == 2:
            return None, position_ids.expand(axes, *position_ids.shape)
        return (position_ids[0], position_ids[1:]) if len(position_ids) == axes + 1 else (None, position_ids)

    def _make_masks(self, layers: range, hidden, mask, position_ids) -> dict:
        """The attention mask of each kind of attention among ``layers``, sized against those layers' keys."""
        if isinstance(mask, dict):
            return mask
        config, first = self.decoder.config, {}
        for layer in layers:
            first.setdefault(attention_kind(config, layer), layer)
        return {
            kind: MASKS[kind](
                config=config,
                inputs_embeds=hidden,
                attention_mask=mask,
                position_ids=position_ids,
                layer_idx=layer,
                **cache_argument(self.cache),
            )
            for kind, layer in first.items()
        }

    def _enter(self, number: int, hidden: torch.Tensor) -> None:
        """Make stage ``number`` the current one: its keys are those its layers already hold and this call's
        columns."""
        self._number, stage = number, self._stages[number]
        ends = [later.first_layer for later in self._stages[number + 1 :]] or [
            self.decoder.config.num_hidden_layers
        ]
        layers = range(stage.first_layer, ends[0])
        if not layers:
            return  # compressed behind the last layer: nobody is left to attend
        past = self._past(stage)
        if self.stream is not None:
            self._held.append((hidden.shape[1], self.stream.row_lengths, past))
        stage.mask = self._key_mask(stage, hidden)
        # No position ids: their gaps would be taken for packed sequences.
        self._masks = self._make_masks(layers, hidden, stage.mask, None)
        if self.compression.positions == "compact":
            self._renumber(stage, hidden)

    def _past(self, stage: Stage) -> int:
        """Columns that a stage's layers already hold."""
        return 0 if self.cache is None else self.cache.get_seq_length(stage.first_layer)

    def _key_mask(self, stage: Stage, hidden: torch.Tensor) -> torch.Tensor | None:
        """(B, K) for the keys that a stage's layers hold and this call's columns; None if no row has
        padding."""
        if stage.mask is None and self._new_mask is None:
            return None
        lengths = self._past(stage), hidden.shape[1]
        whole = [torch.ones(len(hidden), n, dtype=torch.bool, device=hidden.device) for n in lengths]
        return torch.cat(
            [ones if mask is None else mask for ones, mask in zip(whole, (stage.mask, self._new_mask))], 1
        )

    def _renumber(self, stage: Stage, hidden: torch.Tensor) -> None:
        """Compact positions: a stage counts its own columns on from where it stood, and remembers how far it
        fell behind.

        What comes after the call stands behind the last of these columns, whatever the last columns of the
        prompt were.
        """
        positions = self._compact_positions(stage, hidden)
        if self.stream is not None:
            if self._last is None:
                self._last = self._of_valid(self._positions, last=True)
            stage.shift = self._last - self._of_valid(positions, last=True)
        self._rotary = self.decoder.rotary_emb(hidden, positions)

    def _of_valid(self, positions: torch.Tensor, last: bool) -> torch.Tensor:
        """(B, 1): the first or the last of the valid columns' ``positions`` (B or 1, S)."""
        if self._new_mask is None:
            return positions[:, -1:] if last else positions[:, :1]
        place = torch.arange(self._new_mask.shape[1], device=positions.device)
        valid = self._new_mask.bool()
        column = (
            torch.where(valid, place, -1).amax(1) if last else torch.where(valid, place, len(place)).amin(1)
        )
        return positions.expand(len(valid), -1).gather(1, column[:, None])

    def _compact_positions(self, stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        original = self._positions.expand(len(hidden), -1)
        behind = 0 if stage.shift is None else stage.shift
        if self.stream is None:
            return original - behind
        valid = torch.ones_like(original) if self._new_mask is None else self._new_mask.long()
        if self._first is None:
            self._first = self._of_valid(original, last=False)
        return self._first - behind + (valid.cumsum(1) - 1).clamp(min=0)

    def inputs(self, layer: int) -> dict:
        """Keyword arguments of decoder layer ``layer``: mask, positions, cache and, at a compression layer,
        the probe."""
        mask = self._masks[attention_kind(self.decoder.config, layer)]
        given = {"attention_mask": mask, "position_embeddings": self._rotary, **cache_argument(self.cache)}
        if self.compression is None:
            return {**given, "position_ids": self._text_positions}
        self._probe = None
        if self.stream is not None and layer in self.compression.layers:
            self._probe = score.Probe(self.stream.queries, self._stages[self._number].mask)
            if self.compression.score_layer == "same":
                given["score_probe"] = self._probe
        return {**given, "position_ids": None}

    def compress(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the next layer gets: ``hidden`` (B, S, D) itself, or a shorter sequence behind a compression
        layer."""
        if self.compression is None or layer not in self.compression.layers:
            return hidden
        if self.stream is not None:
            if self.compression.score_layer == "next":
                self._score_with(layer + 1, hidden)
            spans = self.stream.span_lengths
            hidden, shortened, step = self.stream.compress(
                hidden, self._probe.attention[:, :, -hidden.shape[1] :]
            )
            if self.recorder is not None:
                self.recorder.add(layer, step, spans)
            with record_function("libra.gather"):
                self._rotary = tuple(shortened.gather(table) for table in self._rotary)
                self._positions = shortened.gather(self._positions, dim=-1)
                self._new_mask = shortened.mask
        with record_function("libra.gather"):
            self._enter(self._number + 1, hidden)
        return hidden

    def _score_with(self, layer: int, hidden: torch.Tensor) -> None:
        """Answer the probe with the next layer, whose keys of earlier calls are those of its own, shorter
        stage."""
        stage, rotary, past_keys = self._stages[self._number + 1], self._rotary, None
        if self.cache is not None and self.cache.get_seq_length(layer):
            past_keys = self.cache.layers[layer].keys
            if self.compression.positions == "compact":
                rotary = self.decoder.rotary_emb(hidden, self._compact_positions(stage, hidden))
        self._probe.key_mask = self._key_mask(stage, hidden)
        score.next_layer_attention(self.decoder.layers[layer], hidden, rotary, self._probe, past_keys)

    def stats(self) -> dict:
        """Of a call with visual tokens, once it is through.

        ``visual_tokens`` [layer][row], without compensation tokens; ``compensation_tokens`` [layer][row],
        added after that layer; ``columns``: for each row those that are left after the last layer, text and
        all; ``padding``: the side on which such rows are padded, None where none is; ``cache``: bytes that
        the KV cache holds after the call (None without one), and how they split up into ``visual``,
        ``compensation``, ``text`` and ``padding`` columns of this call, the ``earlier`` ones, and the
        ``window`` of layers that hold their newest columns only.
        """
        layers = self.decoder.config.num_hidden_layers
        counts, added = self.stream.counts, dict(zip(self.compression.layers, self.stream.compensated))
        stage_of = [sum(layer > boundary for boundary in self.compression.layers) for layer in range(layers)]
        return {
            "visual_tokens": [counts[stage] for stage in stage_of],
            "compensation_tokens": [[int(c) for c in added.get(layer, [])] for layer in range(layers)],
            "columns": self.stream.row_lengths,
            "padding": self.stream.padding,
            "cache": None if self.cache is None else self._cache_bytes(stage_of),
        }

    def _cache_bytes(self, stage_of: list[int]) -> dict[str, int]:
        split = dict.fromkeys(("visual", "compensation", "text", "padding", "earlier", "window"), 0)
        total = 0
        for layer, stage in zip(self.cache.layers, stage_of):
            size = layer.keys.nbytes + layer.values.nbytes
            total += size
            columns, lengths, past = self._held[stage]
            batch, held = len(lengths), layer.keys.shape[-2]
            if held < past + columns:
                split["window"] += size
                continue
            visual, compensation = (
                sum(self.stream.counts[stage]),
                sum(map(sum, self.stream.compensated[:stage])),
            )
            shares = {
                "visual": visual,
                "compensation": compensation,
                "text": sum(lengths) - visual - compensation,
                "padding": batch * columns - sum(lengths),
                "earlier": batch * past,
            }
            for name, tokens in shares.items():
                split[name] += tokens * size // (batch * held)
        return {"total": total, **split}

    @property
    def labels(self) -> torch.Tensor | None:
        """(B, S'): the labels of the columns that are left, None where none were given or nothing was
        compressed."""
        return None if self.stream is None else self.stream.labels
