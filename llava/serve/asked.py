"""What the page's fields hold, checked: whatever a browser sends becomes a question with two compressions, or
a sentence for the field that is wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from libra import Compression
from libra.budget import solve
from libra.media import SERVED, open_image
from libra.methods import METHODS
from libra.rows import CONFIGS, Row, get_model, spec_of

from .speakers import NOTHING, Question, Speaker

FIELDS = ("picture", "question", "share", "way0", "way1")
METHODS_OFFERED = {name: method for name, method in METHODS.items() if method.compresses}
MOST_TURNS = 50
_EXAMPLE = "example:"


class Mistake(ValueError):
    """Something that the user can mend; ``field`` is the one of :data:`FIELDS` where the page says so."""

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


@dataclass(frozen=True)
class Example:
    """A picture to ask about; ``answer`` is the right one, "" where it is not known."""

    image: Image.Image
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Asked:
    """A question to all visual tokens and to two compressions.

    Attributes:
        questions: the same one with the conversation of each: of the plain model, then of both compressions.
        compressions: likewise.
        names: likewise, what the user calls them.
        visual: tokens of the picture.
        note: what the reader of the picture remarked, or "".
    """

    questions: tuple[Question, ...]
    compressions: tuple[Compression, ...]
    names: tuple[str, ...]
    visual: int
    note: str = ""


def fitting_rows(config, folder: Path = CONFIGS) -> dict[str, Compression]:
    """The compressions of the table rows in a folder, and one folder deeper, that are made for a decoder of
    these sizes, by their names; each once."""
    fitting: dict[str, Compression] = {}
    sizes = [getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]:
        row = Row.from_yaml(path)
        spec = get_model(row.model, str(path))
        fits = [spec.layers, spec.hidden_size, spec.intermediate_size] == sizes
        if fits and row.compression.compresses and row.compression not in fitting.values():
            fitting[path.relative_to(folder).with_suffix("").as_posix()] = row.compression
    return fitting


def in_words(c: Compression) -> str:
    """How much a compression removes, and where."""
    if isinstance(c.ratio, float):
        return f"{c.ratio:.0%} removed {c.where.replace('after layers', 'after each of layers')}"
    return f"{c.amount} {c.where}"


@dataclass
class Reader:
    """Reads requests for one model.

    Attributes:
        rows: of the tables, by name; see :func:`fitting_rows`.
        most: tokens of an answer.
    """

    speaker: Speaker
    rows: Mapping[str, Compression]
    examples: list[Example]
    most: int

    def __call__(self, body: bytes) -> Asked:
        """Raises Mistake."""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise Mistake("question", "the request is not what this page sends; load the page again")
        image, note = self._picture(given.get("picture"), given.get("name"))
        text = given.get("question")
        if not isinstance(text, str) or not text.strip():
            raise Mistake("question", "write a question")
        turns = _turns(given.get("turns", []))
        questions = tuple(
            Question(image, text.strip(), tuple((asked, answers[i]) for asked, answers in turns), self.most)
            for i in range(3)
        )
        try:
            visual = self.speaker.visual_tokens(questions[0])
        except ValueError as error:
            raise Mistake("question", str(error)) from error
        ways = given.get("ways")
        if not isinstance(ways, list) or len(ways) != 2:
            raise Mistake("way0", "choose two methods")
        share = _share(given.get("share"))
        compressions = [self._compression(i, way, share, visual) for i, way in enumerate(ways)]
        names = ("all visual tokens", *(way["choice"] for way in ways))
        return Asked(questions, (NOTHING, *compressions), names, visual, note)

    def _picture(self, given, name) -> tuple[Image.Image, str]:
        """An example by its number, or the data URI of an upload. Nothing else is read."""
        if not isinstance(given, str) or not given.startswith((_EXAMPLE, "data:")):
            raise Mistake("picture", "give a picture")
        if given.startswith(_EXAMPLE):
            number = given.removeprefix(_EXAMPLE)
            if number not in map(str, range(len(self.examples))):
                raise Mistake("picture", "there is no such example; give a picture")
            return self.examples[int(number)].image, ""
        notes: list[str] = []
        called = name if isinstance(name, str) and name else "uploaded"
        try:
            image = open_image(given, SERVED, name=called, say=lambda what, remark: notes.append(remark))
        except ValueError as error:
            raise Mistake("picture", str(error)) from error
        return image, "; ".join(notes)

    def _compression(self, number: int, way, share: float, visual: int) -> Compression:
        """Of one of the two methods: a row as it is, a method at the share of tokens."""
        field = f"way{number}"
        choice, layers = (way.get("choice"), way.get("layers", "")) if isinstance(way, dict) else (None, "")
        depth = self.speaker.config.num_hidden_layers
        try:
            if isinstance(choice, str) and choice in self.rows:
                return self.rows[choice].at_depth(depth)
            if not isinstance(choice, str) or choice not in METHODS_OFFERED:
                raise ValueError("choose a method from the list")
            keys = {"method": choice, "tokens": share * visual}
            wanted = Compression.from_dict(keys if not layers else {**keys, "layers": _layers(layers)})
            return solve(wanted, spec_of(self.speaker.config, ""), visual).at_depth(depth)
        except ValueError as error:
            amount = f"{share:.0%} of {visual} tokens: " if "out of range" in str(error) else ""
            raise Mistake(field, f"{amount}{error}") from error


def _share(given) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 1 <= given <= 100:
        raise Mistake("share", "give a share of the visual tokens from 1 to 100 percent")
    return given / 100


def _layers(given) -> list[int] | str:
    """Numbers with commas or spaces between them, or "input"."""
    if not isinstance(given, str):
        raise ValueError("the layers are not a text; write for example 2, 5, 8")
    if given.strip() == "input":
        return "input"
    try:
        return [int(layer) for layer in given.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"the layers {given!r} are not numbers; write for example 2, 5, 8") from None


def _turns(given) -> list[tuple[str, list[str]]]:
    """Earlier questions, each with the three answers."""
    wrong = Mistake("question", "the conversation is damaged; start a new one")
    if not isinstance(given, list) or len(given) > MOST_TURNS:
        raise wrong
    turns = []
    for turn in given:
        if not isinstance(turn, dict):
            raise wrong
        asked, answers = turn.get("question"), turn.get("answers")
        if not isinstance(asked, str) or not isinstance(answers, list) or len(answers) != 3:
            raise wrong
        if not all(isinstance(answer, str) for answer in answers):
            raise wrong
        turns.append((asked, answers))
    return turns
