"""The arguments of a decoder layer that have one entry for each token: found by their shape and shortened.

Rotary tables, position ids, type ids, inputs of single layers: decoders hand their layers more than a mask,
and each under names of its own. What is as long as the call's columns where columns belong is gathered.
"""

import torch

from ..ops.reference import take, take_last


def gathered(value: torch.Tensor, source: torch.Tensor, length: int) -> torch.Tensor:
    """``value`` for fewer columns, or itself where it has none.

    Args:
        value: whole numbers (…, S), with all dimensions before the last two kept, or others (B or 1, S, …)
            and (axes, B or 1, S, …).
        source: (B, S'), the column of the call that each column left comes from.
        length: S, the call's columns.
    """
    batch = len(source)
    if not (value.is_floating_point() or value.is_complex()):
        if value.ndim == 0 or value.shape[-1] != length:
            return value
        return take_last(value[None] if value.ndim == 1 else value, source)
    for axis in (1, 2):
        if value.ndim >= axis + 2 and value.shape[axis] == length and value.shape[axis - 1] in (1, batch):
            tables = [value] if axis == 1 else list(value)
            taken = [take(table, source) for table in tables]
            return taken[0] if axis == 1 else torch.stack(taken)
    return value


class Arguments:
    """Shortens the arguments of a call's layers, each once a stage.

    Args:
        length: the columns of the call.
    """

    def __init__(self, length: int):
        self._length = length
        self.source: torch.Tensor | None = None  # (B, S'), None as long as nothing was shortened
        # By the identity of an argument, which is kept with it: decoders hand all their layers the same ones.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def shorten(self, source: torch.Tensor) -> None:
        """``source`` (B, S'): the old column of each new one."""
        self.source = source if self.source is None else self.source.gather(1, source)
        self._known.clear()

    def fit(self, value):
        """An argument of a layer, for the columns that are left."""
        if self.source is None:
            return value
        if isinstance(value, torch.Tensor):
            if id(value) not in self._known:
                self._known[id(value)] = value, gathered(value, self.source, self._length)
            return self._known[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(map(self.fit, value))
        if type(value) is dict:
            return {name: self.fit(part) for name, part in value.items()}
        return value
