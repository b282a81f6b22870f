"""A table from its cells: Markdown, CSV and a picture. python -m eval.report results/table1"""

import csv
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from libra.cli import Parser
from libra.config import Compression, Row
from libra.flops import cost
from libra.registry import get_model

from .cells import read_cells, read_json, write_text
from .suites import BLIND, PAPER_TASKS, ROWS, SUITES, TABLES, get_task, row_files

LEARNED_AT, LEARNED_ABOVE = 80.0, 25.0  # percent; points above the better of majority and blind
EXAMPLES = """example:
  python -m eval.report results/table1"""


@dataclass(frozen=True)
class Figure:
    """A measured value in percent with its standard error, which is None where it cannot be had."""

    value: float
    stderr: float | None = None


def accuracy(correct: Sequence[float]) -> Figure:
    """Mean of right (1) and wrong (0) answers, and sqrt(p(1-p)/n), in percent."""
    p = float(np.mean(correct))
    return Figure(100 * p, 100 * sqrt(max(0.0, p * (1 - p)) / len(correct)))


def paired_difference(correct: Sequence[float], baseline: Sequence[float]) -> Figure:
    """Mean of the differences on the same questions, and their standard deviation over sqrt(n), in points.

    ValueError where the two did not answer the same number of questions.
    """
    if len(correct) != len(baseline):
        raise ValueError(f"paired answers differ in number, {len(correct)} and {len(baseline)}: use one limit for both rows")
    difference = np.asarray(correct, float) - np.asarray(baseline, float)
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    return Figure(100 * float(difference.mean()), 100 * deviation / sqrt(len(difference)))


def mean_of(figures: Iterable[Figure]) -> Figure:
    """Mean of independent figures: their standard errors add in squares."""
    figures = list(figures)
    stderrs = [figure.stderr for figure in figures]
    stderr = None if None in stderrs else sqrt(sum(s * s for s in stderrs)) / len(figures)
    return Figure(sum(figure.value for figure in figures) / len(figures), stderr)


def is_learned(vanilla: float, majority: float, blind: float) -> bool:
    """Whether a question type counts for Avg (all in percent): decided without a look at any compressed result."""
    return vanilla >= LEARNED_AT and vanilla - max(majority, blind) >= LEARNED_ABOVE


class Measured:
    """The cells of one suite, ready for a table."""

    def __init__(self, suite: str, cells: list[dict]):
        self.suite, self.rows = suite, {name: Row.from_yaml(path) for name, path in row_files(suite).items()}
        if suite == "mini" and "vanilla" in self.rows:
            self.rows[BLIND] = self.rows["vanilla"]
        self.cells = {(cell["row"], cell["task"]): cell for cell in cells if cell["suite"] == suite}
        self.tasks = list(dict.fromkeys(task for row in self.rows.values() for task in row.tasks))

    def score(self, row: str, task: str) -> Figure | None:
        cell = self.cells.get((row, task))
        return Figure(cell["score"], cell["stderr"]) if cell is not None and cell["status"] == "ok" else None

    def correct(self, row: str, task: str) -> list[float] | None:
        cell = self.cells.get((row, task))
        return cell["correct"] if cell is not None and cell["status"] == "ok" else None

    def failed(self, row: str, task: str) -> str | None:
        cell = self.cells.get((row, task))
        return cell["reason"] if cell is not None and cell["status"] == "failed" else None

    def average(self, row: str, tasks: Sequence[str]) -> Figure | None:
        figures = [self.score(row, task) for task in tasks]
        return mean_of(figures) if figures and None not in figures else None

    def difference(self, row: str, tasks: Sequence[str]) -> Figure | None:
        """Paired with vanilla, averaged over ``tasks``."""
        figures = []
        for task in tasks:
            ours, vanilla = self.correct(row, task), self.correct("vanilla", task)
            if ours is None or vanilla is None or len(ours) != len(vanilla):
                return None
            figures.append(paired_difference(ours, vanilla))
        return mean_of(figures) if figures else None

    def seconds(self, row: str) -> float | None:
        """Seconds of generation over all tasks; None while a cell is missing."""
        cells = [self.cells.get((row, task)) for task in self.tasks]
        return sum(cell["seconds"] for cell in cells) if all(cell and cell["status"] == "ok" for cell in cells) else None

    def flops(self, row: str) -> tuple[float, float]:
        """Nominal FLOPs of the visual tokens (§4.1) and their ratio to vanilla's."""
        spec = get_model(self.rows[row].model)
        total, full = cost(spec, self.rows[row].compression).total, cost(spec, Compression()).total
        return total, total / full

    def tokens(self, row: str) -> float | None:
        """Visual tokens of an average layer as the run counted them; of an uncompressed model the registry's number."""
        if not self.rows[row].compression.layers:
            return float(sum(get_model(self.rows[row].model).visual_tokens))
        cells = [cell for (name, _), cell in self.cells.items() if name == row and cell.get("tokens_per_layer")]
        return float(np.mean([cell["tokens_per_layer"] for cell in cells])) if cells else None


def learned_types(measured: Measured, majority: dict[str, float]) -> list[str]:
    """The types that vanilla, blind and majority show to be learned; none while one of the runs is missing."""
    chosen = []
    for task in measured.tasks:
        vanilla, blind = measured.score("vanilla", task), measured.score(BLIND, task)
        if vanilla and blind and task in majority and is_learned(vanilla.value, majority[task], blind.value):
            chosen.append(task)
    return chosen


def _show(figure: Figure | None, digits: int = 1, sign: bool = False) -> str:
    if figure is None:
        return ""
    text = f"{figure.value:{'+' if sign else ''}.{digits}f}"
    return text if figure.stderr is None else f"{text} ± {figure.stderr:.{digits}f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def mini_block(measured: Measured, majority: dict[str, float]) -> list[str]:
    """Markdown of the embedded model's rows; majority: task → percent."""
    learned = learned_types(measured, majority)
    footnotes: list[str] = []

    def cell(row: str, task: str) -> str:
        reason = measured.failed(row, task)
        if reason is not None:
            footnotes.append(f"{ROWS.get(row, row)}, {get_task(task).title}: failed: {reason}")
            return f"failed ({len(footnotes)})"
        return _show(measured.score(row, task))

    decided = [task for task in measured.tasks if measured.score("vanilla", task) and measured.score(BLIND, task) and majority]
    titles = [get_task(task).title + (" †" if task in decided and task not in learned else "") for task in measured.tasks]
    header = ["", "FLOPs", *titles, "Avg", "Δ to vanilla", "seconds"]
    rows = []
    for name in measured.rows:
        seconds, average = measured.seconds(name), measured.average(name, learned)
        difference = measured.difference(name, learned) if name not in ("vanilla", BLIND) else None
        rows.append([
            ROWS.get(name, name), f"{100 * measured.flops(name)[1]:.0f}%", *(cell(name, task) for task in measured.tasks),
            _show(average), _show(difference, sign=True), "" if seconds is None else f"{seconds:.0f}",
        ])
    if majority:
        shares = [majority[task] for task in measured.tasks]
        over = [majority[task] for task in learned]
        average = f"{np.mean(over):.1f}" if over else ""
        rows.append(["most frequent answer", "", *(f"{share:.1f}" for share in shares), average, "", ""])
    sizes = Counter(cell["n"] for cell in measured.cells.values() if cell["status"] == "ok")
    lines = ["## The embedded model, measured", "", *_markdown(header, rows), ""]
    if sizes:
        lines.append(
            f"Exact match in percent ± its standard error, {' or '.join(map(str, sorted(sizes)))} held-out questions a type. "
            "FLOPs: the visual tokens' in the decoder, nominal, relative to vanilla. Δ: mean paired difference to vanilla over "
            "the types in Avg, in points, with its standard error. Seconds: generation over all types, one process."
        )
    if any(title.endswith("†") for title in titles):
        lines += ["", (
            f"† not learned, and so outside Avg: the vanilla model is below {LEARNED_AT:.0f}%, or less than "
            f"{LEARNED_ABOVE:.0f} points above the better of the most frequent answer and the blind run. "
            "No compressed result takes part in this."
        )]
    lines += [""] * bool(footnotes) + [f"({number}) {note}" for number, note in enumerate(footnotes, 1)]
    differences = [
        [ROWS.get(name, name), *(_show(measured.difference(name, [task]), sign=True) for task in measured.tasks)]
        for name in measured.rows if name not in ("vanilla", BLIND)
    ]
    if any(any(row[1:]) for row in differences):
        lines += ["", "Paired differences to vanilla, in points:", "", *_markdown(["", *titles], differences)]
    return lines


def paper_block(table: int, cells: list[dict]) -> list[str]:
    """Markdown of the paper's models: FLOPs computed here beside the printed, accuracies printed and measured."""
    lines = [f"## The paper's models (its Table {table})", ""]
    tasks = list(PAPER_TASKS)
    header = ["", "FLOPs, computed", "FLOPs, paper", "accuracies", *(PAPER_TASKS[task].title for task in tasks), "Avg*"]
    averaged = [task for task in tasks if task != "mme"]
    for suite in TABLES[table]:
        if suite == "mini":
            continue
        measured = Measured(suite, cells)
        rows = []
        for name, row in measured.rows.items():
            if row.paper.get("table") != table:
                continue
            total, ratio = measured.flops(name)
            printed = f"{row.paper['flops']:.2f} T ({row.paper['percent']}%)" if "flops" in row.paper else ""
            own = [ROWS.get(name, name), f"{total / 1e12:.2f} T ({100 * ratio:.0f}%)", printed]
            rows.append([*own, "paper's", *(f"{row.paper[task]}" if task in row.paper else "" for task in tasks),
                         f"{row.paper.get('avg', '')}"])
            ours = ["failed" if measured.failed(name, task) else _show(measured.score(name, task)) for task in tasks]
            rows.append(["", "", "", "ours", *ours, _show(measured.average(name, averaged))])
        lines += [f"### {SUITES[suite][2]}", "", *_markdown(header, rows), ""]
    lines.append(
        "\\* without MME, as in the paper. The paper's accuracies are its own; ours stay empty until the checkpoint is run "
        f"(`python -m eval.run --table {table} --suite llava7b`). MMBench answers are read by rules, not by a judge model."
    )
    return lines


def footer(cells: list[dict], benchmark: dict | None) -> list[str]:
    """Where the numbers come from; every differing value is listed."""

    def every(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    def computer(cell: dict) -> str:
        m = cell["machine"]
        device = "" if m["device"] == "cpu" else f", device {m['device']}"
        return f"{m['cpu']}, {m['cores']} cores, {m['processes']} processes{device}"

    if not cells:
        return ["No cell has been computed yet."]
    lines = [
        f"- commit: {every(cell['commit'] for cell in cells)}",
        f"- versions: {every(', '.join(f'{name} {number}' for name, number in cell['versions'].items()) for cell in cells)}",
        f"- machine: {every(map(computer, cells))}",
        f"- date: {max(cell['date'] for cell in cells)}",
        f"- command: {every(f'`{command}`' for command in (cell['command'] for cell in cells))}",
        f"- dtype: {every(cell['settings']['dtype'] for cell in cells)}",
    ]
    if benchmark is not None:
        contents = f"seed {benchmark['seed']}, sha256 {benchmark['sha256']}"
        lines.append(f"- benchmark: {benchmark['questions']} questions a type, {contents}")
    if len({cell["settings"]["code_sha256"] for cell in cells}) > 1:
        lines.append("- caution: not all cells were computed by the same code; eval.run computes the older ones again")
    return lines


def csv_text(cells: list[dict], table: int, majority: dict[str, float]) -> str:
    """Long form: one line a figure, measured or the paper's."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["suite", "row", "task", "source", "score", "stderr", "n", "difference", "difference_stderr", "flops_ratio",
                     "tokens_per_layer", "seconds", "status"])
    for suite in TABLES[table]:
        measured = Measured(suite, cells)
        for name, row in measured.rows.items():
            ratio = f"{measured.flops(name)[1]:.4f}"
            for task in measured.tasks:
                if task in row.paper and suite != "mini":
                    writer.writerow([suite, name, task, "paper", row.paper[task], "", "", "", "", ratio, "", "", ""])
                cell = measured.cells.get((name, task))
                if cell is None:
                    continue
                if cell["status"] != "ok":
                    writer.writerow([suite, name, task, "measured", "", "", "", "", "", ratio, "", "", cell["status"]])
                    continue
                difference = measured.difference(name, [task])
                pair = ["", ""] if difference is None else [f"{difference.value:.4f}", f"{difference.stderr:.4f}"]
                stderr = "" if cell["stderr"] is None else f"{cell['stderr']:.4f}"
                tokens = " ".join(f"{count:g}" for count in cell["tokens_per_layer"] or [])
                writer.writerow([suite, name, task, "measured", f"{cell['score']:.4f}", stderr, cell["n"], *pair, ratio, tokens,
                                 f"{cell['seconds']:.2f}", "ok"])
        if suite == "mini":
            for task, share in majority.items():
                writer.writerow([suite, "majority", task, "measured", f"{share:.4f}", *[""] * 7, "ok"])
    return file.getvalue()


def draw(measured: Measured, learned: Sequence[str], path: Path) -> None:
    """Accuracy (Avg of the learned types, or of all while none is known) against FLOPs, with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(learned) or measured.tasks
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    vanilla = measured.average("vanilla", tasks)
    if vanilla is not None:
        axes.axhline(vanilla.value, color="0.7", linewidth=1, linestyle="--", zorder=0)
    markers = iter("oDsP^vX*")
    for name in measured.rows:
        average = measured.average(name, tasks)
        if name == BLIND or average is None:
            continue
        axes.errorbar(
            100 * measured.flops(name)[1], average.value, yerr=average.stderr, fmt=next(markers), capsize=3, markersize=7,
            label=ROWS.get(name, name),
        )
    axes.set_xlabel("FLOPs of the visual tokens, % of vanilla")
    axes.set_ylabel(f"exact match, %, mean of {len(tasks)} question types")
    axes.set_title("The embedded model")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(work, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(work, path)


def write_report(output: Path, table: int, publish: Path | None = None) -> Path:
    """Write table<N>.md, .csv and .png into ``output`` from its cells, copy them to ``publish``; the Markdown's path."""
    cells, benchmark = read_cells(output), read_json(output / "benchmark.json")
    majority = {}
    if benchmark is not None:
        majority = {f"mini_{kind}": 100 * entry["majority_share"] for kind, entry in benchmark["types"].items()}
    name = f"table{table}"
    measured = Measured("mini", cells)
    draw(measured, learned_types(measured, majority), output / f"{name}.png")
    lines = [f"# Table {table}", "", *mini_block(measured, majority), "", f"![Accuracy against FLOPs]({name}.png)", "",
             *paper_block(table, cells), "", "## Where the numbers come from", "", *footer(cells, benchmark)]
    write_text(output / f"{name}.md", "\n".join(lines) + "\n")
    write_text(output / f"{name}.csv", csv_text(cells, table, majority))
    if publish is not None:
        publish.mkdir(parents=True, exist_ok=True)
        for suffix in ("md", "csv", "png"):
            shutil.copyfile(output / f"{name}.{suffix}", publish / f"{name}.{suffix}")
    return output / f"{name}.md"


def main(argv: list[str] | None = None) -> int:
    from .checkpoints import REPOSITORY

    parser = Parser(prog="python -m eval.report", description="Write a table from its cells.", epilog=EXAMPLES)
    parser.add_argument("output", type=Path, help="results folder, such as results/table1")
    parser.add_argument("--table", type=int, choices=sorted(TABLES), default=1, help="number of the paper's table")
    parser.add_argument("--publish", action="store_true", help="copy the table to docs/results/")
    args = parser.parse_args(argv)
    if not (args.output / "cells").is_dir():
        parser.error(f"{args.output} holds no cells: fill them with python -m eval.run --table {args.table}")
    try:
        path = write_report(args.output, args.table, REPOSITORY / "docs" / "results" if args.publish else None)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
