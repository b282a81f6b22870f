"""One call of a decoder, layer by layer: what each layer gets, and what happens after it.

Both doors (``llava``'s decoder and :func:`libra.attach`) run the same loop::

    forward = CompressedForward(decoder, compression, hidden, …)
    hidden = forward.compress(BEFORE, hidden)
    for i, layer in enumerate(decoder.layers):
        hidden = layer(hidden, **forward.inputs(i, hidden))
        hidden = forward.compress(i, hidden)
"""

import torch

from ..config import Compression, Step
from ..ops.spans import on_device
from ..places import BEFORE
from ..utils.once import once
from ..utils.ranges import profiled
from . import score
from .cache import Stage, StagedCache, bytes_of, holds_keys
from .masks import attention_kinds, attention_masks, check_padding_mask, joined, why_gaps_count
from .structure import attention_modules, final_norm, fitted, position_axes
from .tokens import Deep, Prefill, Shortened, VisualTokens
from .trace import Recorder
from .transformers_api import cache_argument


class CompressedForward:
    """The stages of one forward call, whether it is a prefill (with visual tokens or without) or a decoding
    step.

    Args:
        decoder: the text model: ``layers``, ``rotary_emb`` and ``config``.
        compression: None or one without layers leaves everything as the plain model does it.
        inputs_embeds: (B, S, D).
        padding_mask: (B, past + S) with 0 for padding, or None; only without compression also a ready 4D
            attention mask, or one for each kind of attention.
        position_ids: (B or 1, S); multi-axis rotary embeddings also take (3, B, S), and (4, B, S) with the
            text's numbers in front, by which the plain model tells packed sequences. None counts on from the
            cache.
        cache: the KV cache or None.
        prefill: the visual tokens of this call; None, or without any: nothing is compressed in this call.
    """

    def __init__(
        self,
        decoder,
        compression: Compression | None,
        inputs_embeds: torch.Tensor,
        padding_mask=None,
        position_ids=None,
        cache=None,
        prefill: Prefill | None = None,
    ):
        self.decoder, self.cache = decoder, cache
        self.compression: Compression | None = None
        self._schedule: tuple[Step, ...] = ()
        if compression is not None and compression.compresses:
            self.compression, self._schedule = self._planned(compression)
        past = 0 if cache is None else cache.get_seq_length()
        self._number_columns(position_ids, past, inputs_embeds)
        # (B, 1), the positions of each row's first and last column, where they are compact: later stages may
        # have lost them.
        self._first: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._compact: torch.Tensor | None = None  # (B, S): compact positions of the columns that are left
        self._counted: torch.Tensor | None = None  # (B, 1), see _padding_counted
        self._number = 0  # of the current stage
        self._valid: torch.Tensor | None = None  # (B, S) bool, False for padding; None if there is none
        self.tokens: VisualTokens | None = None
        self.recorder: Recorder | None = None
        if self.compression is None:
            layers = range(decoder.config.num_hidden_layers)
            self._masks = attention_masks(
                decoder.config, layers, inputs_embeds, padding_mask, self._text_positions, cache
            )
            return

        self._padding_mask = padding_mask
        prefill = self._checked(prefill, len(inputs_embeds), past, inputs_embeds.shape[1])
        # What can be refused has been: the cache is changed from here on.
        self._stages = self._stages_of(cache, past, padding_mask)
        if isinstance(cache, StagedCache):
            cache.plan = compression, self.compression, self._schedule
        # A decoding step adds a valid token to every row.
        decodes = prefill is None and inputs_embeds.shape[1] == 1 and self._stage_of(0).key_mask is None
        if prefill is None and not decodes:
            self._valid = self._valid_since(past)
        if decodes and self._is_plain_step(inputs_embeds):
            self._schedule = ()
            return
        # Of each stage: its columns of this call, each row's valid ones, and the columns of earlier calls.
        self._held: list[tuple[int, list[int], int]] = []
        if prefill is not None and any(row.spans for row in prefill.columns.rows):
            self._begin_compression(prefill, position_ids, past, inputs_embeds)
        self._enter(0, inputs_embeds)

    def _checked(self, prefill: Prefill | None, rows: int, past: int, columns: int) -> Prefill | None:
        """The prefill with its columns. Raises ValueError for what does not fit together, while the cache is
        as it was."""
        if self.cache is not None:
            StagedCache.check(self.cache)
        if self._padding_mask is not None:
            check_padding_mask(self._padding_mask, rows, past, columns)
        if prefill is None:
            return None
        prefill.check((rows, columns))
        self._valid = self._valid_since(past)
        return prefill.surveyed(self._valid)

    def _valid_since(self, past: int) -> torch.Tensor | None:
        """(B, S) bool, which of this call's columns are no padding; None where nobody says that any are."""
        return None if self._padding_mask is None else self._padding_mask[:, past:].bool()

    def _begin_compression(self, prefill: Prefill, position_ids, past: int, hidden: torch.Tensor) -> None:
        """Get ready for the steps: this call has visual tokens."""
        score.enable(self.decoder.config)
        self.tokens = VisualTokens(self._schedule, prefill, self._valid)
        self._valid = self.tokens.valid
        self.tokens.rate(hidden)
        self._counted = self._padding_counted(position_ids, hidden.device)
        if self.compression.positions == "centre":
            self._starts = self.tokens.starts(self._positions)
        self.recorder = Recorder() if prefill.trace else None
        if self.cache is not None:
            self.cache.compressed_until = past + self.tokens.last_visual + 1

    def give_up(self) -> None:
        """The call ended before its last layer: nothing that follows on its cache is part of it."""
        if isinstance(self.cache, StagedCache):
            self.cache.expects_a_call = False

    def _planned(self, compression: Compression) -> tuple[Compression, tuple[Step, ...]]:
        """``compression`` with its layers in this decoder, and its steps. The cache remembers both for the
        decoding steps, which cost little else."""
        if isinstance(self.cache, StagedCache) and self.cache.plan[0] is compression:
            return self.cache.plan[1:]
        own = fitted(self.decoder, compression)
        return own, own.schedule(self.decoder.config.num_hidden_layers)

    @once
    def _kinds(self) -> list[str]:
        """The kind of attention of each layer."""
        return attention_kinds(self.decoder.config)

    def _stage_of(self, layer: int) -> Stage:
        """The stage that a layer is in. (Where the input is shortened, stage 0 has no layers.)"""
        return next(stage for stage in reversed(self._stages) if stage.first_layer <= layer)

    def _stages_of(self, cache, past: int, padding_mask) -> list[Stage]:
        """The stages of this call: those that the cache carries from earlier calls, where there is one.

        Raises ValueError for a cache that was filled under another compression.
        """
        starts = [0, *(step.layer + 1 for step in self._schedule)]
        filled_before = past > 0 and not isinstance(cache, StagedCache)
        if cache is None:
            stages = [Stage(start) for start in starts]
        else:
            stages = StagedCache.adopt(cache, starts).stages
            cache.expects_a_call, cache.tells_all_columns = True, False
        if filled_before and padding_mask is not None:
            # The plain model filled it: all layers hold the same keys, so all stages get the caller's mask.
            for stage in stages:
                stage.key_mask = padding_mask[:, :past].bool()
        return stages

    def _is_plain_step(self, hidden: torch.Tensor) -> bool:
        """True where nothing of a decoding step differs between the stages but the lengths of their caches:
        every layer sees all its keys without a mask, and positions go on as they came. Most are such. Their
        masks are made here; those of an attached model's layers only when one is handed its own."""
        if self.compression.positions == "compact" or any(s.key_mask is not None for s in self._stages):
            return False
        self._masks = self._masks_of(range(self.decoder.config.num_hidden_layers), hidden, None)
        return all(mask is None for mask in self._masks.values())

    def _number_columns(self, position_ids, past: int, hidden: torch.Tensor) -> None:
        """Positions and rotary embeddings of this call's columns."""
        self._text_positions, self._positions = self._split(position_ids, past, hidden)
        self._rotary = self.decoder.rotary_emb(hidden, self._positions)

    def _padding_counted(self, position_ids, device) -> torch.Tensor | None:
        """(B, 1): how many columns of padding before a row its positions count, so that the row alone would
        have them lower by as many. None where none do, or nobody asks for keys, which have positions in them.

        A caller who gives each row its own positions knows what they count. But some models hand all rows the
        same ones, and transformers does where none are given.
        """
        first = [[row.first] for row in self.tokens.columns.rows]
        if not self.compression.compares_keys or not any(map(any, first)):
            return None
        padding = on_device(first, device, torch.long)
        if position_ids is None:
            return padding
        if position_ids.ndim != 2 or len(position_ids) > 1:
            return None
        own = position_ids[0]
        return padding * (own[padding] - own[0] == padding)

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

    def _enter(self, number: int, hidden: torch.Tensor) -> None:
        """Make stage ``number`` the current one: its keys are those its layers already hold and this call's
        columns."""
        self._number, stage = number, self._stages[number]
        ends = [later.first_layer for later in self._stages[number + 1 :]]
        layers = range(stage.first_layer, min(ends, default=self.decoder.config.num_hidden_layers))
        padded = stage.key_mask is not None or self._valid is not None
        past = self._past(stage) if padded or self.tokens is not None else 0
        if self.tokens is not None:
            self._held.append((hidden.shape[1], self.tokens.row_lengths, past))
        if not layers:
            if self.compression.positions == "compact":
                self._renumber(stage, hidden)
            return  # another compression comes before the next layer, or no layer follows: no mask is needed
        if number and self.tokens is not None and self._valid is not None:
            self._check_gaps(layers)
        # The rows of a stage need not be padded where those of another are: after a compression rows are of
        # other lengths, and the keys of earlier calls were shortened with theirs. So each stage grows its own
        # key mask, here, by the columns that its layers are about to append.
        stage.key_mask = joined(stage.key_mask, self._valid, (past, hidden.shape[1]), hidden)
        self._masks = self._masks_of(layers, hidden, stage.key_mask)
        if self.compression.positions == "compact":
            self._renumber(stage, hidden)

    def _check_gaps(self, layers: range) -> None:
        """Raise ValueError where compression put padding between the columns of a row and those of earlier
        calls, and these layers are not indifferent to it."""
        past, columns, mask = self._held[0][2], self.tokens.columns, self._padding_mask
        padded = [b for b, length in enumerate(columns.lengths) if 0 < length < columns.width]
        why = why_gaps_count(self.decoder.config, layers) if past and padded else ""
        if why and (mask is None or bool(mask[padded, :past].any())):
            raise ValueError(
                "the rows of this batch come to differ in length in a later call on the same cache of this"
                f" model: {why} the padding that lies between; call its rows one by one, and leave"
                " prefill_chunk_size unset"
            )

    def _masks_of(self, layers: range, hidden: torch.Tensor, key_mask) -> dict:
        """The attention masks of a stage's layers, by their kind of attention."""
        # No position ids: flash attention takes their gaps for the borders of packed sequences.
        return attention_masks(self.decoder.config, layers, hidden, key_mask, None, self.cache)

    def _past(self, stage: Stage) -> int:
        """Columns that a stage's layers already hold."""
        if self.cache is None:
            return 0
        ends = [later.first_layer for later in self._stages if later.first_layer > stage.first_layer]
        end = min(ends, default=self.decoder.config.num_hidden_layers)
        return self.cache.columns_of(range(stage.first_layer, end))

    def _renumber(self, stage: Stage, hidden: torch.Tensor) -> None:
        """Compact positions: a stage counts its own columns on from where it stood, and remembers its lag.

        What comes after the call stands after the last of these columns, whatever the last columns of the
        prompt were.
        """
        positions = self._compact_positions(stage, hidden)
        if self.tokens is not None:
            if self._last is None:
                self._last = self._of_valid(self._positions, last=True)
            stage.shift = self._last - self._of_valid(positions, last=True)
        self._compact = positions
        self._rotary = self.decoder.rotary_emb(hidden, positions)

    def _of_valid(self, positions: torch.Tensor, last: bool) -> torch.Tensor:
        """(B, 1): the first or the last of the valid columns' ``positions`` (B or 1, S); any one of a row
        without, in which nothing has a place yet."""
        if self._valid is None:
            return positions[:, -1:] if last else positions[:, :1]
        place = torch.arange(self._valid.shape[1], device=positions.device)
        if last:
            column = torch.where(self._valid, place, 0).amax(1)
        else:
            column = torch.where(self._valid, place, len(place) - 1).amin(1)
        return positions.expand(len(self._valid), -1).gather(1, column[:, None])

    def _compact_positions(self, stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        original = self._positions.expand(len(hidden), -1)
        lag = 0 if stage.shift is None else stage.shift
        if self.tokens is None:
            return original - lag
        valid = torch.ones_like(original) if self._valid is None else self._valid.long()
        if self._first is None:
            self._first = self._of_valid(original, last=False)
        return self._first - lag + (valid.cumsum(1) - 1).clamp(min=0)

    def inputs(self, layer: int, hidden: torch.Tensor) -> dict:
        """Keyword arguments of decoder layer ``layer``, which gets ``hidden`` (B, S, D): mask, positions,
        cache and, at a compression layer, the probe."""
        mask = self._masks[self._kinds[layer]]
        given = {"attention_mask": mask, "position_embeddings": self._rotary, **cache_argument(self.cache)}
        if self.compression is None:
            return {**given, "position_ids": self._text_positions}
        if self._asks(layer, hidden):
            given["score_probe"] = self._probe
        return {**given, "position_ids": None}

    def _asks(self, layer: int, hidden: torch.Tensor) -> bool:
        """Make the probe of a compression layer, which gets ``hidden``; True where that layer itself answers
        it."""
        self._probe = None
        if self.tokens is None:
            return False
        step = next((step for step in self._schedule if step.layer == layer), None)
        if step is None or not step.scores:
            return False
        self._probe = score.Probe(self.tokens.queries.columns, self._stages[self._number].key_mask)
        self._probe.over_heads, self._probe.wants_keys = self.tokens.over_heads, step.part.compares_keys
        if step.part.score_layer == "next":
            return False
        self._probe.keys = self._keys_alone(layer, hidden)
        return True

    def _keys_alone(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """(B, S, C): the keys that a layer would make of ``hidden``, which goes into it, did the positions of
        each row not count its padding; None where they do not, or the probe wants no keys."""
        if self._counted is None or not self._probe.wants_keys:
            return None
        rotary = self._rotary_alone(hidden)
        if rotary is None:
            return None
        probe = score.Probe(range(1), None)
        probe.wants_keys = True
        self._ask_layer(layer, hidden, rotary, probe)
        return probe.keys

    def _rotary_alone(self, hidden: torch.Tensor):
        """The rotary embeddings of each row of a padded batch as the row alone has them."""
        positions = self._positions if self._compact is None else self._compact
        return self.decoder.rotary_emb(hidden, positions - self._counted)

    def compress(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the next layer gets: ``hidden`` (B, S, D) itself, or a shorter sequence after a compression
        layer. ``layer`` :data:`~libra.places.BEFORE` is the input: ``hidden`` are the embeddings."""
        for step in self._schedule:
            if step.layer == layer:
                hidden = self._compress(step, hidden)
        return hidden

    def _compress(self, step: Step, hidden: torch.Tensor) -> torch.Tensor:
        if self.tokens is None:
            self._enter(self._number + 1, hidden)
            return hidden
        if step.part.score_layer == "next" and step.scores:
            self._score_with(step.layer + 1, hidden)
        spans, columns = self.tokens.span_lengths, hidden.shape[1]
        # The probe read the attention on all keys of the stage; those of this call come last.
        attention = self._probe.attention[:, :, -columns:] if step.scores else None
        if step.part.compares_keys:
            with torch.no_grad():
                self.tokens.deep = Deep(self._probe.keys[:, -columns:], final_norm(self.decoder)(hidden))
        hidden, shortened, outcome = self.tokens.compress(hidden, attention)
        if self.recorder is not None:
            self.recorder.add(step.layer, outcome, spans)
        if step.layer == BEFORE and self.cache is not None:
            self.cache.lag += columns - hidden.shape[1]
        with profiled("libra.gather"):
            self._follow(shortened, hidden)
            self._enter(self._number + 1, hidden)
        return hidden

    def _follow(self, shortened: Shortened, hidden: torch.Tensor) -> None:
        """Shorten what the engine keeps for each column of this call, of which ``hidden`` are left."""
        self._valid = shortened.valid
        if self._positions is None:
            return  # an attached model's original positions: its layers are handed theirs
        self._positions = shortened.gather(self._positions, dim=-1)
        if self.compression.positions == "centre":
            self._positions = self.tokens.centred(self._positions, self._starts)
            self._rotary = self.decoder.rotary_emb(hidden, self._positions)
        elif self.compression.positions == "original":  # compact ones are counted anew
            self._rotary = tuple(shortened.gather(table) for table in self._rotary)

    def _score_with(self, layer: int, hidden: torch.Tensor) -> None:
        """Answer the probe with the next layer, whose keys of earlier calls are those of its own, shorter
        stage."""
        stage, rotary, past_keys = self._stages[self._number + 1], self._rotary, None
        if self.cache is not None and self.cache.get_seq_length(layer_idx=layer):
            held = self.cache.layers[layer]
            past_keys = held.keys
            for attention in attention_modules(self.decoder.layers[layer]):
                if hasattr(attention, "expand_kv"):  # latent attention holds what its heads' keys are made of
                    past_keys = attention.expand_kv(held.keys, held.values)[0]
            if self.compression.positions == "compact":
                rotary = self.decoder.rotary_emb(hidden, self._compact_positions(stage, hidden))
        lengths = self._past(stage), hidden.shape[1]
        self._probe.key_mask = joined(stage.key_mask, self._valid, lengths, hidden)
        self._probe.past_keys = past_keys
        self._probe.keys = self._keys_alone(layer, hidden)
        self._ask_layer(layer, hidden, rotary, self._probe)

    def _ask_layer(self, layer: int, hidden: torch.Tensor, rotary, probe: score.Probe) -> None:
        """Answer a probe with the queries and keys that a layer makes of ``hidden``, which goes into it."""
        given = {"position_embeddings": rotary, "attention_mask": None, "score_probe": probe}
        score.ask_layer(self.decoder.layers[layer], hidden, given, probe)

    def stats(self) -> dict:
        """Of a call with visual tokens, once it is through.

        ``given`` [row]: the prompt's visual tokens; ``visual_tokens`` [layer][row], without compensation
        tokens; ``compensation_tokens`` [layer][row], added after that layer; ``compensation_at_input`` [row],
        added before layer 0; ``columns``: for each row those that are left after the last layer, text and
        all; ``padding``: the side on which such rows are padded, None where none is; ``cache``: bytes that
        the KV cache holds after the call (None without one), and how they split up into ``visual``,
        ``compensation``, ``text`` and ``padding`` columns of this call, the ``earlier`` ones, the ``window``
        of layers that hold their newest columns only, and the ``state`` of layers that hold no columns, where
        there are any; ``cache_plain``: bytes that it would hold without compression.
        """
        layers = self.decoder.config.num_hidden_layers
        boundaries = [step.layer for step in self._schedule]
        counts, added = self.tokens.counts, dict(zip(boundaries, self.tokens.compensated))
        stage_of = [sum(layer > boundary for boundary in boundaries) for layer in range(layers)]
        # A cache that was emptied may have had more layers in another model.
        sizes = [] if self.cache is None else [bytes_of(layer) for layer in self.cache.layers[:layers]]
        return {
            "given": counts[0],
            "visual_tokens": [counts[stage] for stage in stage_of],
            "compensation_tokens": [[int(c) for c in added.get(layer, [])] for layer in range(layers)],
            "compensation_at_input": [int(c) for c in added.get(BEFORE, [])],
            "columns": self.tokens.row_lengths,
            "padding": self.tokens.padding,
            "cache": None if self.cache is None else self._cache_bytes(stage_of, sizes),
            "cache_plain": None if self.cache is None else self._plain_cache_bytes(sizes),
        }

    def _plain_cache_bytes(self, sizes: list[int]) -> int:
        """Bytes of a cache whose layers hold all columns, or as many as their window takes; ``sizes``: what
        its layers hold now."""
        columns, _, past = self._held[0]
        total = 0
        for layer, size in zip(self.cache.layers, sizes):
            if not holds_keys(layer):
                total += size
                continue
            held = layer.keys.shape[-2]
            window = getattr(layer, "sliding_window", None)
            whole = past + columns if window is None else min(past + columns, max(held, window - 1))
            total += size * whole // held
        return total

    def _cache_bytes(self, stage_of: list[int], sizes: list[int]) -> dict[str, int]:
        split = dict.fromkeys(("visual", "compensation", "text", "padding", "earlier", "window"), 0)
        total = sum(sizes)
        for layer, stage, size in zip(self.cache.layers, stage_of, sizes):
            if not holds_keys(layer):
                split["state"] = split.get("state", 0) + size
                continue
            columns, lengths, past = self._held[stage]
            batch, held = len(lengths), layer.keys.shape[-2]
            if held < past + columns:
                split["window"] += size
                continue
            visual = sum(self.tokens.counts[stage])
            compensation = sum(map(sum, self.tokens.compensated[:stage]))
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
        return None if self.tokens is None else self.tokens.labels
