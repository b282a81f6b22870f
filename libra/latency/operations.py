"""What a compression step queues and what it asks: counted, not timed, hence the same in every run.

On a fast GPU a short prompt takes as long as its operations take to be queued, whatever they compute. Counted
are torch's operations that are not views, where a table that is made on the host and copied is one too; the
launches of Triton kernels, where their interpreter runs them; and the questions that make the host wait for
the device.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .bench import Bench

TABLE = "lift_fresh"  # what torch calls a tensor from a list
# What computes nothing, though torch does not call it a view.
NOTHING = {"_unsafe_view", "promote_types", "_record_function_enter_new", "_record_function_exit"}
# What brings numbers to the host, or asks how many there are.
QUESTIONS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "equal"}


@dataclass
class Queued:
    """What was queued, by name: ``operations`` of torch, launches of Triton ``kernels``, ``questions``."""

    operations: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)
    questions: Counter = field(default_factory=Counter)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Queued):
        super().__init__()
        self._found, self.paused = found, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if not self.paused and name not in NOTHING and (name == TABLE or not function.is_view):
            self._found.operations[name] += 1
        return function(*args, **(kwargs or {}))


class _Questions(TorchFunctionMode):
    def __init__(self, found: Queued):
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in QUESTIONS:
            self._found.questions[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def queued() -> Iterator[Queued]:
    """What is queued and asked inside the block."""
    found = Queued()
    with _Questions(found), _Operations(found) as operations, _interpreted(found, operations):
        yield found


@contextmanager
def _interpreted(found: Queued, operations: _Operations) -> Iterator[None]:
    """Counts the kernels that Triton's interpreter runs, whose own operations are none of ours."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    run = GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        found.kernels[executor.fn.__name__] += 1
        operations.paused = True
        try:
            return run(executor, *args, **kwargs)
        finally:
            operations.paused = False

    GridExecutor.__call__ = counted
    try:
        yield
    finally:
        GridExecutor.__call__ = run


def of_prefill(bench: Bench, compressed: bool) -> Queued:
    """Of one prefill of a bench, without the making of its cache."""
    cache = bench.new_cache()
    # Not in inference mode, where torch hands composite operations over whole.
    with torch.no_grad(), bench.mode(compressed), queued() as found:
        bench.call(cache)
    return found
