"""A table with real workers that is killed at random moments loses nothing and ends as the table that nobody
disturbed."""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.cells import read_cells

ROOT = Path(__file__).resolve().parent.parent
KILLS, SEED = 30, 20_261_126
TASKS = ("reading", "position", "attribute", "yes_no")
TIMES = {"seconds", "date", "reused_from"}  # keys of a cell that no two runs share


def command(output: Path, benchmark: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "eval.run",
        "--table",
        "1",
        "--rows",
        "vanilla,r50,fastv,blind",
        "--tasks",
        ",".join(TASKS),
        "--limit",
        "40",
        "--batch-size",
        "4",
        "--processes",
        "2",
        "--device",
        "cpu",
        "--output",
        str(output),
        "--benchmark",
        str(benchmark),
    ]


def answers(output: Path) -> dict[tuple, str]:
    """(file, document) → the finished answer, of all whole lines of the sample logs."""
    found = {}
    for path in (output / "samples").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            found[path.name, record["doc_id"]] = record["answer"]
    return found


def cells(output: Path) -> dict[str, dict]:
    """The finished cells, without times."""
    found = {
        name: cell for name, cell in read_cells(output).items() if cell is not None and cell["status"] == "ok"
    }
    return {
        name: {key: value for key, value in cell.items() if key not in TIMES} for name, cell in found.items()
    }


def table(output: Path) -> dict[str, object]:
    """The table's files without dates and seconds."""
    text = (output / "table1.md").read_text()
    text = re.sub(r"^- date: .*$", "", text, flags=re.MULTILINE)
    lines = list(csv.DictReader(io.StringIO((output / "table1.csv").read_text())))
    tex = (output / "table1.tex").read_text()
    return {
        "md": re.sub(r"\| \d+ \|$", "|", text, flags=re.MULTILINE),
        "png": (output / "table1.png").read_bytes(),
        "csv": [{**line, "seconds": ""} for line in lines],
        "tex": re.sub(r"& \d+ \\\\$", "", tex, flags=re.MULTILINE),
    }


class Killed:
    """A run that is started again after each kill."""

    def __init__(self, words: list[str], output: Path, start_seconds: float):
        self.words, self.output, self.start_seconds = words, output, start_seconds
        self.random = random.Random(SEED)
        self.runner: subprocess.Popen | None = None
        self.counts = dict.fromkeys(("runner", "all", "worker", "finished before"), 0)

    def kill(self) -> None:
        """One kill -9 at a random moment: while it starts, or while it computes; of the runner, a worker, or
        all of them."""
        if self.runner is None or self.runner.poll() is not None:
            self.runner = subprocess.Popen(
                self.words,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        if self.random.random() < 0.3:
            self._wait(lambda: False, self.random.uniform(0, self.start_seconds))
        else:
            before = len(answers(self.output))
            self._wait(lambda: len(answers(self.output)) > before, 600)
            self._wait(lambda: False, self.random.uniform(0, 2))
        what = self.random.choice(("runner", "all", "worker"))
        workers = children(self.runner.pid)
        if what == "worker" and not workers:
            what = "runner"
        if self.runner.poll() is not None:
            what = "finished before"
        self.counts[what] += 1
        if what == "worker":
            os.kill(self.random.choice(workers), signal.SIGKILL)
        elif what == "runner":  # its orphaned workers leave by themselves
            self.runner.kill()
            self.runner.wait()
        elif what == "all":
            os.killpg(self.runner.pid, signal.SIGKILL)
            self.runner.wait()

    def _wait(self, ready, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.runner.poll() is None and not ready() and time.monotonic() < end:
            time.sleep(0.02)


def children(parent: int) -> list[int]:
    """The workers of a runner; multiprocessing's own resource tracker is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found += (
                    [int(path.parent.name)] if b"spawn_main" in (path.parent / "cmdline").read_bytes() else []
                )
        except OSError:  # it has just ended
            pass
    return found


@pytest.mark.soak
def test_thirty_kills_lose_nothing_and_change_no_byte_of_the_table(tmp_path):
    benchmark = tmp_path / "benchmark"
    whole, output = (
        tmp_path / "whole" / "table1",
        tmp_path / "killed" / "table1",
    )  # apart, so that no cell is reused
    started = time.monotonic()
    undisturbed = subprocess.Popen(
        command(whole, benchmark), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while undisturbed.poll() is None and not answers(whole):
        time.sleep(0.05)
    start_seconds = time.monotonic() - started
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    expected = answers(whole)
    assert len(expected) == 4 * len(TASKS) * 40

    killed = Killed(command(output, benchmark), output, min(start_seconds, 60))
    kept, finished = {}, {}
    progress = []
    for _ in range(KILLS):
        killed.kill()
        now, done = answers(output), cells(output)
        assert (
            kept.items() <= now.items() and finished.items() <= done.items()
        )  # nothing that was finished is lost or changed
        kept, finished = now, done
        progress.append(len(now))
    if killed.runner.poll() is None:
        os.killpg(killed.runner.pid, signal.SIGKILL)
        killed.runner.wait()
    print(
        f"kills: {killed.counts}; answers after each kill: {progress}; seconds:"
        f" {time.monotonic() - started:.0f}"
    )
    # A worker that was killed left a failed cell, whose exit status is 1 in the run that saw it; this one
    # sees none.
    last = subprocess.run(command(output, benchmark), cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert answers(output) == expected and len(cells(output)) == 16
    assert cells(output) == cells(whole)
    assert table(output) == table(whole)
    assert not list(output.glob(".*.tmp")) and not list((output / "cells").glob(".*.tmp"))
