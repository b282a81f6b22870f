"""The cells of one suite of a table, asked by row and task."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from libra.config import ConfigError
from libra.flops import cost
from libra.methods import MERGERS, SELECTORS
from libra.rows import Row, get_model

from .cells import TURNS
from .fitting import fitting
from .plan import flops_ratio
from .statistics import Figure, Spread, is_learned, mean_of, paired_difference
from .suites import BLIND, NOT_AVERAGED, SUITES, Column, SuiteRows, Table, columns, get_task

NEAR = 0.05  # of vanilla's FLOPs, between a row and the one that shrinks its pictures
FAILED = 0.5  # a sample of a lower score is one that was failed


class Measured:
    """One suite of a table. Everything is None (or empty) where it was not measured.

    cells: of a results folder; those that do not fit the rows and the run are left out, and ``left_out`` says
    why. majority: of the embedded benchmark, task → percent that the most frequent answer would reach; empty
    for other suites. rows, run: as a run has read them; else the rows' files as they are now, and the
    settings of the newest cell.

    ``other`` is the name of the checkpoint that the cells were computed with, where it is not the registry's.
    """

    def __init__(
        self,
        table: Table,
        suite: str,
        cells: Sequence[dict],
        majority: dict[str, float] | None = None,
        rows: Mapping[str, Row] | None = None,
        run: dict | None = None,
    ):
        self.table, self.suite = table, suite
        self.rows = SuiteRows(table, suite) if rows is None else rows
        fit, self.left_out = fitting([cell for cell in cells if cell["suite"] == suite], self.rows, run)
        self.cells = {(cell["row"], cell["task"]): cell for cell in fit}
        self.other = max(fit, key=lambda cell: cell["date"])["checkpoint"] if fit else None
        self.tasks = list(dict.fromkeys(task for row in self.rows.values() for task in row.tasks))
        self.majority = {task: share for task, share in (majority or {}).items() if task in self.tasks}

    @property
    def model(self) -> str:
        """What the figures are of, as a heading has it."""
        return SUITES[self.suite] if self.other is None else f"{SUITES[self.suite]}, checkpoint {self.other}"

    def has(self, row: str) -> bool:
        """Whether anything of a row was computed."""
        return any(name == row for name, _ in self.cells) or self.turns(row) is not None

    @property
    def columns(self) -> list[Column]:
        return columns(self.tasks)

    def _has_share(self, row: str) -> bool:
        """Whether the row's merge can make compensation tokens."""
        return MERGERS[self.rows[row].compression.merge].compensates

    def _ok(self, row: str, task: str) -> dict | None:
        cell = self.cells.get((row, task))
        return cell if cell is not None and cell["status"] == "ok" else None

    def score(self, row: str, task: str, group: str = "") -> Figure | None:
        cell = self._ok(row, task)
        if cell is not None and group:
            cell = cell.get("groups", {}).get(group)
        return Figure(cell["score"], cell["stderr"], cell["n"]) if cell is not None else None

    def correct(self, row: str, task: str) -> list[float] | None:
        cell = self._ok(row, task)
        return cell["correct"] if cell is not None else None

    def failed(self, row: str, task: str) -> str | None:
        cell = self.cells.get((row, task))
        return cell["reason"] if cell is not None and cell["status"] == "failed" else None

    @property
    def averaged(self) -> list[str]:
        """The tasks in Avg: all but MME; where there is a blind run, the question types that vanilla and
        blind show to be learned, and none while one of the two is missing. No compressed result takes
        part."""
        if BLIND not in self.rows:
            return [task for task in self.tasks if task not in NOT_AVERAGED]
        return [task for task in self.tasks if task in self.decided and self.decided[task]]

    @property
    def decided(self) -> dict[str, bool]:
        """Of each task of which vanilla, blind and the majority are known, whether it is learned."""
        found = {}
        for task in self.tasks if BLIND in self.rows else ():
            vanilla, blind = self.score("vanilla", task), self.score(BLIND, task)
            if vanilla and blind and task in self.majority:
                found[task] = is_learned(
                    vanilla.value, self.majority[task], blind.value, get_task(task).learned_at
                )
        return found

    def average(self, row: str, tasks: Sequence[str] | None = None) -> Figure | None:
        """Over ``tasks``, by default those in Avg."""
        figures = [self.score(row, task) for task in (self.averaged if tasks is None else tasks)]
        return mean_of(figures) if figures and None not in figures else None

    def difference(
        self, row: str, to: str | None = "vanilla", tasks: Sequence[str] | None = None
    ) -> Figure | None:
        """Paired with the row ``to``, averaged over ``tasks``, by default those in Avg. Vanilla is that of
        the row's checkpoint."""
        figures = []
        to = self.table.plain(row) if to == "vanilla" else to
        for task in self.averaged if tasks is None else tasks:
            ours, theirs = self.correct(row, task), self.correct(to, task) if to else None
            if ours is None or theirs is None or len(ours) != len(theirs):
                return None
            figures.append(paired_difference(ours, theirs))
        return mean_of(figures) if figures else None

    def control(self, row: str) -> str | None:
        """The row that shrinks the pictures to about as many visual tokens as this row's average layer has,
        with the same positions where there is one; None where the table has no such row."""
        mine, own = self.flops_ratio(row), self.rows[row].compression
        if mine is None or not own.compresses or not own.acts:
            return None
        near = {
            name: abs(ratio - mine) for name in self._shrunk if (ratio := self.flops_ratio(name)) is not None
        }
        near = {name: apart for name, apart in near.items() if apart <= NEAR}
        positions = {name: self.rows[name].compression.positions != own.positions for name in near}
        return min(near, key=lambda name: (positions[name], near[name]), default=None)

    @cached_property
    def _shrunk(self) -> list[str]:
        """The rows whose pictures are shrunk before the vision tower."""
        chosen = {name: row.compression for name, row in self.rows.items()}
        return [
            name for name, c in chosen.items() if c.steps is None and c.acts and SELECTORS[c.select].shrinks
        ]

    def hard(self, row: str) -> Figure | None:
        """The score on those samples, of all tasks in Avg, that the row's :meth:`control` fails, in
        percent."""
        control = self.control(row)
        found: list[float] = []
        for task in self.averaged if control else ():
            ours, theirs = self.correct(row, task), self.correct(control or "", task)
            if ours is None and self._ok(row, task):
                continue  # the benchmark's metric is not a mean over samples
            if ours is None or theirs is None or len(ours) != len(theirs):
                return None
            found += [mine for mine, shrunk in zip(ours, theirs) if shrunk < FAILED]
        if not found:
            return None
        return Figure(100 * float(np.mean(found)), 100 * float(np.std(found)) / len(found) ** 0.5, len(found))

    def family(self, rows: Sequence[str], tasks: Sequence[str]) -> Figure | None:
        """The paired difference to vanilla of the mean of several rows on the same questions, over tasks."""
        figures = []
        for task in tasks:
            theirs = self.correct("vanilla", task)
            each = [ours for row in rows if (ours := self.correct(row, task)) is not None]
            if theirs is None or len(each) < len(rows) or any(len(ours) != len(theirs) for ours in each):
                return None
            figures.append(paired_difference(np.mean(each, axis=0).tolist(), theirs))
        return mean_of(figures) if figures else None

    def above(self, row: str) -> str | None:
        """The compressed row before this one under the same heading."""
        for names in self.table.sections.values():
            there = [name for name in names if name in self.rows and self.rows[name].compression.layers]
            if row in there:
                return there[there.index(row) - 1] if there.index(row) else None
        return None

    def flops(self, row: str) -> float | None:
        """Nominal FLOPs of the visual tokens (§4.1)."""
        try:
            return cost(get_model(self.rows[row].model), self.rows[row].compression).total
        except ConfigError:
            return None

    def flops_ratio(self, row: str) -> float | None:
        return flops_ratio(self.rows[row].model, self.rows[row].compression)

    def stages(self, row: str, name: str) -> dict[int, Figure]:
        """Compression layer → ``similarity`` (Table 4's Sim) or ``share`` (what went into the compensation
        token, of the tokens that are no targets), averaged over the tasks."""
        if name == "share" and not self._has_share(row):
            return {}
        found: dict[int, list[Figure]] = {}
        for task in self.tasks:
            for stage in (self._ok(row, task) or {}).get("trace") or ():
                if stage[name] is not None:
                    figure = Figure(stage[name], stage[f"{name}_stderr"], self.cells[row, task]["n"])
                    found.setdefault(stage["layer"], []).append(figure)
        return {layer: mean_of(figures) for layer, figures in found.items()}

    def turns(self, row: str, task: str | None = None) -> dict | None:
        """Of the samples that all rows answered in turns: ``seconds`` with their ``mean`` and their ``ratio``
        to vanilla's as :class:`Spread`, bytes of the KV ``cache`` and ``cache_ratio``, ``peak`` bytes of the
        device (None on a CPU), and how many they are, ``n``."""
        seconds, ratios, cache, base, peaks = [], [], [], [], []
        for name in self.tasks if task is None else [task]:
            rows = (self._ok(TURNS, name) or {}).get("turns", {})
            own, vanilla = rows.get(row, {}), rows.get("vanilla", {})
            if "seconds" not in own:
                continue
            seconds += own["seconds"]
            cache.append(own["cache_bytes"])
            peaks.append(own["peak_bytes"])
            if "seconds" in vanilla:
                ratios += [ours / theirs for ours, theirs in zip(own["seconds"], vanilla["seconds"])]
                base.append(vanilla["cache_bytes"])
        if not seconds:
            return None
        return {
            "seconds": Spread.of(seconds),
            "mean": float(np.mean(seconds)),
            "ratio": Spread.of(ratios) if ratios else None,
            "cache": float(np.mean(cache)),
            "cache_ratio": float(np.sum(cache) / np.sum(base)) if base else None,
            "peak": max((peak for peak in peaks if peak is not None), default=None),
            "n": len(seconds),
        }

    def time_ratio(self, row: str) -> Spread | None:
        """Of vanilla's time, question by question."""
        return (self.turns(row) or {}).get("ratio")

    def turns_failed(self, row: str) -> str | None:
        for task in self.tasks:
            reason = (self._ok(TURNS, task) or {}).get("turns", {}).get(row, {}).get("reason") or self.failed(
                TURNS, task
            )
            if reason:
                return reason
        return None

    def figure(self, row: str, key: str) -> Figure | None:
        """What was measured of a figure that the paper's tables have: a column's score, ``avg``, ``sim``, or
        a task's ``_time`` and ``_latency`` in seconds and ``_memory`` in GB (2³⁰ bytes)."""
        for column in self.columns:
            if key == column.key:
                return self.score(row, column.task, column.group)
        if key == "avg":
            return self.average(row)
        if key == "sim":
            own = self.stages(row, "similarity")
            return next(iter(own.values())) if len(own) == 1 else None
        task, _, what = key.rpartition("_")
        turns, cell = self.turns(row, task), self._ok(row, task)
        if turns is None:
            return None
        if what == "latency":
            return Figure(turns["mean"])
        if what == "memory":
            return None if turns["peak"] is None else Figure(turns["peak"] / 2**30)
        return (
            None if cell is None else Figure(turns["mean"] * cell["n"])
        )  # one after another, as the paper measured

    def title(self, column: Column) -> str:
        """The column's heading, with a dagger where the embedded model has not learned the task."""
        return column.title + (" †" if self.decided.get(column.task) is False else "")


def majority_of(benchmark: dict | None) -> dict[str, float]:
    """Task → percent that the most frequent answer would reach, of a results folder's benchmark.json."""
    types = {} if benchmark is None else benchmark["types"]
    return {f"mini_{kind}": 100 * entry["majority_share"] for kind, entry in types.items()}
