"""What a compression is, and what a table row's YAML file says. Every field is checked and the wrong one is
named."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from . import shipped
from .methods import DEFAULTS, MERGERS, METHODS, SELECTORS, natural_layers
from .rows import get_model
from .utils import plain_yaml
from .utils.names import spelled
from .utils.sentences import ConfigError, did_you_mean, show

IMPORTANCES = ("last", "mean")
SCORE_LAYERS = ("same", "next")
POSITIONS = ("original", "compact")
ROUNDINGS = ("round", "floor", "ceil")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
MOST_LAYERS = 10_000

_CHOICES = {
    "method": tuple(METHODS),
    "select": SELECTORS,
    "merge": MERGERS,
    "importance": IMPORTANCES,
    "score_layer": SCORE_LAYERS,
    "positions": POSITIONS,
    "rounding": ROUNDINGS,
    "attention": ATTENTIONS,
}


@dataclass(frozen=True)
class Compression:
    """How visual tokens are compressed: choose targets × treat the rest × after these layers. Hashable;
    checked when made.

    method: a name of `libra.methods.METHODS`; it sets select and merge (PyramidDrop also score_layer,
        positions and rounding), and a key given beside it overrides it. Without a method: intervals and igm,
        the paper's.
    select: who is a target (§3.2): intervals | topk | random | information, or a name of
        `libra.register_select`.
    merge: what becomes of the rest (§3.3): drop | average | igm | igm-pos (all merge) | igm-neg (none
        merges), or a name of `libra.register_merge`.
    layers: compress after each of these 0-based layers; kept as a sorted tuple. Empty: nothing is compressed.
        None: at the method's natural places, which `at_depth` finds once the depth of the model is known;
            every door of this package does.
    ratio: R, the fraction removed at each of them, in [0, 1); a text like "2/3" is that fraction.
    tau: τ, the similarity above which a token merges (igm only). eta: η of eq. 6's softmax, "mean" (of α) or
        a positive number.
    importance: α is the attention row of the last prompt token ("last", eq. 4), or the "mean" over the text
        after the image.
    score_layer: α from the "same" layer's query and keys, or the "next" layer's.
    positions: "original" position ids, or "compact" (renumbered).
    rounding: of (1-R)·N to whole tokens, round | floor | ceil. information_weight: λ of Turbo's information
        degree.
    seed: of select random, below 2^64.

    After construction no field but `method` and `layers` is None. Raises ConfigError for a wrong value and
    for a key that would have no effect.
    """

    method: str | None = None
    select: str | None = None
    merge: str | None = None
    layers: tuple[int, ...] | None = None
    ratio: float = 0.5
    tau: float = 0.7
    eta: str | float = "mean"
    importance: str = "last"
    # None stands for the method's own choice, which is same, original and round everywhere but in
    # PyramidDrop.
    score_layer: str | None = None
    positions: str | None = None
    rounding: str | None = None
    information_weight: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.method is not None:
            object.__setattr__(self, "method", _choice("method", self.method))
        given = {key for key in DEFAULTS if getattr(self, key) is not None}
        for key, value in _expand(self.method).items():
            if key not in given:
                object.__setattr__(self, key, value)
        for key in ("select", "merge", "importance", "score_layer", "positions", "rounding"):
            object.__setattr__(self, key, _choice(key, getattr(self, key)))
        for key, value in (
            ("layers", () if self.layers is None and self.method == "vanilla" else _layers(self.layers)),
            ("ratio", _ratio(self.ratio)),
            ("tau", _number("tau", self.tau, lambda v: -1 <= v <= 1, "a number in [-1, 1]")),
            ("eta", _eta(self.eta)),
            (
                "information_weight",
                _number("information_weight", self.information_weight, _is_weight, "0 to 1e9"),
            ),
            ("seed", _seed(self.seed)),
        ):
            object.__setattr__(self, key, value)
        for key, why in self._without_effect().items():
            if getattr(self, key) != _default(key, self.method):
                raise ConfigError(f"{key}: {show(getattr(self, key))} has no effect: {why}; remove {key}")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "") -> "Compression":
        """A compression from plain keys, as YAML or `to_dict` gives them. `source` (a file's name) opens
        every error sentence.

        Stricter than the constructor: a key that is given but has no effect is an error even at its default
        value. Raises ConfigError.
        """
        try:
            if not isinstance(mapping, Mapping):
                raise ConfigError(
                    f"compression: {show(mapping)} is not a mapping; write {{method: …, layers: […]}}"
                )
            _keys("compression", mapping, _NAMES)
            for key, value in mapping.items():
                if value is None:
                    raise ConfigError(f"{key}: has no value; give it one or remove the key")
            compression = cls(**mapping)
            for key, why in compression._without_effect().items():
                if key in mapping and key != "layers":
                    raise ConfigError(f"{key}: {show(mapping[key])} has no effect: {why}; remove {key}")
        except ConfigError as error:
            raise _at(source, error) from None
        return compression

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Compression":
        """A compression from a YAML file: its keys alone, or a table row's file, whose `compression:` block
        is taken.

        path: a file, or the name of a shipped row. Raises ConfigError, also for a missing or malformed file.
        """
        file, source = shipped.find_row(path)
        mapping = plain_yaml.load(file)
        if mapping.keys() & {f.name for f in fields(Row)}:
            return _row(mapping, source).compression
        return _block(mapping, source)

    @classmethod
    def named(cls, name: str) -> "Compression":
        """The compression of a row that comes with the package, such as `llava7b_r50` or `mini/r50`: the
        files of configs/.

        Raises ConfigError for another name.
        """
        return cls.from_yaml(shipped.row(name))

    def to_dict(self) -> dict[str, Any]:
        """The keys that matter, resolved, as plain YAML and JSON values; `from_dict` gives back an equal
        compression."""
        idle = self._without_effect()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        if values.get("layers") is not None:
            values["layers"] = list(self.layers)
        else:
            values.pop("layers", None)
        if self.method is None:
            del values["method"]
        return values

    @property
    def compresses(self) -> bool:
        """Whether there is any layer to compress after, named or natural."""
        return self.layers is None or bool(self.layers)

    def at_depth(self, num_layers: int, source: str = "") -> "Compression":
        """The same for a model of `num_layers` layers: `layers` is a tuple, the method's natural places where
        none were named.

        Raises ConfigError, opened by `source`, when a compression layer is not among the model's.
        """
        if self.layers is not None:
            self.check_layers(num_layers, source)
            return self
        layers = self._natural(num_layers)
        if not layers:
            problem = f"layers: a model of {num_layers} layers has no natural place for this method; name the layers"
            raise _at(source, ConfigError(problem))
        return replace(self, layers=layers)

    def check_layers(self, num_layers: int, source: str = "") -> None:
        """Raises ConfigError when a compression layer is not among a model's `num_layers` layers."""
        for layer in self.layers or ():
            problem = ""
            if layer >= num_layers:
                problem = f"{show(layer)} is out of range: the model has layers 0 to {num_layers - 1}"
            elif self.score_layer == "next" and layer == num_layers - 1:
                problem = f"{layer} is the last layer and score_layer: next needs one after it"
            if problem:
                natural = self._natural(num_layers)
                mend = f"use for example {show(natural)}" if natural else "use a smaller layer"
                raise _at(source, ConfigError(f"layers: {problem}; {mend}"))

    def _natural(self, num_layers: int) -> tuple[int, ...]:
        last = num_layers - (2 if self.score_layer == "next" else 1)
        return natural_layers(self.method, num_layers, last)

    def _without_effect(self) -> dict[str, str]:
        """Keys that change nothing here, each with the reason."""
        if self.method == "vanilla":
            return {name: "method vanilla compresses nothing" for name in _NAMES if name != "method"}
        idle = {}
        # Only the merges and selects of this package: one that a user registers may read any key.
        if self.merge in ("drop", "average", "igm-pos", "igm-neg"):
            idle["tau"] = f"it belongs to merge igm, and merge is {self.merge}"
        if self.merge in ("drop", "average"):
            idle["eta"] = f"it belongs to the igm merges, and merge is {self.merge}"
        if self.select in ("intervals", "topk", "random"):
            idle["information_weight"] = f"it belongs to select information, and select is {self.select}"
        if self.select in ("intervals", "topk", "information"):
            idle["seed"] = f"it belongs to select random, and select is {self.select}"
        if self.select == "random" and self.merge in ("drop", "average"):
            # Neither the choice nor the merge reads α, so how α is made is moot.
            idle["importance"] = idle["score_layer"] = (
                f"select random with merge {self.merge} uses no importance"
            )
        return idle


@dataclass(frozen=True)
class Row:
    """One row of a table, as its YAML file describes it.

    model: a name of `libra.rows`; tasks: what it is evaluated on; paper: the paper's figures for it, for
        comparison only;
    name: the file's stem unless given; path: the file; title: in a table, the name unless given; attention:
    how the model attends, one of `ATTENTIONS`. The score row is computed next to any of them.
    """

    model: str
    compression: Compression
    tasks: list[str] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=dict)
    name: str = ""
    path: str = ""
    title: str = ""
    attention: str = "sdpa"

    @classmethod
    def from_yaml(cls, path: str | Path, needs_model: bool = True) -> "Row":
        """Reads and checks a row's file; without layers the compression gets the natural places of the row's
        model.

        path: a file, or the name of a shipped row; needs_model: False also takes a compression's keys only,
        as a row whose model is "". Raises ConfigError naming the key and the file.
        """
        file, source = shipped.find_row(path)
        mapping = plain_yaml.load(file)
        if not needs_model and not mapping.keys() & {f.name for f in fields(cls)}:
            name = Path(source).stem
            return cls("", _block(mapping, source), name=name, path=source, title=name)
        row = _row(mapping, source)
        if row.compression.layers is not None:
            return row
        return replace(
            row, compression=row.compression.at_depth(get_model(row.model, row.path).layers, row.path)
        )


_NAMES = tuple(f.name for f in fields(Compression))
ROW_KEYS = ("model", "compression", "tasks", "paper", "name", "title", "attention")
_NO_LAYERS = (
    "layers: there are none; write for example layers: [7, 15, 23], remove the key for the method's natural places, or write"
    " method: vanilla to compress nothing"
)


def _row(mapping: dict[Any, Any], source: str) -> Row:
    """A row from a file's keys; its compression may still be without layers."""
    try:
        _keys("a row", mapping, ROW_KEYS)
        for key, example in (
            ("model", "model: llava-1.5-7b"),
            ("compression", "compression: {method: vanilla}"),
        ):
            if key not in mapping:
                raise ConfigError(f"{key}: is missing; a row needs it, for example `{example}`")
        for key in ("model", "name", "title"):
            if key in mapping and not _is_name(mapping[key]):
                raise ConfigError(f"{key}: {show(mapping[key])} is not a name; write a text of one line")
        attention = _choice("attention", mapping.get("attention", Row.attention))
        tasks, paper = _tasks(mapping.get("tasks", [])), _paper(mapping.get("paper", {}))
    except ConfigError as error:
        raise _at(source, error) from None
    name = mapping.get("name", Path(source).stem)
    compression = _block(mapping["compression"], source)
    return Row(
        mapping["model"], compression, tasks, paper, name, source, mapping.get("title", name), attention
    )


def _tasks(tasks: Any) -> list[str]:
    if not isinstance(tasks, list) or not all(map(_is_name, tasks)):
        raise ConfigError(f"tasks: {show(tasks)} is not a list of task names; write for example [gqa, mme]")
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f"tasks: {show(tasks)} names a task twice; name each once")
    return tasks


def _paper(paper: Any) -> dict[str, float]:
    if not isinstance(paper, dict):
        raise ConfigError(
            f"paper: {show(paper)} is not a mapping; write for example {{table: 1, flops: 1.78}}"
        )
    for key, value in paper.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not _is_name(key) or not number or not abs(value) < 1e15:
            raise ConfigError(f"paper: {show(key)}: {show(value)} is not a figure; write a name and a number")
    return paper


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _block(mapping: Any, source: str) -> Compression:
    """A file's compression keys; unlike a dictionary's, its list of layers is not allowed to be empty."""
    compression = Compression.from_dict(mapping, source)
    if not compression.compresses and compression.method != "vanilla":
        raise _at(source, ConfigError(_NO_LAYERS))
    return compression


def _expand(method: str | None) -> dict[str, str]:
    return DEFAULTS | (METHODS[method].keys if method else {})


def _default(key: str, method: str | None) -> Any:
    if method == "vanilla" and key == "layers":
        return ()
    return _expand(method).get(key, Compression.__dataclass_fields__[key].default)


def _at(source: str, error: ConfigError) -> ConfigError:
    return ConfigError(f"{source}: {error}" if source else str(error))


def _keys(what: str, mapping: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in mapping:
        if key in known:
            continue
        if key in _NAMES:
            raise ConfigError(f"{key}: is a key of the compression; move it into the block `compression:`")
        hint = did_you_mean(key, known) if isinstance(key, str) else ""
        raise ConfigError(f"{show(key)}: is no key of {what};{hint} the keys are {', '.join(known)}")


def _choice(key: str, value: Any) -> str:
    """The value in its own spelling. Raises ConfigError for an unknown one."""
    known = _CHOICES[key]
    name = spelled(value, known)
    if name is None:
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        raise ConfigError(f"{key}: {show(value)} is unknown;{hint} use one of {', '.join(known)}")
    return name


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(key: str, value: Any, allowed, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = " without quotes, such as 0.001 or 1.0e-3" if _looks_like_a_number(value) else ""
        raise ConfigError(f"{key}: {show(value)} is not a number; write {what}{hint}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of 310 digits
        number = math.inf
    if not math.isfinite(number) or not allowed(number):
        raise ConfigError(f"{key}: {show(value)} is out of range; write {what}")
    return number


def _looks_like_a_number(value: Any) -> bool:
    """Whether it is a text that somebody meant for a number, as YAML reads 1e-3."""
    return isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d.]+([eE][-+]?\d+)?\s*", value) is not None


def _is_weight(value: float) -> bool:
    return 0 <= value <= 1e9


def _seed(value: Any) -> int:
    if not _is_whole(value) or not 0 <= value < 2**64:
        raise ConfigError(f"seed: {show(value)} is not a whole number from 0 to 2^64 - 1; write 0, 1, 2 …")
    return int(value)


def _ratio(value: Any) -> float:
    what = "a number in [0, 1), the fraction removed, such as 0.5 or 2/3"
    fraction = (
        re.fullmatch(r"\s*([0-9]{1,15})\s*/\s*([0-9]{1,15})\s*", value) if isinstance(value, str) else None
    )
    if fraction:
        top, bottom = map(int, fraction.groups())
        if top >= bottom:
            raise ConfigError(f"ratio: {show(value)} is out of range; write {what}")
        return top / bottom
    return _number("ratio", value, lambda v: 0 <= v < 1, what)


def _eta(value: Any) -> str | float:
    what = 'the word "mean" or a positive number, 1e-30 to 1e30'
    if isinstance(value, str) and not _looks_like_a_number(value):
        if value == "mean":
            return value
        raise ConfigError(f"eta: {show(value)} is unknown; write {what}")
    return _number("eta", value, lambda v: 1e-30 <= v <= 1e30, what)  # float32 divides by it


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, range)):
        raise ConfigError(
            f"layers: {show(value)} is not a list; write a list of layer numbers such as [7, 15, 23]"
        )
    if len(value) > MOST_LAYERS:
        raise ConfigError(
            f"layers: there are {len(value)}, more than any model has; write a list such as [7, 15, 23]"
        )
    for layer in value:
        if not _is_whole(layer):
            raise ConfigError(
                f"layers: {show(layer)} is not a layer number; write whole numbers such as [7, 15, 23]"
            )
        if layer < 0:
            raise ConfigError(f"layers: {show(layer)} is out of range; layers are counted from 0")
    if len(set(value)) < len(value):
        raise ConfigError(f"layers: {show(list(value))} names a layer twice; name each layer once")
    return tuple(sorted(int(layer) for layer in value))
