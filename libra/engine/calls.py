"""The call that is on its way: one forward of an attached model, from its outside to its decoder and back.

What belongs to a call is kept with it, next to the models' own arguments, which some of them also hand to
their vision towers. Each thread has its own, and nothing survives a call, whatever ends it.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType

import torch

from .layers import Given, HookedForward
from .tokens import Prefill
from .transformers_api import ASSISTED_GENERATION

BEGUN, IN_BODY, IN_DECODER, AFTER_BODY = range(4)


@dataclass
class Call:
    """One forward call.

    Attributes:
        decoder: whose call it is.
        frame: runs as long as the call.
        outer: the call in which this one was made.
        whole: False where the model's body was called by itself.
        bare: True where its decoder was.
        began: the module at whose call it began, where that was the model or what is around it.
        level: where it stands, one of the levels below. A layer, a tower or a user's hook may call the model
            again; that call begins where this one has been already, and so is known to be another.
        asked: what the call around it had asked an attention when its decoder began.
        labels: which the model does not see.
        kept: logits_to_keep, as the caller gave it.
        score_offset: how far before the last column the scoring token stands.
        marked: what the user said of this call's visual tokens.
        padding_mask: what the model's body was given.
        prefill: the visual tokens that it brings.
        ids: the tokens that its body was given.
        pictures: what the body's functions for pictures returned, by modality.
        given: what the decoder was given.
        forward: the stages, from the first layer on.
        stats, recorder: what came of it, where there was something to compress.
    """

    decoder: torch.nn.Module
    frame: FrameType
    outer: "Call | None" = None
    whole: bool = True
    bare: bool = False
    began: torch.nn.Module | None = None
    level: int = BEGUN
    asked: tuple | None = None
    labels: torch.Tensor | None = None
    kept: int | torch.Tensor = 0
    score_offset: int = 0
    marked: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    prefill: Prefill | None = None
    ids: torch.Tensor | None = None
    pictures: dict = field(default_factory=dict)
    given: Given = Given()
    forward: HookedForward | None = None
    stats: dict | None = None
    recorder: object | None = None


CALL: ContextVar[Call | None] = ContextVar("libra_call", default=None)


def _frames(innermost: FrameType | None = None) -> Iterator[FrameType]:
    """The frames that are running, from the innermost outwards; this thread's unless another's is given."""
    frame = innermost or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def running(decoder: torch.nn.Module) -> Call | None:
    """The call of ``decoder``'s model that is on its way, if one is.

    torch runs no hook at the end of a call that Ctrl-C interrupts, nor of a compiled one that fails, so such
    a call is found here: its frame no longer runs.
    """
    call = CALL.get()
    while call is not None and not _runs(call.frame):
        if call.forward is not None:
            call.forward.give_up()
        call = call.outer
        CALL.set(call)
    return call if call is not None and call.decoder is decoder else None


def _runs(frame: FrameType) -> bool:
    """True as long as the function of a frame has not returned. Asked several times a decoding step, hence
    without the generator."""
    here: FrameType | None = sys._getframe(1)
    while here is not None and here is not frame:
        here = here.f_back
    return here is not None


def at_layers(decoder: torch.nn.Module) -> Call | None:
    """The same between the layers of a decoder that runs, where nothing needs to be looked for."""
    call = CALL.get()
    return call if call is not None and call.decoder is decoder else None


def begin(decoder: torch.nn.Module, modules: tuple[str, ...], **keys) -> Call:
    """A new call is on its way: that of the innermost frame which is neither torch's compiler's nor in one of
    ``modules``, and so runs a hook."""
    skipped = (__name__, *modules, "torch._dynamo", "torch._compile")
    frame = next(frame for frame in _frames() if not frame.f_globals.get("__name__", "").startswith(skipped))
    call = Call(decoder, frame, outer=CALL.get(), **keys)
    CALL.set(call)
    return call


def end(call: Call) -> None:
    """The call is over."""
    CALL.set(call.outer)


def assisted(model: torch.nn.Module) -> bool:
    """True where ``model`` is called by its own assisted generation, which puts its first guesses after the
    prompt."""
    return any(
        frame.f_code is ASSISTED_GENERATION and frame.f_locals.get("self") is model for frame in _frames()
    )


def elsewhere(modules: Iterable[torch.nn.Module]) -> list[FrameType]:
    """The calls of ``modules`` that other threads are in, as the frames of torch that run until they are
    over."""
    known, this = {id(module) for module in modules}, threading.get_ident()
    return [
        frame
        for thread, innermost in sys._current_frames().items()
        if thread != this
        for frame in _frames(innermost)
        if frame.f_code is torch.nn.Module._call_impl.__code__ and id(frame.f_locals.get("self")) in known
    ]


def wait_for(frames: list[FrameType]) -> None:
    """Return when none of the ``frames`` of other threads runs any more."""
    while frames:
        running = {id(frame) for innermost in sys._current_frames().values() for frame in _frames(innermost)}
        frames = [frame for frame in frames if id(frame) in running]
        if frames:
            time.sleep(0.001)
