"""Which stored cells belong into one table: those of its rows as they are now, computed by one run's
settings."""

from collections.abc import Mapping, Sequence

from libra.identity import row_identity
from libra.rows import Row

from .cells import TURNS
from .suites import BLIND

NAMED = 4  # cells of a reason that are named one by one


def fitting(
    cells: Sequence[dict], rows: Mapping[str, Row], run: dict | None = None
) -> tuple[list[dict], list[str]]:
    """The cells of one suite that can stand in one table, and a line for each reason why others cannot.

    Args:
        cells: of one suite. rows: the table's rows of this suite by name.
        run: the settings that the table's run shares; those of the newest cell where there is no such run.
    """
    newest = sorted(
        (cell for cell in cells if not _row_differs(cell, rows)), key=lambda cell: cell["date"], reverse=True
    )
    if run is None and newest:
        run = newest[0]["settings"]["run"]
    data: dict[str, list] = {}  # task → the newest questions
    for cell in newest:
        if cell["settings"]["run"] == run:
            data.setdefault(cell["task"], [cell["settings"]["task"], cell["settings"]["data"]])
    trained: dict[str, dict] = {}  # name → the newest checkpoint that was fine-tuned under it
    for cell in newest:
        one = cell["settings"]["row"].get("trained")
        if one:
            trained.setdefault(one["name"], one)
    fit, left = [], {}
    for cell in cells:
        settings = cell["settings"]
        why = _row_differs(cell, rows) or _run_differs(settings["run"], run)
        if not why and [settings["task"], settings["data"]] != data[cell["task"]]:
            why = "other questions"
        one = settings["row"].get("trained")
        if not why and one and one != trained[one["name"]]:
            why = "another checkpoint"
        if why:
            left.setdefault(why, []).append(f"{cell['row']}, {cell['task'].removeprefix('mini_')}")
        else:
            fit.append(cell)
    return fit, [_line(why, names) for why, names in left.items()]


def _line(why: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} cell{'s' if len(names) > 1 else ''} with {why} ({'; '.join(names[:NAMED])}{more})"


def _row_differs(cell: dict, rows: Mapping[str, Row]) -> str:
    """What a cell's row is that the table's is not, in a few words; "" where it is the same."""
    if cell["row"] == TURNS:
        pairs = [(name, own, False) for name, own in cell["settings"]["row"].get("turns", {}).items()]
    else:
        own = {key: value for key, value in cell["settings"]["row"].items() if key != "trained"}
        pairs = [(cell["row"], own, cell["row"] == BLIND)]
    for name, own, blind in pairs:
        if name not in rows:
            return "a row that the table does not have"
        wanted = row_identity(rows[name]) | ({} if cell["row"] == TURNS else {"blind": blind})
        if own != wanted:
            return _difference(_flat(own), _flat(wanted))
    return ""


def _run_differs(own: dict, wanted: dict | None) -> str:
    for key, words in (("checkpoint", "another checkpoint"), ("code", "other code")):
        if wanted is None or own.get(key) != wanted[key]:
            return words
    return "" if own == wanted else _difference(own, wanted)


def _flat(settings: dict) -> dict:
    compression = settings.get("compression")
    return {**settings, **(compression if isinstance(compression, dict) else {}), "compression": None}


def _difference(own: dict, wanted: dict) -> str:
    key = next(key for key in (*wanted, *own) if own.get(key) != wanted.get(key))
    return f"{key} {_word(own.get(key))}, not {_word(wanted.get(key))}"


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
