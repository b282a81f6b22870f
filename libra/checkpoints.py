"""Where a model's weights are: a folder of this checkout, any other folder, or the model hub."""

from pathlib import Path

from .provenance import REPOSITORY


def find_checkpoint(name: str) -> str:
    """The folder of a checkpoint (relative names start at the working directory, then at this checkout), else its hub name."""
    for folder in (Path(name), REPOSITORY / name):
        if folder.is_dir():
            return str(folder.resolve())
    return name
