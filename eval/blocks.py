"""A report's grids: the embedded model's rows as measured, the paper's models with the paper's figures next
to ours."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from libra.config import Compression
from libra.methods import METHODS

from .formats import Grid, Line
from .measured import Measured
from .plan import flops_ratio
from .statistics import FEWEST, LEARNED_ABOVE, LEARNED_AT, LEARNED_AT_SMALL, Figure
from .suites import BLIND, NOT_AVERAGED, SUITES, get_task

MARKED = "A difference with * exceeds two of its standard errors."
FAMILIES = (
    "Families of methods by kind of question: the mean of a family's rows against vanilla on the same"
    " questions, in points; in brackets how many rows. A family is what a method goes by (docs/methods.md)."
)
HARD = "where downsampling fails"
ERRORS = f"its standard error, which is left out under {FEWEST} answers and where all answers are alike"


def shown_figure(figure: Figure | None, digits: int = 1) -> str:
    return "" if figure is None else figure.show(digits)


def shown_difference(figure: Figure | None) -> str:
    return "" if figure is None else figure.show(1, sign=True) + (" *" if figure.significant else "")


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * ratio:.0f}%"


def _by_layer(figures: dict[int, Figure], digits: int) -> str:
    return " / ".join(f"{figure.value:.{digits}f}" for figure in figures.values())


def under_headings(measured: Measured, make: Callable[[str], list[list[str]]]) -> list[Line]:
    """``make(row)``'s lines for every row, under the table's headings; only rows that were computed where the
    table has no figures of the paper for this model."""
    lines: list[Line] = []
    printed = measured.suite in measured.table.suites
    left = [row for row in measured.rows if printed or measured.has(row)]
    for heading, names in [*measured.table.sections.items(), ("other rows", tuple(measured.rows))]:
        own = [name for name in names if name in left]
        left = [name for name in left if name not in own]
        if own and heading:
            lines.append(heading)
        lines += [line for name in own for line in make(name)]
    return lines


def caption(measured: Measured) -> str:
    """The table and the model, in one line."""
    return f"{measured.table.title}, {measured.model}"


def compares(row: str) -> bool:
    """Whether a difference of this row to vanilla says something."""
    return row != BLIND and row.rpartition("_")[2] != "vanilla"


# Above every table of the embedded model.
SMALL = (
    "One small model and synthetic pictures. It uses tokens of every part of a picture, also where nothing"
    " is, which favours methods that spread their choice; whether a 7B model does is not known. No method is"
    " recommended by it, and its order of methods is not that of large models (docs/results/README.md)."
)


def mini_grid(measured: Measured, notes: list[str]) -> Grid:
    """Scores of the embedded model's rows; reasons of failed cells are appended to ``notes``."""
    table = measured.table
    header = ["", "FLOPs", *map(measured.title, measured.columns), "Avg", "Δ to vanilla"]
    header += ["Δ to the row above"] * table.above + ["Sim"] * ("sim" in table.extras)
    header += ["into compensation"] * ("share" in table.extras)
    filtered = any(measured.hard(row) is not None for row in measured.rows)
    header += [HARD] * filtered

    def cell(row: str, task: str) -> str:
        reason = measured.failed(row, task)
        if reason is None:
            return shown_figure(measured.score(row, task))
        notes.append(f"{measured.rows[row].title}, {get_task(task).title}: failed: {reason}")
        return f"failed ({len(notes)})"

    def make(row: str) -> list[list[str]]:
        line = [measured.rows[row].title, _percent(measured.flops_ratio(row))]
        line += [cell(row, column.task) for column in measured.columns] + [
            shown_figure(measured.average(row))
        ]
        line.append(shown_difference(measured.difference(row)) if compares(row) else "")
        line += [shown_difference(measured.difference(row, measured.above(row)))] * table.above
        line += [_by_layer(measured.stages(row, "similarity"), 3)] * ("sim" in table.extras)
        if "share" in table.extras:
            line.append(
                " / ".join(_percent(figure.value) for figure in measured.stages(row, "share").values())
            )
        return [line + [shown_figure(measured.hard(row))] * filtered]

    grid = Grid(header, under_headings(measured, make), caption(measured))
    if measured.majority and table.blind:
        over = [measured.majority[task] for task in measured.averaged]
        line = ["most frequent answer", "", *(f"{measured.majority[task]:.1f}" for task in measured.tasks)]
        line.append(f"{np.mean(over):.1f}" if over else "")
        grid.lines.append(line + [""] * (len(header) - len(line)))
    return grid


def mini_text(measured: Measured) -> list[str]:
    """What the columns of :func:`mini_grid` are."""
    sizes = Counter(
        cell["n"] for cell in measured.cells.values() if cell["status"] == "ok" and cell["score"] is not None
    )
    if not sizes:
        return []
    many = " or ".join(map(str, sorted(sizes)))
    what = f"Exact match in percent over {many} held-out questions a type"
    if measured.suite != "mini":
        what = f"Each task's own metric, in percent where it is a share, over {many} samples a task"
    said = (
        f"{what}, ± {ERRORS}. FLOPs: the visual tokens' in the decoder, nominal, relative to vanilla. Δ: "
        f"mean paired difference over the types in Avg, in points, with its standard error. {MARKED}"
    )
    if "sim" in measured.table.extras:
        said += (
            " Sim: mean s^max of the tokens that are no targets, after each compression layer. Into "
            "compensation: the share of those tokens that went into the compensation token."
        )
    if any(measured.hard(row) is not None for row in measured.rows):
        said += (
            f" {HARD[0].upper()}{HARD[1:]}: the score on those questions that the row with shrunk pictures of"
            " about the same cost answers wrongly (VTC-Bench's filter); that row itself has 0 there."
        )
    lines = [SMALL, said] if measured.suite == "mini" else [said]
    if False in measured.decided.values():
        lines.append(
            f"† not learned, and so outside Avg: the vanilla model is below {LEARNED_AT:.0f}%"
            f" ({LEARNED_AT_SMALL:.0f}% for half-size digits), or less than "
            f"{LEARNED_ABOVE:.0f} points above the better of the most frequent answer and the blind run. "
            "No compressed result takes part in this."
        )
    return lines


def families_grid(measured: Measured) -> Grid | None:
    """Paired differences to vanilla of the methods of each family together, by kind of question, under the
    table's headings; None where the table compares no families or nothing was measured."""
    kinds = measured.table.kinds
    lines: list[Line] = []
    for heading, names in measured.table.sections.items():
        families: dict[str, list[str]] = {}
        for name in names:
            if name in measured.rows and measured.has(name) and measured.rows[name].compression.acts:
                families.setdefault(family_of(measured.rows[name].compression), []).append(name)
        found = []
        for family, rows in sorted(families.items()):
            each = [shown_difference(measured.family(rows, tasks)) for tasks in kinds.values()]
            if any(each):
                found.append([f"{family} ({len(rows)})", *each])
        if found and heading:
            lines.append(heading)
        lines += found
    if not kinds or not lines:
        return None
    title = f"{caption(measured)}: families of methods, paired differences to vanilla, in points"
    return Grid(["", *kinds], lines, title)


def family_of(c: Compression) -> str:
    """Which methods a compression is compared with; that of its first step where it has several."""
    method = c.parts[0].method
    return METHODS[method].family if method else "own"


def differences_grid(measured: Measured) -> Grid | None:
    """Paired differences to vanilla, type by type; None where there are none."""

    def make(row: str) -> list[list[str]]:
        if not compares(row):
            return []
        each = [
            shown_difference(measured.difference(row, tasks=[column.task])) for column in measured.columns
        ]
        return [[measured.rows[row].title, *each]]

    lines = under_headings(measured, make)
    if not any(any(line[1:]) for line in lines if not isinstance(line, str)):
        return None
    title = f"{caption(measured)}: paired differences to vanilla, in points"
    return Grid(["", *map(measured.title, measured.columns)], lines, title)


def turns_grid(measured: Measured, notes: list[str]) -> Grid:
    """Time and memory of the embedded model's rows as ratios to vanilla, with the score over all
    questions."""
    header = ["", "FLOPs", "Avg", "Δ to vanilla", "seconds a question", "time, of vanilla's"]
    header += ["KV cache, kB", "cache, of vanilla's"]
    gpu = any((measured.turns(row) or {}).get("peak") for row in measured.rows)
    header += ["peak memory, MB"] * gpu

    def make(row: str) -> list[list[str]]:
        line = [
            measured.rows[row].title,
            _percent(measured.flops_ratio(row)),
            shown_figure(measured.average(row)),
        ]
        line.append(shown_difference(measured.difference(row)) if compares(row) else "")
        turns, reason = measured.turns(row), measured.turns_failed(row)
        for task in measured.tasks:
            if failed := measured.failed(row, task):
                notes.append(f"{measured.rows[row].title}, {get_task(task).title}: failed: {failed}")
        if turns is None:
            if reason:
                notes.append(f"{measured.rows[row].title}, timing: failed: {reason}")
            return [
                line + [f"failed ({len(notes)})" if reason else ""] + [""] * (len(header) - len(line) - 1)
            ]
        line += [turns["seconds"].show(4), "" if turns["ratio"] is None else turns["ratio"].show(2)]
        line += [f"{turns['cache'] / 1000:.0f}", _percent(turns["cache_ratio"])]
        return [line + [f"{turns['peak'] / 2**20:.0f}" if turns["peak"] else ""] * gpu]

    return Grid(header, under_headings(measured, make), caption(measured))


def turns_text(measured: Measured) -> list[str]:
    timed = [turns for row in measured.rows if (turns := measured.turns(row))]
    if not timed:
        return []
    return [
        f"Times are medians with quartiles over {timed[0]['n']} questions, from the picture to the answer's "
        "text, one question at a time on one thread; the ratio is taken question by question. KV cache: its "
        "bytes at the end of an answer."
    ]


def _clock(seconds: float) -> str:
    return f"{int(seconds + 0.5) // 60:02d}:{int(seconds + 0.5) % 60:02d}"


def _format(key: str, value: float, digits: int) -> str:
    if key.endswith("_time"):
        return _clock(value)
    if key.endswith("_memory"):
        return f"{value:.1f} GB"
    if key.endswith("_latency"):
        return f"{value:.3f} s"
    return f"{value:.{4 if key == 'sim' else digits}f}"


def paper_columns(measured: Measured) -> list[tuple[str, str]]:
    """(key, heading) of the figures that the paper's table has for this model."""
    found = []
    printed = {key for row in measured.rows.values() for key in row.paper}
    for column in measured.columns:
        found.append((column.key, measured.title(column)))
        for what in ("time", "memory", "latency"):
            if f"{column.key}_{what}" in printed:
                found.append((f"{column.key}_{what}", f"{column.title} {what}"))
    return (
        found
        + [("avg", "Avg (without MME)" if set(measured.tasks) & NOT_AVERAGED else "Avg")] * ("avg" in printed)
        + [("sim", "Sim")] * ("sim" in printed)
    )


def paper_grid(measured: Measured, notes: list[str]) -> Grid:
    """Each row's printed figures, ours, and ours minus the paper's; FLOPs computed next to printed."""
    keys = paper_columns(measured)
    with_flops = any("flops" in row.paper for row in measured.rows.values())
    header = [
        "",
        *["FLOPs, computed", "FLOPs, paper"] * with_flops,
        "",
        *(heading for _, heading in keys),
        "Δ to vanilla",
    ]
    filtered = any(measured.hard(name) is not None for name in measured.rows)
    header += [HARD] * filtered

    def make(name: str) -> list[list[str]]:
        row = measured.rows[name]
        digits = max(
            (len(str(value).partition(".")[2]) for key, value in row.paper.items() if key in row.tasks),
            default=1,
        )
        flops = []
        if with_flops:
            total, ratio = measured.flops(name), flops_ratio(row.model, row.compression)
            flops = ["" if total is None else f"{total / 1e12:.2f} T ({_percent(ratio)})", ""]
            if "flops" in row.paper:
                share = f" ({row.paper['percent']}%)" if "percent" in row.paper else ""
                flops[1] = f"{row.paper['flops']:.2f} T{share}"
        printed = [_format(key, row.paper[key], digits) if key in row.paper else "" for key, _ in keys]
        figures = [measured.figure(name, key) for key, _ in keys]
        ours = []
        for (key, _), figure in zip(keys, figures):
            reason = measured.failed(name, key)
            if reason is not None:
                notes.append(
                    f"{SUITES[measured.suite]}, {row.title}, {get_task(key).title}: failed: {reason}"
                )
            shown = "" if figure is None else _format(key, figure.value, digits)
            if figure is not None and figure.error is not None:
                shown += f" ± {figure.error:.{4 if key == 'sim' else digits}f}"
            ours.append(f"failed ({len(notes)})" if reason is not None else shown)
        if reason := measured.turns_failed(name):
            notes.append(f"{SUITES[measured.suite]}, {row.title}, timing: failed: {reason}")
        blank = [""] * len(flops)
        lines = [[row.title, *flops, "paper's", *printed, *[""] * (1 + filtered)]]
        if measured.has(name) or not measured.cells:
            apart_from = shown_difference(measured.difference(name)) if compares(name) else ""
            hard = [shown_figure(measured.hard(name))] * filtered
            lines.append(["", *blank, "ours", *ours, apart_from, *hard])
        if any(figure is not None and key in row.paper for (key, _), figure in zip(keys, figures)):
            apart = []
            for (key, _), figure in zip(keys, figures):
                both = figure is not None and key in row.paper
                apart.append(_apart(key, figure.value - row.paper[key], digits) if both else "")
            lines.append(["", *blank, "ours − paper's", *apart, *[""] * (1 + filtered)])
        return lines

    return Grid(header, under_headings(measured, make), caption(measured))


def _apart(key: str, value: float, digits: int) -> str:
    if key.endswith("_time"):
        return ("−" if value < 0 else "+") + _clock(abs(value))
    return ("" if value < 0 else "+") + _format(key, value, digits)
