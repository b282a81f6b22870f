"""What every LLaVA model shares, whatever its language model: vision tower, projector, and image features among text embeddings."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from libra import Compression

from ..constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .multimodal_encoder.builder import build_vision_tower
from .multimodal_projector.builder import build_vision_projector


class LlavaMetaModel:
    """Mixed into a decoder: adds the vision tower and the projector that the configuration names."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)


@dataclass
class Spliced:
    """Text and images in one sequence: everything is (B, S), ``embeds`` (B, S, D), padded on one side."""

    embeds: torch.Tensor
    mask: torch.Tensor  # bool
    labels: torch.Tensor | None
    visual: torch.Tensor  # bool, True at visual tokens
    keys: torch.Tensor  # (B,), a number made of the row's own text, for pseudo-random selection


class LlavaMetaForCausalLM:
    """Mixed into a causal language model whose ``model`` is a :class:`LlavaMetaModel`."""

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def set_compression(self, compression: Compression | None) -> None:
        """Compress visual tokens from the next prefill on; None switches it off.

        Raises:
            libra.config.ConfigError: if a compression layer is not a layer of this model.
        """
        if compression is not None:
            compression.check_layers(self.config.num_hidden_layers)
        self.model.compression, self.model.last_stats = compression, None

    @property
    def compression(self) -> Compression | None:
        return self.model.compression

    @property
    def compression_stats(self) -> dict | None:
        """Of the last prefill with visual tokens: ``visual_tokens`` and ``compensation_tokens``, [layer][row]; None before one."""
        return self.model.last_stats

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(I, 3, H, W) pixels to (I, N, D) visual tokens."""
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    def image_features(self, images, image_sizes=None) -> list[torch.Tensor]:
        """The visual tokens (N_i, D) of each image; an entry of several pictures (n, 3, H, W) gives all their tokens in a row.

        ``images`` is (I, 3, H, W), (I, n, 3, H, W) or a list of (3, H, W) or (n, 3, H, W) tensors.
        """
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            return list(self.encode_images(images))
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge != "flat":
            raise ValueError(f"mm_patch_merge_type {merge!r} is not supported by this model class; use a checkpoint with 'flat'")
        groups = [image[None] if image.ndim == 3 else image for image in images]
        tokens = self.encode_images(torch.cat(groups))
        return [part.flatten(0, 1) for part in tokens.split([len(group) for group in groups])]

    def splice(self, input_ids, attention_mask=None, labels=None, images=None, image_sizes=None, padding_side=None) -> Spliced:
        """Put the visual tokens in the place of every -200 and pad the rows anew.

        Args:
            input_ids: (B, S) with -200 for an image; a row without one takes an (ignored) image off the list too.
            attention_mask: (B, S), 0 for padding; None if there is none.
            padding_side: "left" or "right"; the configuration's ``tokenizer_padding_side`` where None.

        Rows longer than the configuration's ``tokenizer_model_max_length`` are cut.

        Raises:
            ValueError: if there are more places for images than images.
        """
        features = self.image_features(images, image_sizes)
        needed = int((input_ids == IMAGE_TOKEN_INDEX).sum(1).clamp(min=1).sum())
        if needed > len(features):
            raise ValueError(
                f"the prompts need {needed} images (one for each image token and one, ignored, for each text-only row)"
                f" but {len(features)} were given; pass as many as there are image tokens"
            )
        embed = self.get_input_embeddings()
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = {"embeds": [], "visual": [], "labels": [], "keys": []}
        queue = iter(features)
        for b in range(len(input_ids)):
            ids = input_ids[b][mask[b]]
            targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[b][mask[b]]
            places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            # A text-only row holds an empty slice of its image, so that the projector is in its graph on every training rank.
            pictures = [next(queue) for _ in places] or [next(queue)[:0]]
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
            rows["embeds"].append(torch.cat(pieces)[:limit])
            rows["visual"].append(torch.cat(kinds)[:limit])
            rows["labels"].append(torch.cat(goals)[:limit])
            rows["keys"].append((ids * torch.arange(1, len(ids) + 1, device=ids.device)).sum())

        side = padding_side or getattr(self.config, "tokenizer_padding_side", "right")

        def padded(parts, value):
            return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

        return Spliced(
            embeds=padded(rows["embeds"], 0.0),
            mask=padded([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows["embeds"]], False),
            labels=None if labels is None else padded(rows["labels"], IGNORE_INDEX),
            visual=padded(rows["visual"], False),
            keys=torch.stack(rows["keys"]),
        )

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """The original's preparation, under its name: (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels).

        What comes in as None goes out as None; the mask keeps its dtype. Without images, or for a single token of a decoding step,
        everything is returned as it came. It does not tell which columns are visual tokens: :meth:`splice` does.
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        spliced = self.splice(input_ids, attention_mask, labels, images, image_sizes)
        if position_ids is not None:
            position_ids = (spliced.mask.long().cumsum(1) - 1).clamp(min=0)
        mask = None if attention_mask is None else spliced.mask.to(attention_mask.dtype)
        return None, position_ids, mask, past_key_values, spliced.embeds, spliced.labels

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, attention_mask=None, **kwargs):
        """Answer a batch of prompts; returns the new token ids alone.

        Args:
            inputs: (B, S) ids with -200 where an image goes, padded on either side.
            images: (I, 3, H, W) pixels, one per -200 and one (ignored) per text-only row; None if no row has an image.
            attention_mask: (B, S), 0 for padding.
            kwargs: transformers' generation arguments.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None or "inputs_embeds" in kwargs:
            raise ValueError("generate needs token ids: embeddings do not tell which columns are visual tokens")
        if images is None:
            if bool((inputs == IMAGE_TOKEN_INDEX).any()):
                raise ValueError("the prompt has an image token but no image was given; pass images=")
            return super().generate(inputs_embeds=self.get_input_embeddings()(inputs), attention_mask=attention_mask, **kwargs)
        spliced = self.splice(inputs, attention_mask, None, images, image_sizes, padding_side="left")
        return super().generate(
            inputs_embeds=spliced.embeds, attention_mask=spliced.mask.long(), visual_mask=spliced.visual, sample_keys=spliced.keys, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, visual_mask=None, sample_keys=None, is_first_iteration=False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration:  # the visual tokens are all in the prefill
            inputs.update(visual_mask=visual_mask, sample_keys=sample_keys)
        return inputs
