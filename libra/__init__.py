"""Libra-Merging: fewer visual tokens between the decoder layers of a vision-language model, without training.

>>> c = libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)
>>> out = libra.compress(hidden, importance, c)                     # the maths alone

Importing this package is cheap: a name's module, and with it torch or transformers, is imported when the name is first used.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from .cli import only_commands
from .lazy import lazily

if TYPE_CHECKING:
    from .attach import attach, detach
    from .compress import Compressed, compress
    from .config import Compression
    from .merge import register_merge
    from .select import register_select

__all__ = ["Compressed", "Compression", "attach", "compress", "detach", "register_merge", "register_select"]
__version__ = "0.1.0"

_MODULES = {
    "attach": "attach", "detach": "attach", "Compressed": "compress", "compress": "compress", "Compression": "config",
    "register_merge": "merge", "register_select": "select",
}


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # Python sets each imported module as an attribute of its package: libra/attach.py would hide the function attach.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
__getattr__ = lazily(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


only_commands("libra", "figures", "flops", "latency", "lmms", "mini.benchmark")
