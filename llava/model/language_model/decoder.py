"""What the language models share: the decoder's loop with the compression in it, and the head with the
loss."""

from dataclasses import dataclass

import torch
from torch import nn

from libra import Compression
from libra.engine.forward import CompressedForward
from libra.engine.tokens import Prefill, check_kept
from libra.engine.trace import Recorder
from libra.engine.transformers_api import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    DynamicCache,
    PreTrainedModel,
    cache_argument,
    cache_of,
    can_return_tuple,
    capture_outputs,
    merge_with_config_defaults,
    one_cache,
)
from libra.places import BEFORE

from ..llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """What the decoder returns; ``labels`` (B, S') belong to the columns that are left of the input's."""

    labels: torch.LongTensor | None = None


class LlavaDecoder(LlavaMetaModel):
    """Mixed into a decoder of transformers: the compression between its layers (the paper's Figure 2)."""

    compression: Compression | None = None
    trace = False  # whether to record what becomes of each visual token
    last_stats: dict | None = None
    recorder: Recorder | None = None

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        prefill: Prefill | None = None,
        cache=None,
        **kwargs,
    ) -> DecoderOutput:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(past_key_values, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        forward = CompressedForward(
            self, self.compression, hidden, attention_mask, position_ids, cache, prefill
        )
        hidden = forward.compress(BEFORE, hidden)  # at the input, the place before layer 0
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, **forward.inputs(i, hidden), use_cache=use_cache, **kwargs)
            hidden = forward.compress(i, hidden)  # after a compression layer the sequence is shorter

        labels = None if prefill is None else prefill.labels
        if forward.tokens is not None:
            self.last_stats, self.recorder, labels = forward.stats(), forward.recorder, forward.labels
        return DecoderOutput(last_hidden_state=self.norm(hidden), labels=labels, **cache_argument(cache))


class LlavaCausalLM(LlavaMetaForCausalLM):
    """Mixed into a causal language model of transformers, whose decoder becomes a ``decoder_class``.

    ``set_compression`` switches the compression of visual tokens on and off.
    """

    decoder_class: type[LlavaDecoder]
    _keys_to_ignore_on_load_unexpected = [
        r"^model\.vision_tower\."
    ]  # a tower that was not tuned loads its own

    def __init__(self, config):
        PreTrainedModel.__init__(
            self, config
        )  # not the language model's own, which would build a plain decoder first
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        images=None,
        image_sizes=None,
        visual_mask=None,
        score_columns=None,
        row_seeds=None,
        seen=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with ``labels``, the loss.

        Args:
            input_ids: (B, S) with a placeholder (-200) where an image goes; ``images`` gives one per
                placeholder and one per text-only row, in the form that :meth:`image_features` takes.
            image_sizes: each image's (width, height) in pixels, for models that cut images into tiles.
            inputs_embeds: (B, S, D) instead of both; ``visual_mask`` (B, S) bool then says which columns are
                visual tokens.
            labels: (B, S), -100 where nothing is supervised. They shorten with the sequence.
            seen: what the vision tower says about the visual tokens, where a method of the compression reads
                it.
            score_columns: (B,), the column whose attention scores the visual tokens, if not the row's last
                prompt token.

        Returns:
            logits (B, S', vocabulary) of the columns that are left after the last compression layer, padded
            on the side of the input: with ``images`` that of the configuration's ``tokenizer_padding_side``.
        """
        padding_side = None
        if inputs_embeds is None and images is not None:
            spliced = self.splice(input_ids, attention_mask, labels, images, image_sizes)
            input_ids, inputs_embeds, visual_mask = None, spliced.embeds, spliced.visual
            attention_mask, labels, row_seeds = spliced.mask, spliced.labels, spliced.row_seeds
            seen = spliced.seen
            padding_side = self.padding_side
        prefill = None
        if visual_mask is not None:
            prefill = Prefill(
                visual_mask, labels, score_columns, row_seeds, padding_side, self.model.trace, seen
            )
            if self.model.compression is not None and self.model.compression.compresses:
                check_kept(logits_to_keep)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefill=prefill,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels if prefill is None else output.labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_argument(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
