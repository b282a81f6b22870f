"""Which cells a table consists of, what of them is there already, and how long the rest may take."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from libra.checkpoints import find_checkpoint
from libra.config import NOTHING, Compression, ConfigError
from libra.flops import cost
from libra.identity import checkpoint_identity, hub_revision, row_identity
from libra.places import place_name
from libra.rows import Row, get_model
from libra.utils import provenance
from libra.utils.sentences import spelled

from .cells import TURNS, Cell, code, finished_elsewhere, read_cells
from .checkpoints import CheckpointError, require_checkpoint
from .data import DATA
from .formats import text_table
from .served import Server, check_rows
from .suites import BLIND, SUITES, SuiteRows, Table, get_task, task_digest

PUBLISHED = provenance.REPOSITORY / provenance.PUBLISHED


@dataclass(frozen=True)
class Wanted:
    """What is asked of a table.

    rows, tasks: names to keep, all where there are none; tasks may be written without ``mini_``. limit:
    samples of a task; checkpoint: weights instead of the registry's; benchmark: folder of the embedded one,
    which is written or reused there; trained: folder of the checkpoints that a table of fine-tuned ones
    names; dry: nothing is going to be computed; configs: a folder with more rows; servers: those that answer,
    instead of a checkpoint here.
    """

    rows: Sequence[str] = ()
    tasks: Sequence[str] = ()
    limit: int | None = None
    checkpoint: str | None = None
    benchmark: Path | None = None
    dtype: str = "float32"
    dry: bool = False
    trained: Path | None = None
    configs: Path | None = None
    servers: Sequence[Server] = ()


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    cells: task by task, so that rows which show the same pictures follow each other; rows: all of the
    suite's, each read once; chosen: the names of those to be computed; run: the settings that the cells
    share; manifest: of the embedded benchmark, None for other suites; amiss: why it cannot run, or an empty
    string.
    """

    table: Table
    suite: str
    cells: list[Cell]
    rows: Mapping[str, Row]
    chosen: list[str]
    run: dict
    manifest: dict | None
    amiss: str = ""


def plan(table: Table, suite: str, wanted: Wanted) -> Plan:
    """The cells of a table's suite, and one cell a task that times all rows where the table has times.

    Raises ValueError for unknown names and for a checkpoint that cannot be had; a dry plan says the latter in
    ``amiss``.
    """
    known = SuiteRows(table, suite, wanted.configs)
    chosen = {name: known[name] for name in _chosen(table, suite, known, wanted.rows)}
    offered = list(dict.fromkeys(task for row in chosen.values() for task in row.tasks))
    tasks = _wanted(wanted.tasks, offered) or offered
    for row in chosen.values():
        row.compression.check_layers(get_model(row.model, row.path).layers, row.path)
    served: dict = {}
    if wanted.servers:
        served = {"server": check_rows(table, chosen, wanted.servers)}
        found, amiss = {"": (wanted.servers[0].model, {"served": wanted.servers[0].model})}, ""
    else:
        found, amiss = _checkpoints(table, chosen, wanted)
    manifest = None
    if suite == "mini":
        from libra.mini.benchmark import write_benchmark

        manifest = write_benchmark(wanted.benchmark)
    run = {"checkpoint": found[""][1], "limit": wanted.limit, "dtype": wanted.dtype, "code": code(), **served}
    maker = _Maker(table, suite, found, _other(chosen, wanted.checkpoint), run, manifest, wanted.benchmark)
    cells = [
        maker.cell(name, row, task, {**row_identity(row), "blind": name == BLIND})
        for task in offered
        for name, row in chosen.items()
        if task in row.tasks and task in tasks
    ]
    if table.timed:
        first = next(iter(chosen.values()))
        rows_in_turns = {name: row_identity(row) for name, row in chosen.items()}
        own = {"turns": rows_in_turns, "limit": min(wanted.limit or table.timed, table.timed)}
        turns = tuple(chosen.items())
        cells += [maker.cell(TURNS, first, task, own, turns) for task in first.tasks if task in tasks]
    return Plan(table, suite, cells, known, list(chosen), run, manifest, amiss)


def _chosen(table: Table, suite: str, known: Mapping[str, Row], rows: Sequence[str]) -> list[str]:
    """The names of the rows to compute, in table order. Raises ValueError for an unknown one."""
    if not known:
        raise ValueError(f"suite {suite} of table {table.name} has no rows: configs/ holds none of its files")
    names = [spelled(name, known) or name for name in rows]
    for name in names:
        if name not in known:
            other = f"; its other models are {', '.join(table.suites)}" if table.suites else ""
            raise ValueError(
                f"row {name} is unknown in suite {suite} of table {table.name}; use one of {', '.join(known)}"
                f"{other}"
            )
    return [name for name in known if not names or name in names]


@dataclass(frozen=True)
class _Maker:
    """Makes cells that share ``run`` and the embedded benchmark in a folder. checkpoints: as
    :func:`_checkpoints` found them."""

    table: Table
    suite: str
    checkpoints: dict[str, tuple[str, dict]]
    other: str | None
    run: dict
    manifest: dict | None
    benchmark: Path | None

    def cell(self, name: str, row: Row, task: str, own: dict, turns: tuple = ()) -> Cell:
        file, data = None, None
        if self.manifest is not None and task.removeprefix("mini_") in self.manifest["types"]:
            entry = self.manifest["types"][task.removeprefix("mini_")]
            file = str(self.benchmark.resolve() / entry["file"]), entry["file_sha256"]
            data = {"sha256": entry["content_sha256"]}
        elif task in DATA:
            data = {"hub": DATA[task].name, "revision": hub_revision(DATA[task].name, "README.md", "dataset")}
        asked = {"name": task, "sha256": task_digest(get_task(task))}
        trained = self.table.trained_for(name)
        checkpoint, identity = self.checkpoints[trained]
        if trained:
            own = {**own, "trained": {"name": trained, "checkpoint": identity}}
        settings = {"row": own, "task": asked, "data": data, "run": self.run}
        return Cell(self.suite, name, task, row, checkpoint, settings, self.other, file, turns)


def _checkpoints(
    table: Table, rows: dict[str, Row], wanted: Wanted
) -> tuple[dict[str, tuple[str, dict]], str]:
    """Where the checkpoints are and what identifies them, by name: "" for the rows' own and the fine-tuned
    ones that they need. The second value says in a dry plan why one cannot be had."""
    models = {row.model: row for row in rows.values()}
    if len(models) > 1:
        raise ValueError(
            f"the rows of one suite name several models: {', '.join(models)}; give each model a suite of its"
            " own"
        )
    (row,) = models.values()
    names = {"": wanted.checkpoint or get_model(row.model, row.path).checkpoint}
    for who in filter(None, dict.fromkeys(map(table.trained_for, rows))):
        names[who] = "" if wanted.trained is None else str(wanted.trained / who)
    found, amiss = {}, ""
    for who, name in names.items():
        try:
            if not name:
                raise CheckpointError(
                    f"table {table.name} needs checkpoints that are fine-tuned first: python -m mini.finetune"
                )
            place = require_checkpoint(name)
            found[who] = place, checkpoint_identity(place)
        except CheckpointError as error:
            if not wanted.dry:
                raise
            found[who], amiss = (name, {}), str(error)
    return found, amiss


def _other(rows: dict[str, Row], named: str | None) -> str | None:
    """The name of a checkpoint that stands in for the registry's."""
    if named is None:
        return None
    row = next(iter(rows.values()))
    places = {os.path.realpath(find_checkpoint(name)) for name in (named, get_model(row.model).checkpoint)}
    return named if len(places) > 1 else None


def _wanted(names: Sequence[str], known: list[str]) -> list[str]:
    full = {name: spelled(name, known) or spelled(f"mini_{name}", known) for name in names}
    for name, task in full.items():
        if task is None:
            raise ValueError(f"task {name} is not a task of these rows; use one of {', '.join(known)}")
    return list(full.values())


def flops_ratio(model: str, compression: Compression) -> float | None:
    """Nominal FLOPs of the visual tokens relative to vanilla; None where their number depends on the
    image."""
    spec = get_model(model)
    try:
        return cost(spec, compression).total / cost(spec, NOTHING).total
    except ConfigError:
        return None


def samples(cell: Cell, manifest: dict | None) -> int | None:
    """Answers that a cell takes, of all its rows; None while the harness has not loaded its data."""
    most = manifest["questions"] if manifest is not None else cell.limit
    if most is None:
        return None
    return min(cell.limit or most, most) * max(1, len(cell.turns))


# How long a run takes.


@dataclass(frozen=True)
class Timed:
    """What an earlier cell took: ``seconds`` of a sample of the plain model; ``samples`` of the task, None
    where it was cut."""

    model: str
    task: str
    seconds: float
    samples: int | None


def timed_cells(cells: Iterable[dict]) -> list[Timed]:
    """Of stored cells, those that tell a time."""
    found = []
    for cell in cells:
        row, run = cell["settings"]["row"], cell["settings"]["run"]
        if cell["status"] != "ok" or cell["row"] == TURNS:
            continue
        try:
            ratio = flops_ratio(row["model"], Compression(**row["compression"])) or 1.0
        except (ConfigError, TypeError, KeyError):
            continue  # a row of another version
        whole = cell["n"] if run["limit"] is None else None
        found.append(Timed(row["model"], cell["task"], cell["seconds"] / cell["n"] / ratio, whole))
    return found


def published_times(suite: str, model: str, folder: Path = PUBLISHED) -> list[Timed]:
    """Of the published tables, the times of a suite's rows, on whatever machine that was."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                if line.get("suite") != suite or line.get("source") != "measured" or not line.get("seconds"):
                    continue
                seconds, n, ratio = (float(line[key] or 0) for key in ("seconds", "n", "flops_ratio"))
                found += [Timed(model, line["task"], seconds / n / (ratio or 1.0), int(n))] if n else []
    return found


def estimate(left: Iterable[Cell], earlier: Iterable[Timed], manifest: dict | None) -> float | None:
    """Seconds of one worker for these cells: what earlier cells of the same model took for a sample of the
    same task (else of any), scaled by the FLOPs of the visual tokens. None where no earlier cell says."""
    earlier = list(earlier)
    total = 0.0
    for cell in left:
        model = cell.spec.model
        of_model = [one for one in earlier if one.model == model]
        own = [one for one in of_model if one.task == cell.task] or of_model
        sizes = [one.samples for one in own if one.task == cell.task and one.samples is not None]
        count = samples(cell, manifest) or next(iter(sizes), None)
        if not own or count is None:
            return None
        rows = [row for _, row in cell.turns] or [cell.spec]
        ratios = [flops_ratio(model, row.compression) or 1.0 for row in rows]
        total += count * float(np.median([one.seconds for one in own])) * float(np.mean(ratios))
    return total


def describe(plan: Plan, output: Path, processes: int) -> str:
    """What a run would do: the rows with their FLOPs, the cells by state, the time as far as earlier cells
    tell."""
    elsewhere = finished_elsewhere(output)
    states = {cell.name: _state(cell, output, elsewhere) for cell in plan.cells}
    lines = []
    for name in plan.chosen:
        row = plan.rows[name]
        c = row.compression
        layers = ", ".join(map(place_name, c.layers)) if c.layers else "none"
        ratio = flops_ratio(row.model, c)
        own = [states[cell.name] for cell in plan.cells if cell.row == name]
        lines.append(
            [
                name,
                row.title,
                layers,
                "" if not c.compresses else c.amount if not isinstance(c.ratio, float) else f"{c.ratio:.0%}",
                "by image" if ratio is None else f"{ratio:.0%}",
                *(str(own.count(state)) for state in ("finished", "reusable", "begun", "to do")),
            ]
        )
    if own := [states[cell.name] for cell in plan.cells if cell.row == TURNS]:
        counts = (str(own.count(state)) for state in ("finished", "reusable", "begun", "to do"))
        lines.append([TURNS, "all rows in turns, timed", "", "", "", *counts])
    header = ["row", "title", "after layers", "removed", "FLOPs", "finished", "reusable", "begun", "to do"]
    left = [cell for cell in plan.cells if states[cell.name] in ("begun", "to do")]
    stored = [cell for _, cell in elsewhere.values()] + [
        cell for cell in read_cells(output).values() if cell is not None
    ]
    title = f"{plan.table.title} · {SUITES[plan.suite]} · {len(plan.cells)} cells"
    tasks = ", ".join(get_task(task).title for task in dict.fromkeys(cell.task for cell in plan.cells))
    amiss = [f"It cannot run as it is: {plan.amiss}"] if plan.amiss else []
    return "\n".join(
        [
            title,
            f"tasks: {tasks}",
            "",
            *text_table(header, lines),
            "",
            _time(plan, left, stored, processes),
            *amiss,
        ]
    )


def _time(plan: Plan, left: list[Cell], stored: list[dict], processes: int) -> str:
    """A sentence on how long it takes to compute the cells that are left."""
    if not left:
        return "Nothing is left to compute."
    told, where = timed_cells(stored), "earlier cells"
    if estimate(left, told, plan.manifest) is None:
        told, where = (
            published_times(plan.suite, left[0].spec.model),
            "the tables in docs/results, on their machine,",
        )
    seconds = estimate(left, told, plan.manifest)
    if seconds is None:
        return "How long this takes cannot be told: no earlier cell of this model has been timed."
    # The turns are timed one after another, everything else by all workers.
    by_itself = estimate([cell for cell in left if cell.turns], told, plan.manifest) or 0.0
    workers = f"{processes} worker{'s' if processes > 1 else ''}"
    duration = _duration((seconds - by_itself) / processes + by_itself)
    return f"About {duration} with {workers} for {len(left)} cells, judging by {where} and FLOPs."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def _state(cell: Cell, output: Path, elsewhere: dict) -> str:
    if cell.is_finished(output):
        return "finished"
    if cell.config_hash in elsewhere:
        return "reusable"
    return "begun" if cell.is_begun(output) else "to do"
