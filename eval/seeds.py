"""One table over several trainings of the embedded model: each row's value with every seed, their mean and
their spread. python -m eval.report results/table1 --seeds results/table1_seed1"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from libra.utils.files import write_bytes, write_text

from .blocks import compares, shown_difference, shown_figure, under_headings
from .cells import TURNS, read_cells, read_json
from .commits import commits, require_commits
from .formats import Grid, latex, markdown
from .measured import Measured, majority_of
from .own import Own
from .statistics import Figure, mean_of, paired_difference
from .suites import Table, get_task

NAMED = 6  # pairs of rows that are named one by one
SEED_COLUMNS = ("row", "task", "seed", "score", "stderr", "n", "difference", "difference_stderr")


@dataclass(frozen=True)
class Seed:
    """What one training answered; ``name``: of its results folder, without the table's, or "shipped" for the
    table's own folder and the repository's checkpoint."""

    name: str
    measured: Measured
    benchmark: dict


def read_seed(table: Table, output: Path) -> Seed:
    """The embedded model's cells of a results folder.

    Raises ValueError where it has none that fits the rows, or does not say which questions they answer.
    """
    cells = [cell for cell in read_cells(output).values() if cell is not None and cell["suite"] == "mini"]
    benchmark = read_json(output / "benchmark.json")
    if not cells or benchmark is None:
        raise ValueError(
            f"{output} holds no cells of the embedded model: fill it with python -m eval.run --table"
            f" {table.name} --checkpoint CHECKPOINT --output {output}"
        )
    measured = Measured(table, "mini", cells, majority_of(benchmark), Own.load(output).rows(table, "mini"))
    if not measured.cells:
        raise ValueError(
            f"no cell of {output} fits the rows as they are now ({measured.left_out[0]}): run eval.run again"
        )
    name = output.resolve().name
    shipped = name == table.stem and measured.other is None
    return Seed("shipped" if shipped else name.removeprefix(f"{table.stem}_") or name, measured, benchmark)


def check_comparable(seeds: Sequence[Seed]) -> None:
    """Raises ValueError, in one sentence, where a mean over these seeds would mix what is not alike."""
    first = seeds[0]
    weights: dict[str, str] = {}
    for seed in seeds:
        if seed.benchmark["sha256"] != first.benchmark["sha256"]:
            raise ValueError(
                f"{seed.name} answers another benchmark (sha256 {seed.benchmark['sha256'][:12]}) than"
                f" {first.name} ({first.benchmark['sha256'][:12]}): run both with one --benchmark"
            )
        if seed.name in weights.values():
            raise ValueError(f"two results folders are called {seed.name}: rename one")
        own = _weights(seed)
        if own in weights:
            raise ValueError(
                f"{seed.name} has the weights of {weights[own]}: it is not another seed; run eval.run with"
                " --checkpoint and the other training's folder"
            )
        weights[own] = seed.name
        for place in first.measured.cells:
            if place in seed.measured.cells:
                _check_cell(place, seed, first)


def _check_cell(place: tuple[str, str], seed: Seed, first: Seed) -> None:
    mine, theirs = seed.measured.cells[place], first.measured.cells[place]
    if "ok" != mine["status"] or "ok" != theirs["status"] or place[0] == TURNS:
        return
    where = f"{place[0]}, {place[1].removeprefix('mini_')}"
    if mine["n"] != theirs["n"]:
        raise ValueError(
            f"{where} has {mine['n']} answers with {seed.name} and {theirs['n']} with {first.name}:"
            " use one --limit for both"
        )
    for key, words in (("task", "another task"), ("data", "other questions")):
        if mine["settings"][key] != theirs["settings"][key]:
            raise ValueError(f"{where} is {words} with {seed.name} than with {first.name}: run both again")
    if mine["settings"]["run"]["dtype"] != theirs["settings"]["run"]["dtype"]:
        raise ValueError(
            f"{where} has another dtype with {seed.name} than with {first.name}: run both with one --dtype"
        )


def _weights(seed: Seed) -> str:
    cell = next(iter(seed.measured.cells.values()))
    return str(cell["settings"]["run"]["checkpoint"])


class Seeds:
    """A table's rows and types that every seed has; ``left_out`` says which others some seed has.

    Raises ValueError where they cannot be compared (:func:`check_comparable`) or share no cell.
    """

    def __init__(self, table: Table, seeds: Sequence[Seed]):
        check_comparable(seeds)
        self.table, self.names = table, [seed.name for seed in seeds]
        self.given = seeds
        answered = [_answered(seed.measured) for seed in seeds]
        common = set.intersection(*answered)
        if not common:
            raise ValueError(f"{' and '.join(self.names)} have no row and type of question in common")
        self.each = [_only(seed.measured, common) for seed in seeds]
        self.averaged = [
            task for task in self.each[0].averaged if all(task in one.averaged for one in self.each)
        ]
        self.left_out = [
            f"{seed.name} also has {row}, {get_task(task).title}"
            for seed, own in zip(seeds, answered)
            for row, task in sorted(own - common)
        ]

    @property
    def first(self) -> Measured:
        return self.each[0]

    @property
    def not_averaged(self) -> dict[str, list[str]]:
        """Seed → the types that it has not learned, which Avg therefore leaves out for all."""
        found = {}
        for name, one in zip(self.names, self.each):
            own = [get_task(task).title for task, learned in one.decided.items() if not learned]
            found |= {name: own} if own else {}
        return found

    def scores(self, row: str, tasks: Sequence[str]) -> list[Figure | None]:
        """One a seed, averaged over ``tasks``."""
        return [one.average(row, tasks) for one in self.each]

    def differences(self, row: str, tasks: Sequence[str], to: str | None = "vanilla") -> list[Figure | None]:
        """One a seed: paired with the row ``to``, averaged over ``tasks``."""
        return [one.difference(row, to, tasks) for one in self.each]

    def mean(self, row: str, tasks: Sequence[str], to: str | None = None) -> Figure | None:
        """The mean over seeds, with the standard error of the questions: the answers of all seeds to a
        question are one value. ``to``: as the paired difference to that row."""
        figures = []
        for task in tasks:
            ours = self._answers(row, task)
            theirs = np.zeros_like(ours) if to is None or ours is None else self._answers(to, task)
            if ours is None or theirs is None:
                return None
            figures.append(paired_difference(ours.tolist(), theirs.tolist()))
        return mean_of(figures) if figures else None

    def _answers(self, row: str, task: str) -> np.ndarray | None:
        """Right or wrong, question by question, as the mean over seeds."""
        each = [one.correct(row, task) for one in self.each]
        return None if None in each else np.mean(np.asarray(each, float), axis=0)

    def pairs(self) -> "Pairs":
        """How the compressed rows stand to each other with each seed, over the types in Avg."""
        rows = [row for row in self.first.rows if compares(row) and self.mean(row, self.averaged)]
        agree, sure, against = 0, 0, []
        every = list(combinations(rows, 2))
        for a, b in every:
            found = [one for one in self.differences(a, self.averaged, b) if one is not None]
            signs = {np.sign(one.value) for one in found}
            agree += len(signs) == 1
            marked = {np.sign(one.value) for one in found if one.significant}
            sure += len(marked) == 1 and all(one.significant for one in found)
            if len(marked) == 2:
                titles = self.first.rows[a].title, self.first.rows[b].title
                values = ", ".join(one.show(sign=True) for one in found)
                against.append(f"{titles[0]} minus {titles[1]}: {values}")
        return Pairs(len(every), agree, sure, against)


@dataclass(frozen=True)
class Pairs:
    """all: pairs of compressed rows; agree: in the same order with every seed; sure: besides, apart by more
    than two standard errors with every seed; against: those that are so far apart in both directions."""

    all: int
    agree: int
    sure: int
    against: list[str]


def _answered(measured: Measured) -> set[tuple[str, str]]:
    return {
        place
        for place, cell in measured.cells.items()
        if cell["status"] == "ok" and cell["correct"] is not None and place[0] != TURNS
    }


def _only(measured: Measured, places: set[tuple[str, str]]) -> Measured:
    cells = [cell for place, cell in measured.cells.items() if place in places]
    run = cells[0]["settings"]["run"]
    only = Measured(measured.table, measured.suite, cells, measured.majority, measured.rows, run)
    only.tasks = [task for task in only.tasks if any(task == asked for _, asked in places)]
    return only


def spread(figures: Sequence[Figure | None]) -> float | None:
    """Standard deviation over the seeds (n − 1): of two, their difference over √2."""
    values = [figure.value for figure in figures if figure is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _spread(figures: Sequence[Figure | None]) -> str:
    value = spread(figures)
    return "" if value is None else f"{value:.1f}"


def average_grid(seeds: Seeds) -> Grid:
    """Avg and the difference to vanilla: with each seed, their mean, their spread."""
    header = [""]
    for what in ("Avg", "Δ to vanilla"):
        header += [*(f"{what}, {name}" for name in seeds.names), f"{what}, mean", "over seeds"]

    def make(row: str) -> list[list[str]]:
        tasks = seeds.averaged
        each = seeds.scores(row, tasks)
        line = [
            seeds.first.rows[row].title,
            *map(shown_figure, each),
            shown_figure(seeds.mean(row, tasks)),
            _spread(each),
        ]
        if not compares(row):
            return [line + [""] * (len(header) - len(line))]
        each = seeds.differences(row, tasks)
        mean = seeds.mean(row, tasks, seeds.table.plain(row))
        return [line + [*map(shown_difference, each), shown_difference(mean), _spread(each)]]

    return Grid(header, under_headings(seeds.first, make), f"{seeds.table.title}, over seeds")


def scores_grid(seeds: Seeds) -> Grid:
    """Scores type by type, those of the seeds in their order."""

    def make(row: str) -> list[list[str]]:
        each = [seeds.scores(row, [task]) for task in seeds.first.tasks]
        shown = [" / ".join("" if one is None else f"{one.value:.1f}" for one in figures) for figures in each]
        return [[seeds.first.rows[row].title, *shown]]

    header = ["", *(get_task(task).title for task in seeds.first.tasks)]
    return Grid(header, under_headings(seeds.first, make), f"{seeds.table.title}: scores with each seed")


def differences_grid(seeds: Seeds) -> Grid:
    """Paired differences to vanilla type by type, as means over seeds with their spread in brackets."""

    def make(row: str) -> list[list[str]]:
        if not compares(row):
            return []
        shown = []
        for task in seeds.first.tasks:
            mean, apart = seeds.mean(row, [task], seeds.table.plain(row)), seeds.differences(row, [task])
            shown.append("" if mean is None else f"{shown_difference(mean)} ({_spread(apart)})")
        return [[seeds.first.rows[row].title, *shown]]

    header = ["", *(get_task(task).title for task in seeds.first.tasks)]
    caption = f"{seeds.table.title}: paired differences to vanilla, mean over seeds (spread over seeds)"
    return Grid(header, under_headings(seeds.first, make), caption)


def said_of(seeds: Seeds) -> list[str]:
    """The sentences above the grids."""
    n = len(seeds.names)
    told = [
        f"The embedded model, trained {n} times; the same questions were put to each (mini/README.md says how"
        f" they were trained). ± is the questions' standard error, in a mean that of the {n} answers to a"
        " question together. *Over seeds* is the standard deviation of the values of the seeds (n − 1; of"
        " two, their difference over √2): what another training changes, which no number of questions makes"
        " smaller."
    ]
    for name, types in seeds.not_averaged.items():
        told.append(f"{name} has not learned {', '.join(types)}: Avg leaves that out for all seeds.")
    pairs = seeds.pairs()
    if pairs.all:
        told.append(
            f"Of {pairs.all} pairs of compressed rows, {pairs.agree} are in the same order with every seed,"
            f" and {pairs.sure} of them are more than two standard errors apart with every seed."
            f" {len(pairs.against)} are that far apart in opposite directions"
            + (f": {'; '.join(pairs.against[:NAMED])}" if pairs.against else "")
            + (f"; and {len(pairs.against) - NAMED} more." if len(pairs.against) > NAMED else ".")
        )
    return told


def origin(seeds: Seeds) -> list[str]:
    """Where each seed's figures come from."""
    lines = []
    for seed, one in zip(seeds.given, seeds.each):
        cells = list(one.cells.values())
        run = cells[0]["settings"]["run"]
        weights = run["checkpoint"].get("sha256", "unknown")
        which = "the checkpoint in the repository" if one.other is None else "another training"
        lines.append(
            f"- {seed.name}: {which}, sha256 {weights[:16]}; {len(cells)} cells, commit"
            f" {'; '.join(dict.fromkeys(commits(cells)))}, {max(cell['date'] for cell in cells)}"
        )
    codes = {str(one.cells[next(iter(one.cells))]["settings"]["run"]["code"]) for one in seeds.each}
    if len(codes) > 1:
        lines.append("- the seeds' cells were computed by different code, at the commits above")
    benchmark = seeds.given[0].benchmark
    questions = sorted({cell["n"] for one in seeds.each for cell in one.cells.values()})
    many = " or ".join(map(str, questions))
    lines.append(f"- benchmark: {many} questions a type, sha256 {benchmark['sha256']}")
    for seed in seeds.given:
        lines += [f"- left out of {seed.name}: {line}" for line in seed.measured.left_out]
    if seeds.left_out:
        more = f" and {len(seeds.left_out) - NAMED} more" if len(seeds.left_out) > NAMED else ""
        lines.append(f"- left out, for not every seed has it: {'; '.join(seeds.left_out[:NAMED])}{more}")
    return lines


def seeds_csv(seeds: Seeds) -> str:
    """Long form: a line a row, type (or avg) and seed, then one of their mean and one of their spread."""
    file = io.StringIO()
    writer = csv.DictWriter(file, SEED_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in seeds.first.rows:
        tasks = {"avg": seeds.averaged} | {task: [task] for task in seeds.first.tasks}
        for name, asked in tasks.items():
            scores = seeds.scores(row, asked)
            if None in scores:
                continue
            differences = seeds.differences(row, asked) if compares(row) else [None] * len(scores)
            to = seeds.table.plain(row)
            mean = seeds.mean(row, asked, to) if compares(row) else None
            means = (seeds.mean(row, asked), mean)
            each = [*zip(seeds.names, scores, differences), ("mean", *means)]
            for seed, score, difference in each:
                line = {"row": row, "task": name, "seed": seed, "n": score.n}
                writer.writerow(
                    line | _columns(score, "score", "") | _columns(difference, "difference", "difference_")
                )
            apart = {"score": spread(scores), "difference": spread(differences)}
            told = {key: f"{value:.4f}" for key, value in apart.items() if value is not None}
            writer.writerow({"row": row, "task": name, "seed": "spread", **told})
    return file.getvalue()


def _columns(figure: Figure | None, key: str, prefix: str) -> dict[str, str]:
    if figure is None:
        return {}
    return {key: f"{figure.value:.4f}", f"{prefix}stderr": figure.stored_error}


def write_seeds(table: Table, outputs: Sequence[Path], publish: Path | None = None) -> str:
    """Write a table over seeds as STEM_seeds.md, .csv and .tex into the first folder, copy them to
    ``publish``; the Markdown's text.

    Raises ValueError where the folders cannot be compared, and where what is to be published was not computed
    by a commit; OSError where it cannot be written.
    """
    seeds = Seeds(table, [read_seed(table, output) for output in outputs])
    if publish is not None:
        require_commits([cell for one in seeds.each for cell in one.cells.values()])
    grids = [average_grid(seeds), scores_grid(seeds), differences_grid(seeds)]
    order = " / ".join(seeds.names)
    lines = [f"# {table.title}, over seeds", ""]
    for text in said_of(seeds):
        lines += [text, ""]
    lines += [*markdown(grids[0]), "", f"Scores by type ({order}):", "", *markdown(grids[1]), ""]
    lines += ["Paired differences to vanilla, mean over seeds (in brackets their spread over seeds):", ""]
    lines += [*markdown(grids[2]), "", "## Where the numbers come from", "", *origin(seeds)]
    text = "\n".join(lines) + "\n"
    contents = {"md": text, "csv": seeds_csv(seeds), "tex": "\n".join(map(latex, grids))}
    for suffix, content in contents.items():
        name = f"{table.stem}_seeds.{suffix}"
        write_text(outputs[0] / name, content)
        if publish is not None:
            write_bytes(publish / name, (outputs[0] / name).read_bytes())
    return text
