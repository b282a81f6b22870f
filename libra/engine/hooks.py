"""The hooks on one attached model: they follow a call from the model's outside to its decoder's layers.

They are put on when a compression is attached and taken off when it is detached, never while a call runs;
what they know of a call is kept with the call. They are methods, without closures, so that a deep copy of the
model has its own.
"""

import copy
import inspect
import pickle
import sys
import warnings
import weakref
from collections import deque
from contextvars import ContextVar
from functools import partial

import torch

from ..config import Compression
from . import calls, score
from .cache import StagedCache
from .calls import CALL, Call
from .checkpointing import Outside, checkpoints_call
from .families import VIDEO_IDS
from .layers import Given, HookedForward
from .pictures import Eyes
from .relevance import ClipRelevance
from .structure import (
    arguments_of,
    attention_modules,
    examined,
    layers_of,
    placeholder_ids,
    scoring_layer,
)
from .survey import surveyed
from .tokens import check_kept
from .transformers_api import PreTrainedModel, cache_given

REMEMBERED = 1000  # prefills whose statistics are kept
OWNER = "libra_hooks"  # attribute of an attached decoder
# Whose next call it is, weakly: a call that never comes must not keep a model alive.
_MARKED: ContextVar[tuple[weakref.ref["Hooks"], torch.Tensor] | None] = ContextVar(
    "libra_marked", default=None
)


def named(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name."""
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(type(module).forward).parameters
    if "args" in parameters:  # peft's wrapper, which hands everything on
        parameters = inspect.signature(type(module.get_base_model()).forward).parameters
    return {**dict(zip(list(parameters)[1:], args)), **kwargs}


def forget_compiled_code() -> None:
    """Compiled code does not look for hooks that were added later, or that are gone; it is made anew when it
    is called next, whatever model it belongs to."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Hooks:
    """The hooks on one model, and what came of its last call.

    Args:
        model: with or without an adapter around it.
        compression: what to do; :attr:`compression` has its layers in this model.
        trace: whether to record what becomes of each visual token.
        clip: says how relevant visual tokens are for the question; None: text embeddings do.

    Raises:
        ValueError: for a model or a compression that cannot work, and for a model that has hooks already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compression: Compression,
        trace: bool,
        clip: ClipRelevance | None = None,
    ):
        found, self.compression = examined(model, compression)
        if OWNER in vars(found.decoder):
            raise ValueError(
                "a compression is attached to this model already; detach it first, with its handle or"
                " libra.detach(model)"
            )
        self.base, self.decoder, self._token_ids, self._trace = (
            found.base,
            found.decoder,
            found.token_ids,
            trace,
        )
        self._eyes = Eyes(found.body, found.decoder, found.name, self.compression, clip)
        self.compression = self._eyes.compression
        self._videos = placeholder_ids(found.base.config, VIDEO_IDS)
        self.handle: weakref.ref | None = None
        self.stats: dict | None = None
        self.recorder: object = None
        self.history: deque[dict] = deque(maxlen=REMEMBERED)
        self._marks: dict[int, score.Mark] = {}
        self._names: list[list[str]] = []
        self._hooks: list = []
        self._is_leaving = False  # calls that begin from now on are the plain model's
        vars(self.decoder)[OWNER] = self
        outside = {id(module): module for module in (model, self.base)}.values()
        self._called = [*outside, found.body, found.decoder]
        for module in outside:  # peft's forward goes past the base model's hooks
            self._before(module, self._begin)
        self._before(found.body, self._begin_body)
        self._after(found.body, self._end_body)
        for module in outside:
            self._hooks.append(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))
        self._hook_decoder()
        self._eyes.open()
        forget_compiled_code()

    def _before(self, module, hook) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module, hook) -> None:
        self._hooks.append(module.register_forward_hook(hook, always_call=True))

    def _hook_decoder(self) -> None:
        """The decoder and its layers, and the marks on those that are asked for their attention."""
        self._before(self.decoder, self._begin_decoder)
        self._after(self.decoder, self._end_decoder)
        layers = layers_of(self.decoder)
        schedule = self.compression.schedule(len(layers)) if self.compression.compresses else ()
        for step in schedule:
            if step.scores:
                scoring = scoring_layer(step)
                mark = self._marks.setdefault(scoring, score.Mark())
                for module in attention_modules(layers[scoring]):
                    setattr(module, score.MARK, mark)
        self._compresses = bool(schedule)
        for i, layer in enumerate(layers if schedule else ()):
            self._names.append(arguments_of(layer))
            self._before(layer, partial(self._before_layer, i))
        last = any(step.layer == len(layers) - 1 for step in schedule)
        if last:
            self._hooks.append(layers[-1].register_forward_hook(self._after_last_layer))
        self._outside = Outside(layers, self._change, self._shorten_output if last else None)

    def __deepcopy__(self, memo) -> "Hooks":
        other = memo[id(self)] = object.__new__(type(self))
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return other

    def __reduce_ex__(self, protocol):
        raise pickle.PicklingError(
            "a compressed model cannot be pickled: detach first, with the handle or libra.detach(model)"
        )

    @property
    def attached(self) -> bool:
        """False once the model was given back."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing, whatever was attached since.

        Calls that other threads are in come to their end first; what they generate ends with the next one.

        Raises:
            ValueError: inside a call of the model.
        """
        if not self._hooks:
            return
        # Which forgets a call that was interrupted, and what it held.
        if calls.running(self.decoder) is not None:
            raise ValueError(
                "detach was called by a hook inside a call of the model, whose layers need the compression to"
                " the end; detach after the call"
            )
        self._is_leaving = True
        try:
            calls.wait_for(calls.elsewhere(self._called))
        finally:
            self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._eyes.close()
        del vars(self.decoder)[OWNER]
        for module in self.decoder.modules():
            vars(module).pop(score.MARK, None)
        self._outside.leave()
        score.disable(self.decoder.config)
        forget_compiled_code()

    def mark_visual_tokens(self, mask: torch.Tensor) -> None:
        """For this thread's next call of the model: (B, S) bool."""
        if not self.attached:
            raise ValueError("this compression was detached; mark visual tokens with the handle of the next")
        _MARKED.set((weakref.ref(self), mask))

    # --- the model: labels, which become shorter ---

    def _start(self, **keys) -> Call:
        """A new call is on its way; what was marked for it is taken."""
        if self.handle is not None and self.handle() is None:
            self.handle = None
            warnings.warn(
                "the handle of libra.attach is gone and this model is still compressed; keep the handle,"
                " or give the model back with libra.detach(model)",
                stacklevel=2,
            )
        marked = _MARKED.get()
        if marked is not None and marked[0]() is self:
            keys["marked"] = marked[1]
            _MARKED.set(None)
        return calls.begin(self.decoder, (__name__,), **keys)

    @torch.compiler.disable
    def _begin(self, model, args, kwargs):
        """Take the labels aside, and note how many of the last columns are an answer that is being tried."""
        call = calls.running(self.decoder)
        if call is None and self._is_leaving:
            return None
        if call is not None and call.level == calls.BEGUN:
            return None
        kwargs = named(model, args, kwargs)
        call = self._start(began=model, labels=kwargs.pop("labels", None))
        tried = kwargs.get("logits_to_keep", 0)
        call.kept = tried
        if isinstance(tried, int) and tried > 1 and calls.assisted(self.base):
            call.score_offset = tried - 1  # the guesses have no say in what is kept
        return (), kwargs

    @torch.compiler.disable
    def _end(self, model, args, kwargs, output):
        call = calls.running(self.decoder)
        if call is None or call.began is not model:
            return None
        calls.end(call)
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
        call = calls.running(self.decoder)
        if call is None and self._is_leaving:
            return None
        kwargs = named(body, args, kwargs)
        if call is None or call.level != calls.BEGUN:
            call = self._start(whole=False)
        call.level = calls.IN_BODY
        cache = cache_given(kwargs)
        if isinstance(cache, StagedCache):
            cache.tells_all_columns = True
        call.padding_mask = kwargs.get("attention_mask")
        call.ids, call.pictures = kwargs.get("input_ids"), dict(kwargs.get("mm_encoder_outputs") or {})
        embeddings = self.base.get_input_embeddings
        call.prefill = surveyed(kwargs, self._token_ids, embeddings, call, self._trace)
        return (), kwargs

    @torch.compiler.disable
    def _end_body(self, body, args, output):
        call = calls.running(self.decoder)
        if call is None:
            return
        call.level = calls.AFTER_BODY
        if not call.whole:
            calls.end(call)
            self._remember(call)

    def _remember(self, call: Call) -> None:
        if call.stats is not None:
            self.stats, self.recorder = call.stats, call.recorder
            self.history.append(call.stats)

    # --- its decoder and the layers ---

    @torch.compiler.disable
    def _begin_decoder(self, decoder, args, kwargs):
        """A new pass through the layers: nothing of an earlier one is left."""
        call = calls.running(decoder)
        if call is None and self._is_leaving:
            return
        if call is None or call.level >= calls.IN_DECODER:
            call = self._start(whole=False, bare=True)
        call.level, call.asked = calls.IN_DECODER, None if call.outer is None else score.asked()
        score.forget()
        given = named(decoder, args, kwargs)
        mask, ready = given.get("attention_mask"), False
        if not call.bare and (isinstance(mask, dict) or mask is not None and mask.ndim == 4):
            # The body made the masks of what it was given itself: that shortens, and the layers' masks are
            # ready.
            mask, ready = call.padding_mask, True
        if call.prefill is not None and call.pictures:
            call.prefill = self._eyes.seen(call.prefill, call.ids, self._videos, call.pictures)
        columns = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        shape = (0, 0) if columns is None else tuple(columns.shape[:2])
        call.given, call.forward = Given(mask, ready, given.get("position_ids"), shape), None
        if self._compresses:
            self._outside.enter()

    @torch.compiler.disable
    def _end_decoder(self, decoder, args, output):
        call = calls.running(decoder)
        score.forget(None if call is None else call.asked)
        if call is None:
            return
        call.level = calls.IN_BODY
        if call.bare:
            calls.end(call)
        forward, call.forward = call.forward, None
        if output is None and forward is not None:
            forward.give_up()
        if output is not None and forward is not None and forward.tokens is not None:
            check_kept(call.kept)
            call.stats, call.recorder, call.labels = forward.stats(), forward.recorder, forward.labels

    @torch.compiler.disable(recursive=False)
    def _before_layer(self, i: int, layer, args, kwargs):
        """Shorten the hidden states after a compression layer, and every argument of the layers that
        follow."""
        # Most layers of most calls take what they are handed. That is found without calling anything: in
        # caches that a layer's weights have gone through, each call costs as much as a small operation.
        call = CALL.get()
        if call is None or call.decoder is not self.decoder:
            return None
        # A ready mask must be shortened; one that is handed by position is not looked for.
        maskless = "attention_mask" in kwargs and kwargs["attention_mask"] is None
        if i > 0 and call.forward.is_idle and maskless:
            return None
        return self._change_at(i, layer, args, kwargs)

    @torch.compiler.disable
    def _change_at(self, i: int, layer, args, kwargs) -> tuple[tuple, dict] | None:
        return None if checkpoints_call(layer) else self._change(i, layer, args, kwargs)

    def _change(self, i: int, layer, args, kwargs) -> tuple[tuple, dict] | None:
        """The arguments of layer ``i`` where some change."""
        call = calls.at_layers(self.decoder)
        if call is None:
            return None
        given = {**dict(zip(self._names[i], args)), **kwargs}
        if i == 0:
            call.forward = HookedForward(
                self.decoder,
                self.compression,
                next(iter(given.values())),
                call.given,
                self._marks,
                cache_given(given),
                call.prefill,
            )
            if call.forward.is_idle and given.get("attention_mask") is None:
                return None
        changed = call.forward.before(i, given)
        if not changed:
            return None
        args = tuple(changed.get(name, value) for name, value in zip(self._names[i], args))
        return args, {name: changed.get(name, value) for name, value in kwargs.items()}

    @torch.compiler.disable
    def _after_last_layer(self, layer, args, output):
        return None if checkpoints_call(layer) else self._shorten_output(layer, args, output)

    def _shorten_output(self, layer, args, output):
        """What leaves the last layer, where a compression comes after it."""
        call = calls.at_layers(self.decoder)
        if call is None:
            return None
        last: int = self.decoder.config.num_hidden_layers - 1  # type: ignore[assignment]
        if isinstance(output, tuple):
            return (call.forward.shorten(last, output[0]), *output[1:])
        return call.forward.shorten(last, output)
