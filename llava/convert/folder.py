"""A new folder that comes into being whole or not at all, and the small files of a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from libra.utils.files import new_folder

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def small_files(folder: Path) -> list[Path]:
    """The files of a folder that hold no weights: settings, tokenizer, licence …; folders in it are left
    out."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``destination`` when the block is left without an error, and vanishes
    otherwise.

    Raises:
        ValueError: if the destination exists or its parent does not.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists; give the name of a folder that does not, or remove it")
    if not destination.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {destination.absolute().parent} to write to; make it first")
    with new_folder(destination) as stage:
        yield stage
