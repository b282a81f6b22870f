"""Gradient checkpointing before transformers 5.23, which runs the hooks of a layer again where it recomputes
it.

There the function that checkpoints is called with the layer's call, hooks included. Ours stands before it: it
does outside what the hooks do elsewhere, so that the recomputation finds short hidden states and short
arguments.
"""

from collections.abc import Callable
from functools import partial

import torch

from .transformers_api import CHECKPOINTS_CALLS

_NAME = "_gradient_checkpointing_func"


def checkpoints_call(layer: torch.nn.Module) -> bool:
    """True where a layer's hooks run inside its checkpoint."""
    return CHECKPOINTS_CALLS and layer.training and getattr(layer, "gradient_checkpointing", False)


class Outside:
    """Stands before the checkpointing function of a decoder's layers.

    Args:
        layers: of the decoder.
        before: ``before(i, layer, args, kwargs)`` gives changed arguments of layer i, or None.
        after: ``after(layer, args, output)`` of the last layer, or None.
    """

    def __init__(self, layers: list[torch.nn.Module], before: Callable, after: Callable | None):
        self._layers = layers if CHECKPOINTS_CALLS else []
        self._before, self._after = before, after

    def enter(self) -> None:
        """Before a pass: a trainer may have switched checkpointing on since the last one."""
        for i, layer in enumerate(self._layers):
            function = vars(layer).get(_NAME)
            if layer.training and function is not None and not self._is_ours(function):
                setattr(layer, _NAME, partial(self._run, i, i == len(self._layers) - 1, function))

    def leave(self) -> None:
        """Give the layers their own function back."""
        for layer in self._layers:
            function = vars(layer).get(_NAME)
            if self._is_ours(function):
                setattr(layer, _NAME, function.args[2])

    @staticmethod
    def _is_ours(function) -> bool:
        return isinstance(function, partial) and getattr(function.func, "__func__", None) is Outside._run

    def _run(self, i: int, last: bool, function: Callable, run: partial, *args):
        """``run``: the layer's call, with its keyword arguments."""
        layer = run.func.__self__
        changed = self._before(i, layer, args, run.keywords)
        if changed is not None:
            args, run = changed[0], partial(run.func, *run.args, **changed[1])
        output = function(run, *args)
        if last and self._after is not None:
            shortened = self._after(layer, args, output)
            output = output if shortened is None else shortened
        return output
