"""What every LLaVA model shares, whatever its language model: vision tower, projector, image features among
text embeddings."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from libra import Compression, Context
from libra.engine.relevance import Asked, ClipRelevance
from libra.engine.shrunk import Shrunk
from libra.engine.tokens import Seen
from libra.engine.tower import (
    RELEVANCE,
    Left,
    Look,
    Wants,
    compress_pictures,
    context_of,
    grids_of,
    left_of_rows,
)
from libra.engine.trace import RowTrace
from libra.engine.transformers_api import cache_argument, check_guesses, one_cache
from libra.places import BEFORE, TOWER
from libra.rows import compression_from

from ..constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .anyres import MERGE_TYPES, arrange_tiles
from .multimodal_encoder.builder import build_vision_tower
from .multimodal_projector.builder import build_vision_projector


class LlavaMetaModel:
    """Mixed into a decoder: adds the vision tower and the projector that the configuration names, and the
    newline of anyres."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)


@dataclass
class Spliced:
    """Text and images in one sequence: everything is (B, S), ``embeds`` (B, S, D), padded on one side."""

    embeds: torch.Tensor
    mask: torch.Tensor  # bool
    labels: torch.Tensor | None
    visual: torch.Tensor  # bool, True at visual tokens
    row_seeds: torch.Tensor  # (B,), a hash of the row's text, for pseudo-random selection
    seen: Seen | None = None  # what the vision tower says about the visual tokens, where a method asks


@dataclass
class Picture:
    """The visual tokens (N, D) of one picture; ``look``: what the vision tower says about them, where a
    method asks; ``left``: what a compression in the tower left of them, where ``tokens`` are 0 at the
    others."""

    tokens: torch.Tensor
    look: Look | None = None
    left: Left | None = None


class LlavaMetaForCausalLM:
    """Mixed into a causal language model whose ``model`` is a :class:`LlavaMetaModel`."""

    placeholders: tuple[int, ...] = (IMAGE_TOKEN_INDEX,)  # the token ids that visual tokens take the place of
    tells_of_tokens = (
        True  # whether each visual token is a feature of the tower, which the projector maps by itself
    )
    takes_videos = False  # whether one of them stands for a video
    clip: ClipRelevance | None = None  # says how relevant visual tokens are for the question
    _clip_source: tuple[str, object] | None = None

    @property
    def length_limit(self) -> int | None:
        """Text and visual tokens of a row; what comes after is cut."""
        return getattr(self.config, "tokenizer_model_max_length", None)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt with its visual tokens: :attr:`length_limit`, where the decoder has that many
        positions."""
        positions = self.config.max_position_embeddings
        return min(self.length_limit or positions, positions)

    @property
    def padding_side(self) -> str:
        """Where rows are padded outside ``generate``."""
        return getattr(self.config, "tokenizer_padding_side", "right")

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def set_compression(
        self, compression: Compression | Mapping | str | None, trace: bool = False, **keys
    ) -> None:
        """Compress visual tokens from the next prefill on; None switches it off. ``trace``: record what
        becomes of each token.

        compression, keys: as :func:`libra.rows.compression_from` takes them, such as ``"fastv", ratio=0.5``.

        Raises:
            libra.config.ConfigError: if it is none, or a compression layer is not a layer of this model.
            ValueError: if a method needs what this model's vision tower cannot give.
        """
        if compression is not None:
            compression = compression_from(compression, **keys).at_depth(self.config.num_hidden_layers)
            if Wants.of(compression, has_cls=True) is not None and not self.tells_of_tokens:
                raise ValueError(
                    f"{compression.name}: this model's projector joins features of the vision tower, so the"
                    " tower says nothing about single visual tokens; choose a method that reads embeddings"
                )
            if RELEVANCE in compression.needs:
                self._find_clip(compression)
        self.model.compression, self.model.trace = compression, trace
        self.model.last_stats = self.model.recorder = None

    def name_clip(self, checkpoint: str, tokenizer) -> None:
        """Say where the whole CLIP is that the vision tower is a part of (a folder or hub name), and which
        tokenizer a prompt's ids come from; it is read when a method first asks how relevant tokens are."""
        self.clip, self._clip_source = None, (checkpoint, tokenizer)

    def _find_clip(self, compression: Compression) -> None:
        source, self._clip_source = self._clip_source, None
        if source is None or not self.tells_of_tokens:
            return
        try:
            self.clip = ClipRelevance.load(*source)
        except ValueError as error:
            warnings.warn(
                f"{compression.name} compares with the question's text embeddings instead of CLIP's: {error}",
                stacklevel=3,
            )

    @property
    def compression(self) -> Compression | None:
        return self.model.compression

    @property
    def compression_stats(self) -> dict | None:
        """Of the last prefill with images, as :meth:`libra.engine.forward.CompressedForward.stats` gives it;
        None before it."""
        return self.model.last_stats

    @property
    def compression_trace(self) -> list[RowTrace] | None:
        """What became of each visual token of the last prefill with images, for each row; only with
        ``trace=True``."""
        return None if self.model.recorder is None else self.model.recorder.rows()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) pixels to (I, N, D) visual tokens."""
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    def image_features(self, images, image_sizes=None) -> list[torch.Tensor]:
        """The visual tokens (N_i, D) of each image; the pictures of an entry (n, 3, H, W) become one run of
        tokens.

        Args:
            images: (I, 3, H, W), (I, n, 3, H, W) or a list of (3, H, W) or (n, 3, H, W) tensors.
            image_sizes: (width, height) of each image in pixels, where the configuration's
                ``mm_patch_merge_type`` is spatial.

        Raises:
            ValueError: if sizes are missing or do not fit the pictures, or the configuration asks for another
                way of merging.
        """
        pixels, counts, arrange = self._tiles(images, image_sizes)
        tokens = self.encode_images(pixels).split(counts)
        newline = getattr(self.model, "image_newline", None)
        return [arrange(number, part, newline) for number, part in enumerate(tokens)]

    def pictures(self, images, image_sizes=None) -> list[Picture]:
        """The visual tokens of each image, as :meth:`image_features` gives them, with what the compression's
        methods ask of the vision tower.

        Raises:
            ValueError: as :meth:`image_features` does.
        """
        wants = Wants.of(self.compression, has_cls=True, clip=self.clip is not None)
        if wants is None:
            return [Picture(tokens) for tokens in self.image_features(images, image_sizes)]
        pixels, counts, arrange = self._tiles(images, image_sizes)
        tower, depth = self.get_vision_tower(), self.config.num_hidden_layers
        view = tower.view(pixels, wants, Shrunk.of(self.compression, depth, tower.num_patches_per_side))
        grid = None
        if "grid" in wants.fields:

            def grid(number, outside):
                return grids_of(outside, counts[number], tower.num_patches_per_side)

        looks = view.looks(counts, lambda i, x: arrange(i, x, torch.zeros_like(x[0, 0])), grid)
        schedule = self.compression.schedule(depth)
        step = next((step for step in schedule if step.part.at == TOWER), None)
        lefts = [None] * len(looks) if step is None else compress_pictures(step, looks)
        plain = [left is None for left in lefts]
        tiles = view.hidden
        if not all(plain):
            tiles = torch.cat(
                [part for part, whole in zip(tiles.split(counts), plain) if whole] or [tiles[:0]]
            )
        projector, newline = self.get_model().mm_projector, getattr(self.model, "image_newline", None)
        whole = iter(projector(tiles).split([count for count, is_plain in zip(counts, plain) if is_plain]))
        shortened = iter(self._project([left for left in lefts if left is not None]))
        found = []
        for number, (one, left) in enumerate(zip(looks, lefts)):
            if left is None:
                found.append(Picture(arrange(number, next(whole), newline), one))
                continue
            tokens = next(shortened)
            places = tokens.new_zeros(len(one), tokens.shape[1])
            found.append(Picture(places.index_copy(0, left.columns, tokens), one, left))
        return found

    def _project(self, lefts: list[Left]) -> list[torch.Tensor]:
        """What is left of each picture, through the projector: (T, D) each; newlines stay what they are."""
        if not lefts:
            return []
        features, outside = (
            torch.cat([getattr(left, name) for left in lefts]) for name in ("tokens", "outside")
        )
        tokens = self.get_model().mm_projector(features)
        newline = getattr(self.model, "image_newline", None)
        if newline is not None:
            tokens = torch.where(outside[:, None], newline.to(tokens), tokens)
        return list(tokens.split([len(left.columns) for left in lefts]))

    def visual_tokens(self, images, image_sizes=None) -> list[int]:
        """How many visual tokens :meth:`image_features` makes of each image, counted without running the
        vision tower."""

        tower = self.get_vision_tower()
        pixels, counts, arrange = self._tiles(images, image_sizes)
        patches = tower.num_patches + (tower.select_feature == "cls_patch")
        newline = getattr(self.model, "image_newline", None)
        tokens = torch.empty(len(pixels), patches, self.config.hidden_size, device="meta").split(counts)
        return [len(arrange(number, part, newline)) for number, part in enumerate(tokens)]

    def _tiles(self, images, image_sizes) -> tuple[torch.Tensor, list[int], Callable]:
        """The tower's inputs (T, 3, H, W), how many each image has, and the way from something about an
        image's tiles (n, P, W) to its visual tokens (N, W): ``arrange(image's number, tiles, newline
        (W,))``."""
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            return images, [1] * len(images), lambda number, tiles, newline: tiles[0]
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge not in MERGE_TYPES:
            raise ValueError(
                f"mm_patch_merge_type {merge!r} is unknown; use one of {', '.join(MERGE_TYPES)} in the"
                " checkpoint's config.json"
            )
        groups = [image[None] if image.ndim == 3 else image for image in images]
        if merge != "flat" and any(len(group) > 1 for group in groups):
            self._check_tiles(groups, image_sizes)
        else:
            image_sizes = [None] * len(groups)
        pinpoints = getattr(self.config, "image_grid_pinpoints", None)
        edge = self.get_vision_tower().config.image_size

        def arrange(number, tiles, newline):
            return arrange_tiles(tiles, merge, image_sizes[number], pinpoints, edge, newline)

        return torch.cat(groups), [len(group) for group in groups], arrange

    def _check_tiles(self, groups, image_sizes) -> None:
        aspect = getattr(self.config, "image_aspect_ratio", None)
        if aspect != "anyres":
            raise ValueError(
                "images of several tiles need image_aspect_ratio 'anyres' in the checkpoint's config.json,"
                f" not {aspect!r}"
            )
        if image_sizes is None or len(image_sizes) != len(groups):
            given = "none" if image_sizes is None else len(image_sizes)
            raise ValueError(
                f"{len(groups)} images cut into tiles need as many image_sizes, each (width, height);"
                f" {given} given"
            )

    def _held_places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) bool, True at placeholders."""
        return torch.isin(input_ids, torch.tensor(self.placeholders, device=input_ids.device))

    def splice(
        self, input_ids, attention_mask=None, labels=None, images=None, image_sizes=None, padding_side=None
    ) -> Spliced:
        """Put the visual tokens in the place of every -200 and pad the rows anew.

        Args:
            input_ids: (B, S) with a placeholder for an image; a row without one takes an (ignored) image off
                the list too.
            attention_mask: (B, S), 0 for padding; None if there is none.
            padding_side: "left" or "right"; the configuration's ``tokenizer_padding_side`` where None.

        Rows longer than :attr:`length_limit` are cut.

        Raises:
            ValueError: if there are not as many images as places for them, or ids that are neither tokens nor
                placeholders.
        """
        features = self.pictures(images, image_sizes)
        held = self._held_places(input_ids)
        needed = int(held.sum(1).clamp(min=1).sum())
        if needed != len(features):  # one too many would be shown in the next row's place
            raise ValueError(
                f"the prompts need {needed} images (one for each image token and one, ignored, for each "
                f"text-only row) but {len(features)} were given; pass as many as there are image tokens"
            )
        embed = self.get_input_embeddings()
        mask = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        if bool(((input_ids < 0) & ~held & mask).any()):
            raise ValueError(
                f"input_ids has negative ids other than this model's placeholders {list(self.placeholders)};"
                " correct the prompt"
            )
        rows = {"embeds": [], "visual": [], "labels": [], "seeds": [], "pictures": [], "asked": []}
        queue = iter(features)
        for b in range(len(input_ids)):
            ids = input_ids[b][mask[b]]
            targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[b][mask[b]]
            places = held[b][mask[b]].nonzero().flatten().tolist()
            # A text-only row holds an empty slice of its image, so that the projector is in its graph on
            # every training rank.
            shown = [next(queue) for _ in places or [None]]
            pictures = [one.tokens if places else one.tokens[:0] for one in shown]
            rows["pictures"].append(shown if places else [])
            if self.clip is not None:
                rows["asked"].append(
                    Asked.of(ids.tolist(), held[b][mask[b]].tolist(), (targets != IGNORE_INDEX).tolist())
                )
            text = embed(ids.clamp(min=0))
            cuts = list(zip([0, *(p + 1 for p in places)], [*places, len(ids)]))
            pieces, kinds, goals = [], [], []
            for i, (start, stop) in enumerate(cuts):
                pieces.append(text[start:stop])
                goals.append(targets[start:stop])
                kinds.append(torch.zeros(stop - start, dtype=torch.bool, device=ids.device))
                if i < len(pictures):
                    pieces.append(pictures[i].to(text.device, text.dtype))
                    goals.append(targets.new_full((len(pictures[i]),), IGNORE_INDEX))
                    kinds.append(torch.ones(len(pictures[i]), dtype=torch.bool, device=ids.device))
            rows["embeds"].append(torch.cat(pieces)[: self.length_limit])
            rows["visual"].append(torch.cat(kinds)[: self.length_limit])
            rows["labels"].append(torch.cat(goals)[: self.length_limit])
            rows["seeds"].append((ids * torch.arange(1, len(ids) + 1, device=ids.device)).sum())

        side = padding_side or self.padding_side

        def padded(parts, value):
            return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

        return Spliced(
            embeds=padded(rows["embeds"], 0.0),
            mask=padded(
                [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows["embeds"]], False
            ),
            labels=None if labels is None else padded(rows["labels"], IGNORE_INDEX),
            visual=padded(rows["visual"], False),
            row_seeds=torch.stack(rows["seeds"]),
            seen=self._seen(rows["pictures"], rows["asked"]),
        )

    def _seen(self, rows: list[list[Picture]], asked: list[Asked]) -> Seen | None:
        """What the vision tower says about the visual tokens of each row, and which pictures they are of;
        None where no method asks and nothing is compressed before the language model."""
        shown = [one for row in rows for one in row]
        looked = any(one.look is not None for one in shown)
        layers = () if self.compression is None else self.compression.layers
        if not shown or not looked and BEFORE not in layers:
            return None
        lengths = [[len(one.tokens) for one in row] for row in rows]
        left, context = None, Context()
        if looked:
            context = context_of([[one.look for one in row] for row in rows])
            if self.clip is not None and RELEVANCE in self.compression.needs:
                context = self.clip.add_to(context, asked)
        if any(part.at == TOWER for part in self.compression.parts):
            pairs = [[(len(one.tokens), one.left) for one in row] for row in rows]
            left = left_of_rows(pairs, shown[0].tokens.device)
        return Seen(context, lengths, left)

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """The original's preparation: (None, position_ids, attention_mask, past_key_values, inputs_embeds,
        labels).

        What comes in as None goes out as None; the mask keeps its dtype. Without images, or for a single
        token of a decoding step, everything is returned as it came. It does not tell which columns are visual
        tokens: :meth:`splice` does.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        spliced = self.splice(input_ids, attention_mask, labels, images, image_sizes)
        if position_ids is not None:
            position_ids = (spliced.mask.long().cumsum(1) - 1).clamp(min=0)
        mask = None if attention_mask is None else spliced.mask.to(attention_mask.dtype)
        return None, position_ids, mask, past_key_values, spliced.embeds, spliced.labels

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        images=None,
        image_sizes=None,
        attention_mask=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        """Answer a batch of prompts; returns only the new token ids.

        Args:
            inputs: (B, S) ids with a placeholder (-200) where an image goes, padded on either side.
            images: one per placeholder and one (ignored) per text-only row, as :meth:`image_features` takes
                them; None if no row has an image.
            image_sizes: (width, height) of each image in pixels, for models that cut images into tiles.
            attention_mask: (B, S), 0 for padding.
            past_key_values, cache: by either name, a ``DynamicCache`` to keep a conversation in. In a later
                turn it holds the turns before, and ``inputs``, ``images`` and ``attention_mask`` are only the
                new turn's. What was compressed stays as it is; the new images' visual tokens are compressed
                by the new turn's last token. One conversation at a time.
            kwargs: transformers' generation arguments.

        Raises:
            ValueError: without token ids, for more or fewer images than places, with compression on and no
                image (but in a conversation, whose images may come later), for a prompt longer than
                :attr:`length_limit`, for a later turn of several rows, beams or sequences, for two caches,
                where the prompt would be read in pieces, or for assisted generation with transformers 5.17,
                which gives wrong tokens.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or "inputs_embeds" in kwargs:
            raise ValueError(
                "generate needs token ids: embeddings do not tell which columns are visual tokens"
            )
        check_guesses(kwargs)
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size: a llava model reads its prompt in one piece; leave it out")
        cache = one_cache(past_key_values, cache)
        past = 0 if cache is None else cache.get_seq_length()
        if past:
            self._check_later_turn(inputs, kwargs)
        self._check_length(inputs, attention_mask, images, image_sizes, past)
        if images is None:
            if bool(self._held_places(inputs).any()):
                raise ValueError("the prompt has an image token but no image was given; pass images=")
            if cache is None and self.compression is not None and self.compression.layers:
                raise ValueError(
                    "compression is on but there is no image to compress; pass images, or switch it off"
                )
            if past and attention_mask is not None:
                inputs, attention_mask = inputs[:, attention_mask[0].bool()], None
            kwargs.update(inputs_embeds=self.get_input_embeddings()(inputs), attention_mask=attention_mask)
        else:
            spliced = self.splice(inputs, attention_mask, None, images, image_sizes, padding_side="left")
            kwargs.update(
                inputs_embeds=spliced.embeds,
                attention_mask=spliced.mask.long(),
                visual_mask=spliced.visual,
                row_seeds=spliced.row_seeds,
                seen=spliced.seen,
            )
        if past:  # the cache's tokens and the new ones, none of them padding
            kwargs["attention_mask"] = inputs.new_ones(1, past + kwargs["inputs_embeds"].shape[1])
        if cache is not None:
            kwargs.update(cache_argument(cache))
        return super().generate(**kwargs)

    def _check_length(self, inputs, attention_mask, images, image_sizes, past: int) -> None:
        """Refuse what :meth:`splice` would cut: a question that loses its end gets an answer to something
        else."""
        if self.length_limit is None:
            return
        held = self._held_places(inputs)
        mask = torch.ones_like(inputs, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = (mask & ~held).sum(1) + past
        if images is not None:
            counts = iter(self.visual_tokens(images, image_sizes))
            for row, places in enumerate((mask & held).sum(1).tolist()):
                tokens = [
                    next(counts, 0) for _ in range(places or 1)
                ]  # a row without places takes an image and ignores it
                lengths[row] += sum(tokens) if places else 0
        row = int(lengths.argmax())
        if lengths[row] > self.length_limit:
            raise ValueError(
                f"row {row} of the prompt has {int(lengths[row])} tokens with its visual tokens and the "
                f"model takes {self.length_limit}; shorten the text or give fewer images"
            )

    def _check_later_turn(self, inputs: torch.Tensor, options: dict) -> None:
        defaults = options.get("generation_config") or self.generation_config
        wide = [
            name
            for name in ("num_beams", "num_return_sequences")
            if (options.get(name) or getattr(defaults, name, None) or 1) > 1
        ]
        if len(inputs) > 1 or wide:
            what = f"{len(inputs)} rows" if len(inputs) > 1 else f"{wide[0]} above 1"
            raise ValueError(
                f"a later turn continues one conversation with one answer, and this call has {what};"
                " give each conversation a cache and a call of its own, without beams"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        visual_mask=None,
        row_seeds=None,
        seen=None,
        is_first_iteration=False,
        **kwargs,
    ):
        if (
            is_first_iteration
        ):  # the embeddings are of this turn only: nothing to slice off for what the cache holds
            kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration:  # the visual tokens are all in the prefill
            inputs.update(visual_mask=visual_mask, row_seeds=row_seeds, seen=seen)
        return inputs
