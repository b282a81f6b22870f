"""A cell of a table: one row on one task, and the JSON file it becomes."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .checkpoints import REPOSITORY

CODE = ("libra/**/*", "llava/**/*", "eval/tasks/*", "eval/lmms_libra.py")
PACKAGES = ("torch", "transformers", "lmms-eval", "datasets", "numpy")


@dataclass(frozen=True)
class Cell:
    """What to compute. ``settings`` is everything an answer depends on; equal settings mean equal answers.

    suite, row, task: its place in the table (names of :mod:`eval.suites`); config: the row's file; blind: grey images;
    checkpoint: folder or hub name; data: the benchmark's parquet file, None where the harness fetches the data;
    limit: at most that many samples, None for all.
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

    def is_finished(self, output: Path) -> bool:
        stored = read_json(self.path(output))
        return (
            stored is not None and stored.get("status") == "ok"
            and stored.get("config_hash") == self.config_hash and stored.get("limit") == self.limit
        )

    def record(self, result: dict) -> dict:
        """The JSON of a cell: what was asked and ``result``, which says ``status: ok`` or ``failed``."""
        asked = asdict(self)
        for machine_path in ("config", "checkpoint", "data"):
            del asked[machine_path]
        return {**asked, "config_hash": self.config_hash, **result}


def read_json(path: Path) -> dict | None:
    """A JSON file's dictionary; None where there is none or it is damaged, which means computing it again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


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
        if path.is_file() and not {"train", "serve"} & set(name.parts):
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it; ``unknown`` outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict:
    """Processor model and the cores this process may use; no names, no paths."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return {"cpu": model, "cores": cores()}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
