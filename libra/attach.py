"""Compression for stock Hugging Face models: ``with libra.attach(model, compression):`` touches one instance alone."""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType

import torch

from . import hybrid
from .config import Compression
from .passage import MASKS, Passage, attention_kind, fitted
from .registry import spec_of
from .trace import Recorder, RowTrace
from .transformers_api import (
    BaseModelOutputWithPast,
    DynamicCache,
    PreTrainedModel,
    cache_argument,
    cache_given,
    capture_outputs,
    merge_with_config_defaults,
    take_cache,
)


@dataclass(frozen=True)
class Family:
    """Where a model class keeps what the plug-in needs.

    Attributes:
        token_ids: names of the configuration's placeholder ids of visual tokens.
        body: dotted path to the module that puts text and images together; it takes ``input_ids``.
        decoder: dotted path to the text decoder (``layers``, ``norm``, ``rotary_emb``).
    """

    token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    body: str = "model"
    decoder: str = "model.language_model"


_IMAGES_ALONE = Family(token_ids=("image_token_id",))
FAMILIES = {
    "LlavaForConditionalGeneration": _IMAGES_ALONE,
    "LlavaNextForConditionalGeneration": _IMAGES_ALONE,
    "LlavaOnevisionForConditionalGeneration": Family(),
    "VideoLlavaForConditionalGeneration": Family(),
    "Qwen2VLForConditionalGeneration": Family(),
    "Qwen2_5_VLForConditionalGeneration": Family(),
    "Qwen3VLForConditionalGeneration": Family(),
    "InternVLForConditionalGeneration": _IMAGES_ALONE,
}
# Decoders whose forward is the plain loop of CompressedDecoder.
DECODERS = (
    "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel", "Qwen3VLTextModel",
)


@dataclass
class Call:
    """One forward call on its way from the model's outside to its decoder, and back."""

    decoder: torch.nn.Module
    labels: torch.Tensor | None = None
    score_offset: int = 0  # how far before the last column the scoring token stands
    inputs: dict = field(default_factory=dict)  # what the passage is told of the prompt
    stats: dict | None = None  # what came of it, where there was something to compress
    recorder: Recorder | None = None
    outer: "Call | None" = None
    whole: bool = True  # False: the model's body was called by itself


# Beside the models' own arguments, which some of them also hand to their vision towers; each thread has its own.
_CALL: ContextVar[Call | None] = ContextVar("libra_call", default=None)


class CompressedDecoder:
    """Mixed into a decoder's class while compression is attached: the plain loop over the layers, with the passage in it."""

    compression: Compression
    trace: bool

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None,
        visual_pos_masks=None, deepstack_visual_embeds=None, **kwargs,
    ):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = take_cache(cache, kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        call = _CALL.get()
        told = call.inputs if call is not None and call.decoder is self else {}
        passage = Passage(self, self.compression, hidden, attention_mask, position_ids, cache, **told, trace=self.trace)
        deep = () if deepstack_visual_embeds is None else deepstack_visual_embeds  # Qwen3-VL's, before any compression
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden = layer(hidden, **passage.inputs(i), use_cache=use_cache, **kwargs)
            if i < len(deep):
                hidden = self._deepstack_process(hidden, visual_pos_masks, deep[i])
            hidden = passage.compress(i, hidden)
        if passage.stream is not None:
            call.stats, call.recorder, call.labels = passage.stats(), passage.recorder, passage.labels
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **cache_argument(cache))


def _named(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name."""
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(type(module).forward).parameters
    if "args" in parameters:  # peft's wrapper, which hands everything on
        parameters = inspect.signature(type(module.get_base_model()).forward).parameters
    return {**dict(zip(list(parameters)[1:], args)), **kwargs}


class Attachment:
    """A compression on one model; ``detach`` (or leaving the ``with`` block) gives the model back as it was."""

    def __init__(self, model: PreTrainedModel, compression: Compression, trace: bool = False):
        if not isinstance(compression, Compression):
            raise ValueError(f"libra.attach needs a libra.Compression, not {type(compression).__name__}; from_yaml reads files")
        if hasattr(model, "_orig_mod"):
            raise ValueError("this is the wrapper of torch.compile; attach to the model in it first, then compile")
        base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
        name = type(base).__name__
        if name not in FAMILIES:
            raise ValueError(f"libra.attach does not support {name}; it supports {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        decoder = base.get_submodule(family.decoder)
        if isinstance(decoder, CompressedDecoder):
            raise ValueError("a compression is attached to this model already; detach it first")
        compression = _check(decoder, compression, base)
        self.compression, self._base, self._decoder = compression, base, decoder
        ids = [getattr(base.config, token, None) for token in family.token_ids]
        self._token_ids = [token for token in ids if token is not None]
        self._plain_class = type(decoder)
        self._stats: dict | None = None
        self._recorder: Recorder | None = None
        self._marked: torch.Tensor | None = None
        # Under the plain class's own name, by which transformers knows how to record hidden states and attentions.
        names = {name: getattr(self._plain_class, name) for name in ("__module__", "__qualname__")}
        _become(decoder, type(self._plain_class.__name__, (CompressedDecoder, self._plain_class), names))
        decoder.compression, decoder.trace = compression, trace
        body = base.get_submodule(family.body)
        self._hooks = []
        for module in {id(m): m for m in (model, base)}.values():  # peft's forward goes past the base model's hooks
            self._hooks += [
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            ]
        self._hooks += [
            body.register_forward_pre_hook(self._begin_body, with_kwargs=True),
            body.register_forward_hook(self._end_body, always_call=True),
        ]

    # --- the model: labels, which become shorter ---

    def _begin(self, model, args, kwargs):
        """Take the labels aside, and note how many of the last columns are an answer that is being tried."""
        if self._running() is not None:
            return None
        kwargs = _named(model, args, kwargs)
        call = Call(self._decoder, kwargs.pop("labels", None), outer=_CALL.get())
        tried = kwargs.get("logits_to_keep", 0)
        # Assisted generation puts its first guesses behind the prompt; they have no say in what is kept.
        if isinstance(tried, int) and tried > 1 and cache_given(kwargs) is not None and call.labels is None:
            call.score_offset = tried - 1
        _CALL.set(call)
        return (), kwargs

    def _end(self, model, args, kwargs, output):
        call = self._running()
        if call is None:
            return None
        _CALL.set(call.outer)
        if output is None:  # an exception is on its way
            return None
        self._remember(call)
        if call.labels is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        options = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
        vocabulary = self._base.config.get_text_config().vocab_size
        loss = self._base.loss_function(logits=logits, labels=call.labels, vocab_size=vocabulary, **options)
        if isinstance(output, tuple):
            return (loss, *output)
        output.loss = loss
        return output

    # --- its body: which columns are visual tokens ---

    def _begin_body(self, body, args, kwargs):
        kwargs = _named(body, args, kwargs)
        call = self._running()
        if call is None:
            call = Call(self._decoder, outer=_CALL.get(), whole=False)
            _CALL.set(call)
        call.inputs = self._survey(call, kwargs)
        return (), kwargs

    def _end_body(self, body, args, output):
        call = self._running()
        if call is not None and not call.whole:
            _CALL.set(call.outer)
            self._remember(call)

    def _survey(self, call: Call, kwargs: dict) -> dict:
        """What the passage is told: columns of visual tokens, labels, who scores, and a number made of the row's own text."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        cache, mask = cache_given(kwargs), kwargs.get("attention_mask")
        length = (embeds if ids is None else ids).shape[1]
        if length == 1 and cache is not None and cache.get_seq_length():
            return {"visual": None}  # a decoding step; the model itself may say a placeholder's id
        visual = self._visual_columns(ids, embeds, kwargs)
        places = torch.arange(1, length + 1, device=visual.device)
        if mask is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            valid = mask[:, -length:].long()
            places = valid.cumsum(1) * valid
            if cache is not None and bool((valid[:, -1] == 0).any()):
                raise ValueError(
                    "the prompts are padded on the right; generate needs processor.tokenizer.padding_side = 'left'"
                )
        elif mask is None and self._is_packed(kwargs.get("position_ids")):
            raise ValueError("several samples are packed into one row; compression needs one sample a row, padded")
        columns = None
        if call.score_offset:
            columns = torch.full((len(visual),), length - 1 - call.score_offset, device=visual.device)
        keys = torch.zeros(len(visual), dtype=torch.long, device=visual.device)
        if ids is not None:
            keys = (ids * places * ~visual)[:, : length - call.score_offset].sum(1)
        return {"visual": visual, "labels": call.labels, "score_columns": columns, "keys": keys}

    def _visual_columns(self, ids, embeds, kwargs: dict) -> torch.Tensor:
        """(B, S) bool."""
        if self._marked is not None:
            marked, self._marked = self._marked.to((embeds if ids is None else ids).device), None
            batch, length = (embeds if ids is None else ids).shape[:2]
            if marked.shape[1] != length or batch % len(marked):
                raise ValueError(f"the marked visual tokens are {tuple(marked.shape)} but the prompt is {(batch, length)}")
            return marked.repeat_interleave(batch // len(marked), 0)  # beams and returned sequences repeat the rows
        encoded = kwargs.get("mm_encoder_outputs") or {}  # newer releases' generate runs the vision tower beforehand
        pixels = [value for name, value in kwargs.items() if name.startswith("pixel_values")]
        pictures = any(value is not None for value in (*pixels, *encoded.values()))
        if ids is not None:  # a placeholder that the model said, or that a guess repeats, comes without a picture: text
            return torch.isin(ids, torch.tensor(self._token_ids, device=ids.device)) & pictures
        if pictures:
            table = self._base.get_input_embeddings()
            placeholders = table(torch.tensor(self._token_ids, device=embeds.device)).to(embeds.dtype)
            return (embeds[:, :, None] == placeholders).all(-1).any(-1)
        raise ValueError(
            "embeddings alone do not tell which columns are visual tokens: give input_ids, or say it before the call with"
            " handle.mark_visual_tokens(mask)"
        )

    @staticmethod
    def _is_packed(position_ids) -> bool:
        return position_ids is not None and position_ids.ndim == 2 and bool((position_ids.diff(dim=1) < 0).any())

    def _running(self) -> Call | None:
        call = _CALL.get()
        return call if call is not None and call.decoder is self._decoder else None

    def _remember(self, call: Call) -> None:
        if call.stats is not None:
            self._stats, self._recorder = call.stats, call.recorder

    # --- what the user sees ---

    def mark_visual_tokens(self, mask: torch.Tensor) -> None:
        """Say for the next call which columns of its ``inputs_embeds`` are visual tokens: (B, S) bool."""
        if mask.ndim != 2:
            raise ValueError(f"the mask of visual tokens must be (batch, tokens), but it is {tuple(mask.shape)}")
        self._marked = mask.bool()

    @property
    def stats(self) -> dict | None:
        """Of the last prefill with visual tokens; None before one.

        ``visual_tokens`` and ``compensation_tokens``: [layer][row]; ``flops``: multiply-accumulates of each row's visual tokens
        by §4.1's formula for the whole tokens of the run; ``flops_ratio``: the same over those of the plain model; ``cache``:
        bytes of the KV cache after the prefill, ``total`` and what they are for (:meth:`libra.passage.Passage.stats`).
        """
        if self._stats is None:
            return None
        from .flops import model_flops  # here, so that `python -m libra.flops` finds its module not yet imported

        stats, spec = self._stats, spec_of(self._decoder.config, type(self._base).__name__)
        rows = list(zip(*stats["visual_tokens"]))
        flops = [model_flops(spec, row) for row in rows]
        plain = [model_flops(spec, [row[0]] * len(row)) for row in rows]
        ratios = [part / whole if whole else 1.0 for part, whole in zip(flops, plain)]
        return {**stats, "flops": flops, "flops_ratio": ratios}

    @property
    def trace(self) -> list[RowTrace] | None:
        """Of the last prefill with visual tokens, for each row what became of each of them; only with ``trace=True``."""
        return None if self._recorder is None else self._recorder.rows()

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, decoder = [], self._decoder
        if not isinstance(decoder, CompressedDecoder) or decoder.compression is not self.compression:
            return
        _become(decoder, self._plain_class)
        del decoder.compression, decoder.trace
        hybrid.disable(decoder.config)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def _become(decoder: torch.nn.Module, new: type) -> None:
    """Change a decoder's class, and with it the forward that accelerate's device hooks keep on the module itself."""
    old, decoder.__class__ = type(decoder), new
    for name in ("forward", "_old_forward"):
        if getattr(vars(decoder).get(name), "__func__", None) is old.forward:
            setattr(decoder, name, MethodType(new.forward, decoder))


def _check(decoder, compression: Compression, model) -> Compression:
    """Refuse what could only go wrong later. Returns the compression with its layers in this decoder."""
    name, config, own = type(decoder).__name__, decoder.config, vars(decoder)
    if name not in DECODERS:
        raise ValueError(f"libra.attach does not support {name} decoders; it supports {', '.join(DECODERS)}")
    replaced = "forward" in own and getattr(own["forward"], "__func__", None) is not type(decoder).forward
    if replaced and "_old_forward" not in own:
        raise ValueError(f"the forward of this model's {name} was replaced (by torch.compile?); attach first, then replace it")
    compression = fitted(decoder, compression)
    kinds = {attention_kind(config, layer) for layer in range(config.num_hidden_layers)}
    if kinds - MASKS.keys():
        raise ValueError(f"libra.attach does not support {', '.join(kinds - MASKS.keys())}; it supports {', '.join(MASKS)}")
    deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if compression.layers and compression.layers[0] < deep - 1:
        raise ValueError(
            f"layers: {compression.layers[0]} is too early: {name} adds visual features after its layers 0 to {deep - 1};"
            f" compress after layer {deep - 1} at the earliest"
        )
    return compression


def attach(model: PreTrainedModel, compression: Compression, trace: bool = False) -> Attachment:
    """Compress the visual tokens of a Hugging Face vision-language model between its decoder layers.

    >>> with libra.attach(model, libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)) as handle:
    ...     ids = model.generate(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    >>> handle.stats["flops_ratio"]

    Batches may be padded on the left (for ``generate``) or on the right (for a forward pass and the loss). The model keeps its
    attention implementation. With ``trace`` the handle tells what became of each visual token.

    Raises:
        ValueError: for a model that is not supported (the sentence lists those that are) or a layer it does not have.
    """
    return Attachment(model, compression, trace)
