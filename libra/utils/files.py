"""The one way in which this project writes files and folders: whole and on the disk, or not at all."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """:func:`write_bytes` of JSON values that people read too; in ASCII, which no text in them fails at."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file: after a kill or a power cut it is the old one or the whole new one. Makes its folder.

    Raises OSError, and then the old file is untouched.
    """
    with replacing(path) as work:
        work.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to ``path``, for libraries that want a file to write to. What is written there
    becomes ``path`` when the block ends without an error, and vanishes otherwise."""
    path = Path(path)
    make_folder(path.parent)
    work = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield work
        _flush(work)
        os.replace(work, path)
        flush_folder(path.parent)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``destination`` when the block ends without an error, and vanishes
    otherwise.

    An older folder of that name goes only when the new one is whole. Raises OSError where ``destination`` is
    a file.
    """
    destination = Path(destination)
    make_folder(destination.parent)
    stage = destination.with_name(f".{destination.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    older = stage.with_suffix(".older")
    stage.mkdir()
    try:
        yield stage
        flush_tree(stage)
        if destination.is_dir():
            os.replace(destination, older)
        os.replace(stage, destination)
        flush_folder(destination.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they too are there after a power cut."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        flush_folder(place.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; only for a folder in which nobody writes
    now."""
    for work in folder.glob(".*.tmp"):
        work.unlink(missing_ok=True)


def flush_tree(folder: Path) -> None:
    """Have everything in a folder on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush(Path(place, name))
        flush_folder(Path(place))


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Some file systems, such as those of networks, know no such
    thing."""
    with suppress(OSError):
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
