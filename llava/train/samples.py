"""Training data as it lies in files, in the forms that are in use, and as training takes it: in LLaVA's own
form.

LLaVA's has ``image`` or ``video`` and ``conversations`` of turns with ``from`` and ``value``; LLaMA-Factory's
has ``images`` or ``videos`` and ``messages`` of turns with ``role`` and ``content``; ShareGPT's has the
conversations of the former and more names for who speaks. They may be mixed.

A sample that cannot be trained on as it was meant is left out, and the reason is told: nothing is guessed,
except that an image without a place in the text goes to the front of the first question, and that is told
too.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from libra.utils.sentences import ConfigError, check_characters, show

from ..constants import DEFAULT_IMAGE_TOKEN
from ..conversation import Conversation, SeparatorStyle
from ..video import DEFAULT_VIDEO_TOKEN

LOOKED_FOR = 100  # samples whose files must not all be missing before a training begins
SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "bing": "gpt",
    "bard": "gpt",
}
PLACES = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
_MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_READ = {*_MEDIA_KEYS, "id", "conversations", "messages", "system", "tools"}
_LOOKS_LIKE_MEDIA = re.compile(
    r"(image|img|picture|photo|pic|pixel|video|clip|frame|audio|sound|media)s?"
    r"[_-]?(path|file|filename|name|url|uri|list|bytes|data|value|content|base64|folder|dir)?s?",
    re.IGNORECASE,
)
_MEDIA_FILE = re.compile(
    r"data:(image|video|audio)/.*|.*\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|mkv|avi|mov|webm|m4v|mp3|wav|flac|ogg|m4a)",
    re.IGNORECASE | re.DOTALL,
)
_NEARLY_A_PLACE = re.compile(
    r"[<\[{(]\s*/?\s*(image|img|video|picture)s?[\s_-]*\d*\s*/?\s*[>\]})]", re.IGNORECASE
)


class Fault(ConfigError):
    """Why a sample is left out: ``kind`` in a word or two, to be counted by, and a sentence. ``id`` is the
    sample's own."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind, self.id = kind, None


@dataclass
class Data:
    """The samples of a file, in LLaVA's form with their ``number`` in the file, and what is left out of
    it."""

    path: str
    samples: list[dict]
    digest: str = ""
    faults: dict[int, Fault] = field(default_factory=dict)  # by number
    placed: int = 0  # samples whose image had no place in the text and was put in front
    lost_rounds: int = 0  # questions without an answer

    @property
    def total(self) -> int:
        return len(self.samples) + len(self.faults)

    def sentence(self, number: int) -> str:
        """Why a sample is left out, with its number and its own id."""
        fault = self.faults[number]
        return f"sample {number}{'' if fault.id is None else f' (id {fault.id})'}: {fault}"

    def leave_out(self, problem_of: Callable[[dict], Fault | None]) -> None:
        """Leave out the samples that something is wrong with."""
        found = {}
        for sample in self.samples:
            if (fault := problem_of(sample)) is not None:
                fault.id = _id_of(sample)
                found[sample["number"]] = fault
        self.samples = [sample for sample in self.samples if sample["number"] not in found]
        self.faults.update(found)

    def kinds(self) -> dict[str, int]:
        """How many samples are left out, kind by kind."""
        return dict(Counter(fault.kind for fault in self.faults.values()).most_common())

    def check_any(self) -> None:
        """Raises ValueError where no sample is left."""
        if not self.samples:
            first = self.sentence(min(self.faults))
            raise ValueError(
                f"{self.path}, {first}"
                if self.total == 1
                else f"{self.path} has nothing to learn from: each of its {self.total} samples is left out; "
                f"{first}"
            )


def read_samples(path: str) -> list:
    """The samples of a JSON list, or of a ``.jsonl`` file with one in each line.

    Raises:
        ValueError: with the line at fault.
    """
    return parse_samples(path, read_bytes(path))


def read_bytes(path: str) -> bytes:
    """The content of a data file. Raises ValueError."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(2, "it is a folder" if Path(path).is_dir() else "there is no such file")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the data {show(path)} cannot be read ({reason}); give the path of a JSON file"
        ) from error


def parse_samples(path: str, content: bytes) -> list:
    """What :func:`read_samples` returns, of a file's content."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the data {path} cannot be read ({error}); write it in UTF-8") from error
    if path.lower().endswith(".jsonl") and not text.lstrip().startswith("["):
        # A line ends with a line feed only: JSON texts may hold every other separator.
        lines = enumerate(text.split("\n"), 1)
        samples = [_parse(path, line, number) for number, line in lines if line.strip()]
    else:
        samples = _parse(path, text)
    if not isinstance(samples, list) or not samples:
        raise ValueError(f'{path} holds no list of samples; it should begin with [{{"conversations": …')
    return samples


def _parse(path: str, text: str, line: int = 1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            "name it .jsonl if it has one sample in each line" if error.msg == "Extra data" else "correct it"
        )
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: no valid JSON ({error.msg}); {hint}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{path}, line {line}: it is nested too deeply for a list of samples; correct it"
        ) from error


def read_data(path: str, content: bytes, template: Conversation | None) -> Data:
    """A file's samples in LLaVA's form, without those that are not as they should be.

    Raises:
        ValueError: if the file is not a list of samples, or none can be used.
    """
    plain = template is not None and template.sep_style is SeparatorStyle.PLAIN
    data = Data(path, [])
    for number, given in enumerate(parse_samples(path, content)):
        try:
            sample = _in_our_form(given, plain, data)
            sample["number"] = number
            data.samples.append(sample)
        except Fault as fault:
            fault.id = _id_of(given)
            data.faults[number] = fault
    data.check_any()
    return data


def check_files(data: Data, kind: str, folder: str) -> None:
    """See that there is a folder for the files that are named, and files in it; ``kind`` is image or video.

    Raises:
        ValueError: if the folder is missing, or none of the first files is there.
    """
    named = [name for sample in data.samples for name in files_of(sample, kind)][:LOOKED_FOR]
    if named and not Path(folder).is_dir():
        raise ValueError(
            f"{data.path} names {kind}s and there is no folder {folder}; give it as --{kind}_folder"
        )
    if named and not any(os.path.exists(os.path.join(folder, name)) for name in named):
        raise ValueError(
            f"none of the {kind}s that {data.path} names first lies in {folder}, {show(named[0])} for one;"
            f" --{kind}_folder is what their names begin at"
        )


def check_for_model(data: Data, takes_videos: bool) -> None:
    """Leave out what this model cannot be shown.

    Raises:
        ValueError: if nothing is left.
    """

    def problem(sample: dict) -> Fault | None:
        if "video" in sample and not takes_videos:
            return Fault("video", "it has a video, and this model takes images only")
        places = any(DEFAULT_VIDEO_TOKEN in turn["value"] for turn in sample["conversations"])
        if places and takes_videos and "video" not in sample:
            return Fault("places", f"it has {DEFAULT_VIDEO_TOKEN} and no video")
        return None

    data.leave_out(problem)
    data.check_any()


def _id_of(sample) -> str | None:
    given = sample.get("id") if isinstance(sample, dict) else None
    return None if given is None else show([given])[1:-1]


def files_of(sample: dict, kind: str) -> list[str]:
    """The file names of a sample in LLaVA's form."""
    given = sample.get(kind, [])
    return [given] if isinstance(given, str) else given


def _in_our_form(sample, plain: bool, data: Data) -> dict:
    """One sample; ``data`` counts what was put right. Raises Fault."""
    if not isinstance(sample, dict):
        raise Fault("conversation", "it is not an object with a conversation")
    kind, files = _media_of(sample)
    rounds = _rounds_of(_turns_of(sample), plain)
    if plain and len(rounds) != 1:
        raise Fault(
            "conversation",
            f"the version plain takes one question and one answer, not {2 * len(rounds)} turns",
        )
    kept, lost, files = _answered(rounds, kind, files, plain)
    turns = [{"from": who, "value": text} for pair in kept for who, text in zip(("human", "gpt"), pair)]
    placed = False
    if files:
        files, placed = _check_places(turns, kind, files, plain)
    elif plain:
        raise Fault("places", "it has no image, and the version plain is for images with a caption")
    elif any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns):
        raise Fault("places", f"it has {DEFAULT_IMAGE_TOKEN} and no image")
    data.placed += placed
    data.lost_rounds += lost
    return {
        **({"id": sample["id"]} if "id" in sample else {}),
        **({kind: files} if files else {}),
        "conversations": turns,
    }


def _media_of(sample: dict) -> tuple[str | None, str | list[str] | None]:
    """ "image" or "video", and the file name, or the list of them; None twice for text. Raises Fault."""
    given = {key: sample[key] for key in _MEDIA_KEYS if sample.get(key) not in (None, "", [])}
    for key, value in given.items():
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise Fault("file names", f'"{key}" is {show(value)}, not a file name or a list of them')
    kinds = {_MEDIA_KEYS[key] for key in given}
    if len(kinds) > 1:
        raise Fault("file names", "it has both image and video; make it two samples")
    lists = [[value] if isinstance(value, str) else value for value in given.values()]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise Fault("file names", f"its keys {' and '.join(given)} name different files; leave one out")
    for key, value in sample.items():
        if key not in _READ and _is_media(key, value, bool(given)):
            raise Fault(
                "unknown key",
                f"its key {show(key)} looks like media and is not read; call it image, images, video or"
                " videos, or take it out",
            )
    if sample.get("system") not in (None, "") or sample.get("tools") not in (None, "", "[]", []):
        raise Fault(
            "system text",
            "it has a system text or tools of its own, and the template brings its own; take them out",
        )
    if not given:
        return None, None
    return kinds.pop(), next(iter(given.values()))


def _is_media(key: str, value, has_media: bool) -> bool:
    """Whether a value under an unknown key looks like an image, a video or a sound that was meant to be
    shown.

    An address next to a known file is where that came from.
    """
    if isinstance(value, dict):
        return any(_is_media(inner, part, has_media) for inner, part in value.items())
    if isinstance(value, list):
        return any(_is_media(key, part, has_media) for part in value)
    if not isinstance(value, str) or not value or has_media and value.startswith(("http://", "https://")):
        return False
    return bool(_LOOKS_LIKE_MEDIA.fullmatch(key) or _MEDIA_FILE.fullmatch(value))


def _turns_of(sample: dict) -> list[tuple[str, str]]:
    """(human or gpt, text) of each turn, without a first one of gpt. Raises Fault."""
    given = [sample[key] for key in ("conversations", "messages") if sample.get(key)]
    if len(given) != 1 or not isinstance(given[0], list):
        raise Fault(
            "conversation",
            'it has no list "conversations" or "messages"'
            if not given
            else 'it has both "conversations" and "messages"'
            if len(given) == 2
            else "its conversation is not a list",
        )
    turns = [_turn(turn) for turn in given[0]]
    return turns[1:] if turns[0][0] == "gpt" else turns


def _turn(turn) -> tuple[str, str]:
    wrong = Fault(
        "conversation", 'a turn needs "from" (human or gpt) and "value" (a text), or "role" and "content"'
    )
    if not isinstance(turn, dict):
        raise wrong
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker == "system":
        raise Fault(
            "system text", "it has a system text of its own, and the template brings its own; take it out"
        )
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise wrong
    for key, value in turn.items():
        if key not in ("from", "value", "role", "content") and _is_media(key, value, False):
            raise Fault(
                "unknown key",
                f"a turn has the key {show(key)}, which looks like media and is not read; name files as"
                " image, images, video or videos of the sample",
            )
    if isinstance(text, list):
        texts = [part.get("text") for part in text if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(text) or not all(isinstance(part, str) for part in texts):
            raise Fault(
                "unknown key",
                "a turn has parts that are not text and not read; name files as image, images, video or"
                f" videos of the sample, and put {DEFAULT_IMAGE_TOKEN} where they go",
            )
        text = "".join(texts)
    if text is None and SPEAKERS[speaker] == "gpt":
        text = ""
    if not isinstance(text, str):
        raise wrong
    try:
        check_characters(text, "its text")
    except ValueError as error:
        raise Fault("text", str(error)) from error
    return SPEAKERS[speaker], text


def _rounds_of(turns: list[tuple[str, str]], plain: bool) -> list[tuple[str, str]]:
    """(question, answer) of each round; a last question without an answer has an empty one. Raises Fault."""
    if any(who != ("human", "gpt")[i % 2] for i, (who, _) in enumerate(turns)):
        raise Fault("turns", "human and gpt do not take turns")
    texts = [text for _, text in turns]
    rounds = list(zip(texts[::2], [*texts[1::2], ""]))
    if not any(answer.strip() for _, answer in rounds):
        raise Fault("no answer", "the conversation has no answer (a turn from gpt after one from human)")
    return rounds


def _answered(
    rounds: list[tuple[str, str]], kind: str | None, files: str | list[str] | None, plain: bool
) -> tuple[list[tuple[str, str]], int, str | list[str] | None]:
    """The rounds with a question and an answer, how many are lost, and the files that remain.

    The template would run an empty turn into the next one. The places of what is lost go to the next
    question; where there is none, the files are lost too.
    """
    token = PLACES[kind or "image"]
    kept, carried = [], []
    for question, answer in rounds:
        if answer.strip() and (question.strip() or plain or carried):
            kept.append(("\n".join([*carried, question]) if carried else question, answer))
            carried = []
        else:
            carried += [token] * (question + answer).count(token)
    if not kept:
        raise Fault("no answer", "no round of the conversation has both a question and an answer")
    if carried and files:
        seen = any(token in question + answer for question, answer in kept)
        files = (files if seen else None) if isinstance(files, str) else files[: -len(carried)] or None
    return kept, len(rounds) - len(kept), files


def _check_places(
    turns: list[dict], kind: str, files: str | list[str], plain: bool
) -> tuple[str | list[str], bool]:
    """The files as a name or a list, and whether their places were put in front. Raises Fault where places do
    not fit.

    A single name has its places in one turn, where they become one, as in the published code.
    """
    token = PLACES[kind]
    if plain:  # its only place is the template's
        if isinstance(files, list) and len(files) > 1:
            raise Fault("places", f"the version plain takes one {kind}, not {len(files)}")
        return (files if isinstance(files, str) else files[0]), False
    if kind == "video" and not any(token in turn["value"] for turn in turns):
        for turn in turns:  # LLaVA-NeXT writes <image> for videos too
            turn["value"] = turn["value"].replace(DEFAULT_IMAGE_TOKEN, token)
    counts = [turn["value"].count(token) for turn in turns]
    wanted = 1 if isinstance(files, str) else len(files)
    if not any(counts):
        if nearly := next(
            (found for turn in turns[::2] if (found := _NEARLY_A_PLACE.search(turn["value"]))), None
        ):
            raise Fault("places", f"it writes {nearly[0]} where an {kind} goes; write {token}")
        turns[0]["value"] = "\n".join([*[token] * wanted, turns[0]["value"]])
        return files, True
    if isinstance(files, list) and sum(counts) != wanted:
        raise Fault("places", f"it has {wanted} {kind}s and {sum(counts)} {token}; give one for each")
    if isinstance(files, str) and sum(map(bool, counts)) > 1:
        raise Fault("places", f"it has one {kind} and {token} in several turns; give a list of {kind}s")
    if kind == "video" and any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns):
        raise Fault("places", f"it has {DEFAULT_IMAGE_TOKEN} and no image")
    return files, False
