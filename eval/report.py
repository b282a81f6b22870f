"""A table from its cells: Markdown, CSV, LaTeX and pictures. python -m eval.report results/table1"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from libra.cli import Parser
from libra.files import write_bytes, write_text

from . import blocks, plots
from .cells import read_cells, read_json
from .formats import Grid, latex, markdown
from .measured import Measured
from .suites import SUITES, TABLES, Table, get_table

EXAMPLES = """examples:
  python -m eval.report results/table1
  python -m eval.report results/arena --publish"""


def _notes(notes: list[str]) -> list[str]:
    return [""] * bool(notes) + [f"({number}) {note}" for number, note in enumerate(notes, 1)]


def mini_block(measured: Measured, grids: list[Grid]) -> list[str]:
    """Markdown of the embedded model's rows; its grids are appended to ``grids``."""
    notes: list[str] = []
    timed = bool(measured.table.timed)
    grid = blocks.turns_grid(measured, notes) if timed else blocks.mini_grid(measured, notes)
    grids.append(grid)
    lines = ["## The embedded model, measured", "", *markdown(grid)]
    for text in [measured.table.note, *blocks.mini_text(measured), *(blocks.turns_text(measured) if timed else [])]:
        lines += ["", text] if text else []
    lines += _notes(notes)
    differences = None if timed else blocks.differences_grid(measured)
    if differences is not None:
        grids.append(differences)
        lines += ["", "Paired differences to vanilla, in points:", "", *markdown(differences)]
    return lines


def paper_block(table: Table, suites: Sequence[Measured], grids: list[Grid]) -> list[str]:
    """Markdown of the paper's models: FLOPs computed here beside the printed, figures printed and measured."""
    if not suites:
        return []
    lines = [f"## The paper's models (its Table {table.name})", ""]
    notes: list[str] = []
    for measured in suites:
        grid = blocks.paper_grid(measured, notes)
        grids.append(grid)
        lines += [f"### {SUITES[measured.suite]}", "", *markdown(grid), ""]
    tasks = {task for measured in suites for task in measured.tasks}
    said = "The paper's figures are its own; ours stay empty until the checkpoint is run"
    said += f" (`python -m eval.run --table {table.name} --suite {suites[0].suite}`)."
    if "mme" in tasks and any("avg" in row.paper for measured in suites for row in measured.rows.values()):
        said += " Avg leaves MME out, as in the paper."
    if any(task.startswith("mmbench") for task in tasks):
        said += " MMBench answers are read by rules, not by a judge model."
    if table.timed:
        said += (
            " Ours: latency is the mean over the samples that all rows answer in turns, one at a time; time is latency × the"
            " benchmark's samples; memory is the device's peak."
        )
    lines.append(said + f" {blocks.MARKED}")
    return lines + _notes(notes)


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
    reused = [cell["reused_from"].split("/")[0] for cell in cells if "reused_from" in cell]
    if reused:
        lines.append(f"- reused: {len(reused)} of {len(cells)} cells, computed with equal settings for {every(reused)}")
    if len({cell["settings"]["code_sha256"] for cell in cells}) > 1:
        lines.append("- caution: not all cells were computed by the same code; eval.run computes the older ones again")
    return lines


CSV_COLUMNS = (
    "suite", "row", "task", "source", "score", "stderr", "n", "difference", "difference_stderr", "difference_above",
    "difference_above_stderr", "flops_ratio", "tokens_per_layer", "seconds", "status", "similarity", "similarity_stderr",
    "compensation_share", "compensation_share_stderr", "turns_seconds", "turns_ratio", "turns_ratio_lower", "turns_ratio_upper",
    "cache_bytes", "peak_bytes", "reused_from",
)


def csv_text(suites: Sequence[Measured]) -> str:
    """Long form: one line a figure, measured or the paper's. Figures by layer are separated by spaces."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for measured in suites:
        for name, row in measured.rows.items():
            ratio = measured.flops_ratio(name)
            place = {"suite": measured.suite, "row": name, "flops_ratio": "" if ratio is None else f"{ratio:.4f}"}
            for key, value in row.paper.items() if measured.suite != "mini" else ():
                if key not in ("table", "flops", "percent"):
                    writer.writerow({**place, "task": key, "source": "paper", "score": value})
            for column in measured.columns:
                cell = measured.cells.get((name, column.task))
                line = {**place, "task": column.key, "source": "measured"}
                if cell is not None and cell["status"] != "ok":
                    writer.writerow({**line, "status": cell["status"]})
                elif (figure := measured.score(name, column.task, column.group)) is not None:
                    line |= {"score": f"{figure.value:.4f}", "stderr": "" if figure.stderr is None else f"{figure.stderr:.4f}"}
                    writer.writerow(line | ({"status": "ok"} if column.group else _details(measured, name, column.task, cell)))
        for task, share in measured.majority.items() if measured.table.blind else ():
            writer.writerow({"suite": measured.suite, "row": "majority", "task": task, "source": "measured",
                             "score": f"{share:.4f}", "status": "ok"})
    return file.getvalue()


def _details(measured: Measured, row: str, task: str, cell: dict) -> dict:
    line = {
        "n": cell["n"], "seconds": f"{cell['seconds']:.2f}", "status": "ok", "reused_from": cell.get("reused_from", ""),
        "tokens_per_layer": " ".join(f"{count:g}" for count in cell["tokens_per_layer"] or []),
    }
    for name, to in (("difference", "vanilla"), ("difference_above", measured.above(row))):
        difference = measured.difference(row, to, [task])
        if difference is not None:
            line |= {name: f"{difference.value:.4f}", f"{name}_stderr": f"{difference.stderr:.4f}"}
    for name, key in (("similarity", "similarity"), ("compensation_share", "share")):
        stages = [stage for stage in cell.get("trace") or () if stage[key] is not None]
        line |= {name: " ".join(f"{stage[key]:.4f}" for stage in stages)}
        line |= {f"{name}_stderr": " ".join(f"{stage[f'{key}_stderr']:.4f}" for stage in stages)}
    turns = measured.turns(row, task)
    if turns is not None:
        line |= {"turns_seconds": f"{turns['seconds'].median:.5f}", "cache_bytes": f"{turns['cache']:.0f}"}
        line |= {"peak_bytes": "" if turns["peak"] is None else turns["peak"]}
        if turns["ratio"] is not None:
            line |= {f"turns_ratio{end}": f"{getattr(turns['ratio'], part):.4f}"
                     for end, part in (("", "median"), ("_lower", "lower"), ("_upper", "upper"))}
    return line


def write_report(output: Path, table: Table, publish: Path | None = None, unwritten: Sequence[dict] = ()) -> str:
    """Write a table's .md, .csv, .tex and .png into ``output`` from its cells, copy them to ``publish``; the Markdown's text.

    unwritten: cells that could not be stored, because the disk was full; they are in the report all the same. Files of the
    report itself that cannot be written are named at the end of the text; only what is to be published raises OSError.
    """
    stored = {(cell["suite"], cell["row"], cell["task"]): cell for cell in [*read_cells(output), *unwritten]}
    cells, benchmark = list(stored.values()), read_json(output / "benchmark.json")
    majority = {}
    if benchmark is not None:
        majority = {f"mini_{kind}": 100 * entry["majority_share"] for kind, entry in benchmark["types"].items()}
    mini, *others = [Measured(table, suite, cells, majority if suite == "mini" else None) for suite in ("mini", *table.suites)]
    mini.majority = {task: share for task, share in mini.majority.items() if task in mini.tasks}
    stem, grids = table.stem, []
    lines = [f"# {table.title}", "", *mini_block(mini, grids), ""]
    problems: list[str] = []
    drawn = [f"{stem}.png"]
    _store(problems, output / drawn[0], lambda path: plots.accuracy_against_flops(mini, path))
    lines += [f"![Accuracy against FLOPs]({drawn[0]})", ""]
    if table.extras and plots.has_traces(mini):
        drawn.append(f"{stem}_traces.png")
        _store(problems, output / drawn[1], lambda path: plots.traces(mini, path))
        lines += [f"![Similarity by layer, and the share of the compensation token]({drawn[1]})", ""]
    lines += [*paper_block(table, others, grids), ""] if others else []
    lines += ["## Where the numbers come from", "", *footer(cells, benchmark)]
    text = "\n".join(lines) + "\n"
    for suffix, content in (("md", text), ("csv", csv_text([mini, *others])), ("tex", "\n".join(map(latex, grids)))):
        _store(problems, output / f"{stem}.{suffix}", lambda path, content=content: write_text(path, content))
    if publish is not None:
        for name in (f"{stem}.md", f"{stem}.csv", f"{stem}.tex", *drawn):
            write_bytes(publish / name, (output / name).read_bytes())
    return text + "".join(f"\n{problem}\n" for problem in problems)


def _store(problems: list[str], path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        problems.append(f"{path.name} could not be written: {error.strerror or error}")


def table_of(output: Path) -> str | None:
    """The table that a results folder's name tells, if any."""
    return next((table.name for table in TABLES.values() if output.resolve().name == table.stem), None)


def main(argv: list[str] | None = None) -> int:
    from libra.provenance import REPOSITORY

    parser = Parser(prog="python -m eval.report", description="Write a table from its cells.", epilog=EXAMPLES)
    parser.add_argument("output", type=Path, help="results folder, such as results/table1")
    parser.add_argument("--table", choices=list(TABLES), help="the table (default: as the folder is called, else 1)")
    parser.add_argument("--publish", action="store_true", help="copy the table to docs/results/")
    args = parser.parse_args(argv)
    table = get_table(args.table or table_of(args.output) or "1")
    if not (args.output / "cells").is_dir():
        parser.error(f"{args.output} holds no cells: fill them with python -m eval.run --table {table.name}")
    try:
        text = write_report(args.output, table, REPOSITORY / "docs" / "results" if args.publish else None)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
