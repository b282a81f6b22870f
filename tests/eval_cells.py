"""Cells as a run stores them, without a run."""

from functools import cache

import numpy as np

from eval.cells import FORMAT, TURNS
from eval.suites import BLIND, SuiteRows
from libra.identity import digest, row_identity

RUN = {"checkpoint": {"sha256": "w"}, "limit": None, "dtype": "float32", "code": {"libra": "c"}}
ORIGIN = {
    "commit": "abc",
    "versions": {"python": "3", "torch": "2"},
    "date": "2026-01-01T00:00:00+00:00",
    "command": "python -m eval.run --table 1",
    "machine": {"cpu": "A CPU", "cores": 2, "device": "cpu", "processes": 2, "batch_size": 32},
}
rows = cache(SuiteRows)


def stored(table, row: str, task: str, answers: list[float], suite: str = "mini", run=RUN, **more) -> dict:
    """A finished cell of a row of ``table`` as its file is; ``more`` are keys to set otherwise."""
    own = {"turns": {}} if row == TURNS else {**row_identity(rows(table, suite)[row]), "blind": row == BLIND}
    p = float(np.mean(answers))
    cell = {
        "format": FORMAT,
        "suite": suite,
        "row": row,
        "task": task,
        "checkpoint": None,
        "status": "ok",
        "score": 100 * p,
        "stderr": 100 * (p * (1 - p) / len(answers)) ** 0.5,
        "n": len(answers),
        "correct": answers,
        "groups": {},
        "trace": [],
        "tokens_per_layer": [256.0] * 12,
        "seconds": 3.0,
        **ORIGIN,
        "settings": {
            "row": own,
            "task": {"name": task, "sha256": None},
            "data": {"sha256": "feed"},
            "run": run,
        },
        **more,
    }
    return {**cell, "config_hash": digest(cell["settings"])}


def share(percent: int, n: int = 100) -> list[float]:
    return [1.0] * (percent * n // 100) + [0.0] * (n - percent * n // 100)
