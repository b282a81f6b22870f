"""What a compression is. Every field is checked, and an error names the wrong one and what to write
instead."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from . import merge, select  # noqa: F401  They register what several methods share.
from .methods import DEFAULTS, MERGERS, METHODS, SELECTORS, natural_layers
from .places import BEFORE, IN_WORDS, INPUT, LAYERS, TOWER, place_and_layers, place_name
from .utils import plugins
from .utils.numbers import is_whole
from .utils.sentences import ConfigError, did_you_mean, show, spelled

IMPORTANCES = ("last", "mean", "tower", "raters", "rater-heads")
SCORE_LAYERS = ("same", "next")
POSITIONS = ("original", "compact", "centre")
ROUNDINGS = ("round", "floor", "ceil")
RESERVED = "reserved"
COMPENSATIONS = ("ragged", RESERVED)
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
MOST_LAYERS = 10_000
DEFAULT_RATIO = 0.5
BUDGETS = ("ratio", "keep", "tokens", "flops")
ADAPTIVE = "adaptive"  # as a value of keep: the picture decides
TOWER_SCORE = "tower_cls|tower_received"

_CHOICES = {
    "method": tuple(METHODS),
    "select": SELECTORS,
    "merge": MERGERS,
    "importance": IMPORTANCES,
    "score_layer": SCORE_LAYERS,
    "positions": POSITIONS,
    "rounding": ROUNDINGS,
    "compensation": COMPENSATIONS,
    "attention": ATTENTIONS,
}


@dataclass(frozen=True)
class Compression:
    """How visual tokens are compressed: choose targets × treat the rest × at these places. Hashable;
    checked when made.

    method: a name of `libra.methods.METHODS`; it sets select and merge (PyramidDrop also score_layer,
        positions and rounding), and a key given next to it overrides it. Without a method: intervals and igm,
        the paper's.
    select: who is a target (§3.2): intervals | topk | random | information, or a name of
        `libra.register_select`.
    merge: what becomes of the rest (§3.3): drop | average | igm | igm-pos (all merge) | igm-neg (none
        merges), or a name of `libra.register_merge`.
    layers: compress after each of these 0-based layers; kept as a sorted tuple. Empty: nothing is compressed.
        None: at the method's natural places, which `at_depth` finds once the depth of the model is known;
            every door of this package does. -1, or the word "input" instead of a list, is the place before
            layer 0.
    at: a place before the language model instead of layers: "input" (embeddings, before layer 0) or "tower"
        (features, before the model's own projector); None after decoder layers. The number of a layer is
        taken too, and becomes `layers`.
    ratio: R, the fraction removed at each of them, in [0, 1); a text like "2/3" is that fraction. 0.5 where
        no budget is given.
        A list has one for each layer.
    keep, tokens, flops: instead of ratio, the tokens that each span is left with after the last compression
        ("adaptive" in the tower, for methods whose choice says how many);
        the visual tokens of an average layer; or the share of the plain model's FLOPs in (0, 1). The last two
        become a ratio where model and number of tokens are known (`libra.budget.solve`; a row's file does
        it).
    tau: τ, the similarity above which a token merges (igm only). eta: η of eq. 6's softmax, "mean" (of α) or
        a positive number.
    importance: α is the attention row of the last prompt token ("last", eq. 4), or the "mean" over the text
        after the image, or over those of its tokens that are SparseVLM's "raters" ("rater-heads": only of the
        heads that look at the picture most), or the score of the vision "tower".
    score_layer: α from the "same" layer's query and keys, or the "next" layer's.
    positions: "original" position ids, "compact" (renumbered), or "centre": the i-th of a span's T tokens
        stands at the centre of the i-th of T even intervals of the span.
    rounding: of (1-R)·N to whole tokens, round | floor | ceil. information_weight: λ of Turbo's information
        degree.
    seed: of select random, below 2^64.
    compensation: "ragged", a row gets a compensation token where a token is too dissimilar to merge (the
        paper's); or "reserved" (ours): every row in which anything is removed gets one, which the least
        similar token joins in any case, so that all lengths are known beforehand.

    as_released: reproduce what the released code does where it is not what its paper says (docs/methods.md).
    steps: compressions of their own, one after another, each a mapping of the keys above (or a Compression).
        Next to them only `positions` may be given, which then goes for all of them; `layers` is that of all
        steps, and the other fields mean nothing.

    After construction no field but `method`, `layers`, `at`, `steps` and all but one of the four budgets is
    None. Raises ConfigError for a wrong value and for a key that would have no effect.
    """

    method: str | None = None
    select: str | None = None
    merge: str | None = None
    layers: tuple[int, ...] | None = None
    ratio: float | tuple[float, ...] | None = None
    tau: float = 0.7
    eta: str | float = "mean"
    # None stands for the method's own choice.
    importance: str | None = None
    score_layer: str | None = None
    positions: str | None = None
    rounding: str | None = None
    information_weight: float = 1.0
    seed: int = 0
    keep: int | str | None = None
    tokens: float | None = None
    flops: float | None = None
    as_released: bool = False
    at: str | None = None
    steps: tuple["Compression", ...] | None = None
    compensation: str = COMPENSATIONS[0]

    def __post_init__(self):
        if self.steps is not None:
            return self._take_steps()
        if self.method is not None:
            object.__setattr__(self, "method", choice("method", self.method))
        given = {key for key in DEFAULTS if getattr(self, key) is not None}
        place, layers = place_and_layers(self.at, self.layers)
        if place is None and layers is None and self.method and METHODS[self.method].place != LAYERS:
            place = METHODS[self.method].place
        object.__setattr__(self, "at", place)
        object.__setattr__(self, "layers", [BEFORE] if place else layers)
        for key, value in _expand(self.method).items():
            if key not in given:
                object.__setattr__(self, key, value)
        for key in (*DEFAULTS, "compensation"):
            object.__setattr__(self, key, choice(key, getattr(self, key)))
        for key, value in (
            ("layers", () if self.layers is None and not self.acts else _layers(self.layers)),
            *self._budget().items(),
            ("as_released", _flag("as_released", self.as_released)),
            ("tau", _number("tau", self.tau, lambda v: -1 <= v <= 1, "a number in [-1, 1]")),
            ("eta", _eta(self.eta)),
            (
                "information_weight",
                _number("information_weight", self.information_weight, _is_weight, "0 to 1e9"),
            ),
            ("seed", _seed(self.seed)),
        ):
            object.__setattr__(self, key, value)
        self._check_pair()
        self._check_place()
        for key, why in self._without_effect().items():
            if getattr(self, key) != _default(key, self.method):
                raise ConfigError(f"{key}: {show(getattr(self, key))} has no effect: {why}; remove {key}")

    def _check_pair(self) -> None:
        """Raises ConfigError for a merge that goes on from another select."""
        follows = MERGERS[self.merge].follows
        if self.acts and follows and self.select not in follows:
            raise ConfigError(
                f"merge: {self.merge} goes on from what select {' or '.join(follows)} leaves it, and select"
                f" is {self.select}; write select: {follows[0]}, or another merge"
            )

    def _check_place(self) -> None:
        """Raises ConfigError where this cannot be done at its place, whatever the model."""
        if BEFORE in (self.layers or ()) and self.acts and self.reads_importance:
            if self.importance != "tower":
                raise ConfigError(
                    f"importance: {self.importance} is the decoder's attention, and {self.name} reads it "
                    f"{IN_WORDS[self.place if self.at else INPUT]}, where there is none yet; write "
                    "importance: tower, or compress after a layer"
                )
        layers = (0,) if self.layers is None else self.layers  # at natural places, which are after layers
        if self.acts and SELECTORS[self.select].shrinks and any(layer != BEFORE for layer in layers):
            raise ConfigError(
                f"layers: {self.name} shrinks the picture before the vision tower; write at: tower or"
                " at: input"
            )
        if BEFORE in (self.layers or ()) and self.compares_keys:
            raise ConfigError(
                f"layers: {self.name} compares keys of a decoder layer, and before the language model there"
                " are none; compress after a layer"
            )
        _check_grid((self,))
        if self.adaptive and (self.at != TOWER or SELECTORS[self.select].own_count is None):
            able = [name for name, traits in SELECTORS.items() if traits.own_count is not None]
            raise ConfigError(
                f"keep: {ADAPTIVE} is for select {' and '.join(able)} in the tower; write how many tokens"
                " are kept"
            )
        if self.at != TOWER:
            return
        if MERGERS[self.merge].compensates:
            problem = f"merge {self.merge} makes a compensation token, which no feature of a picture is"
        elif any("text" in need.split("|") for need in self.needs):
            problem = f"{self.name} compares with the question, which the tower does not see"
        else:
            return
        raise ConfigError(f"at: {problem}; write at: input")

    def _take_steps(self) -> None:
        """Checks `steps`, gives all of them the same positions, and sets the fields that tell of all."""
        if not isinstance(self.steps, (list, tuple)) or not self.steps:
            raise ConfigError(
                f"steps: {show(self.steps)} is not a list of compressions; write for example"
                " [{at: input, method: divprune, keep: 192}, {at: 15, method: fastv, ratio: 0.5}]"
            )
        steps = [
            part if isinstance(part, Compression) else Compression.from_dict(part) for part in self.steps
        ]
        nested = any(part.steps is not None for part in steps)
        idle = next((part.name for part in steps if not nested and not part.compresses), "")
        if nested or idle:
            what = "a step has steps of its own" if nested else f"{idle} compresses nothing"
            raise ConfigError(f"steps: {what}; remove it")
        found = {part.positions for part in steps}
        if self.positions is None and len(found) > 1:
            raise ConfigError(
                f"positions: the steps have {' and '.join(sorted(found))}; write one of them next to steps"
            )
        positions = found.pop() if self.positions is None else choice("positions", self.positions)
        steps = tuple(  # type: ignore[assignment]  # the list is not needed any more
            part if part.positions == positions else replace(part, positions=positions) for part in steps
        )
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "steps", steps)
        places = [place for part in steps for place in ((TOWER,) if part.at == TOWER else part.layers or ())]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            twice = place_name(twice) if isinstance(twice, int) else twice
            raise ConfigError(f"steps: two of them are at {twice}; give each a place of its own")
        _check_grid(steps)
        layers = None
        if all(part.layers is not None for part in steps):
            layers = tuple(sorted(layer for part in steps for layer in part.layers))
        for key, value in vars(self).items():
            told = key in ("steps", "positions") or key == "layers" and value == layers
            if not told and value != Compression.__dataclass_fields__[key].default:
                raise ConfigError(f"{key}: {show(value)} has no effect next to steps; write it in a step")
        object.__setattr__(self, "layers", layers)

    def _budget(self) -> dict[str, Any]:
        """The four budgets, checked: the given one, or the default ratio, is the only one that is not
        None."""
        given = {key: getattr(self, key) for key in BUDGETS if getattr(self, key) is not None}
        if len(given) > 1:
            told = " and ".join(f"{key}: {show(value)}" for key, value in given.items())
            raise ConfigError(f"{told} both say how much is kept; remove all but one")
        key, value = next(iter(given.items()), ("ratio", DEFAULT_RATIO))
        if key == "ratio":
            value = _ratios(value, self.layers)
        elif key == "keep":
            value = _keep(value)
        elif key == "tokens":
            what = "the visual tokens of an average layer, such as 192"
            value = _number(key, value, lambda v: 0.5 < v <= 1e6, what)
        else:
            value = _number(key, value, lambda v: 0 < v < 1, "a share of the plain model's FLOPs in (0, 1)")
        if key == "tokens" and self.at is not None:
            key, value = "keep", _keep(round(value))  # type: ignore[arg-type]  # every layer has what is kept
        return dict.fromkeys(BUDGETS) | {key: value}

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
            check_keys("compression", mapping, _NAMES)
            for key, value in mapping.items():
                if value is None:
                    raise ConfigError(f"{key}: has no value; give it one or remove the key")
            compression = cls(**mapping)
            if compression.steps is not None:
                return compression
            for key, why in compression._without_effect().items():
                if key in mapping and key != "layers":
                    raise ConfigError(f"{key}: {show(mapping[key])} has no effect: {why}; remove {key}")
        except ConfigError as error:
            raise at(source, error) from None
        return compression

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Compression":
        """A compression from a YAML file with its keys, or from a table row's file, whose `compression:`
        block is taken.

        path: a file, or the name of a shipped row. Raises ConfigError, also for a missing or malformed file.
        """
        from .rows import read_compression  # rows are above compressions

        return read_compression(path)

    @classmethod
    def named(cls, name: str) -> "Compression":
        """The compression of a row that comes with the package, such as `llava7b_r50` or `mini/r50`: the
        files of configs/.

        Raises ConfigError for another name.
        """
        from .rows import shipped_row

        return cls.from_yaml(shipped_row(name))

    def to_dict(self) -> dict[str, Any]:
        """The keys that matter, resolved, as plain YAML and JSON values; `from_dict` gives back an equal
        compression."""
        if self.steps is not None:
            steps = [part.to_dict() for part in self.steps]
            return {
                "steps": [{k: v for k, v in step.items() if k != "positions"} for step in steps],
                "positions": self.positions,
            }
        idle = self._without_effect()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        values = {key: value for key, value in values.items() if key not in BUDGETS or value is not None}
        if isinstance(values.get("ratio"), tuple):
            values["ratio"] = list(values["ratio"])
        if values.get("layers") is not None and self.at is None:
            values["layers"] = list(self.layers)
        else:
            values.pop("layers", None)
        for key in ("method", "at", "steps"):
            if values.get(key) is None:
                values.pop(key, None)
        if values.get("compensation") != RESERVED:  # what was written before there was a choice says the same
            values.pop("compensation", None)
        return values

    @property
    def acts(self) -> bool:
        """False for a method that changes nothing wherever it stands, such as vanilla."""
        if self.steps is not None:
            return True
        return self.method is None or METHODS[self.method].compresses

    @property
    def compresses(self) -> bool:
        """Whether there is any layer to compress after, named or natural."""
        return self.layers is None or bool(self.layers)

    def at_depth(self, num_layers: int, source: str = "") -> "Compression":
        """The same for a model of `num_layers` layers: `layers` is a tuple, the method's natural places where
        none were named.

        Raises ConfigError, opened by `source`, when a compression layer is not among the model's.
        """
        if self.steps is not None:
            steps = tuple(part.at_depth(num_layers, source) for part in self.steps)
            return self if steps == self.steps else replace(self, steps=steps, layers=None)
        if self.ratio is None and self.keep is None:
            problem = (
                f"{self.amount.replace(' ', ': ', 1)} is a budget of a whole model; give ratio or"
                " keep, or make it a ratio with libra.budget.solve(compression, sizes, visual_tokens), where"
                " sizes = libra.rows.spec_of(model.config.get_text_config(), 'my model')"
            )
            raise at(source, ConfigError(problem))
        if self.layers is not None:
            self.check_layers(num_layers, source)
            return self
        layers = self._natural(num_layers)
        if isinstance(self.ratio, tuple) and len(self.ratio) != len(layers):
            problem = f"ratio: there are {len(self.ratio)} for layers {show(list(layers))}; give one for each"
            raise at(source, ConfigError(problem))
        if not layers:
            problem = (
                f"layers: a model of {num_layers} layers has no natural place for this method; name the"
                " layers"
            )
            raise at(source, ConfigError(problem))
        return replace(self, layers=layers)

    def schedule(self, num_layers: int) -> tuple["Step", ...]:
        """The single compressions in a model of `num_layers` layers, in the order in which they run.

        Raises ConfigError as :meth:`at_depth`.
        """
        steps = []
        for part in self.at_depth(num_layers).parts:
            for number, layer in enumerate(part.layers):
                steps.append(Step(layer, part, len(part.layers) - number))
        return tuple(sorted(steps, key=lambda step: (step.layer, step.part.at != TOWER)))

    @property
    def parts(self) -> tuple["Compression", ...]:
        """The compressions that this one is made of: its steps, or itself."""
        return (self,) if self.steps is None else self.steps

    @property
    def place(self) -> str:
        """ "layers" (after decoder layers), "input" (before the first one) or "tower" (before the
        projector)."""
        return self.at or LAYERS

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        if self.steps is not None:
            return ", then ".join(part.name for part in self.steps)
        return f"method {self.method}" if self.method else f"select {self.select} with merge {self.merge}"

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of :class:`libra.Context` that the select, the merge and the importance need."""
        if self.steps is not None:
            return tuple(dict.fromkeys(need for part in self.steps for need in part.needs))
        tower = (TOWER_SCORE,) if self.importance == "tower" else ()
        return tuple(dict.fromkeys((*SELECTORS[self.select].needs, *MERGERS[self.merge].needs, *tower)))

    @property
    def compares_keys(self) -> bool:
        """Whether a decoder layer's keys are looked at."""
        return "layer_keys" in self.needs

    @property
    def adaptive(self) -> bool:
        """Whether each picture decides how many tokens are kept, in one of its steps at least."""
        return any(part.keep == ADAPTIVE for part in self.parts)

    @property
    def amount(self) -> str:
        """How much is kept or removed, in words: "ratio 0.5" or "keep 64"."""
        if self.steps is not None:
            return ", then ".join(part.amount for part in self.steps)
        key, value = next((key, getattr(self, key)) for key in BUDGETS if getattr(self, key) is not None)
        values = value if isinstance(value, tuple) else (value,)
        return f"{key} {', '.join(n if isinstance(n, str) else f'{n:.3g}' for n in values)}"

    @property
    def where(self) -> str:
        """The places in words: "after layers 7, 15, 23" or "before the language model"."""
        if self.steps is not None:
            return ", then ".join(part.where for part in self.steps)
        if self.at is not None or self.layers is None:
            return IN_WORDS[self.place]
        return f"after layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(place_name, self.layers))}"

    @property
    def reads_importance(self) -> bool:
        """Whether α makes a difference, as far as is known."""
        if self.steps is not None:
            return any(part.reads_importance for part in self.steps)
        parts = SELECTORS[self.select], MERGERS[self.merge]
        return any(part.reads is None or "importance" in part.reads for part in parts)

    @property
    def reserves(self) -> bool:
        """Whether each of its steps gives a compensation token to every row in which anything is removed."""
        if self.steps is not None:
            return all(part.reserves for part in self.steps)
        return self.compensation == RESERVED and MERGERS[self.merge].compensates

    def check_layers(self, num_layers: int, source: str = "") -> None:
        """Raises ConfigError when a compression layer is not among a model's `num_layers` layers."""
        if self.steps is not None:
            for part in self.steps:
                part.check_layers(num_layers, source)
            return
        for layer in self.layers or ():
            problem = ""
            if layer >= num_layers:
                problem = f"{show(layer)} is out of range: the model has layers 0 to {num_layers - 1}"
            elif self.score_layer == "next" and layer == num_layers - 1:
                problem = f"{layer} is the last layer and score_layer: next needs one after it"
            if problem:
                natural = self._natural(num_layers)
                mend = f"use for example {show(natural)}" if natural else "use a smaller layer"
                raise at(source, ConfigError(f"layers: {problem}; {mend}"))

    def _natural(self, num_layers: int) -> tuple[int, ...]:
        last = num_layers - (2 if self.score_layer == "next" else 1)
        return natural_layers(self.method, num_layers, last)

    def _without_effect(self) -> dict[str, str]:
        """Keys that change nothing here, each with the reason."""
        if not self.acts:
            return {name: f"method {self.method} compresses nothing" for name in _NAMES if name != "method"}
        idle = {}
        chooser, treatment = SELECTORS[self.select], MERGERS[self.merge]
        for key, what, own, other in (
            ("tau", "merge", treatment, chooser),
            ("eta", "merge", treatment, chooser),
            ("information_weight", "select", chooser, treatment),
            ("seed", "select", chooser, treatment),
            ("as_released", "select", chooser, treatment),
        ):
            # Where it is not known what is read, as of most that users register, any key may have an effect.
            if own.reads is not None and key not in own.reads and key not in (other.reads or ()):
                readers = _readers(what, key)
                idle[key] = f"it belongs to {what} {', '.join(readers)}, and {what} is {getattr(self, what)}"
        if not treatment.compensates:
            idle["compensation"] = f"merge {self.merge} makes no compensation token"
        if not self.reads_importance:
            # Neither the choice nor the merge reads α, so it does not matter how α is made.
            idle["importance"] = idle["score_layer"] = (
                f"select {self.select} with merge {self.merge} uses no importance"
            )
        if self.at is not None:
            idle["score_layer"] = f"there is no decoder layer {IN_WORDS[self.at]} to score with"
        return idle


@dataclass(frozen=True)
class Step:
    """One compression at one place: after `layer`, or before the language model where that is -1.

    part: what is done, with its own place; left: the compressions of the part that are still to come, this
    one included.
    """

    layer: int
    part: Compression
    left: int

    @property
    def scores(self) -> bool:
        """Whether importance is a row of the decoder's attention."""
        return self.layer != BEFORE and self.part.importance != "tower"


def _readers(what: str, key: str) -> list[str]:
    table = SELECTORS if what == "select" else MERGERS
    return [name for name, traits in table.items() if key in (traits.reads or ())]


def _check_grid(parts: Sequence[Compression]) -> None:
    """Raises ConfigError for one that reads the grid of a picture after another has taken tokens out of
    it."""
    places = [(layer, part.at != TOWER, part) for part in parts for layer in part.layers or ()]
    ordered = sorted(places, key=lambda place: place[:2])
    part = next((part for *_, part in ordered[1:] if "grid" in part.needs), None)
    if part is not None:
        where = "give it one place" if part is ordered[0][2] else "put it before the others"
        raise ConfigError(
            f"layers: {part.name} reads the grid of a picture, which is whole only before the first"
            f" compression; {where}"
        )


_NAMES = tuple(f.name for f in fields(Compression))


def _expand(method: str | None) -> dict[str, str]:
    return DEFAULTS | (METHODS[method].keys if method else {})


def _default(key: str, method: str | None) -> Any:
    if key == "layers" and method and not METHODS[method].compresses:
        return ()
    if key == "ratio":
        return DEFAULT_RATIO
    return _expand(method).get(key, Compression.__dataclass_fields__[key].default)


def at(source: str, error: ConfigError) -> ConfigError:
    return ConfigError(f"{source}: {error}" if source else str(error))


def check_keys(what: str, mapping: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in mapping:
        if key in known:
            continue
        if key in _NAMES:
            raise ConfigError(f"{key}: is a key of the compression; move it into the block `compression:`")
        hint = did_you_mean(key, known) if isinstance(key, str) else ""
        raise ConfigError(f"{show(key)}: is not a key of {what};{hint} the keys are {', '.join(known)}")


def choice(key: str, value: Any) -> str:
    """The value in its own spelling. Raises ConfigError for an unknown one."""
    known = _CHOICES[key]
    name = spelled(value, known)
    if name is None and key in ("select", "merge") and isinstance(value, str) and plugins.offered(value):
        name = spelled(value, known)
    if name is None:
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        raise ConfigError(f"{key}: {show(value)} is unknown;{hint} use one of {', '.join(known)}")
    return name


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
    if not is_whole(value) or not 0 <= value < 2**64:
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


def _ratios(value: Any, layers: Any) -> float | tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        return _ratio(value)
    if not value or isinstance(layers, (list, tuple, range)) and len(layers) != len(value):
        raise ConfigError(
            f"ratio: {show(list(value))} has not one number for each layer; give one for each, or one"
        )
    return tuple(map(_ratio, value))


def _keep(value: Any) -> int | str:
    if value == ADAPTIVE:
        return value
    if not is_whole(value) or not 1 <= value <= 1_000_000:
        raise ConfigError(f"keep: {show(value)} is not a number of tokens; write 1 or more, such as keep: 64")
    return int(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: {show(value)} is not true or false; write one of them")
    return value


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
        if not is_whole(layer):
            raise ConfigError(
                f"layers: {show(layer)} is not a layer number; write whole numbers such as [7, 15, 23]"
            )
        if layer < BEFORE:
            problem = "layers are counted from 0, and -1 is the input"
            raise ConfigError(f"layers: {show(layer)} is out of range; {problem}")
    if len(set(value)) < len(value):
        raise ConfigError(f"layers: {show(list(value))} names a layer twice; name each layer once")
    return tuple(sorted(int(layer) for layer in value))


NOTHING = Compression(method="vanilla")  # compresses nothing, whatever the model
