"""Matplotlib, where it is installed: how this project's pictures look, are made and are written."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, then darker ones of Tol's.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#000000", "#882255", "#999933", "#332288", "#117733", "#AA4499",
)  # fmt: skip
MARKERS = "oDsP^vX*<>hp"
HEAT = "inferno"  # a colour map from low to high
# In points (1/72 inch): from one line of text to the next, a letter, and between a point and its name.
LINE, LETTER, SPACING = 11.0, 4.8, 9.0


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


def style_of(number: int) -> dict[str, str]:
    """A colour and a marker; no two of the first twelve share either."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


@dataclass(frozen=True)
class Point:
    """A point to be named on a picture."""

    x: float
    y: float
    name: str
    color: str


def label(axes: "Axes", points: Sequence[Point]) -> None:
    """Write each point's name next to it, where it covers no other point and no other name; a thin line leads
    from a name that stands higher or lower than its point.

    The limits of the axes have to be set before.
    """
    figure: Any = axes.figure  # a subfigure for matplotlib's types
    figure.draw_without_rendering()  # the places of the axes follow from all other labels
    scale = 72 / figure.dpi
    left, right = (x * scale for x in axes.transAxes.transform([(0, 0), (1, 1)])[:, 0])
    where = [axes.transData.transform((point.x, point.y)) * scale for point in points]
    taken = [(x - SPACING / 2, x + SPACING / 2, y) for x, y in where]
    for point, (x, y) in sorted(zip(points, where), key=lambda pair: pair[0].y):
        width = LETTER * len(point.name)

        def badness(place: tuple[int, float], x=x, y=y, width=width) -> float:
            """How many points and names a place covers, then how far away and how unusual it is."""
            side, rise = place
            start, end = sorted((x + side * SPACING, x + side * (SPACING + width)))
            hit = sum(start < b and a < end and abs(y + rise - height) < LINE for a, b, height in taken)
            return 100 * (hit + (start < left) + (end > right)) + abs(rise) + (side < 0) + 0.5 * (rise < 0)

        steps = [LINE * step for step in range(-6, 7)]
        side, rise = min(((side, step) for side in (1, -1) for step in steps), key=badness)
        start, end = sorted((x + side * SPACING, x + side * (SPACING + width)))
        taken.append((start, end, y + rise))
        axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=(side * SPACING, rise),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
            color=point.color,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": point.color, "lw": 0.6} if rise else None,
        )


def save(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Write a figure in the format that the name's ending says, whole or not at all. Neither the version of
    matplotlib nor a date is in it, so equal pictures are equal files."""
    from matplotlib import rc_context

    buffer, kind = io.BytesIO(), path.suffix[1:].lower()
    nameless = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    with rc_context({"svg.hashsalt": "libra", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=nameless.get(kind))
    write_bytes(path, buffer.getvalue())


def save_both(figure: "Figure", path: Path) -> None:
    """:func:`save` as PNG, and as SVG next to it."""
    for ending in (".png", ".svg"):
        save(figure, path.with_suffix(ending))
