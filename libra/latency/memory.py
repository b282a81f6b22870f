"""Bytes that compression allocates, against one decoder layer's: counted tensor by tensor, hence the same in
every run.

Counted are the tensors that torch's operations return, from the operation to the moment nobody holds their
storage any more. What a kernel allocates for itself inside one operation is not seen, nor is an allocator's
rounding.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine.structure import final_norm
from ..places import BEFORE

RANGE = "libra."  # what the names of compression's record_function ranges begin with


@dataclass(eq=False)
class Region:
    """A stretch of a run: of the bytes that were allocated in it, those alive now and the most alive at
    once."""

    live: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass
class Step:
    """One compression step: the score row inside its layer and all that comes between this layer and the next
    one.

    ``parts`` are the ranges of the step by name, each by itself.
    """

    whole: Region = field(default_factory=Region)
    parts: dict[str, Region] = field(default_factory=dict)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations allocate on one device while regions are open.

    Attributes:
        on_range: called with a ``record_function`` range's name when it begins; returns the regions that it
            is part of.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self._open: list = []
        self._known: set = set()
        self._ranges: list = []
        self.on_range: Callable[[str], tuple[Region, ...]] = lambda name: ()

    def open(self, *regions: Region) -> None:
        self._open += regions

    def close(self, *regions: Region) -> None:
        for region in regions:
            self._open.remove(region)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.profiler._record_function_exit._RecordFunction and self._ranges:
            self.close(*self._ranges.pop())
        for tensor in self._tensors((args, kwargs)):
            self._enter(tensor, ())  # a view of what was there before is not new storage
        result = operation(*args, **kwargs)
        for tensor in self._tensors(result):
            self._enter(tensor, self._open)
        if operation is torch.ops.profiler._record_function_enter_new.default:
            self._ranges.append(self.on_range(args[0]))
            self.open(*self._ranges[-1])
        return result

    def _tensors(self, tree) -> Iterator[torch.Tensor]:
        return (
            leaf
            for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor) and leaf.device == self.device
        )

    def _enter(self, tensor: torch.Tensor, regions: Iterable[Region]) -> None:
        storage = tensor.untyped_storage()
        key, size, regions = storage._cdata, storage.nbytes(), tuple(dict.fromkeys(regions))
        if key in self._known:
            return
        self._known.add(key)
        for region in regions:
            region.add(size)
        weakref.finalize(storage, self._leave, key, size, regions).atexit = False

    def _leave(self, key: int, size: int, regions: tuple[Region, ...]) -> None:
        self._known.discard(key)
        for region in regions:
            region.live -= size


@contextmanager
def _hooked(pairs: list[tuple[torch.nn.Module, bool, Callable]]) -> Iterator[None]:
    """Calls each function before its module runs (True) or after it (False)."""
    hooks = [
        module.register_forward_pre_hook(lambda *_, do=do: do())
        if before
        else module.register_forward_hook(lambda *_, do=do: do())
        for module, before, do in pairs
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch_layer(meter: LiveBytes, decoder, layers: tuple[int, ...]) -> Iterator[list[Region]]:
    """The region of the first compression layer's forward, where nothing is compressed: one plain layer at
    full length."""
    layer, region = decoder.layers[max(0, layers[0])], Region()
    with _hooked([(layer, True, lambda: meter.open(region)), (layer, False, lambda: meter.close(region))]):
        yield [region]


@contextmanager
def watch_compression(meter: LiveBytes, decoder, layers: tuple[int, ...]) -> Iterator[list[Step]]:
    """The regions of each compression step of one prefill, in order."""
    steps, pairs = [Step() for _ in layers], []
    now = Step()  # of what runs before the first compression layer

    def begin(step: Step) -> None:
        nonlocal now
        now = step

    def part(name: str) -> tuple[Region, ...]:
        if not name.startswith(RANGE):
            return ()
        return now.whole, now.parts.setdefault(name.removeprefix(RANGE), Region())

    meter.on_range = part
    for layer, step in zip(layers, steps):
        if layer == BEFORE:  # all that the decoder does before its first layer
            pairs += [
                (decoder, True, lambda step=step: begin(step)),
                (decoder, True, lambda step=step: meter.open(step.whole)),
                (decoder.layers[0], True, lambda step=step: meter.close(step.whole)),
            ]
            continue
        follower = decoder.layers[layer + 1] if layer + 1 < len(decoder.layers) else final_norm(decoder)
        pairs += [
            (decoder.layers[layer], True, lambda step=step: begin(step)),
            (decoder.layers[layer], False, lambda step=step: meter.open(step.whole)),
            (follower, True, lambda step=step: meter.close(step.whole)),
        ]
    with _hooked(pairs):
        yield steps
