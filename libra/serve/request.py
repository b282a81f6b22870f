"""A request's JSON, checked field by field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Compression
from ..rows import compression_from
from ..utils import plugins
from ..utils.sentences import did_you_mean, show
from .pictures import FRAMES, MOST

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 256
MOST_STOPS = 4
# Fields of the protocol that change nothing here, and those that must keep the value that changes nothing.
HARMLESS = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
    )
    + ("user", "verbosity")
)
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
FIELDS = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
) + ("compression",)


@dataclass(frozen=True)
class Request:
    """A chat request as it is answered.

    Attributes:
        messages: (role, parts) of each; a part is ("text", text), ("image", source) or
            ("video", source, number of frames).
        sampling: what transformers' handler reads of the answer's length and choice of tokens.
        stops: texts that end the answer.
        seed: of the sampling, or None.
        compression: what the request asks for, None where it says nothing.
        stream: whether the answer comes piece by piece.
    """

    messages: tuple[tuple[str, tuple[tuple, ...]], ...]
    sampling: dict[str, Any]
    stops: tuple[str, ...]
    seed: int | None
    compression: Compression | None
    stream: bool


def read_request(body: Mapping[str, Any]) -> Request:
    """The request in a JSON object; ``model`` is not looked at. Raises ValueError in one sentence."""
    for name, value in body.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise ValueError(f"{name}: {show(value)} is not offered by this server; leave {name} out")
        if name not in FIELDS and name not in HARMLESS and name not in NEUTRAL:
            raise ValueError(f"{show(name)} is not a field of a request;{_hint(name)}")
    given = {name: value for name, value in body.items() if value is not None}
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise ValueError(f"stream: {show(stream)} is not true or false")
    return Request(
        messages=_messages(given.get("messages")),
        sampling=_sampling(given),
        stops=_stops(given.get("stop", [])),
        seed=_whole(given, "seed", 0, 2**63 - 1),
        compression=compression_of(given["compression"]) if "compression" in given else None,
        stream=stream,
    )


def compression_of(given: Any) -> Compression:
    """A compression by a method's name, the name of a shipped row or a mapping of its keys; never a file or a
    plug-in.

    Raises:
        ConfigError: for anything else.
    """
    with plugins.shut():
        return compression_from(given, files=False)


def _hint(name: str) -> str:
    return did_you_mean(name, (*FIELDS, *NEUTRAL)) or f" the fields are {', '.join(FIELDS)}"


def _messages(given: Any) -> tuple:
    if not isinstance(given, list) or not given:
        raise ValueError('messages: give a list such as [{"role": "user", "content": "What is this?"}]')
    if len(given) > MOST_MESSAGES:
        raise ValueError(f"messages: there are {len(given)}; at most {MOST_MESSAGES} are taken")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(given))


def _message(where: str, given: Any) -> tuple[str, tuple]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {show(given)} is not a message; give its role and content")
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: {show(role)} is not one of {', '.join(ROLES)}")
    if given.get("tool_calls") or given.get("function_call"):
        raise ValueError(f"{where}: tools are not offered by this server; send their results as text")
    content = given.get("content")
    if isinstance(content, str):
        return role, (("text", content),)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}.content: {show(content)} is neither a text nor a list of parts")
    parts = tuple(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if role != "user" and any(part[0] != "text" for part in parts):
        raise ValueError(
            f"{where}: pictures are taken in messages of the user only; put it into one of these"
        )
    return role, parts


def _part(where: str, given: Any) -> tuple:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise ValueError(f"{where}.text: {show(given.get('text'))} is not a text")
        return "text", given["text"]
    if kind not in ("image_url", "video_url"):
        said = show(kind if isinstance(given, Mapping) else given)
        raise ValueError(f"{where}.type: {said} is not one of text, image_url, video_url")
    source, frames = given.get(kind), FRAMES
    if isinstance(source, Mapping):
        if kind == "video_url" and source.get("frames") is not None:
            frames = _whole(source, "frames", 1, MOST)
        source = source.get("url")
    if not isinstance(source, str) or not source:
        raise ValueError(
            f'{where}.{kind}: give {{"url": …}} with a data URI, such as data:image/png;base64,…'
        )
    return ("image", source) if kind == "image_url" else ("video", source, frames)


def _sampling(given: dict) -> dict[str, Any]:
    """max_tokens, temperature and top_p, as far as they are given."""
    longest = _whole(given, "max_completion_tokens", 1, 10**6)
    longest = _whole(given, "max_tokens", 1, 10**6) if longest is None else longest
    found = {
        "max_tokens": longest,
        "temperature": _number(given, "temperature", 0.0, 100.0),
        "top_p": _number(given, "top_p", 1e-6, 1.0),
    }
    return {name: value for name, value in found.items() if value is not None}


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(one, str) and 0 < len(one) <= 200 for one in stops):
        raise ValueError(f"stop: {show(given)} is not a text or a list of texts of 1 to 200 characters")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"stop: there are {len(stops)}; at most {MOST_STOPS} are taken")
    return tuple(stops)


def _whole(given: Mapping, name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {show(value)} is not a whole number from {least} to {most}")
    return value


def _number(given: Mapping, name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not least <= value <= most:  # nan is in no range
        raise ValueError(f"{name}: {show(value)} is not a number from {least:g} to {most:g}")
    return float(value)
