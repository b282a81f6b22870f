"""Which cells a table consists of, what of them is there already, and how long the rest may take."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from libra.config import Compression, ConfigError, Row
from libra.flops import cost
from libra.registry import get_model

from .cells import TURNS, Cell, code_hash, finished_beside, read_cells
from .checkpoints import CheckpointError, checkpoint_hash, require_checkpoint
from .formats import text_table
from .suites import BLIND, BLIND_TITLE, SUITES, Table, get_task, suite_rows


@dataclass(frozen=True)
class Plan:
    """The cells, row by row; the rows; the embedded benchmark's manifest (None for other suites); what is amiss, in a word."""

    table: Table
    suite: str
    cells: list[Cell]
    rows: dict[str, Row]
    manifest: dict | None
    amiss: str = ""


def plan(
    table: Table, suite: str, rows: list[str] | None = None, tasks: list[str] | None = None, limit: int | None = None,
    checkpoint: str | None = None, benchmark: Path | None = None, dtype: str = "float32", dry: bool = False,
) -> Plan:
    """The cells of a table's suite, and one cell a task that times all rows where the table has times.

    rows, tasks: names to keep; tasks may be written without ``mini_``. Writes or reuses the embedded benchmark in
    ``benchmark``. Raises ValueError for unknown names and for a checkpoint that cannot be had; a ``dry`` plan says the
    latter in ``amiss``, for then nothing is computed.
    """
    files = suite_rows(table, suite)
    if not files:
        raise ValueError(f"suite {suite} of table {table.name} has no rows: configs/ holds none of its files")
    for name in rows or []:
        if name not in files:
            raise ValueError(f"row {name} is unknown in suite {suite} of table {table.name}; use one of {', '.join(files)}")
    chosen = {name: Row.from_yaml(path) for name, path in files.items() if not rows or name in rows}
    chosen = {name: replace(row, title=BLIND_TITLE) if name == BLIND else row for name, row in chosen.items()}
    wanted = _wanted(tasks or [], [task for row in chosen.values() for task in row.tasks])
    found, hashes, amiss = {}, {}, ""
    for row in chosen.values():
        spec = get_model(row.model, row.path)
        row.compression.check_layers(spec.layers, row.path)
        if row.model not in found:
            try:
                found[row.model] = require_checkpoint(checkpoint or spec.checkpoint)
                hashes[row.model] = checkpoint_hash(found[row.model])
            except CheckpointError as error:
                if not dry:
                    raise
                found[row.model], hashes[row.model], amiss = spec.checkpoint, "", str(error)
    manifest = None
    if suite == "mini":
        from libra.mini.benchmark import write_benchmark

        manifest = write_benchmark(benchmark)
    cells = []

    def add(name: str, row: Row, task: str, settings: dict, most: int | None, turns: tuple = ()) -> None:
        data = benchmark_hash = None
        if manifest is not None:
            entry = manifest["types"][task.removeprefix("mini_")]
            data, benchmark_hash = str(benchmark.resolve() / entry["file"]), manifest["sha256"]
        settings = {
            "model": row.model, "checkpoint_sha256": hashes[row.model], **settings, "blind": name == BLIND, "dtype": dtype,
            "task": task, "benchmark_sha256": benchmark_hash, "code_sha256": code_hash(),
        }
        cells.append(
            Cell(suite, name, task, row.path, name == BLIND, found[row.model], data, most, settings, turns)
        )

    for name, row in chosen.items():
        for task in row.tasks:
            if not wanted or task in wanted:
                add(name, row, task, _how(row), limit)
    if table.timed:
        first = next(iter(chosen.values()))
        turns = tuple((name, row.path) for name, row in chosen.items())
        how = {TURNS: {name: _how(row) for name, row in chosen.items()}}
        for task in first.tasks:
            if not wanted or task in wanted:
                add(TURNS, first, task, how, min(limit or table.timed, table.timed), turns)
    return Plan(table, suite, cells, chosen, manifest, amiss)


def _how(row: Row) -> dict:
    """What a row does to the model. The method's name is only another way to say the keys that are there as well."""
    compression = row.compression.to_dict()
    compression.pop("method", None)
    return {"compression": compression, "attention": row.attention}


def _wanted(names: list[str], known: list[str]) -> list[str]:
    full = {name: name if name in known else f"mini_{name}" for name in names}
    for name, task in full.items():
        if task not in known:
            raise ValueError(f"task {name} is not a task of these rows; use one of {', '.join(dict.fromkeys(known))}")
    return list(full.values())


def flops_ratio(model: str, compression: Compression) -> float | None:
    """Nominal FLOPs of the visual tokens relative to vanilla; None where their number depends on the image."""
    spec = get_model(model)
    try:
        return cost(spec, compression).total / cost(spec, Compression(method="vanilla")).total
    except ConfigError:
        return None


def samples(cell: Cell, manifest: dict | None) -> int | None:
    """Answers that a cell takes, of all its rows; None while the harness has not loaded its data."""
    most = manifest["questions"] if manifest is not None else cell.limit
    if most is None:
        return None
    return min(cell.limit or most, most) * max(1, len(cell.turns))


def estimate(left: Iterable[Cell], earlier: Iterable[dict], manifest: dict | None) -> float | None:
    """Seconds of one worker for these cells: what earlier cells of the same model took for a sample of the same task (else of
    any), scaled by the FLOPs of the visual tokens. None where no earlier cell tells."""
    rates: dict[tuple[str, str], list[float]] = {}  # (model, task) → seconds a sample of vanilla
    sizes: dict[str, int] = {}
    for cell in earlier:
        settings = cell.get("settings", {})
        if cell.get("status") != "ok" or cell.get("row") == TURNS or not cell.get("n") or "compression" not in settings:
            continue
        try:
            keys = {key: value for key, value in settings["compression"].items() if key != "method"}
            ratio = flops_ratio(settings["model"], Compression(**keys)) or 1.0
        except (ConfigError, TypeError, KeyError):
            continue  # a cell of another version
        rates.setdefault((settings["model"], cell["task"]), []).append(cell["seconds"] / cell["n"] / ratio)
        if cell.get("limit") is None:
            sizes[cell["task"]] = cell["n"]
    total = 0.0
    for cell in left:
        model = cell.settings["model"]
        own = rates.get((model, cell.task)) or [r for (name, _), many in rates.items() if name == model for r in many]
        count = samples(cell, manifest) or sizes.get(cell.task)
        if not own or count is None:
            return None
        paths = [path for _, path in cell.turns] or [cell.config]
        ratios = [flops_ratio(model, Row.from_yaml(path).compression) or 1.0 for path in paths]
        total += count * float(np.median(own)) * float(np.mean(ratios))
    return total


def describe(plan: Plan, output: Path, processes: int) -> str:
    """What a run would do: the rows with their FLOPs, the cells by state, the hours as far as earlier cells tell."""
    beside = finished_beside(output)
    states = {cell.name: _state(cell, output, beside) for cell in plan.cells}
    lines = []
    for name, row in plan.rows.items():
        c = row.compression
        layers = ", ".join(map(str, c.layers)) if c.layers else "none"
        ratio = flops_ratio(row.model, c)
        own = [states[cell.name] for cell in plan.cells if cell.row == name]
        lines.append([
            name, row.title, layers, f"{c.ratio:.0%}" if c.layers else "", "by image" if ratio is None else f"{ratio:.0%}",
            *(str(own.count(state)) for state in ("finished", "reusable", "begun", "to do")),
        ])
    if own := [states[cell.name] for cell in plan.cells if cell.row == TURNS]:
        counts = (str(own.count(state)) for state in ("finished", "reusable", "begun", "to do"))
        lines.append([TURNS, "all rows in turns, timed", "", "", "", *counts])
    header = ["row", "title", "after layers", "removed", "FLOPs", "finished", "reusable", "begun", "to do"]
    left = [cell for cell in plan.cells if states[cell.name] in ("begun", "to do")]
    earlier = [cell for _, cell in beside.values()] + read_cells(output)
    seconds = estimate(left, earlier, plan.manifest)
    if not left:
        time = "Nothing is left to compute."
    elif seconds is None:
        time = "How long this takes cannot be told: no earlier cell of this model has been timed."
    else:
        # The turns are timed one after another, everything else by all workers.
        alone = estimate([cell for cell in left if cell.turns], earlier, plan.manifest) or 0.0
        hours = ((seconds - alone) / processes + alone) / 3600
        workers = f"{processes} worker{'s' if processes > 1 else ''}"
        time = f"About {hours:.2f} hours with {workers} for {len(left)} cells, judging by earlier cells and FLOPs."
    title = f"{plan.table.title} · {SUITES[plan.suite]} · {len(plan.cells)} cells"
    tasks = ", ".join(get_task(task).title for task in dict.fromkeys(cell.task for cell in plan.cells))
    amiss = [f"It cannot run as it is: {plan.amiss}"] if plan.amiss else []
    return "\n".join([title, f"tasks: {tasks}", "", *text_table(header, lines), "", time, *amiss])


def _state(cell: Cell, output: Path, beside: dict) -> str:
    if cell.is_finished(output):
        return "finished"
    if (cell.config_hash, cell.limit) in beside:
        return "reusable"
    return "begun" if cell.is_begun(output) else "to do"
