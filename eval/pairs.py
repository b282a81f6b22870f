"""Which rows of a section a table tells apart: the pairs that differ by more than three standard errors."""

from dataclasses import replace
from itertools import combinations

from .blocks import caption
from .formats import Grid, Line
from .measured import Measured

TIMES = 3  # standard errors: with some hundred pairs, two would find several by chance
PAIRS = (
    f"Pairs of rows of one section that differ by more than {TIMES} standard errors of their paired"
    " difference; the column pairs counts all. Draws of one method with other seeds are not compared with"
    " each other."
)


def pairs_grid(measured: Measured) -> Grid | None:
    """For each section of the table, and for all together, how many pairs of rows each column tells apart;
    None where the table does not ask for it or no two rows were measured."""
    tasks = [[column.task] for column in measured.columns]
    lines: list[Line] = []
    total = [0] * (len(tasks) + 2)
    for heading, names in measured.table.sections.items() if measured.table.pairs else ():
        pairs = _pairs(measured, names)
        if not pairs:
            continue
        found = [sum(_apart(measured, pair, asked) for pair in pairs) for asked in (*tasks, None)]
        lines.append([heading, str(len(pairs)), *map(str, found)])
        total = [one + other for one, other in zip(total, (len(pairs), *found))]
    if not lines:
        return None
    lines.append(["all sections", *map(str, total)])
    header = ["", "pairs", *map(measured.title, measured.columns), "Avg"]
    return Grid(header, lines, f"{caption(measured)}: pairs beyond {TIMES} standard errors")


def _pairs(measured: Measured, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of a section's measured, compressed rows; none of rows that differ in the seed only."""
    rows = [
        name
        for name in names
        if name in measured.rows and measured.has(name) and measured.rows[name].compression.acts
    ]
    unseeded = {name: replace(measured.rows[name].compression, seed=0) for name in rows}
    return [(one, other) for one, other in combinations(rows, 2) if unseeded[one] != unseeded[other]]


def _apart(measured: Measured, pair: tuple[str, str], tasks: list[str] | None) -> bool:
    difference = measured.difference(pair[0], pair[1], tasks)
    if difference is None or difference.error is None:
        return False
    return abs(difference.value) > TIMES * difference.error
