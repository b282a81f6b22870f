"""The call that is on its way: one forward of an attached model, from its outside to its decoder and back;
and what it brings: which columns are visual tokens, who scores them, and what seeds a random choice.

What belongs to a call is kept with it, next to the models' own arguments, which some of them also hand to
their vision towers. Each thread has its own, and nothing survives a call, whatever ends it.
"""

import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType

import torch

from .families import PICTURES
from .layers import Given, HookedForward
from .tokens import Prefill
from .transformers_api import ASSISTED_GENERATION, cache_given


@dataclass
class Call:
    """One forward call.

    Attributes:
        decoder: whose call it is.
        frame: runs as long as the call.
        outer: the call in which this one was made.
        whole: False where the model's body was called by itself.
        bare: True where its decoder was.
        labels: which the model does not see.
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
    labels: torch.Tensor | None = None
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


_CALL: ContextVar[Call | None] = ContextVar("libra_call", default=None)


def _frames() -> Iterator[FrameType]:
    """The frames that are running, from the innermost outwards."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _runs(wanted: FrameType) -> bool:
    """True for a frame of this thread that has not returned."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


@torch.compiler.disable
def running(decoder: torch.nn.Module) -> Call | None:
    """The call of ``decoder``'s model that is on its way, if one is.

    torch runs no hook at the end of a call that Ctrl-C interrupts, nor of a compiled one that fails, so such
    a call is found here: its frame no longer runs.
    """
    call = _CALL.get()
    while call is not None and not _runs(call.frame):
        call = call.outer
        _CALL.set(call)
    return call if call is not None and call.decoder is decoder else None


def at_layers(decoder: torch.nn.Module) -> Call | None:
    """The same between the layers of a decoder that runs, where nothing needs to be looked for."""
    call = _CALL.get()
    return call if call is not None and call.decoder is decoder else None


def begin(decoder: torch.nn.Module, modules: tuple[str, ...], **keys) -> Call:
    """A new call is on its way: that of the innermost frame which is neither torch's compiler's nor in one of
    ``modules``, and so runs a hook."""
    skipped = (__name__, *modules, "torch._dynamo", "torch._compile")
    frame = next(frame for frame in _frames() if not frame.f_globals.get("__name__", "").startswith(skipped))
    call = Call(decoder, frame, outer=_CALL.get(), **keys)
    _CALL.set(call)
    return call


def end(call: Call) -> None:
    """The call is over."""
    _CALL.set(call.outer)


def assisted(model: torch.nn.Module) -> bool:
    """True where ``model`` is called by its own assisted generation, which puts its first guesses after the
    prompt."""
    return any(
        frame.f_code is ASSISTED_GENERATION and frame.f_locals.get("self") is model for frame in _frames()
    )


# --- what a call brings ---


def surveyed(
    given: dict, token_ids: list[int], table: torch.nn.Module, call: Call, trace: bool
) -> Prefill | None:
    """The prompt of a call; None for a decoding step.

    Args:
        given: what the model's body is given, by name.
        token_ids: the placeholder ids of visual tokens.
        table: the input embeddings, by which placeholders are found where embeddings come instead of ids.
        call: with its labels and what the user marked.
        trace: whether to record what becomes of each visual token.

    Raises:
        ValueError: where nothing says which columns are visual tokens, for prompts that are padded on the
            right with a cache, and for several samples packed into one row.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    cache, mask = cache_given(given), given.get("attention_mask")
    length = (embeds if ids is None else ids).shape[1]
    if length == 1 and cache is not None and cache.get_seq_length():
        return None  # a decoding step; the model itself may say a placeholder's id
    visual = _visual_columns(given, token_ids, table, call.marked)
    places = torch.arange(1, length + 1, device=visual.device)
    if mask is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        valid = mask[:, -length:].long()
        places = valid.cumsum(1) * valid
        if cache is not None and bool((valid[:, -1] == 0).any()):
            raise ValueError(
                "the prompts are padded on the right; generate needs"
                " processor.tokenizer.padding_side = 'left'"
            )
    elif mask is None and _is_packed(given.get("position_ids")):
        raise ValueError(
            "several samples are packed into one row; compression needs one sample a row, padded"
        )
    columns = None
    if call.score_offset:
        columns = torch.full((len(visual),), length - 1 - call.score_offset, device=visual.device)
    seeds = torch.zeros(len(visual), dtype=torch.long, device=visual.device)
    if ids is not None:
        seeds = (ids * places * ~visual)[:, : length - call.score_offset].sum(1)
    return Prefill(visual, call.labels, columns, seeds, padding_side="left", trace=trace)


def _visual_columns(given: dict, token_ids: list[int], table, marked) -> torch.Tensor:
    """(B, S) bool."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
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
    # Newer releases' generate runs the vision tower beforehand.
    encoded = given.get("mm_encoder_outputs") or {}
    pixels = [value for name, value in given.items() if "pixel_values" in name or name in PICTURES]
    pictures = any(value is not None for value in (*pixels, *encoded.values()))
    if ids is not None:  # placeholder ids without pixels were generated by the model, or guessed for it: text
        return torch.isin(ids, torch.tensor(token_ids, device=ids.device)) & pictures
    if pictures:
        placeholders = table(torch.tensor(token_ids, device=embeds.device)).to(embeds.dtype)
        return (embeds[:, :, None] == placeholders).all(-1).any(-1)
    raise ValueError(
        "embeddings alone do not tell which columns are visual tokens: give input_ids, or say it before"
        " the call with handle.mark_visual_tokens(mask)"
    )


def _is_packed(position_ids) -> bool:
    return position_ids is not None and position_ids.ndim == 2 and bool((position_ids.diff(dim=1) < 0).any())
