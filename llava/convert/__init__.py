"""Checkpoints in LLaVA's own format to folders that transformers' LLaVA classes load ("llava-hf"), and back.

    python -m llava.convert SOURCE DESTINATION

Tensors are copied byte by byte from file to file, one at a time, so a 7B checkpoint needs little memory.
"""

from .converter import convert

__all__ = ["convert"]
