"""Which compressions a vLLM server can do, and how many tokens one leaves of a picture that nobody has seen
yet. Needs no vLLM."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import libra

from ..budget import keeps
from ..config import NOTHING, Compression
from ..engine.tower import OF_THE_READER
from ..methods import MERGERS, SELECTORS
from ..places import INPUT, LAYERS
from ..rows import compression_from
from ..utils.sentences import ConfigError, show

ENVIRONMENT = "LIBRA_COMPRESSION"
KEY = "libra"  # of vLLM's --hf-overrides
RATIO = "libra_ratio"  # of a request's mm_processor_kwargs
QUESTION = {"text", "relevance"}  # fields of a context that are made of the question
# What a method may need besides its name so that vLLM can do it.
ADDED: tuple[dict[str, Any], ...] = ({}, {"at": INPUT}, {"compensation": "reserved"})


def server_compression(overrides: Any = None) -> Compression:
    """What a server was started with, as the one compression that it does; :data:`NOTHING` where nothing was
    said.

    Args:
        overrides: the value of :data:`KEY` among --hf-overrides: keys of a compression, a method, a row or a
            file. Without it the variable :data:`ENVIRONMENT` counts.

    Raises:
        ConfigError: for one that vLLM cannot do, with the reason and what to write instead.
    """
    given = overrides if overrides is not None else os.environ.get(ENVIRONMENT) or NOTHING
    return qualified(compression_from(given))


def compression_of(config: Any) -> Compression:
    """What a server does with the model of this Hugging Face configuration, which may carry it. Raises
    ConfigError as :func:`server_compression` and :func:`fitted`."""
    return fitted(server_compression(getattr(config, KEY, None)), config)


def qualified(c: Compression) -> Compression:
    """The compression itself, or its only step, if vLLM can do it. Raises ConfigError otherwise."""
    if not c.compresses:
        return c
    if len(c.parts) > 1:
        raise ConfigError(
            f"steps: a vLLM server does one compression, before the language model, and here are"
            f" {len(c.parts)} ({c.name}); give one of them"
        )
    (part,) = c.parts
    if problem := _problem(part):
        raise ConfigError(problem)
    keeps([[1]], part)  # which refuses budgets of a whole model
    return part


def added(method: str) -> dict[str, str] | None:
    """The keys of :data:`ADDED` that make a method one that vLLM can do; None where none do."""
    for keys in ADDED:
        try:
            qualified(Compression(method=method, **keys))
        except ConfigError:
            continue
        return keys
    return None


def reads_the_reader(c: Compression) -> bool:
    """Whether it looks at the layer that reads the tower's features, which vLLM does not load for LLaVA."""
    return bool(OF_THE_READER & {*c.needs})


def fitted(c: Compression, config: Any) -> Compression:
    """The same for a model's Hugging Face configuration: at the input where its projector joins patches.

    Raises ConfigError where the model cannot give what the compression needs.
    """
    if not c.compresses:
        return c
    if config.model_type != "llava":
        if c.positions != "original":
            raise ConfigError(
                f"positions: {c.positions}: {config.model_type} has positions of three axes; write positions:"
                " original"
            )
        return replace(c, at=INPUT)
    if reads_the_reader(c):
        raise ConfigError(
            f"{c.name} looks at the layer that reads the features, and vLLM does not load it; use another"
            " method, such as divprune"
        )
    for key, found, known in (
        ("vision tower", config.vision_config.model_type, "clip_vision_model"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("vision_feature_layer", type(config.vision_feature_layer).__name__, "int"),
    ):
        if found != known:
            raise ConfigError(f"{key}: {found} is not supported here; LLaVA-1.5's is {known}")
    return c


def _problem(part: Compression) -> str:
    """Why vLLM cannot do it, and the mend; an empty string where it can."""
    if part.place == LAYERS:
        return (
            f"layers: {part.name} compresses after decoder layers, and vLLM keeps one length of a sequence"
            " for all layers; write at: input, with a method that reads no attention of the decoder, such as"
            " libra-input or divprune"
        )
    if any(QUESTION & set(need.split("|")) for need in part.needs):
        return (
            f"{part.name} compares with the question, and vLLM shares what it computed of a picture among"
            " all questions about it; use a method that looks at the picture only, such as divprune"
        )
    if SELECTORS[part.select].films:
        return (
            f"{part.name} chooses among the frames of a video, and videos are not compressed here; vLLM"
            " itself has --video-pruning-rate for them"
        )
    if SELECTORS[part.select].shrinks:
        return f"{part.name} gives the vision tower a smaller picture, which is vLLM's processor's to make"
    if MERGERS[part.merge].compensates and not part.reserves:
        return (
            f"merge: {part.merge} makes a compensation token or none, as the picture has it, and vLLM must"
            " know the number of tokens beforehand; write compensation: reserved"
        )
    return ""


def with_request(c: Compression, kwargs: Mapping[str, Any]) -> Compression:
    """The compression of one request, which may bring a ratio of its own (:data:`RATIO`; 0 compresses
    nothing). Raises ConfigError for a bad one."""
    ratio = kwargs.get(RATIO)
    if ratio is None:
        return c
    if not c.compresses:
        raise ConfigError(
            f"{RATIO}: {show(ratio)}: this server compresses nothing; start it with {ENVIRONMENT}=ROW"
        )
    try:
        if isinstance(ratio, (list, tuple)):
            raise ConfigError(f"{show(ratio)} is a list; write one number")
        return replace(c, ratio=ratio, keep=None)
    except ConfigError as error:
        raise ConfigError(f"{RATIO}: {str(error).removeprefix('ratio: ')}") from None


def targets(c: Compression, n: int) -> int:
    """How many of a picture's ``n`` tokens are kept."""
    return keeps([[n]], c)[0][0] if c.compresses else n


def slots(c: Compression, n: int, kept: int) -> int:
    """How many tokens stand in the prompt for a picture of ``n``, of which ``kept`` are kept; a compensation
    token is one of them."""
    return kept + (c.compresses and c.reserves and kept < n)


def cache_key(c: Compression) -> str:
    """What distinguishes the tokens of one picture under different compressions, for vLLM's caches."""
    settings = c.to_dict() if c.compresses else {}
    return json.dumps({"libra": libra.__version__, **settings}, sort_keys=True)
