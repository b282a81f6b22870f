"""A table from its cells: Markdown, CSV, LaTeX and pictures. python -m eval.report results/table1"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from libra.utils.cli import Parser, names
from libra.utils.files import write_bytes, write_text

from . import blocks, plots
from .cells import read_cells, read_json
from .commits import commits, require_commits
from .formats import Grid, latex, markdown
from .measured import Measured, majority_of
from .own import Own
from .pairs import PAIRS, pairs_grid
from .plan import PUBLISHED, Plan
from .seeds import write_seeds
from .suites import OWN, TABLES, Table, get_table
from .training import NOTED, training_block

EXAMPLES = """examples:
  python -m eval.report results/table1
  python -m eval.report results/table1 --seeds results/table1_seed1,results/table1_seed2
  python -m eval.report results/arena --publish"""


def _notes(notes: list[str]) -> list[str]:
    return [""] * bool(notes) + [f"({number}) {note}" for number, note in enumerate(notes, 1)]


def mini_block(measured: Measured, grids: list[Grid]) -> list[str]:
    """Markdown of the embedded model's rows; its grids are appended to ``grids``."""
    heading = f"## {measured.model}, measured"
    if not measured.cells:
        return [heading, "", "No cell has been computed yet."]
    notes: list[str] = []
    timed = bool(measured.table.timed)
    grid = blocks.turns_grid(measured, notes) if timed else blocks.mini_grid(measured, notes)
    grids.append(grid)
    lines = [heading, "", *markdown(grid)]
    for text in [
        measured.table.note,
        *blocks.mini_text(measured),
        *(blocks.turns_text(measured) if timed else []),
    ]:
        lines += ["", text] if text else []
    lines += _notes(notes)
    differences = None if timed else blocks.differences_grid(measured)
    if differences is not None:
        grids.append(differences)
        lines += ["", "Paired differences to vanilla, in points:", "", *markdown(differences)]
    families = None if timed else blocks.families_grid(measured)
    if families is not None:
        grids.append(families)
        lines += ["", blocks.FAMILIES, "", *markdown(families)]
    pairs = pairs_grid(measured)
    if pairs is not None:
        grids.append(pairs)
        lines += ["", PAIRS, "", *markdown(pairs)]
    return lines


def paper_block(table: Table, suites: Sequence[Measured], grids: list[Grid]) -> list[str]:
    """Markdown of the paper's models: FLOPs computed here next to the printed, figures printed and
    measured."""
    if not suites:
        return []
    lines = [f"## The paper's models (its Table {table.name})", ""]
    notes: list[str] = []
    for measured in suites:
        grid = blocks.paper_grid(measured, notes)
        grids.append(grid)
        lines += [f"### {measured.model}", "", *markdown(grid), ""]
    tasks = {task for measured in suites for task in measured.tasks}
    said = "The paper's figures are its own; ours stay empty until the checkpoint is run"
    said += f" (`python -m eval.run --table {table.name} --suite {suites[0].suite}`)."
    if "mme" in tasks and any("avg" in row.paper for measured in suites for row in measured.rows.values()):
        said += " Avg leaves MME out, as in the paper."
    if any(task.startswith("mmbench") for task in tasks):
        said += " MMBench answers are read by rules, not by a judge model."
    if table.timed:
        said += (
            " Ours: latency is the mean over the samples that all rows answer in turns, one at a time; time "
            "is latency × the benchmark's samples; memory is the device's peak."
        )
    lines.append(said + f" {blocks.MARKED}")
    return lines + _notes(notes)


def footer(cells: list[dict], left_out: Sequence[str], benchmark: dict | None) -> list[str]:
    """Where the numbers of the shown cells come from, with every differing value; and what is not shown."""

    def every(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    def computer(cell: dict) -> str:
        m = cell["machine"]
        device = "" if m["device"] == "cpu" or "server" in cell else f", device {m['device']}"
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['processes']} processes{device}, batches of "
            f"{m['batch_size']}"
        )

    missing = [f"- left out: {line}" for line in left_out]
    if not cells:
        return ["No cell has been computed yet." if not left_out else "No cell fits this table.", *missing]
    lines = [
        f"- commit: {every(commits(cells))}",
        *_versions(cells),
        f"- machine: {every(map(computer, cells))}",
        f"- date: {max(cell['date'] for cell in cells)}",
        f"- command: {every(f'`{command}`' for command in (cell['command'] for cell in cells))}",
        f"- dtype: {every(cell['settings']['run']['dtype'] for cell in cells)}",
    ]
    served = [cell["server"] for cell in cells if "server" in cell]
    if served:
        told = every(f"{one['engine']} {one['version']} with {one['model']}" for one in served)
        lines.append(f"- answered by servers: {told}")
    if benchmark is not None:
        contents = f"seed {benchmark['seed']}, sha256 {benchmark['sha256']}"
        lines.append(f"- benchmark: {benchmark['questions']} questions a type, {contents}")
    reused = [cell["reused_from"].split("/")[0] for cell in cells if "reused_from" in cell]
    if reused:
        lines.append(
            f"- reused: {len(reused)} of {len(cells)} cells, computed with equal settings for {every(reused)}"
        )
    return lines + missing


def _versions(cells: list[dict]) -> list[str]:
    """A line for the versions of most cells, and one for those of each other cell."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        text = ", ".join(f"{name} {number}" for name, number in cell["versions"].items())
        groups.setdefault(text, []).append(f"{cell['row']}, {cell['task'].removeprefix('mini_')}")
    most = max(groups, key=lambda text: len(groups[text]))
    others = {text: names for text, names in groups.items() if text != most}
    return [
        f"- versions: {most}",
        *(f"- other versions: {text} ({'; '.join(names)})" for text, names in others.items()),
    ]


CSV_COLUMNS = (
    "suite",
    "row",
    "task",
    "source",
    "score",
    "stderr",
    "n",
    "difference",
    "difference_stderr",
    "difference_above",
    "difference_above_stderr",
    "flops_ratio",
    "tokens_per_layer",
    "seconds",
    "status",
    "similarity",
    "similarity_stderr",
    "compensation_share",
    "compensation_share_stderr",
    "turns_seconds",
    "turns_ratio",
    "turns_ratio_lower",
    "turns_ratio_upper",
    "cache_bytes",
    "peak_bytes",
    "reused_from",
)


def csv_text(suites: Sequence[Measured]) -> str:
    """Long form: one line a figure, measured or the paper's. Figures by layer are separated by spaces."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for measured in suites:
        for name, row in measured.rows.items():
            ratio = measured.flops_ratio(name)
            place = {
                "suite": measured.suite,
                "row": name,
                "flops_ratio": "" if ratio is None else f"{ratio:.4f}",
            }
            for key, value in row.paper.items() if measured.suite != "mini" else ():
                if key not in ("table", "flops", "percent"):
                    writer.writerow({**place, "task": key, "source": "paper", "score": value})
            for column in measured.columns:
                cell = measured.cells.get((name, column.task))
                line = {**place, "task": column.key, "source": "measured"}
                if cell is not None and cell["status"] != "ok":
                    writer.writerow({**line, "status": cell["status"]})
                elif (figure := measured.score(name, column.task, column.group)) is not None:
                    line |= {"score": f"{figure.value:.4f}", "stderr": figure.stored_error}
                    writer.writerow(
                        line
                        | ({"status": "ok"} if column.group else _details(measured, name, column.task, cell))
                    )
        for task, share in measured.majority.items() if measured.table.blind else ():
            writer.writerow(
                {
                    "suite": measured.suite,
                    "row": "majority",
                    "task": task,
                    "source": "measured",
                    "score": f"{share:.4f}",
                    "status": "ok",
                }
            )
    return file.getvalue()


def _details(measured: Measured, row: str, task: str, cell: dict) -> dict:
    line = {
        "n": cell["n"],
        "seconds": f"{cell['seconds']:.2f}",
        "status": "ok",
        "reused_from": cell.get("reused_from", ""),
        "tokens_per_layer": " ".join(f"{count:g}" for count in cell["tokens_per_layer"] or []),
    }
    for name, to in (("difference", "vanilla"), ("difference_above", measured.above(row))):
        difference = measured.difference(row, to, [task])
        if difference is not None:
            line |= {name: f"{difference.value:.4f}", f"{name}_stderr": difference.stored_error}
    for name, key in (("similarity", "similarity"), ("compensation_share", "share")):
        stages = [stage for stage in cell.get("trace") or () if stage[key] is not None]
        line |= {name: " ".join(f"{stage[key]:.4f}" for stage in stages)}
        line |= {f"{name}_stderr": " ".join(f"{stage[f'{key}_stderr']:.4f}" for stage in stages)}
    turns = measured.turns(row, task)
    if turns is not None:
        line |= {"turns_seconds": f"{turns['seconds'].median:.5f}", "cache_bytes": f"{turns['cache']:.0f}"}
        line |= {"peak_bytes": "" if turns["peak"] is None else turns["peak"]}
        if turns["ratio"] is not None:
            line |= {
                f"turns_ratio{end}": f"{getattr(turns['ratio'], part):.4f}"
                for end, part in (("", "median"), ("_lower", "lower"), ("_upper", "upper"))
            }
    return line


def write_report(
    output: Path,
    table: Table,
    publish: Path | None = None,
    unwritten: Sequence[dict] = (),
    plan: Plan | None = None,
) -> str:
    """Write a table's .md, .csv, .tex and .png into ``output`` from its cells, copy them to ``publish``; the
    Markdown's text.

    unwritten: cells that could not be stored, because the disk was full; they are in the report all the same.
    plan: of the run whose table it is; else the rows are read again, and the newest cell says what fits.
    Files of the report itself that cannot be written are named at the end of the text; only what is to be
    published raises OSError, and ValueError where it was not computed by a commit.
    """
    stored = read_cells(output)
    damaged = [f"{name}, which cannot be read" for name, cell in stored.items() if cell is None]
    found = {
        (cell["suite"], cell["row"], cell["task"]): cell
        for cell in [*filter(None, stored.values()), *unwritten]
    }
    benchmark = read_json(output / "benchmark.json")
    suites = _suites(table, output, list(found.values()), benchmark, plan)
    firsts, others = _apart(table, suites)
    mini = firsts[0]
    shown = [cell for measured in suites for cell in measured.cells.values()]
    left_out = [line for measured in suites for line in measured.left_out] + damaged
    stem, grids = table.stem, []
    lines = [f"# {table.title}", ""]
    problems: list[str] = []
    drawn: list[str] = []
    for measured in firsts:
        drawn.append(f"{stem}.png" if measured is mini else f"{stem}_{measured.suite}.png")
        lines += [*mini_block(measured, grids), ""]
        _store(problems, output / drawn[-1], lambda path, one=measured: plots.accuracy(one, path))
        against = "time" if table.timed else "FLOPs"
        lines += [f"![Accuracy against {against}]({drawn[-1]})", ""]
    if table.extras and plots.has_traces(mini):
        drawn.append(f"{stem}_traces.png")
        _store(problems, output / drawn[-1], lambda path: plots.traces(mini, path))
        lines += [f"![Similarity by layer, and the share of the compensation token]({drawn[-1]})", ""]
    lines += [*paper_block(table, others, grids), ""] if others else []
    noted = read_json(output / NOTED) if table.trained else None
    lines += training_block(table, noted, grids) if noted else []
    lines += ["## Where the numbers come from", "", *footer(shown, left_out, benchmark)]
    text = "\n".join(lines) + "\n"
    for suffix, content in (("md", text), ("csv", csv_text(suites)), ("tex", "\n".join(map(latex, grids)))):
        _store(problems, output / f"{stem}.{suffix}", lambda path, content=content: write_text(path, content))
    if publish is not None:
        require_commits(shown)
        _publish(output, publish, stem, drawn)
    return text + "".join(f"\n{problem}\n" for problem in problems)


def _publish(output: Path, publish: Path, stem: str, drawn: Sequence[str]) -> None:
    """Copy a written table and its pictures, which are there as SVG too."""
    vectors = [name.replace(".png", ".svg") for name in drawn]
    for name in (f"{stem}.md", f"{stem}.csv", f"{stem}.tex", *drawn, *vectors):
        write_bytes(publish / name, (output / name).read_bytes())


def _suites(
    table: Table, output: Path, cells: list[dict], benchmark: dict | None, plan: Plan | None
) -> list[Measured]:
    """Every suite of a table, the embedded model's or a user's first."""
    own = Own.load(output)
    names = own.suites if table is OWN else ("mini", *table.suites)
    return [_measured(table, suite, cells, benchmark, plan, own) for suite in names]


def _apart(table: Table, suites: list[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Those that stand for themselves, at least one, and the paper's models."""
    if table is not OWN:
        return suites[:1], suites[1:]
    return [measured for measured in suites if measured.cells] or suites[:1], []


def _measured(
    table: Table, suite: str, cells: list[dict], benchmark: dict | None, plan: Plan | None, own: Own
) -> Measured:
    if plan is not None and plan.suite == suite:
        rows, run = plan.rows, plan.run
    else:
        rows, run = own.rows(table, suite), None
    return Measured(table, suite, cells, majority_of(benchmark) if suite == "mini" else None, rows, run)


def _store(problems: list[str], path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        problems.append(f"{path.name} could not be written: {error.strerror or error}")


def table_of(output: Path) -> str | None:
    """The table that a results folder's name tells, if any."""
    return next((table.name for table in TABLES.values() if output.resolve().name == table.stem), None)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        takes_plugins=True,
        prog="python -m eval.report",
        description="Write a table from its cells.",
        epilog=EXAMPLES,
    )
    parser.add_argument("output", type=Path, help="results folder, such as results/table1")
    parser.add_argument(
        "--table", choices=[*TABLES, OWN.name], help="the table (default: as the folder is called, else 1)"
    )
    parser.add_argument(
        "--seeds",
        type=names,
        metavar="DIR,DIR",
        help="results folders of the same table with other trainings of the embedded model: instead of the"
        " table itself, each row's value with every seed, their mean and their spread",
    )
    parser.add_argument("--publish", action="store_true", help="copy the table to docs/results/")
    args = parser.parse_args(argv)
    try:
        own = Own.load(args.output)
        table = get_table(args.table or own.table or table_of(args.output) or "1")
        if not (args.output / "cells").is_dir():
            raise ValueError(
                f"{args.output} holds no cells: fill them with python -m eval.run --table {table.name}"
            )
        own.apply()
        publish = PUBLISHED if args.publish else None
        if args.seeds:
            text = write_seeds(table, [args.output, *map(Path, args.seeds)], publish)
        else:
            text = write_report(args.output, table, publish)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
