"""A cell of a table: one row on one task, and the JSON file it becomes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from libra.identity import checkpoint_identity, code_identity, digest, file_digest
from libra.rows import Row

FORMAT = 2  # of a cell's file; raise when its keys change
SCORING = ("harness.py", "samples.py", "turns.py")  # of this package, what makes a cell of answers
PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "numpy")
TURNS = "turns"  # the row name of cells that time all rows of a table


@dataclass(frozen=True)
class Cell:
    """What to compute. ``settings`` is everything an answer depends on; equal settings mean equal answers.

    suite, row, task: its place in the table (names of :mod:`eval.suites`); spec: what the row's file said
    when the run was planned; checkpoint: folder or hub name; other: its name where it stands in for the
    registry's; data: the benchmark's parquet file and its sha256, None where the harness fetches the data;
    turns: names and rows that answer this task in turns to be timed, none for an ordinary cell.

    settings has four parts: ``row`` (:func:`libra.identity.row_identity`, ``blind`` for grey images and
    ``trained``, name and checkpoint, for one that was fine-tuned; or ``turns``, the rows by name, and their
    own limit), ``task``, ``data``, and ``run``, which the cells of a run share:
    checkpoint, limit, dtype, code.
    """

    suite: str
    row: str
    task: str
    spec: Row
    checkpoint: str
    settings: dict
    other: str | None = None
    data: tuple[str, str] | None = None
    turns: tuple[tuple[str, Row], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.suite}.{self.row}.{self.task}"

    @property
    def limit(self) -> int | None:
        """At most that many samples, None for all."""
        return self.settings["row"].get("limit", self.settings["run"]["limit"])

    @property
    def blind(self) -> bool:
        return self.settings["row"].get("blind", False)

    @property
    def config_hash(self) -> str:
        return digest(self.settings)

    def path(self, output: Path) -> Path:
        return output / "cells" / f"{self.name}.json"

    def samples_path(self, output: Path) -> Path:
        """The JSONL of finished answers; other settings have another file."""
        return output / "samples" / f"{self.name}.{self.config_hash[:12]}.jsonl"

    def is_answered_by(self, stored: dict | None) -> bool:
        """Whether a stored cell, of whatever table, has this one's figures."""
        return stored is not None and stored["status"] == "ok" and stored["config_hash"] == self.config_hash

    def is_finished(self, output: Path) -> bool:
        return self.is_answered_by(read_cell(self.path(output)))

    def is_begun(self, output: Path) -> bool:
        return not self.is_finished(output) and self.samples_path(output).exists()

    def record(self, result: dict) -> dict:
        """The JSON of a cell: what was asked and ``result``, which says ``status: ok`` or ``failed``."""
        asked = {
            "format": FORMAT,
            "suite": self.suite,
            "row": self.row,
            "task": self.task,
            "checkpoint": self.other,
        }
        return {**asked, "settings": self.settings, "config_hash": self.config_hash, **result}


def code() -> dict[str, str]:
    """Package → digest of the code that makes the answers and what a cell says of them."""
    return code_identity(eval=[Path(__file__).parent / name for name in SCORING])


def check_unchanged(cell: Cell, loaded: dict) -> None:
    """Raises ValueError where a worker would answer with something else than the run was planned with.

    loaded: checkpoint and code, as :func:`what_is_loaded` gave them.
    """
    planned = cell.settings["run"] | cell.settings["row"].get("trained", {})
    changed = next((name for name, value in loaded.items() if value != planned[name]), None)
    if cell.data is not None and file_digest(Path(cell.data[0])) != cell.data[1]:
        changed = "benchmark"
    if changed:
        raise ValueError(f"the {changed} changed after the run was planned; run the same command again")


def what_is_loaded(checkpoint: str) -> dict:
    """Checkpoint and code of a worker that has just loaded both."""
    return {"checkpoint": checkpoint_identity(checkpoint), "code": code()}


def read_json(path: Path) -> dict | None:
    """A JSON file's dictionary; None where there is none or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_cell(path: Path) -> dict | None:
    """A stored cell; None where there is none, or what is there is not a whole cell, which means computing it
    again."""
    stored = read_json(path)
    return stored if stored is not None and _is_whole(stored) else None


def read_cells(output: Path) -> dict[str, dict | None]:
    """All cells of a results folder by their files' names, in order; None for one that cannot be read."""
    return {path.stem: read_cell(path) for path in sorted((output / "cells").glob("*.json"))}


def finished_elsewhere(output: Path) -> dict[str, tuple[str, dict]]:
    """Finished cells of the other results folders next to ``output``: config_hash → (folder/name, the cell).

    Timings are left out: they belong to their table's rows and hour.
    """
    found = {}
    for folder in sorted(path.parent for path in output.resolve().parent.glob("*/cells")):
        for name, cell in read_cells(folder).items() if folder != output.resolve() else ():
            if cell is not None and cell["status"] == "ok" and cell["row"] != TURNS:
                found.setdefault(cell["config_hash"], (f"{folder.name}/{name}", cell))
    return found


# What a report reads of a cell, by status: key → what its value must be. None stands for a figure that is not
# there.
_TEXT, _NUMBER, _FIGURE = (str,), (int, float), (int, float, type(None))
_ALWAYS = {
    "suite": _TEXT,
    "row": _TEXT,
    "task": _TEXT,
    "checkpoint": (str, type(None)),
    "settings": (dict,),
    "status": _TEXT,
    "commit": _TEXT,
    "versions": (dict,),
    "machine": (dict,),
    "date": _TEXT,
    "command": _TEXT,
}
_BY_STATUS = {
    "ok": {
        "score": _FIGURE,
        "stderr": _FIGURE,
        "n": (int,),
        "seconds": _NUMBER,
        "correct": (list, type(None)),
    },
    "failed": {"reason": _TEXT},
}
_ANSWERED = {"tokens_per_layer": (list, type(None)), "trace": (list,), "groups": (dict,)}
_SETTINGS = {"row", "task", "data", "run"}
_MACHINE = {"cpu", "cores", "device", "processes", "batch_size"}


def _is_whole(cell: dict) -> bool:
    """Whether a stored cell has all its keys, its settings are those of its hash, and there is an answer for
    each question."""
    needed = {**_ALWAYS, **_BY_STATUS.get(cell.get("status"), {"status": ()})}
    if cell.get("status") == "ok":
        needed |= {"turns": (dict,)} if cell.get("row") == TURNS else _ANSWERED
    if cell.get("format") != FORMAT or not cell.keys() >= needed.keys():
        return False
    if not all(isinstance(cell[key], kinds) for key, kinds in needed.items()):
        return False
    if cell.get("config_hash") != digest(cell["settings"]) or not cell["settings"].keys() >= _SETTINGS:
        return False
    if not cell["machine"].keys() >= _MACHINE:
        return False
    if cell["status"] == "failed":
        return True
    correct = cell["correct"]
    figures = [
        cell["n"],
        cell["seconds"],
        *(value for value in (cell["score"], cell["stderr"]) if value is not None),
    ]
    figures += correct or []
    finite = all(isinstance(value, _NUMBER) and math.isfinite(value) for value in figures)
    return finite and cell["n"] > 0 and (correct is None or len(correct) == cell["n"])
