"""Libra-Merging: fewer visual tokens between the decoder layers of a vision-language model, without training.

>>> c = libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)
>>> out = libra.compress(hidden, importance, c)                     # the maths alone
"""

from .attach import attach
from .compress import Compressed, compress
from .config import Compression
from .merge import register_merge
from .select import register_select

__all__ = ["Compressed", "Compression", "attach", "compress", "register_merge", "register_select"]
__version__ = "0.1.0"
