"""A compressed run of any class by hand: one sample, no cache, no padding, around the layers of the model's
own eager twin.

The twin is run once uncompressed and watched: what each of its layers is given, by the arguments' names, and
the mask that it sees. From the first compression on, the layers are then called one by one with what is left
of that. Which columns are left, and what becomes of their states, is what ``plain.shorten`` reads in the
method. Nothing here is the engine's.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import families
import plain
import torch
import zoo

from libra import Compression

# The arguments of decoder layers that have one entry for each token of the call, and which dimension it is.
PER_TOKEN = {
    "position_embeddings": -2,  # cos and sin, or complex numbers, of each token
    "position_ids": -1,
    "per_layer_input": -2,
    "moe_mm_token_type_ids": -1,
    "conv_mask": -1,
}
FAR = 10**6  # a window that hides nothing


@dataclass
class Told:
    """What a layer of the uncompressed twin was given: hidden states, and its other arguments by name."""

    hidden: torch.Tensor
    others: dict


@dataclass
class Outcome:
    """What entered each layer and what left the last one, (S, D) each; the logits (S, V) after that;
    ``source`` has the column that each remaining one was, None for a compensation token."""

    entered: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor | None = None
    source: list[int | None] = field(default_factory=list)


def flat(hidden: torch.Tensor) -> torch.Tensor:
    """(S, D) of one sample's states; several streams of a token, at whichever dimension, make one row."""
    if hidden.ndim == 4 and hidden.shape[0] != 1:
        return hidden.permute(1, 2, 0, 3).flatten(2)[0]
    return hidden.flatten(2)[0] if hidden.ndim == 4 else hidden[0]


def shaped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`flat`."""
    if like.ndim == 4 and like.shape[0] != 1:
        return rows.unflatten(1, (like.shape[0], like.shape[-1])).permute(1, 0, 2)[:, None]
    return rows[None].unflatten(2, like.shape[2:]) if like.ndim == 4 else rows[None]


def named(layer: torch.nn.Module, args: tuple, kwargs: dict) -> Told:
    names = list(inspect.signature(inspect.unwrap(type(layer).forward)).parameters)[1:]
    others = {**dict(zip(names, args)), **kwargs}
    return Told(others.pop("hidden_states"), others)


@contextmanager
def watched(layers: Iterator[torch.nn.Module]) -> Iterator[dict[int, Told]]:
    """What each layer is given in a call that is made inside the block."""
    seen: dict[int, Told] = {}
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):

            def spy(layer, args, kwargs, i=i):
                seen[i] = named(layer, args, kwargs)

            hooks.callback(layer.register_forward_pre_hook(spy, with_kwargs=True).remove)
        yield seen


def observe(twin, given: dict) -> dict[int, Told]:
    with watched(zoo.decoder(twin).layers) as seen:
        twin(**given, use_cache=False)
    return seen


@contextmanager
def without_windows(config) -> Iterator[None]:
    """The masks that a configuration stands for, had its sliding windows and chunks no end."""
    names = ("sliding_window", "sliding_window_size", "attention_chunk_size")
    before = {name: getattr(config, name) for name in names if getattr(config, name, None)}
    try:
        for name in before:
            setattr(config, name, FAR)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def kind_of(config, layer: int) -> str:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def left_of_mask(mask: torch.Tensor, kept: list[tuple[int, bool]], config, kind: str) -> torch.Tensor:
    """A layer's additive mask (1, 1, S, S) without windows, for the columns that are left, with its window.

    ``kept`` has for each column the one whose place it takes, and whether it is a compensation token, which
    stands after the visual tokens: who is before it sees it where they see the last of these ahead.
    """
    least = torch.finfo(mask.dtype).min
    old, count = torch.tensor([j for j, _ in kept]), len(kept)
    visible = mask[0, 0] == 0
    seen = visible[old][:, old]
    for column, (j, extra) in enumerate(kept):
        if extra:
            seen[:column, column][old[:column] == j] = visible[j - 1, j]
    place = torch.arange(count)
    behind = place[:, None] - place
    ahead = seen & (behind < 0)
    if "sliding" in kind:
        window = config.sliding_window
        seen = seen & ((behind < window) | ahead.T)
    if "chunked" in kind:
        size = config.attention_chunk_size
        seen = seen & (place[:, None] // size == place // size)
    return torch.where(seen, 0.0, least).to(mask.dtype)[None, None]


def left_of(name: str, value, old: list[int]):
    """What is left of one argument; ``old`` has the column that each remaining one was."""
    if isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value):
        return type(value)(left_of(name, part, old) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    assert name in PER_TOKEN, f"the reference does not know {name}, of shape {tuple(value.shape)}"
    return value.index_select(PER_TOKEN[name], torch.tensor(old))


def run_layer(layer, hidden: torch.Tensor, others: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states after a layer, and the mean over heads (S, S) of its attention, None where it has none."""
    weights = []

    def spy(module, args, output):
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
            if output[1].ndim == 4 and output[1].shape[-1] == output[1].shape[-2]:
                weights.append(output[1])

    with ExitStack() as hooks:
        for module in layer.modules():
            if module is not layer:
                hooks.callback(module.register_forward_hook(spy).remove)
        output = layer(hidden, **others)
    after = output[0] if isinstance(output, tuple) else output
    return after, weights[0][0].float().mean(0).detach() if weights else None


class Columns:
    """The columns that are left, and what is left of the layers' arguments."""

    def __init__(self, config, told: dict[int, Told], open_masks: dict[int, Told], length: int):
        self.config, self.told, self.open = config, told, open_masks
        self.kept = [(j, False) for j in range(length)]
        self.shared: dict | None = None  # keys and values that later layers use again

    def arguments(self, i: int) -> dict:
        others, old = {}, [j for j, _ in self.kept]
        for name, value in self.told[i].others.items():
            if name == "attention_mask" and isinstance(value, torch.Tensor):
                others[name] = self.mask(i, value)
            elif name == "shared_kv_states" and value is not None:
                self.shared = type(value)() if self.shared is None else self.shared
                others[name] = self.shared
            else:
                others[name] = left_of(name, value, old)
        return others

    def mask(self, i: int, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 2:  # of a recurrent layer: which columns are not padding
            return value[:, [j for j, _ in self.kept]]
        mask = self.open[i].others["attention_mask"][..., : value.shape[2]]
        return left_of_mask(mask, self.kept, self.config, kind_of(self.config, i))

    def shorten(self, hidden, alpha, c: Compression, prefills) -> tuple[torch.Tensor, list]:
        matrix, kept, prefills = plain.shorten(flat(hidden).detach(), alpha, c, prefills, 0)
        self.kept = [(self.kept[j][0], extra or self.kept[j][1]) for j, extra in kept]
        return shaped(matrix @ flat(hidden), hidden), prefills


def by_hand(twin, name: str, t: families.Talk, c: Compression, said=(), replayed: Callable = dict) -> Outcome:
    """A sample with the ids ``said`` after it, scored by its last column before these; ``twin`` has eager
    attention. ``replayed`` changes the arguments of a pass that holds the answer too."""
    longer = families.Talk(torch.cat([t.ids, torch.tensor(list(said), dtype=torch.long)]), t.labels, t.given)
    given = replayed(zoo.collate(name, [longer]))
    decoder = zoo.decoder(twin)
    config, layers = decoder.config, decoder.layers
    told = observe(twin, given)
    with without_windows(config):
        open_masks = observe(twin, given)
    key = families.sample_key(t.ids, t.visual)
    prefills = [plain.Prefill.of(t.visual, len(t.ids) - 1, c, 0, key)]
    first = min(c.layers, default=len(layers) - 1)
    columns = Columns(config, told, open_masks, len(longer.ids))
    outcome = Outcome(entered=[flat(told[i].hidden) for i in range(first)])
    hidden = told[first].hidden
    for i in range(first, len(layers)):
        outcome.entered.append(flat(hidden))
        hidden, alpha = run_layer(layers[i], hidden, columns.arguments(i))
        if i == first and i + 1 < len(layers):
            hidden = told[i + 1].hidden  # with what the decoder adds between the two, as Qwen3-VL's does
        if i in c.layers:
            if c.score_layer == "next":
                shared = copy.copy(columns.shared)
                alpha = run_layer(layers[i + 1], hidden, columns.arguments(i + 1))[1]
                columns.shared = shared
            hidden, prefills = columns.shorten(hidden, alpha, c, prefills)
    outcome.entered.append(flat(hidden))
    outcome.source = [None if extra else j for j, extra in columns.kept]
    outcome.logits = logits_after(twin, given, hidden)
    return outcome


def logits_after(twin, given: dict, hidden: torch.Tensor) -> torch.Tensor:
    """What the model says if ``hidden`` leaves its last layer, (S, V)."""

    def swap(layer, args, output):
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = zoo.decoder(twin).layers[-1].register_forward_hook(swap)
    try:
        return twin(**given, use_cache=False).logits[0]
    finally:
        hook.remove()
