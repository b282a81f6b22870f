"""Where a GPU would wait for launches, a Triton kernel does the work of a torch function: its twin in
:mod:`libra.ops.kernels`."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

_failed: set[str] = set()  # the kernels that this machine could not compile or launch


@functools.cache
def _kernels():
    """The module of the kernels, None where there is no Triton that works or LIBRA_KERNELS=torch switches it
    off."""
    if os.environ.get("LIBRA_KERNELS") == "torch" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import kernels
    except Exception as error:  # whatever a broken Triton may raise
        _say("all Triton kernels", error)
        return None
    return kernels


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether the work on ``tensor`` is a kernel's: it lies on a GPU, and no compiler is tracing, which sees
    more in torch."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def _say(what: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    warnings.warn(
        f"{what} failed on this machine ({reason}); torch does the work from now on, and LIBRA_KERNELS=torch in the environment"
        " keeps kernels off",
        stacklevel=5,
    )


def _launch(name: str, args: tuple, kwargs: dict):
    """What the kernel ``name`` returns. One that fails says so once, and from then on counts as not there."""
    if (kernels := _kernels()) is None:
        return NotImplemented
    device = args[0].device
    # Triton launches on the current device, which is another one where a model is spread over several.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            return getattr(kernels, name)(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, a driver or a linker may raise
            _failed.add(name)
            _say(f"the Triton kernel {name}", error)
            return NotImplemented


def fused(function: Callable) -> Callable:
    """Call the kernel of the same name instead, on a GPU and where no gradient is asked for.

    ``function`` stays the definition, and what runs everywhere else: on a CPU, without Triton, while
    training, and where its kernel fails. A kernel may answer NotImplemented for what it does not do. The
    first argument is a tensor.
    """
    name = function.__name__

    @functools.wraps(function)
    def call(*args, **kwargs):
        if args and name not in _failed and runs_kernels(args[0]):
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
                result = _launch(name, args, kwargs)
                if result is not NotImplemented:
                    return result
        return function(*args, **kwargs)

    return call
