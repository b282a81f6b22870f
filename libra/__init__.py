"""Libra-Merging: fewer visual tokens between the decoder layers of a vision-language model, without training.

>>> c = libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)
>>> out = libra.compress(hidden, importance, c)                     # only the maths

Importing this package is cheap: a name's module, and with it torch or transformers, is imported when the name
is first used.
"""

from typing import TYPE_CHECKING

from .utils.cli import only_commands
from .utils.lazy import lazily

if TYPE_CHECKING:
    from .config import Compression
    from .engine.attach import attach, detach
    from .engine.relevance import ClipRelevance
    from .methods import Context, register_merge, register_select
    from .step import Compressed, compress

__all__ = [
    "ClipRelevance", "Compressed", "Compression", "Context", "attach", "compress", "detach", "register_merge",
    "register_select",
]  # fmt: skip
__version__ = "0.1.0"

_MODULES = {
    "attach": "engine.attach",
    "detach": "engine.attach",
    "ClipRelevance": "engine.relevance",
    "Compressed": "step",
    "compress": "step",
    "Compression": "config",
    "Context": "methods",
    "register_merge": "methods",
    "register_select": "methods",
}
__getattr__ = lazily(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


only_commands(
    "libra",
    "figures",
    "flops",
    "latency",
    "latency.methods",
    "latency.selectors",
    "lmms",
    "mini.benchmark",
    "mini.page",
    "serve",
    "serve.bench",
    "vllm",
)
