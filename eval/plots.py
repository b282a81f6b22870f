"""A table's pictures: accuracy against FLOPs, and what the traces of the runs tell."""

from itertools import cycle
from pathlib import Path

import numpy as np

from libra.config import Compression
from libra.utils.plotting import new_figure, save

from .blocks import caption
from .measured import Measured
from .suites import BLIND, section_of

MARKERS = "oDsP^vX*<>"
ROOMY = 12  # rows that a legend can name one by one


def method_of(c: Compression) -> str:
    """A short name for what a row does, whatever its layers, ratio and seed."""
    if not c.layers:
        return "vanilla"
    name = c.method or f"{c.select} + {c.merge}"
    return name if c.importance == "last" else f"{name}, mean importance"


def accuracy_against_flops(measured: Measured, path: Path) -> None:
    """Avg with error bars; a colour a method and a shape a heading where there are too many rows to name
    them."""
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    vanilla = measured.average("vanilla") if "vanilla" in measured.rows else None
    if vanilla is not None:
        axes.axhline(vanilla.value, color="0.7", linewidth=1, linestyle="--", zorder=0)
    shown = [
        name
        for name in measured.rows
        if name != BLIND and measured.average(name) and measured.flops_ratio(name)
    ]
    one_by_one = len(shown) <= ROOMY
    colours = cycle([f"C{i}" for i in range(10)])
    shapes = cycle(MARKERS)
    colour_of: dict[str, str] = {}
    shape_of: dict[str, str] = {}
    for name in shown:
        average, row = measured.average(name), measured.rows[name]
        heading = name if one_by_one else section_of(measured.table, name)
        method = name if one_by_one else method_of(row.compression)
        colour = colour_of.setdefault(method, next(colours) if method not in colour_of else "")
        shape = shape_of.setdefault(heading, next(shapes) if heading not in shape_of else "")
        axes.errorbar(
            100 * measured.flops_ratio(name),
            average.value,
            yerr=average.error,
            fmt=shape,
            color=colour,
            capsize=3,
            markersize=7,
            label=row.title if one_by_one else None,
        )
    axes.set_xlabel("FLOPs of the visual tokens, % of vanilla")
    what = "exact match, %" if measured.suite == "mini" else "score"
    axes.set_ylabel(f"{what}, mean of {len(measured.averaged)} tasks")
    axes.set_title(measured.table.title if measured.other is None else caption(measured))
    axes.grid(alpha=0.3)
    if shown and one_by_one:
        axes.legend(loc="best", fontsize=8)
    elif shown:
        for method, colour in colour_of.items():
            axes.plot([], [], "o", color=colour, label=method)
        for heading, shape in shape_of.items():
            axes.plot([], [], shape, color="0.4", label=heading or "plain model")
        figure.legend(loc="outside right upper", fontsize=7)
    save(figure, path)


def has_traces(measured: Measured) -> bool:
    """Whether any run told what :func:`traces` draws."""
    return any(measured.stages(name, "similarity") or measured.histograms(name) for name in measured.rows)


def traces(measured: Measured, path: Path) -> None:
    """Sim by layer, and the cumulative distribution of the compensation share over samples."""
    similar = {name: figures for name in measured.rows if (figures := measured.stages(name, "similarity"))}
    shares = {name: counts for name in measured.rows if (counts := measured.histograms(name))}
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    for (name, figures), marker, style in zip(similar.items(), cycle(MARKERS), cycle(("-", "--", ":"))):
        errors = [figure.error or 0.0 for figure in figures.values()]
        left.errorbar(
            list(figures),
            [figure.value for figure in figures.values()],
            yerr=errors,
            fmt=marker + style,
            capsize=2,
            markersize=5,
            linewidth=1,
            label=measured.rows[name].title,
        )
    left.set(
        xlabel="compression layer",
        ylabel="Sim: mean s^max of the non-target tokens",
        title="Similarity by layer",
    )
    for number, (name, counts) in enumerate(shares.items()):
        for (layer, histogram), style in zip(counts.items(), cycle(("-", "--", ":"))):
            label = f"{measured.rows[name].title}: after layer {layer}"
            below = 100 * np.cumsum(histogram) / max(1, histogram.sum())
            right.plot(
                np.linspace(5, 100, len(below)), below, linestyle=style, color=f"C{number % 10}", label=label
            )
    right.set(
        xlabel="share of the non-target tokens that the compensation token takes, %",
        ylabel="samples with at most that share, %",
        title="What the compensation token takes",
        xlim=(0, 102),
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6, ncols=1 + (len(axes.get_legend_handles_labels()[0]) > 12))
    save(figure, path)
