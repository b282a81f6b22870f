"""Names for the parts of a compression step in profiles."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function
from torch.utils._python_dispatch import _get_current_dispatch_mode


def profiled(name: str) -> AbstractContextManager:
    """A block that is a range ``name`` of a profile, or of a dispatch mode that follows such ranges; nothing
    where nobody watches: a range costs as much as several small operations, and a prefill has two dozen."""
    return record_function(name) if _is_watched() else nullcontext()


def _is_watched() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch.autograd._profiler_enabled() or _get_current_dispatch_mode() is not None
