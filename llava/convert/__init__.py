"""Checkpoints in LLaVA's own format to folders that transformers' LLaVA classes load ("llava-hf"), and back.

    python -m llava.convert SOURCE DESTINATION

Tensors are copied byte by byte from file to file, one at a time, so a 7B checkpoint needs little memory.
"""

from libra.utils.lazy import lazily

__all__ = ["convert"]

__getattr__ = lazily(__name__, {"convert": "converter"})
