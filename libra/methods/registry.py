"""Where methods, selects and merges are registered by name, each with what it needs to be known about it.

Nothing here needs torch: a configuration is checked, and FLOPs are counted, without it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, TypedDict, Unpack

from ..utils.sentences import show
from .context import Context

QUARTERS = (Fraction(1, 4), Fraction(2, 4), Fraction(3, 4))
EARLY = (Fraction(1, 8),)  # after layer 3 of 32
CONTEXT = frozenset(f.name for f in fields(Context))
# What a select or a merge may read: the hidden states, the importance α, and these keys of a compression.
KEYS = ("tau", "eta", "information_weight", "seed", "as_released")
READABLE = frozenset(("hidden", "importance", *KEYS))


@dataclass(frozen=True)
class Select:
    """A way to choose target tokens.

    function: takes :class:`libra.select.Candidates` and a compression, returns (B, N) bool, True at the
        targets;
    reads: which of :data:`READABLE` the choice depends on, None where that is not known;
    needs: fields of :class:`libra.Context` that must be given;
    per_interval: it takes one token of each of N_t even intervals of a span;
    trusted: it is tested to keep to the contract, so that what it returns is not checked at every use;
    tower_layers: further layers of the vision tower that it looks at, as fractions of its depth: their scores
        come before those of the layer whose features the model takes;
    takes_cls: in the tower its first candidate is the [CLS] token itself, where there is one;
    shrinks: where the vision tower is to read a smaller picture: takes the (h, w) patches of one and the
        tokens that stay, returns the patches (h', w') that the tower gets;
    films: it looks at the frames of a video together;
    own_count: takes the ``tower_next`` (n,) of a span, returns how many tokens it keeps of its own accord;
        None where a budget always says.
    """

    function: Callable
    reads: frozenset[str] | None = None
    needs: tuple[str, ...] = ()
    per_interval: bool = False
    trusted: bool = False
    tower_layers: tuple[Fraction, ...] = ()
    takes_cls: bool = False
    shrinks: Callable[[int, int, int], tuple[int, int]] | None = None
    films: bool = False
    own_count: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Merge:
    """A way to treat the tokens that are not targets.

    function: takes :class:`libra.merge.Matches` and a compression, returns slots and logits;
    compensates: it may make a compensation token;
    drops: targets stay as they are and nothing else is used, so no weights are computed;
    gives_weights: it returns the weights themselves, not logits of a softmax within each slot;
    gives_tokens: it leaves the tokens (B, T, D) that become of the targets in ``candidates.memo["tokens"]``,
        where a token has a part in several of them; weights are then for traces only;
    follows: the selects that it goes on from, by what they leave in ``candidates.memo``; empty: it takes any;
    reads, needs, trusted: as of :class:`Select`.
    """

    function: Callable
    compensates: bool = True
    drops: bool = False
    gives_weights: bool = False
    gives_tokens: bool = False
    follows: tuple[str, ...] = ()
    reads: frozenset[str] | None = None
    needs: tuple[str, ...] = ()
    trusted: bool = False


@dataclass(frozen=True)
class Method:
    """One named method: a select and a merge with the keys that belong to them.

    description: one line for tables and help; section: where the paper (or its source) speaks of it;
    keys: the fields of `Compression` that it sets, the others keep `DEFAULTS`;
    places: the fractions of the depth that lie before each of its compressions where a compression names no
        layers;
    place: "layers" after decoder layers, "input" before the first one, "tower" before the model's projector;
    compresses: False for the plain model;
    own_count: how the original counts its layer K where that is not "after layer K", as a sentence with the
        places {K} and {before}; empty where it counts as we do;
    cost: what the choice costs; deviation: where ours differs from the released code and why;
    family: which methods it is compared with: those that go by attention, by diversity, by intervals, ….
    """

    name: str
    description: str
    section: str
    keys: dict[str, str] = field(default_factory=dict)
    places: tuple[Fraction, ...] = EARLY
    place: str = "layers"
    compresses: bool = True
    own_count: str = ""
    cost: str = ""
    deviation: str = ""
    family: str = ""


class OfTower(TypedDict, total=False):
    """Traits of a :class:`Select` that looks at the vision tower or at whole videos."""

    tower_layers: Iterable[Fraction]
    takes_cls: bool
    shrinks: Callable[[int, int, int], tuple[int, int]] | None
    films: bool
    own_count: Callable[[Any], int] | None


class Gives(TypedDict, total=False):
    """Traits of a :class:`Merge` that returns something else than logits, or goes on from certain selects."""

    gives_weights: bool
    gives_tokens: bool
    follows: Iterable[str]


SELECTORS: dict[str, Select] = {}
MERGERS: dict[str, Merge] = {}


def register_select(
    name: str,
    *,
    reads: Iterable[str] | None = None,
    needs: Iterable[str] = (),
    per_interval: bool = False,
    trusted: bool = False,
    **of_tower: Unpack[OfTower],
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function usable as ``select: name`` in every configuration.

    The function takes :class:`libra.select.Candidates` and the :class:`libra.Compression`, and returns (B, N)
    bool with exactly the wanted number of targets in each span; that is checked at every use unless
    ``trusted``.

    Args:
        reads: which of "hidden", "importance" and the keys tau, eta, information_weight, seed the choice
            depends on. A configuration may then refuse keys without effect. None: any of them.
        needs: fields of :class:`libra.Context` that have to be given; "a|b" asks for one of the two.
        per_interval: it takes one token of each even interval of a span, which figures then show.
        of_tower: :class:`OfTower`.

    Raises:
        ValueError: for a name that is taken or is not a name, and for unknown words in ``reads`` or
            ``needs``.
    """
    traits = {"reads": _known("reads", reads, READABLE), "needs": _known("needs", needs, CONTEXT)}
    traits |= {**of_tower, "tower_layers": tuple(of_tower.get("tower_layers", ()))}
    return _register(
        SELECTORS, "select", name, Select, {**traits, "per_interval": per_interval, "trusted": trusted}
    )


def register_merge(
    name: str,
    *,
    compensates: bool = True,
    drops: bool = False,
    reads: Iterable[str] | None = None,
    needs: Iterable[str] = (),
    trusted: bool = False,
    **gives: Unpack[Gives],
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function usable as ``merge: name`` in every configuration.

    The function takes :class:`libra.merge.Matches` and the :class:`libra.Compression`, and returns, both
    (B, N), the output slot of each token (:data:`libra.merge.NOWHERE`, a target's slot or
    ``matches.compensation``) and the logit of its weight there; weights are the softmax of the logits within
    a slot. That is checked at every use unless ``trusted``.

    Args:
        compensates: whether it may send tokens to ``matches.compensation``.
        drops: targets stay as they are and nothing else is used.
        reads, needs: as for :func:`register_select`.
        gives: :class:`Gives`.

    Raises:
        ValueError: for a name that is taken or is not a name, and for unknown words in ``reads`` or
            ``needs``.
    """
    traits = {"reads": _known("reads", reads, READABLE), "needs": _known("needs", needs, CONTEXT)}
    traits |= {"compensates": compensates and not drops, "drops": drops, "trusted": trusted, **gives}
    traits["follows"] = _words(gives.get("follows", ()))
    return _register(MERGERS, "merge", name, Merge, traits)


def _words(given: Iterable[str]) -> tuple[str, ...]:
    """One word may be given without a list around it."""
    return (given,) if isinstance(given, str) else tuple(given)


def _known(what: str, words: Iterable[str] | None, known: frozenset[str]):
    if words is None:
        return None
    words = _words(words)
    for word in words:
        if not set(word.split("|")) <= known:
            raise ValueError(f"{what}: {show(word)} is unknown; use {', '.join(sorted(known))}")
    return frozenset(words) if what == "reads" else words


def _register(table: dict, what: str, name: str, kind: type, traits: dict) -> Callable[[Callable], Callable]:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(
            f'register_{what} takes a name: write @register_{what}("mine") above the function,'
            f" not {show(name)}"
        )

    def add(function: Callable) -> Callable:
        # A notebook's cell that is run again defines the same function once more.
        if name in table and _path(table[name].function) != _path(function):
            raise ValueError(f"{what}: {name} is taken by {_path(table[name].function)}; choose another name")
        table[name] = kind(function, **traits)
        return function

    return add


def _path(function: Callable) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
