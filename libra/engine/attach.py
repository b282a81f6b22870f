"""Compression for stock Hugging Face models: ``with libra.attach(model, compression):`` touches one instance
alone."""

import copy
import inspect
import pickle
import sys
import warnings
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, MethodType

import torch

from ..config import Compression
from ..places import BEFORE
from ..rows import spec_of
from . import score
from .families import DECODERS, FAMILIES
from .forward import CompressedForward, fitted
from .masks import MASKS, attention_kind
from .tokens import Prefill
from .trace import Recorder, RowTrace
from .transformers_api import (
    ASSISTED_GENERATION,
    BaseModelOutputWithPast,
    DynamicCache,
    PreTrainedModel,
    cache_argument,
    cache_given,
    capture_outputs,
    merge_with_config_defaults,
    take_cache,
)


@dataclass
class Call:
    """One forward call on its way from the model's outside to its decoder, and back."""

    decoder: torch.nn.Module
    frame: FrameType  # runs as long as the call
    labels: torch.Tensor | None = None
    score_offset: int = 0  # how far before the last column the scoring token stands
    marked: torch.Tensor | None = None  # what the user said of this call's visual tokens
    prefill: Prefill | None = None  # the visual tokens that it brings
    stats: dict | None = None  # what came of it, where there was something to compress
    recorder: Recorder | None = None
    outer: "Call | None" = None
    whole: bool = True  # False: the model's body was called by itself


# Next to the models' own arguments, which some of them also hand to their vision towers; each thread has its
# own.
_CALL: ContextVar[Call | None] = ContextVar("libra_call", default=None)
_MARKED: ContextVar[tuple["_Watch", torch.Tensor] | None] = ContextVar("libra_marked", default=None)


def _frames():
    """The frames that are running, from the innermost outwards."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@torch.compiler.disable
def _running(decoder: torch.nn.Module) -> Call | None:
    """The call of ``decoder``'s model that is on its way, if one is.

    torch runs no hook at the end of a call that Ctrl-C interrupts, nor of a compiled one that fails, so such
    a call is found
    here: its frame no longer runs.
    """
    call = _CALL.get()
    while call is not None and not any(frame is call.frame for frame in _frames()):
        call = call.outer
        _CALL.set(call)
    return call if call is not None and call.decoder is decoder else None


def _caller() -> FrameType:
    """The frame of torch's that runs a hook of this module, and with it the module that the hook belongs
    to."""
    ours = (__name__, "torch._dynamo", "torch._compile")
    return next(frame for frame in _frames() if not frame.f_globals.get("__name__", "").startswith(ours))


def _assisted(model: torch.nn.Module) -> bool:
    """Whether ``model`` is called by its own assisted generation, which puts its first guesses behind the
    prompt."""
    return any(
        frame.f_code is ASSISTED_GENERATION and frame.f_locals.get("self") is model for frame in _frames()
    )


class CompressedDecoder:
    """Mixed into a decoder's class while compression is attached: the plain loop, compressed."""

    compression: Compression
    watch: "_Watch"

    def __deepcopy__(self, memo) -> "CompressedDecoder":
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __reduce_ex__(self, protocol):
        raise pickle.PicklingError(
            "a compressed model cannot be pickled: detach first, with the handle or libra.detach(model)"
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        visual_pos_masks=None,
        deepstack_visual_embeds=None,
        **kwargs,
    ):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = take_cache(cache, kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        call = _running(self)
        prefill = None if call is None else call.prefill
        forward = CompressedForward(
            self, self.compression, hidden, attention_mask, position_ids, cache, prefill
        )
        deep = (
            () if deepstack_visual_embeds is None else deepstack_visual_embeds
        )  # Qwen3-VL's, before any compression
        hidden = forward.compress(BEFORE, hidden)
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden = layer(hidden, **forward.inputs(i), use_cache=use_cache, **kwargs)
            if i < len(deep):
                hidden = self._deepstack_process(hidden, visual_pos_masks, deep[i])
            hidden = forward.compress(i, hidden)
        if forward.tokens is not None:
            call.stats, call.recorder, call.labels = forward.stats(), forward.recorder, forward.labels
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **cache_argument(cache))


def _named(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name."""
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(type(module).forward).parameters
    if "args" in parameters:  # peft's wrapper, which hands everything on
        parameters = inspect.signature(type(module.get_base_model()).forward).parameters
    return {**dict(zip(list(parameters)[1:], args)), **kwargs}


class _Watch:
    """The hooks that follow each call of one model, and what came of the last one. An :class:`Attachment` is
    its handle."""

    def __init__(self, model: PreTrainedModel, compression: Compression, trace: bool):
        base = _base_of(model)
        name = type(base).__name__
        if name not in FAMILIES:
            raise ValueError(f"libra.attach does not support {name}; it supports {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        decoder = base.get_submodule(family.decoder)
        if isinstance(decoder, CompressedDecoder):
            raise ValueError(
                "a compression is attached to this model already; detach it first, with its handle or"
                " libra.detach(model)"
            )
        self.compression, self.base, self.decoder = _check(decoder, compression, base), base, decoder
        self._trace = trace
        self.handle: weakref.ref[Attachment] | None = None
        self.stats: dict | None = None
        self.recorder: Recorder | None = None
        ids = [getattr(base.config, token, None) for token in family.token_ids]
        self._token_ids = [token for token in ids if token is not None]
        self._plain_class = type(decoder)
        # Under the plain class's own name, by which transformers knows how to record hidden states and
        # attentions.
        names = {name: getattr(self._plain_class, name) for name in ("__module__", "__qualname__")}
        _become(decoder, type(self._plain_class.__name__, (CompressedDecoder, self._plain_class), names))
        decoder.compression, decoder.watch = self.compression, self
        body = base.get_submodule(family.body)
        self._hooks = []
        for module in {
            id(m): m for m in (model, base)
        }.values():  # peft's forward goes past the base model's hooks
            self._hooks += [
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            ]
        self._hooks += [
            body.register_forward_pre_hook(self._begin_body, with_kwargs=True),
            body.register_forward_hook(self._end_body, always_call=True),
        ]

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing, whatever was attached since."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks, decoder = [], self.decoder
        _become(decoder, self._plain_class)
        del decoder.compression, decoder.watch
        score.disable(decoder.config)

    # --- the model: labels, which become shorter ---

    def _start(self, frame: FrameType, **keys) -> Call:
        """A new call is on its way; what was marked for it is taken."""
        if self.handle is not None and self.handle() is None:
            self.handle = None
            warnings.warn(
                "the handle of libra.attach is gone and this model is still compressed; keep the handle,"
                " or give the model back with libra.detach(model)",
                stacklevel=2,
            )
        marked = _MARKED.get()
        if marked is not None and marked[0] is self:
            keys["marked"] = marked[1]
            _MARKED.set(None)
        call = Call(self.decoder, frame, outer=_CALL.get(), **keys)
        _CALL.set(call)
        return call

    @torch.compiler.disable
    def _begin(self, model, args, kwargs):
        """Take the labels aside, and note how many of the last columns are an answer that is being tried."""
        if _running(self.decoder) is not None:
            return None
        kwargs = _named(model, args, kwargs)
        call = self._start(_caller(), labels=kwargs.pop("labels", None))
        tried = kwargs.get("logits_to_keep", 0)
        if isinstance(tried, int) and tried > 1 and _assisted(self.base):
            call.score_offset = tried - 1  # the guesses have no say in what is kept
        return (), kwargs

    @torch.compiler.disable
    def _end(self, model, args, kwargs, output):
        call = _running(self.decoder)
        if call is None:
            return None
        _CALL.set(call.outer)
        if output is None:  # an exception is on its way
            return None
        self._remember(call)
        if call.labels is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        options = (
            {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
        )
        vocabulary = self.base.config.get_text_config().vocab_size
        loss = self.base.loss_function(logits=logits, labels=call.labels, vocab_size=vocabulary, **options)
        if isinstance(output, tuple):
            return (loss, *output)
        output.loss = loss
        return output

    # --- its body: which columns are visual tokens ---

    @torch.compiler.disable
    def _begin_body(self, body, args, kwargs):
        kwargs = _named(body, args, kwargs)
        call = _running(self.decoder) or self._start(_caller(), whole=False)
        call.prefill = self._survey(call, kwargs)
        return (), kwargs

    @torch.compiler.disable
    def _end_body(self, body, args, output):
        call = _running(self.decoder)
        if call is not None and not call.whole:
            _CALL.set(call.outer)
            self._remember(call)

    def _survey(self, call: Call, kwargs: dict) -> Prefill | None:
        """The prompt's visual tokens, labels and scoring columns, and a hash of each row's text that seeds
        random selection; None for a decoding step."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        cache, mask = cache_given(kwargs), kwargs.get("attention_mask")
        length = (embeds if ids is None else ids).shape[1]
        if length == 1 and cache is not None and cache.get_seq_length():
            return None  # a decoding step; the model itself may say a placeholder's id
        visual = self._visual_columns(call.marked, ids, embeds, kwargs)
        places = torch.arange(1, length + 1, device=visual.device)
        if mask is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            valid = mask[:, -length:].long()
            places = valid.cumsum(1) * valid
            if cache is not None and bool((valid[:, -1] == 0).any()):
                raise ValueError(
                    "the prompts are padded on the right; generate needs"
                    " processor.tokenizer.padding_side = 'left'"
                )
        elif mask is None and self._is_packed(kwargs.get("position_ids")):
            raise ValueError(
                "several samples are packed into one row; compression needs one sample a row, padded"
            )
        columns = None
        if call.score_offset:
            columns = torch.full((len(visual),), length - 1 - call.score_offset, device=visual.device)
        seeds = torch.zeros(len(visual), dtype=torch.long, device=visual.device)
        if ids is not None:
            seeds = (ids * places * ~visual)[:, : length - call.score_offset].sum(1)
        return Prefill(visual, call.labels, columns, seeds, padding_side="left", trace=self._trace)

    def _visual_columns(self, marked, ids, embeds, kwargs: dict) -> torch.Tensor:
        """(B, S) bool."""
        if marked is not None:
            marked = marked.to((embeds if ids is None else ids).device)
            batch, length = (embeds if ids is None else ids).shape[:2]
            if marked.shape[1] != length or batch % len(marked):
                raise ValueError(
                    f"the marked visual tokens are {tuple(marked.shape)} but the prompt is {(batch, length)}"
                )
            return marked.repeat_interleave(
                batch // len(marked), 0
            )  # beams and returned sequences repeat the rows
        encoded = (
            kwargs.get("mm_encoder_outputs") or {}
        )  # newer releases' generate runs the vision tower beforehand
        pixels = [value for name, value in kwargs.items() if name.startswith("pixel_values")]
        pictures = any(value is not None for value in (*pixels, *encoded.values()))
        if (
            ids is not None
        ):  # placeholder ids without pixels were generated by the model, or guessed for it: text
            return torch.isin(ids, torch.tensor(self._token_ids, device=ids.device)) & pictures
        if pictures:
            table = self.base.get_input_embeddings()
            placeholders = table(torch.tensor(self._token_ids, device=embeds.device)).to(embeds.dtype)
            return (embeds[:, :, None] == placeholders).all(-1).any(-1)
        raise ValueError(
            "embeddings alone do not tell which columns are visual tokens: give input_ids, or say it before"
            " the call with handle.mark_visual_tokens(mask)"
        )

    @staticmethod
    def _is_packed(position_ids) -> bool:
        return (
            position_ids is not None and position_ids.ndim == 2 and bool((position_ids.diff(dim=1) < 0).any())
        )

    def _remember(self, call: Call) -> None:
        if call.stats is not None:
            self.stats, self.recorder = call.stats, call.recorder


class Attachment:
    """A compression on one model; ``detach`` (or leaving the ``with`` block) gives the model back as it was.

    The model stays compressed when a handle is dropped, and says so once when it is called next;
    :func:`detach` gives it back.
    """

    def __init__(self, model: PreTrainedModel, compression: Compression, trace: bool = False):
        if not isinstance(compression, Compression):
            raise ValueError(
                f"libra.attach needs a libra.Compression, not {type(compression).__name__};"
                " from_yaml reads files"
            )
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "this is the wrapper of torch.compile; attach to the model in it first, then compile"
            )
        self._hold(_Watch(model, compression, trace))

    def _hold(self, watch: _Watch) -> None:
        self._watch, self.compression = watch, watch.compression
        watch.handle = weakref.ref(self)

    def __deepcopy__(self, memo) -> "Attachment":
        other = memo[id(self)] = object.__new__(type(self))
        other._hold(copy.deepcopy(self._watch, memo))
        return other

    def mark_visual_tokens(self, mask: torch.Tensor) -> None:
        """Say for this thread's next call which columns of its ``inputs_embeds`` are visual tokens: (B, S)
        bool."""
        if mask.ndim != 2:
            raise ValueError(
                f"the mask of visual tokens must be (batch, tokens), but it is {tuple(mask.shape)}"
            )
        _MARKED.set((self._watch, mask.bool()))

    @property
    def stats(self) -> dict | None:
        """Of the last prefill with visual tokens; None before one.

        ``visual_tokens`` and ``compensation_tokens``: [layer][row]; ``columns``: for each row those of its
        logits, ``padding``: on which side the others are; ``flops``: multiply-accumulates of each row's
        visual tokens by §4.1's formula for whole tokens; ``flops_ratio``: the same over those of the plain
        model; ``cache``: bytes of the KV cache after the
        prefill, ``total`` and what they are for (:meth:`libra.engine.forward.CompressedForward.stats`).
        """
        watch = self._watch
        if watch.stats is None:
            return None
        from ..flops import (
            model_flops,  # here, so that `python -m libra.flops` finds its module not yet imported
        )

        stats, spec = watch.stats, spec_of(watch.decoder.config, type(watch.base).__name__)
        rows = list(zip(*stats["visual_tokens"]))
        flops = [model_flops(spec, row) for row in rows]
        plain = [model_flops(spec, [n] * len(row)) for n, row in zip(stats["given"], rows)]
        ratios = [part / whole if whole else 1.0 for part, whole in zip(flops, plain)]
        return {**stats, "flops": flops, "flops_ratio": ratios}

    @property
    def trace(self) -> list[RowTrace] | None:
        """Of the last prefill with visual tokens, for each row what became of each of them; only with
        ``trace=True``."""
        return None if self._watch.recorder is None else self._watch.recorder.rows()

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing, whatever was attached since."""
        self._watch.detach()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception) -> None:
        self.detach()


def _become(decoder: torch.nn.Module, new: type) -> None:
    """Change a decoder's class, and with it the forward that accelerate's device hooks keep on the module
    itself."""
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
        raise ValueError(
            f"the forward of this model's {name} was replaced (by torch.compile?); attach first, then"
            " replace it"
        )
    compression = fitted(decoder, compression)
    kinds = {attention_kind(config, layer) for layer in range(config.num_hidden_layers)}
    if kinds - MASKS.keys():
        raise ValueError(
            f"libra.attach does not support {', '.join(kinds - MASKS.keys())}; it supports {', '.join(MASKS)}"
        )
    deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if compression.layers and compression.layers[0] < deep - 1:
        raise ValueError(
            f"layers: {compression.layers[0]} is too early: {name} adds visual features after its layers"
            f" 0 to {deep - 1}; compress after layer {deep - 1} at the earliest"
        )
    return compression


def attach(model: PreTrainedModel, compression: Compression, trace: bool = False) -> Attachment:
    """Compress the visual tokens of a Hugging Face vision-language model between its decoder layers.

    >>> with libra.attach(model, libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)) as handle:
    ...     ids = model.generate(**processor(images=images, text=prompts, padding=True, return_tensors="pt"))
    >>> handle.stats["flops_ratio"]

    Batches may be padded on the left (for ``generate``) or on the right (for a forward pass and the loss).
    The model keeps its attention implementation. With ``trace`` the handle tells what became of each visual
    token.

    Raises:
        ValueError: for a model that is not supported (the sentence lists those that are) or a layer it does
            not have.
    """
    return Attachment(model, compression, trace)


def detach(model: PreTrainedModel) -> None:
    """Give a model back as it was before :func:`attach`, where its handle is not at hand; without a
    compression do nothing."""
    base = _base_of(model)
    family = FAMILIES.get(type(base).__name__)
    decoder = None if family is None else base.get_submodule(family.decoder)
    if isinstance(decoder, CompressedDecoder):
        decoder.watch.detach()


def _base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model in an adapter of peft, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )
