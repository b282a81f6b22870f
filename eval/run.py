"""Fill a table's cells, and go on where an earlier run stopped: python -m eval.run --table 1"""

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from tqdm import tqdm

from libra.cli import Parser
from libra.config import Row
from libra.registry import get_model
from libra.shadow import warn_if_llava_is_another

from .cells import Cell, code_hash, commit, cores, machine, versions, write_text
from .checkpoints import REPOSITORY, checkpoint_hash, require_checkpoint
from .harness import Harness, Settings
from .pool import PoolError, run_cells
from .suites import BLIND, SUITES, TABLES, get_task, row_files

EXAMPLES = """examples:
  python -m eval.run --table 1                            all rows of the embedded model
  python -m eval.run --table 1 --rows vanilla,r50 --limit 20 --output results/try
  python -m eval.run --table 1 --suite llava7b            the real checkpoint, downloaded from the hub"""


def plan(
    suite: str, rows: list[str] | None = None, tasks: list[str] | None = None, limit: int | None = None,
    checkpoint: str | None = None, benchmark: Path | None = None, dtype: str = "float32",
) -> tuple[list[Cell], dict | None]:
    """The cells of a suite, row by row, and the embedded benchmark's manifest (None for other suites).

    rows, tasks: names to keep; tasks may be written without ``mini_``. The embedded suite's last row is the blind run.
    Writes or reuses the embedded benchmark in ``benchmark``. Raises ValueError for unknown names and for a checkpoint
    that cannot be had.
    """
    files = row_files(suite)
    if suite == "mini" and "vanilla" in files:
        files[BLIND] = files["vanilla"]
    if not files:
        raise ValueError(f"suite {suite} has no rows: configs/ holds none of its files")
    for name in rows or []:
        if name not in files:
            raise ValueError(f"row {name} is unknown in suite {suite}; use one of {', '.join(files)}")
    chosen = {name: Row.from_yaml(path) for name, path in files.items() if not rows or name in rows}
    known = {task: get_task(task) for row in chosen.values() for task in row.tasks}
    wanted = []
    for name in tasks or []:
        full = name if name in known else f"mini_{name}"
        if full not in known:
            raise ValueError(f"task {name} is not a task of these rows; use one of {', '.join(known)}")
        wanted.append(full)
    found, hashes = {}, {}
    for row in chosen.values():
        spec = get_model(row.model, row.path)
        row.compression.check_layers(spec.layers, row.path)
        if row.model not in found:
            found[row.model] = require_checkpoint(checkpoint or spec.checkpoint)
            hashes[row.model] = checkpoint_hash(found[row.model])
    manifest = None
    if suite == "mini":
        from mini.benchmark import write_benchmark

        manifest = write_benchmark(benchmark)
    cells = []
    for name, row in chosen.items():
        for task in row.tasks:
            if wanted and task not in wanted:
                continue
            data = benchmark_hash = None
            if manifest is not None:
                entry = manifest["types"][task.removeprefix("mini_")]
                data, benchmark_hash = str(benchmark.resolve() / entry["file"]), manifest["sha256"]
            settings = {
                "model": row.model, "checkpoint_sha256": hashes[row.model], "compression": row.compression.to_dict(),
                "blind": name == BLIND, "dtype": dtype, "task": task, "benchmark_sha256": benchmark_hash,
                "code_sha256": code_hash(),
            }
            cells.append(Cell(suite, name, task, str(files[name]), name == BLIND, found[row.model], data, limit, settings))
    return cells, manifest


def fill(
    cells: list[Cell], manifest: dict | None, output: Path, settings: Settings, processes: int, command: str,
    factory: Callable = Harness,
) -> int:
    """Compute the cells that are not finished, with a bar and the time left; returns how many failed.

    Every cell becomes one JSON below ``output``/cells the moment it is done. Raises PoolError where no worker starts.
    """
    left = [cell for cell in cells if not cell.is_finished(output)]

    def samples(cell: Cell) -> int:
        if manifest is None:
            return 0  # the harness learns it when it loads the data
        return min(cell.limit or manifest["questions"], manifest["questions"])

    failed = 0
    computer = {**machine(), "device": settings.device, "processes": processes}
    origin = {"commit": commit(), "versions": versions(), "machine": computer, "command": command}
    total = sum(map(samples, left)) or None
    with tqdm(total=total, unit=" questions", smoothing=0.05, disable=not left, mininterval=0.5) as bar:
        bar.set_description("starting")
        done = {cell.name: 0 for cell in left}

        def on_samples(cell: Cell, count: int) -> None:
            done[cell.name] += count
            bar.set_description(f"{cell.row} · {cell.task.removeprefix('mini_')}", refresh=False)
            bar.update(count)

        def on_result(cell: Cell, result: dict) -> None:
            nonlocal failed
            bar.update(samples(cell) - done[cell.name] if total else 0)
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = cell.record({**result, **origin, "date": date})
            write_text(cell.path(output), json.dumps(record, indent=1) + "\n")
            if result["status"] == "failed":
                failed += 1
                bar.write(f"failed: {cell.name}: {result['reason']}", file=sys.stderr)

        if left:
            run_cells(left, factory, settings, processes, output / "logs", on_samples, on_result)
    return failed


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number; give 1 or more")
    return int(text)


def parser() -> Parser:
    parser = Parser(prog="python -m eval.run", description="Fill a table's cells; finished ones are kept.", epilog=EXAMPLES)
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True, help="number of the paper's table")
    parser.add_argument("--suite", choices=sorted(SUITES), default="mini", help="which model's rows (default %(default)s)")
    parser.add_argument("--rows", type=_names, metavar="A,B", help="only these rows, such as vanilla,r50")
    parser.add_argument("--tasks", type=_names, metavar="A,B", help="only these tasks, such as reading,color")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples of a task (to try things out)")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="samples a forward call (default: 32 mini, 8 others)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results folder (default results/tableN)")
    parser.add_argument("--benchmark", type=Path, default=Path("results/benchmark"), metavar="DIR",
                        help="the embedded benchmark, written where it is missing (default %(default)s)")
    parser.add_argument("--processes", type=_positive, metavar="N", help="workers (default: 2 on a CPU of two cores or more)")
    parser.add_argument("--checkpoint", metavar="DIR", help="weights to use instead of the registry's")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--publish", action="store_true", help="copy the finished table to docs/results/")
    return parser


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """0 when every cell is filled, 1 when some failed (the table says which), 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    warn_if_llava_is_another()  # here, because what a worker prints goes to its log
    output = args.output or Path("results") / f"table{args.table}"
    device = args.device or ("cuda:0" if _has_gpu() else "cpu")
    processes = args.processes or (min(2, cores()) if device == "cpu" else 1)
    command = f"python -m eval.run --table {args.table} --suite {args.suite}"
    for name in ("rows", "tasks"):
        if getattr(args, name):
            command += f" --{name} {','.join(getattr(args, name))}"
    command += f" --limit {args.limit}" if args.limit else ""
    started = time.monotonic()
    try:
        cells, manifest = plan(
            args.suite, args.rows, args.tasks, args.limit, args.checkpoint, args.benchmark, args.dtype,
        )
        output.mkdir(parents=True, exist_ok=True)
        with open(output / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is filling {output}: wait for it, or choose another --output") from None
            settings = Settings(
                output=str(output.resolve()), device=device, threads=max(1, cores() // processes),
                batch_size=args.batch_size or (32 if args.suite == "mini" else 8), dtype=args.dtype,
                online=args.suite != "mini",
            )
            failed = fill(cells, manifest, output, settings, processes, command)
            from .report import write_report

            if manifest is not None:
                write_text(output / "benchmark.json", json.dumps(manifest, indent=1) + "\n")
            table = write_report(output, args.table, publish=REPOSITORY / "docs" / "results" if args.publish else None)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, PoolError) as error:
        options.error(str(error))
    print(table.read_text(encoding="utf-8"))
    print(f"{len(cells)} cells, {failed} failed, {time.monotonic() - started:.0f} s; table: {table}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
