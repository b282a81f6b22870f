"""Compression for stock Hugging Face models: ``with libra.attach(model, compression):`` touches one instance alone."""

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .config import Compression
from .passage import Passage
from .registry import ModelSpec


@dataclass(frozen=True)
class Family:
    """Where a model class keeps what the plug-in needs.

    Attributes:
        decoder: dotted path from the model to its text decoder (``layers``, ``norm``, ``rotary_emb``).
        token_ids: names of the configuration's placeholder ids of visual tokens.
    """

    decoder: str
    token_ids: tuple[str, ...]


FAMILIES = {"LlavaForConditionalGeneration": Family("model.language_model", ("image_token_id",))}
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")


class CompressedDecoder:
    """Mixed into a decoder's class while compression is attached: the plain loop over the layers, with the passage in it."""

    compression: Compression
    last_stats: dict | None

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None,
        libra_inputs=None, **kwargs,
    ):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        passage = Passage(self, self.compression, hidden, attention_mask, position_ids, past_key_values, **(libra_inputs or {}))
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, **passage.inputs(i), past_key_values=past_key_values, use_cache=use_cache, **kwargs)
            hidden = passage.compress(i, hidden)
        if passage.stream is not None:
            self.last_stats = passage.stats()
        self.last_labels = passage.labels
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class Attachment:
    """A compression on one model; ``detach`` (or leaving the ``with`` block) gives the model back as it was."""

    def __init__(self, model: PreTrainedModel, compression: Compression):
        family = FAMILIES.get(type(model).__name__)
        if family is None:
            raise ValueError(f"libra.attach does not support {type(model).__name__}; it supports {', '.join(FAMILIES)}")
        decoder = model.get_submodule(family.decoder)
        if isinstance(decoder, CompressedDecoder):
            raise ValueError("a compression is attached to this model already; detach it first")
        if type(decoder).__name__ not in DECODERS:
            name = type(decoder).__name__
            raise ValueError(f"libra.attach does not support {name} decoders; it supports {', '.join(DECODERS)}")
        if getattr(decoder.config, "use_sliding_window", True) and getattr(decoder.config, "sliding_window", None) is not None:
            raise ValueError(
                "libra.attach does not support sliding windows; set sliding_window to None if prompts and answers fit into it"
            )
        compression.check_layers(decoder.config.num_hidden_layers)
        self.model, self.compression, self._decoder = model, compression, decoder
        self._token_ids = [getattr(model.config, name) for name in family.token_ids]
        self._plain_class, self._attention = type(decoder), decoder.config._attn_implementation
        self._labels = None
        # Under the plain class's own name, by which transformers knows how to record hidden states and attentions.
        names = {name: getattr(self._plain_class, name) for name in ("__module__", "__qualname__")}
        decoder.__class__ = type(self._plain_class.__name__, (CompressedDecoder, self._plain_class), names)
        decoder.compression, decoder.last_stats, decoder.last_labels = compression, None, None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, model, args, kwargs):
        """Tell the decoder which columns are visual tokens, and take the labels aside: they become shorter."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            embeds = kwargs.get("inputs_embeds")
            if kwargs.get("pixel_values") is not None or embeds is not None and embeds.shape[1] > 1:
                raise ValueError("libra.attach needs input_ids: embeddings do not tell which columns are visual tokens")
            return None
        self._labels = kwargs.pop("labels", None)
        visual = torch.isin(input_ids, torch.tensor(self._token_ids, device=input_ids.device))
        if input_ids.shape[1] == 1 and kwargs.get("past_key_values") is not None:
            visual = torch.zeros_like(visual)  # the model itself may say a placeholder's id
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            valid = mask[:, -input_ids.shape[1] :].long()
            places = valid.cumsum(1) * valid
            if kwargs.get("past_key_values") is not None and bool((valid[:, -1] == 0).any()):
                raise ValueError(
                    "the prompts are padded on the right; generate needs processor.tokenizer.padding_side = 'left'"
                )
        kwargs["libra_inputs"] = {
            "visual": visual, "labels": self._labels, "keys": (input_ids * places * ~visual).sum(1),
        }
        return args, kwargs

    def _after(self, model, args, kwargs, output):
        if self._labels is not None:
            labels = self._labels if self._decoder.last_labels is None else self._decoder.last_labels
            output.loss = model.loss_function(
                logits=output.logits, labels=labels, vocab_size=self._decoder.config.vocab_size
            )
        self._labels = self._decoder.last_labels = None
        return output

    @property
    def stats(self) -> dict | None:
        """Of the last prefill with visual tokens; None before one.

        ``visual_tokens`` and ``compensation_tokens``: [layer][row]; ``flops``: multiply-accumulates of each row's visual tokens
        by §4.1's formula for the whole tokens of the run; ``flops_ratio``: the same over those of the plain model.
        """
        stats = self._decoder.last_stats
        if stats is None:
            return None
        from .flops import model_flops  # here, so that `python -m libra.flops` finds its module not yet imported

        config = self._decoder.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        spec = ModelSpec(
            name=type(self.model).__name__, layers=config.num_hidden_layers, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, kv_size=head * config.num_key_value_heads, visual_tokens=(1,),
            checkpoint="", conversation="",
        )
        rows = list(zip(*stats["visual_tokens"]))
        flops = [model_flops(spec, row) for row in rows]
        plain = [model_flops(spec, [row[0]] * len(row)) for row in rows]
        ratios = [part / whole if whole else 1.0 for part, whole in zip(flops, plain)]
        return {**stats, "flops": flops, "flops_ratio": ratios}

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if type(self._decoder) is not self._plain_class and isinstance(self._decoder, CompressedDecoder):
            stats = self._decoder.last_stats
            self._decoder.__class__ = self._plain_class
            for name in ("compression", "last_stats", "last_labels"):
                delattr(self._decoder, name)
            self._decoder.config._attn_implementation = self._attention
            self._decoder = _Detached(self._decoder.config, stats)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


@dataclass
class _Detached:
    """What the statistics of an attachment need when the model is no longer its own."""

    config: object
    last_stats: dict | None
    last_labels: None = None


def attach(model: PreTrainedModel, compression: Compression) -> Attachment:
    """Compress the visual tokens of a Hugging Face vision-language model between its decoder layers.

    >>> with libra.attach(model, libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)) as handle:
    ...     ids = model.generate(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    >>> handle.stats["flops_ratio"]

    Batches may be padded on the left (for ``generate``) or on the right (for a forward pass and the loss). The model keeps its
    attention implementation.

    Raises:
        ValueError: for a model that is not supported (the sentence lists those that are) or a layer it does not have.
    """
    return Attachment(model, compression)
