"""A property that is computed once, as functools.cached_property, which torch's compiler cannot trace."""

from collections.abc import Callable
from typing import Any


class once:
    """Decorates a method without arguments; the first result is kept in the instance's dictionary, but not
    while torch.compile traces, which finds equal computations by itself."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function, self.__doc__, self.name = function, function.__doc__, function.__name__

    def __get__(self, instance, owner=None):
        import torch  # here: the configuration starts without it

        if instance is None:
            return self
        value = self.function(instance)
        if not torch.compiler.is_compiling():
            instance.__dict__[self.name] = value
        return value
