"""Computes the cells that are not finished and stores each the moment it is done."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from libra.utils.files import remove_unfinished, write_json
from libra.utils.provenance import commit, machine, versions

from .cells import PACKAGES, Cell, finished_elsewhere
from .harness import Harness, Settings
from .plan import samples
from .pool import run_cells


def fill(
    cells: list[Cell],
    manifest: dict | None,
    output: Path,
    settings: Settings,
    devices: Sequence[str],
    command: str,
    factory: Callable = Harness,
) -> tuple[int, list[dict]]:
    """Compute the cells that are not finished, with a bar and the time left; how many failed, and the cells
    that could not be stored, as on a full disk.

    Every cell becomes one JSON below ``output``/cells the moment it is done. Cells that lie finished in a
    results folder next to it are taken from there. Cells that time rows in turns come last, one at a time, so
    that nothing else runs meanwhile. Raises PoolError where no worker starts.
    """
    for folder in (output, output / "cells"):
        remove_unfinished(folder)  # of a run that was killed
    left, elsewhere = [cell for cell in cells if not cell.is_finished(output)], finished_elsewhere(output)
    again = {cell.name: elsewhere[cell.config_hash] for cell in left if cell.config_hash in elsewhere}
    counts = {cell.name: samples(cell, manifest) or 0 for cell in left if cell.name not in again}
    total = sum(counts.values()) or None
    with tqdm(total=total, unit=" questions", smoothing=0.05, disable=not counts, mininterval=0.5) as bar:
        bar.set_description("starting")
        store = _Store(output, settings, devices, command, counts, bar)
        for cell in left:
            if cell.name in again:
                where, record = again[cell.name]
                own = {"suite": cell.suite, "row": cell.row, "task": cell.task, "checkpoint": cell.other}
                store.write(cell, {**record, **own, "reused_from": record.get("reused_from", where)})
        plain = [cell for cell in left if cell.name in counts and not cell.turns]
        timed = [cell for cell in left if cell.name in counts and cell.turns]
        logs = output / "logs"
        if plain:
            run_cells(plain, factory, settings, devices, logs, store.on_samples, store.on_result)
        if timed:
            one = replace(settings, threads=1, batch_size=1)
            run_cells(timed, factory, one, devices[:1], logs / "turns", store.on_samples, store.on_result)
        store.write_again()
    return store.failed, list(store.unwritten.values())


class _Store:
    """Hears of samples and results, draws the bar, and writes the cells' files.

    counts: of the samples of each cell that is computed.
    """

    def __init__(
        self,
        output: Path,
        settings: Settings,
        devices: Sequence[str],
        command: str,
        counts: dict[str, int],
        bar: tqdm,
    ):
        self.output, self.counts, self.bar = output, counts, bar
        size = settings.batch_size
        self.computer = {
            **machine(),
            "device": settings.device,
            "processes": len(devices),
            "batch_size": size,
        }
        self.origin = {
            "commit": commit(),
            "versions": versions(PACKAGES),
            "machine": self.computer,
            "command": command,
        }
        self.done = dict.fromkeys(counts, 0)
        self.results: dict[str, tuple[Cell, dict]] = {}
        self.unwritten: dict[str, dict] = {}

    @property
    def failed(self) -> int:
        """Cells without an answer, and those whose answer could not be stored."""
        without = {name for name, (_, record) in self.results.items() if record["status"] == "failed"}
        return len(without | self.unwritten.keys())

    def write(self, cell: Cell, record: dict) -> None:
        try:
            write_json(cell.path(self.output), record)
            self.unwritten.pop(cell.name, None)
        except OSError as error:
            reason = f"its file could not be written: {error.strerror or error}"
            self.unwritten[cell.name] = {**record, "status": "failed", "reason": reason}
            self.bar.write(f"failed: {cell.name}: {reason}", file=sys.stderr)

    def write_again(self) -> None:
        """There may be room for the files again."""
        for name in list(self.unwritten):
            if name in self.results:
                self.write(*self.results[name])

    def on_samples(self, cell: Cell, count: int) -> None:
        self.done[cell.name] += count
        self.bar.set_description(f"{cell.row} · {cell.task.removeprefix('mini_')}", refresh=False)
        self.bar.update(count)

    def on_result(self, cell: Cell, result: dict) -> None:
        self.bar.update(self.counts[cell.name] - self.done[cell.name] if self.bar.total else 0)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        where = {"machine": {**self.computer, "processes": 1, "batch_size": 1}} if cell.turns else {}
        record = cell.record({**result, **self.origin, **where, "date": date})
        self.results[cell.name] = cell, record
        self.write(cell, record)
        if result["status"] == "failed":
            self.bar.write(f"failed: {cell.name}: {result['reason']}", file=sys.stderr)
