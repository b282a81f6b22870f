"""Runs the Triton kernel of the same name on a GPU, otherwise the torch function."""

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
    """:mod:`libra.ops.kernels`; None without a working Triton, or where LIBRA_KERNELS=torch switches kernels
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
    """True on a GPU outside torch.compile, which optimises the torch definitions better than opaque
    kernels."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def _say(what: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    warnings.warn(
        f"{what} failed on this machine ({reason}); torch does the work from now on, and "
        "LIBRA_KERNELS=torch in the environment keeps kernels off",
        stacklevel=5,
    )


def _launch(name: str, args: tuple, kwargs: dict):
    """What the kernel ``name`` returns. A kernel that fails is reported once and then disabled."""
    if (kernels := _kernels()) is None:
        return NotImplemented
    device = args[0].device
    # Triton launches on the current device, which need not be the tensors' where a model is spread over
    # several.
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
    """Decorates a torch definition: on a GPU, and where no gradient is needed, its kernel runs instead.

    The torch function runs everywhere else: on a CPU, without Triton, while training, and after its kernel
    failed. A kernel may return NotImplemented for arguments it does not support. The first argument must be a
    tensor.
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
