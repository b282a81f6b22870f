"""Stand-ins for the harness. A module of its own, without torch, because every spawned worker imports it."""

import errno
import os
import signal
from pathlib import Path


def stand_in(settings):
    """Answers cells by their row's name; every call leaves a mark, so that a test can count them."""

    def evaluate(cell, on_samples):
        (Path(settings.output) / "calls").mkdir(exist_ok=True)
        with open(Path(settings.output) / "calls" / cell.name, "a") as file:
            file.write("x")
        on_samples(2)
        (Path(settings.output) / "devices").mkdir(exist_ok=True)
        (Path(settings.output) / "devices" / cell.name).write_text(settings.device)
        if cell.row == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if cell.row == "raises":
            raise ValueError("no such thing\nsecond line")
        if cell.row == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        print("chatter of a library")
        on_samples(2)
        figures = {"score": 50.0, "stderr": 25.0, "n": 4, "correct": [1.0, 0.0, 1.0, 0.0]}
        return {
            "status": "ok",
            **figures,
            "tokens_per_layer": [4.0],
            "groups": {},
            "trace": [],
            "seconds": 1.0,
        }

    return evaluate


def broken(settings):
    raise RuntimeError("the model does not load")


def ratio_as_score(settings):
    """Answers with the ratio of the row that the worker was given."""

    def evaluate(cell, on_samples):
        on_samples(4)
        figures = {"score": 100 * cell.spec.compression.ratio, "stderr": None, "n": 4, "correct": None}
        return {
            "status": "ok",
            **figures,
            "tokens_per_layer": None,
            "groups": {},
            "trace": [],
            "seconds": 1.0,
        }

    return evaluate
