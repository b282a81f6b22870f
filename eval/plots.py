"""A table's pictures: accuracy against FLOPs or time, and what the traces of the runs tell. Those of a
published table are drawn again from its CSV: python -m eval.plots docs/results/table1.csv"""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from libra.methods import MERGERS
from libra.rows import Row
from libra.utils.cli import Parser
from libra.utils.plotting import COLOURS, Point, label, new_figure, save_both, style_of

from .plan import flops_ratio
from .statistics import Figure, Spread, is_learned, mean_of
from .suites import BLIND, NOT_AVERAGED, SuiteRows, Table, get_table, get_task, section_of

EXAMPLES = """example:
  python -m eval.plots docs/results/table1.csv"""
NAMED = 12  # rows that can be named in one picture


class Shown(Protocol):
    """What a picture needs of a table, as :class:`eval.measured.Measured` has it."""

    table: Table
    suite: str
    rows: Mapping[str, Row]

    @property
    def averaged(self) -> list[str]: ...
    def average(self, row: str) -> Figure | None: ...
    def flops_ratio(self, row: str) -> float | None: ...
    def time_ratio(self, row: str) -> Spread | None: ...
    def stages(self, row: str, name: str) -> dict[int, Figure]: ...


def accuracy(shown: Shown, path: Path) -> None:
    """Avg against FLOPs, or against time where the table is about time, with the rows' names at the points; a
    panel for each heading where there are too many rows for that. PNG and SVG."""
    rows = [name for name in shown.rows if name != BLIND and shown.average(name)]
    if len(rows) > NAMED:
        return _by_heading(shown, rows, path)
    figure = new_figure(7.5, 4.8)
    axes, points, timed = figure.subplots(), [], bool(shown.table.timed)
    if "vanilla" in rows:
        axes.axhline(shown.average("vanilla").value, color="0.7", linewidth=1, linestyle="--", zorder=0)
    for number, name in enumerate(rows):
        average, place = shown.average(name), _place(shown, name, timed)
        if place is None:
            continue
        spread = [[100 * (place.median - place.lower)], [100 * (place.upper - place.median)]]
        style = style_of(number)
        axes.errorbar(
            100 * place.median,
            average.value,
            yerr=average.error,
            xerr=spread if timed else None,
            linestyle="",
            capsize=3,
            markersize=7,
            **style,
        )
        points.append(Point(100 * place.median, average.value, shown.rows[name].title, style["color"]))
    axes.set_xlabel(
        "time of a question, % of vanilla's (median and quartiles, rows in turns)"
        if timed
        else "FLOPs of the visual tokens, % of vanilla"
    )
    axes.set_ylabel(_what(shown))
    axes.set_title(shown.table.title)
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    label(axes, points)
    save_both(figure, path)


def _what(shown: Shown) -> str:
    what = "exact match, %" if shown.suite == "mini" else "score"
    return f"{what}, mean of {len(shown.averaged)} tasks"


def _place(shown: Shown, row: str, timed: bool) -> Spread | None:
    """Where a row stands on the horizontal axis, as a share of vanilla."""
    if timed:
        return shown.time_ratio(row)
    ratio = shown.flops_ratio(row)
    return None if ratio is None else Spread(ratio, ratio, ratio)


def _panels(heights: list[float], width: float, wide: int):
    """A figure with a panel of each of the heights, ``wide`` of them in a line, which is as high as its
    highest; and the panels."""
    across = min(wide, len(heights))
    lines = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    figure = new_figure(width * across, sum(lines))
    panels = figure.subplots(len(lines), across, squeeze=False, height_ratios=lines).flatten().tolist()
    for panel in panels[len(heights) :]:
        panel.axis("off")
    return figure, panels[: len(heights)]


def _by_heading(shown: Shown, rows: list[str], path: Path) -> None:
    """A panel for each heading, whose rows cost the same or are told apart by their names: accuracy only,
    best on top."""
    headings: dict[str, list[str]] = {}
    for name in rows:
        headings.setdefault(section_of(shown.table, name), []).append(name)
    plain = headings.pop("", [])
    figure, panels = _panels([0.9 + 0.22 * len(names) for names in headings.values()], 5.5, 2)
    for panel, (heading, names) in zip(panels, headings.items(), strict=True):
        panel.sharex(panels[0])
        for name in plain:
            panel.axvline(shown.average(name).value, color="0.7", linewidth=1, linestyle="--", zorder=0)
        names = sorted(names, key=lambda name: shown.average(name).value)
        for height, name in enumerate(names):
            average = shown.average(name)
            panel.errorbar(average.value, height, xerr=average.error, fmt="o", color=COLOURS[0], capsize=2)
        titles = without_end([shown.rows[name].title for name in names])
        panel.set_yticks(range(len(names)), titles, fontsize=8)
        panel.set_ylim(-0.7, len(names) - 0.3)
        shares = {f"{ratio:.0%}" for name in names if (ratio := shown.flops_ratio(name)) is not None}
        cost = f"{shares.pop()} of the FLOPs" if len(shares) == 1 else "FLOPs differ"
        panel.set_title(f"{heading}\n{cost}", fontsize=9, loc="right")
        panel.grid(alpha=0.3)
    figure.supxlabel(f"{_what(shown)}; dashed: vanilla", fontsize=9)
    figure.suptitle(shown.table.title)
    save_both(figure, path)


def without_end(titles: list[str]) -> list[str]:
    """Titles without the parts that all of them end in, which the heading says."""
    parts = [title.split(", ") for title in titles]
    while min(map(len, parts)) > 1 and len({title[-1] for title in parts}) == 1:
        parts = [title[:-1] for title in parts]
    return [", ".join(title) for title in parts]


def has_traces(shown: Shown) -> bool:
    """Whether there is anything for :func:`traces` to draw: figures of several layers. Those of one stand in
    the table."""
    return any(_lines(shown, kind) for kind in ("similarity", "share"))


def _lines(shown: Shown, kind: str) -> dict[str, dict[str, dict[int, Figure]]]:
    """Heading → row → layer → figure, of headings with several layers."""
    headings: dict[str, dict[str, dict[int, Figure]]] = {}
    for name in shown.rows:
        if figures := shown.stages(name, kind):
            headings.setdefault(section_of(shown.table, name), {})[name] = figures
    return {heading: rows for heading, rows in headings.items() if max(map(len, rows.values())) > 1}


def traces(shown: Shown, path: Path) -> None:
    """Sim, and what goes into the compensation token, by layer: a panel for each heading, the rows' names at
    the ends of their lines. PNG and SVG."""
    kinds = {
        "similarity": ("Sim: mean s^max of the non-targets", 1),
        "share": ("non-targets in the compensation token, %", 100),
    }
    drawn = [(kind, heading, rows) for kind in kinds for heading, rows in _lines(shown, kind).items()]
    figure, panels = _panels([3.4] * len(drawn), 5.2, 3)
    for panel, (kind, heading, rows) in zip(panels, drawn, strict=True):
        what, scale = kinds[kind]
        points = []
        section = [name for name in shown.rows if section_of(shown.table, name) == heading]
        titles = without_end([shown.rows[name].title for name in rows])
        for title, (name, figures) in zip(titles, rows.items(), strict=True):
            style, layers = style_of(section.index(name)), list(figures)
            values = [scale * one.value for one in figures.values()]
            errors = [scale * (one.error or 0.0) for one in figures.values()]
            panel.errorbar(layers, values, yerr=errors, capsize=2, markersize=5, linewidth=1, **style)
            points.append(Point(layers[-1], values[-1], title, style["color"]))
        panel.set_title(heading or shown.table.title, fontsize=9)
        panel.set_xlabel("after layer", fontsize=8)
        panel.set_ylabel(what, fontsize=8)
        low, high = panel.get_xlim()
        last = max(point.x for point in points)
        panel.set_xlim(low, last + 1.4 * (last - low) + 1)  # room for the names
        panel.set_xticks(sorted({layer for figures in rows.values() for layer in figures}))
        panel.grid(alpha=0.3)
        label(panel, points)
    save_both(figure, path)


class Published:
    """A published table's CSV, as far as its pictures need it. Raises ValueError where it is none."""

    suite = "mini"

    def __init__(self, path: Path):
        name = path.stem.removeprefix("table")
        self.table = get_table(name)
        self.rows = SuiteRows(self.table, self.suite)
        with open(path, encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line.get("suite") == self.suite]
        self._lines = {(line["row"], line["task"]): line for line in lines if line.get("status") == "ok"}
        if not self._lines:
            raise ValueError(f"{path} has no figures of the embedded model")
        self.tasks = list(dict.fromkeys(task for row, task in self._lines if row in self.rows))

    def _score(self, row: str, task: str) -> Figure | None:
        line = self._lines.get((row, task))
        if line is None or not line["score"]:
            return None
        return Figure(float(line["score"]), float(line["stderr"] or 0), int(line["n"] or 0))

    @property
    def averaged(self) -> list[str]:
        tasks = [task for task in self.tasks if task not in NOT_AVERAGED]
        if BLIND not in self.rows:
            return tasks
        return [
            task
            for task in tasks
            if is_learned(
                *(self._score(row, task).value for row in ("vanilla", "majority", BLIND)),
                get_task(task).learned_at,
            )
        ]

    def average(self, row: str) -> Figure | None:
        figures = [self._score(row, task) for task in self.averaged]
        return mean_of(figures) if figures and None not in figures else None

    def flops_ratio(self, row: str) -> float | None:
        return flops_ratio(self.rows[row].model, self.rows[row].compression)

    def time_ratio(self, row: str) -> Spread | None:
        """Nothing: a CSV has the times task by task, not over all questions."""
        return None

    def stages(self, row: str, name: str) -> dict[int, Figure]:
        if name == "share" and not MERGERS[self.rows[row].compression.merge].compensates:
            return {}
        column = {"similarity": "similarity", "share": "compensation_share"}[name]
        found: dict[int, list[Figure]] = {}
        for task in self.tasks:
            line = self._lines.get((row, task), {})
            values, errors = ((line.get(key) or "").split() for key in (column, f"{column}_stderr"))
            layers = self.rows[row].compression.layers if values else ()
            for layer, value, error in zip(layers, values, errors):
                found.setdefault(layer, []).append(Figure(float(value), float(error), int(line["n"])))
        return {layer: mean_of(figures) for layer, figures in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Draw the pictures of published tables next to their CSV."""
    parser = Parser(
        prog="python -m eval.plots",
        description="Draw a published table's pictures again, from its CSV.",
        epilog=EXAMPLES,
    )
    parser.add_argument("csv", type=Path, nargs="+", help="such as docs/results/table1.csv")
    args = parser.parse_args(argv)
    try:
        for path in args.csv:
            shown = Published(path)
            accuracy(shown, path.with_suffix(".png"))
            if shown.table.extras and has_traces(shown):
                traces(shown, path.with_name(f"{path.stem}_traces.png"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
