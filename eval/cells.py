"""A cell of a table: one row on one task, and the JSON file it becomes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from libra.provenance import REPOSITORY

CODE = ("libra/**/*", "llava/**/*")
BESIDE = {  # no part in an answer
    *(("llava", part) for part in ("train", "serve", "convert", "eval")),
    ("libra", "latency"),
    ("libra", "figures"),
    *(("libra", f"{part}.py") for part in (
        "cli", "drawing", "flops", "provenance", "random_weights", "shadow", "timing", "units",
    )),
}
PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "numpy")
TURNS = "turns"  # the row name of cells that time all rows of a table


@dataclass(frozen=True)
class Cell:
    """What to compute. ``settings`` is everything an answer depends on; equal settings mean equal answers.

    suite, row, task: its place in the table (names of :mod:`eval.suites`); config: the row's file; blind: grey images;
    checkpoint: folder or hub name; data: the benchmark's parquet file, None where the harness fetches the data;
    limit: at most that many samples, None for all; turns: names and files of the rows that answer this task in turns to be
    timed, none for an ordinary cell.
    """

    suite: str
    row: str
    task: str
    config: str
    blind: bool
    checkpoint: str
    data: str | None
    limit: int | None
    settings: dict
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.suite}.{self.row}.{self.task}"

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def path(self, output: Path) -> Path:
        return output / "cells" / f"{self.name}.json"

    def samples_path(self, output: Path) -> Path:
        """The JSONL of finished answers; other settings have another file, so stale answers are never met."""
        return output / "samples" / f"{self.name}.{self.config_hash[:12]}.jsonl"

    def is_answered_by(self, stored: dict | None) -> bool:
        """Whether a stored cell, of whatever table, has this one's figures."""
        return (
            stored is not None and stored.get("status") == "ok"
            and stored.get("config_hash") == self.config_hash and stored.get("limit") == self.limit
        )

    def is_finished(self, output: Path) -> bool:
        return self.is_answered_by(read_json(self.path(output)))

    def is_begun(self, output: Path) -> bool:
        return not self.is_finished(output) and self.samples_path(output).exists()

    def record(self, result: dict) -> dict:
        """The JSON of a cell: what was asked and ``result``, which says ``status: ok`` or ``failed``."""
        asked = asdict(self)
        for machine_path in ("config", "checkpoint", "data", "turns"):
            del asked[machine_path]
        return {**asked, "config_hash": self.config_hash, **result}


def read_json(path: Path) -> dict | None:
    """A JSON file's dictionary; None where there is none or it is damaged, which means computing it again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_cells(output: Path) -> list[dict]:
    """All cells of a results folder, in the order of their files' names."""
    cells = [read_json(path) for path in sorted((output / "cells").glob("*.json"))]
    return [cell for cell in cells if cell is not None]


@cache
def code_hash() -> str:
    """sha256 of the code that makes the answers, so that cells of two versions of it never stand in one table."""
    digest = hashlib.sha256()
    files = [path for pattern in CODE for path in REPOSITORY.glob(pattern) if path.suffix in (".py", ".yaml", "")]
    for path in sorted(files):
        name = path.relative_to(REPOSITORY)
        if path.is_file() and name.parts[:2] not in BESIDE:
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def finished_beside(output: Path) -> dict[tuple[str, int | None], tuple[str, dict]]:
    """Finished cells of the other results folders beside ``output``: (config_hash, limit) → (folder/name, the cell).

    Timings are left out: they belong to their table's rows and hour.
    """
    found = {}
    for path in sorted(output.resolve().parent.glob("*/cells/*.json")):
        cell = read_json(path) if path.parent.parent != output.resolve() else None
        if cell is not None and cell.get("status") == "ok" and cell.get("row") != TURNS:
            found.setdefault((cell.get("config_hash"), cell.get("limit")), (f"{path.parent.parent.name}/{path.stem}", cell))
    return found
