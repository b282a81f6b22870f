"""Matplotlib, where it is installed: how this project's pictures are made and written."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class():
    """Matplotlib's figure, without pyplot, which would choose a window system. Raises ValueError where it is
    missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib; pip install matplotlib") from None
    return Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches, which finds room for its labels. Raises as
    :func:`figure_class`."""
    return figure_class()(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Write a figure in the format that the name's ending says, whole or not at all. A PNG does not name the
    version of matplotlib, so equal pictures are equal files."""
    buffer, kind = io.BytesIO(), path.suffix[1:].lower()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Software": None} if kind == "png" else None)
    write_bytes(path, buffer.getvalue())
