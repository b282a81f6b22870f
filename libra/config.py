"""What a compression is, and what a table row's YAML file says. Every field is checked and the wrong one is named."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from .methods import DEFAULTS, MERGERS, METHODS, SELECTORS
from .names import spelled

IMPORTANCES = ("last", "mean")
SCORE_LAYERS = ("same", "next")
POSITIONS = ("original", "compact")
ROUNDINGS = ("round", "floor", "ceil")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")

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


class ConfigError(ValueError):
    """One sentence that names the key, its value, the file if there is one, and what to write instead."""


@dataclass(frozen=True)
class Compression:
    """How visual tokens are compressed: choose targets × treat the rest × after these layers. Hashable; checked when made.

    method: a name of `libra.methods.METHODS`; it sets select and merge (PyramidDrop also score_layer, positions and
        rounding), and a key given beside it overrides it. Without a method: intervals and igm, the paper's.
    select: who is a target (§3.2): intervals | topk | random | information, or a name of `libra.register_select`.
    merge: what becomes of the rest (§3.3): drop | average | igm | igm-pos (all merge) | igm-neg (none merges), or a name of
        `libra.register_merge`.
    layers: compress after each of these 0-based layers; kept as a sorted tuple. Empty: nothing is compressed.
    ratio: R, the fraction removed at each of them, in [0, 1); a text like "2/3" is that fraction.
    tau: τ, the similarity above which a token merges (igm only). eta: η of eq. 6's softmax, "mean" (of α) or a positive number.
    importance: α is the attention row of the last prompt token ("last", eq. 4), or the "mean" over the text after the image.
    score_layer: α from the "same" layer's query and keys, or the "next" layer's.
    positions: "original" position ids, or "compact" (renumbered).
    rounding: of (1-R)·N to whole tokens, round | floor | ceil. information_weight: λ of Turbo's information degree.
    seed: of select random.

    After construction no field is None. Raises ConfigError for a wrong value and for a key that would have no effect.
    """

    method: str | None = None
    select: str | None = None
    merge: str | None = None
    layers: tuple[int, ...] = ()
    ratio: float = 0.5
    tau: float = 0.7
    eta: str | float = "mean"
    importance: str = "last"
    # None stands for the method's own choice, which is same, original and round everywhere but in PyramidDrop.
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
            ("layers", _layers(self.layers)),
            ("ratio", _ratio(self.ratio)),
            ("tau", _number("tau", self.tau, lambda v: -1 <= v <= 1, "a number in [-1, 1]")),
            ("eta", _eta(self.eta)),
            ("information_weight", _number("information_weight", self.information_weight, lambda v: v >= 0, "0 or more")),
            ("seed", _whole("seed", self.seed)),
        ):
            object.__setattr__(self, key, value)
        for key, why in self._without_effect().items():
            if getattr(self, key) != _default(key, self.method):
                raise ConfigError(f"{key}: {_show(getattr(self, key))} has no effect: {why}; remove {key}")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "") -> "Compression":
        """A compression from plain keys, as YAML or `to_dict` gives them. `source` (a file's name) opens every error sentence.

        Stricter than the constructor: `layers` has to be there unless the method is vanilla, and a key that is given but has
        no effect is an error even at its default value. Raises ConfigError.
        """
        try:
            _keys("compression", mapping, _NAMES)
            for key, value in mapping.items():
                if value is None:
                    raise ConfigError(f"{key}: has no value; give it one or remove the key")
            compression = cls(**mapping)
            for key, why in compression._without_effect().items():
                if key in mapping and key != "layers":
                    raise ConfigError(f"{key}: {_show(mapping[key])} has no effect: {why}; remove {key}")
            if "layers" not in mapping and compression.method != "vanilla":
                raise ConfigError(_NO_LAYERS)
        except ConfigError as error:
            raise _at(source, error) from None
        return compression

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Compression":
        """A compression from a YAML file: its keys alone, or a table row's file, whose `compression:` block is taken.

        Raises ConfigError, also for a missing or malformed file.
        """
        mapping = _load(path)
        if mapping.keys() & {f.name for f in fields(Row)}:
            return Row.from_yaml(path).compression
        return _block(mapping, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The keys that matter, resolved, as plain YAML and JSON values; `from_dict` gives back an equal compression."""
        idle = self._without_effect()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        if "layers" in values:
            values["layers"] = list(self.layers)
        if self.method is None:
            del values["method"]
        return values

    def check_layers(self, num_layers: int, source: str = "") -> None:
        """Raises ConfigError when a compression layer is not among a model's `num_layers` layers."""
        for layer in self.layers:
            if layer >= num_layers:
                problem = f"layers: {layer} is out of range: the model has layers 0 to {num_layers - 1}"
                raise _at(source, ConfigError(problem))
            if self.score_layer == "next" and layer == num_layers - 1:
                problem = f"layers: {layer} is the last layer and score_layer: next needs one after it; use a smaller layer"
                raise _at(source, ConfigError(problem))

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
            idle["importance"] = idle["score_layer"] = f"select random with merge {self.merge} uses no importance"
        return idle


@dataclass(frozen=True)
class Row:
    """One row of a table, as its YAML file describes it.

    model: a name of `libra.registry`; tasks: what it is evaluated on; paper: the paper's figures for it, for comparison only;
    name: the file's stem unless given; path: the file; title: in a table, the name unless given; attention: how the model
    attends, one of `ATTENTIONS`. The score row is computed beside any of them.
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
    def from_yaml(cls, path: str | Path) -> "Row":
        """Reads and checks a row's file. Raises ConfigError naming the key and the file."""
        mapping, source = _load(path), str(path)
        try:
            _keys("a row", mapping, ROW_KEYS)
            for key, example in (("model", "model: llava-1.5-7b"), ("compression", "compression: {method: vanilla}")):
                if key not in mapping:
                    raise ConfigError(f"{key}: is missing; a row needs it, for example `{example}`")
            for key in ("model", "name", "title"):
                if key in mapping and (not isinstance(mapping[key], str) or not mapping[key]):
                    raise ConfigError(f"{key}: {_show(mapping[key])} is not a name; write a text")
            attention = _choice("attention", mapping.get("attention", cls.attention))
            tasks, paper = mapping.get("tasks", []), mapping.get("paper", {})
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise ConfigError(f"tasks: {_show(tasks)} is not a list of task names; write for example [gqa, mme]")
            if len(set(tasks)) < len(tasks):
                raise ConfigError(f"tasks: {_show(tasks)} names a task twice; name each once")
            if not isinstance(paper, dict):
                raise ConfigError(f"paper: {_show(paper)} is not a mapping; write for example {{table: 1, flops: 1.78}}")
            for key, value in paper.items():
                if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ConfigError(f"paper: {_show(key)}: {_show(value)} is not a figure; write a name and a number")
        except ConfigError as error:
            raise _at(source, error) from None
        compression = _block(mapping["compression"], source)
        name = mapping.get("name", Path(path).stem)
        return cls(mapping["model"], compression, tasks, paper, name, source, mapping.get("title", name), attention)


_NAMES = tuple(f.name for f in fields(Compression))
ROW_KEYS = ("model", "compression", "tasks", "paper", "name", "title", "attention")
_NO_LAYERS = "layers: there are none; write for example layers: [7, 15, 23], or method: vanilla to compress nothing"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with a key that is written twice an error instead of the last one winning."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is written twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(path: str | Path) -> dict[str, Any]:
    """A YAML file's top mapping. Raises ConfigError for a missing, unreadable or malformed file."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            mapping = yaml.load(file, _Loader)  # a SafeLoader: plain values only
    except FileNotFoundError:
        beside = [other.name for other in path.parent.glob("*.yaml")]
        raise ConfigError(f"{path}: there is no such file;{did_you_mean(path.name, beside) or ' check the path'}") from None
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{path}: is not valid YAML: {error.problem}{where}; correct that line") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path}: is not a text file in UTF-8; a configuration is a YAML text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable YAML file") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: holds no keys; write a mapping such as `method: libra` with `layers: [7, 15, 23]`")
    return mapping


def _block(mapping: Any, source: str) -> Compression:
    """A file's compression keys; unlike a dictionary's, its list of layers is not allowed to be empty."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{source}: compression: {_show(mapping)} is not a mapping; write {{method: …, layers: […]}}")
    compression = Compression.from_dict(mapping, source)
    if not compression.layers and compression.method != "vanilla":
        raise ConfigError(f"{source}: {_NO_LAYERS}")
    return compression


def _expand(method: str | None) -> dict[str, str]:
    return DEFAULTS | (METHODS[method].keys if method else {})


def _default(key: str, method: str | None) -> Any:
    return _expand(method).get(key, Compression.__dataclass_fields__[key].default)


def _at(source: str, error: ConfigError) -> ConfigError:
    return ConfigError(f"{source}: {error}" if source else str(error))


def _show(value: Any) -> str:
    """A value as it stands in a file: text without quotes, as long as it can be told from nothing."""
    return value if isinstance(value, str) and value.strip() else str(list(value)) if isinstance(value, tuple) else repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """" did you mean …?" with the known word nearest to a wrong one, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" did you mean {near[0]}?" if near else ""


def _keys(what: str, mapping: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in mapping:
        if key in known:
            continue
        if key in _NAMES:
            raise ConfigError(f"{key}: is a key of the compression; move it into the block `compression:`")
        hint = did_you_mean(str(key), known)
        raise ConfigError(f"{_show(key)}: is no key of {what};{hint} the keys are {', '.join(known)}")


def _choice(key: str, value: Any) -> str:
    """The value in its own spelling. Raises ConfigError for an unknown one."""
    known = _CHOICES[key]
    name = spelled(value, known)
    if name is None:
        raise ConfigError(f"{key}: {_show(value)} is unknown;{did_you_mean(str(value), known)} use one of {', '.join(known)}")
    return name


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(key: str, value: Any, allowed, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        # YAML reads 1e-3 as text.
        dotted = isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d.]+([eE][-+]?\d+)?\s*", value)
        hint = " without quotes, such as 0.001 or 1.0e-3" if dotted else ""
        raise ConfigError(f"{key}: {_show(value)} is not a number; write {what}{hint}")
    if not math.isfinite(value) or not allowed(value):
        raise ConfigError(f"{key}: {_show(value)} is out of range; write {what}")
    return float(value)


def _whole(key: str, value: Any) -> int:
    if not _is_whole(value) or value < 0:
        raise ConfigError(f"{key}: {_show(value)} is not a whole number; write 0, 1, 2 …")
    return int(value)


def _ratio(value: Any) -> float:
    what = "a number in [0, 1), the fraction removed, such as 0.5 or 2/3"
    fraction = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value) if isinstance(value, str) else None
    if fraction:
        top, bottom = map(int, fraction.groups())
        if top >= bottom:
            raise ConfigError(f"ratio: {value} is out of range; write {what}")
        return top / bottom
    return _number("ratio", value, lambda v: 0 <= v < 1, what)


def _eta(value: Any) -> str | float:
    what = 'the word "mean" or a positive number'
    if isinstance(value, str):
        if value == "mean":
            return value
        raise ConfigError(f"eta: {_show(value)} is unknown; write {what}")
    return _number("eta", value, lambda v: v > 0, what)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, range)):
        raise ConfigError(f"layers: {_show(value)} is not a list; write a list of layer numbers such as [7, 15, 23]")
    for layer in value:
        if not _is_whole(layer):
            raise ConfigError(f"layers: {_show(layer)} is not a layer number; write whole numbers such as [7, 15, 23]")
        if layer < 0:
            raise ConfigError(f"layers: {layer} is out of range; layers are counted from 0")
    if len(set(value)) < len(value):
        raise ConfigError(f"layers: {_show(list(value))} names a layer twice; name each layer once")
    return tuple(sorted(int(layer) for layer in value))
