"""Worker processes that each take one cell after another; the death of one costs the cell it had in hand."""

import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from .cells import Cell
from .checkpoints import CheckpointError

Evaluate = Callable[[Cell, Callable[[int], None]], dict]


class PoolError(RuntimeError):
    """No worker can be started; the message says why."""


def run_cells(
    cells: Sequence[Cell],
    factory: Callable[..., Evaluate],
    settings,
    devices: Sequence[str],
    log_folder: Path,
    on_samples: Callable[[Cell, int], None],
    on_result: Callable[[Cell, dict], None],
) -> None:
    """Evaluate all cells with one worker for each of ``devices``, which may name one more than once.

    Each worker makes ``factory(settings)`` once, with its own device in the settings, and calls it with each
    cell it is given. on_samples hears of finished samples while a cell is computed, on_result of its result,
    which for a cell that raised or whose worker died is ``{"status": "failed", "reason": …}``. A dead worker
    is replaced. What workers print goes to files in ``log_folder``. Raises PoolError where a worker cannot
    even start, or a checkpoint does not load.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    for old in log_folder.glob("worker-*.log"):
        old.unlink()
    pool = _Pool(deque(cells), factory, settings, log_folder, on_samples, on_result)
    try:
        for device, _ in zip(devices, list(cells)):
            pool.start(device)
        while pool.workers:
            for connection in wait(list(pool.workers)):
                pool.hear(connection)
    finally:
        pool.end()


@dataclass
class _Pool:
    """workers: our end of a worker's pipe → its process and its device; at_work: the cell that each has."""

    waiting: deque[Cell]
    factory: Callable[..., Evaluate]
    settings: object
    log_folder: Path
    on_samples: Callable[[Cell, int], None]
    on_result: Callable[[Cell, dict], None]
    workers: dict[Connection, tuple] = field(default_factory=dict)
    at_work: dict[Connection, Cell] = field(default_factory=dict)
    started: int = 0

    def start(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = str(self.log_folder / f"worker-{self.started}.log")
        given = (theirs, self.factory, replace(self.settings, device=device), log, os.getpid())
        process = context.Process(target=_work, args=given, daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = process, device
        self.started += 1

    def hear(self, connection: Connection) -> None:
        """One message of a worker, or its end; a worker with nothing to do gets the next cell."""
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            self._bury(connection)
            return
        if kind == "samples":
            self.on_samples(self.at_work[connection], value)
            return
        if kind == "broken":
            raise PoolError(value)
        if kind == "result":
            self.on_result(self.at_work.pop(connection), value)
        if self.waiting:
            self.at_work[connection] = self.waiting.popleft()
            connection.send(self.at_work[connection])
        else:
            connection.send(None)

    def _bury(self, connection: Connection) -> None:
        """A worker has ended: its cell has failed, and another worker takes its place where cells wait."""
        process, device = self.workers.pop(connection)
        process.join()
        connection.close()
        if (cell := self.at_work.pop(connection, None)) is not None:
            reason = f"the worker process died ({_died(process.exitcode)})"
            self.on_result(cell, {"status": "failed", "reason": reason})
        elif process.exitcode:
            raise PoolError(f"a worker process died while starting ({_died(process.exitcode)})")
        if len(self.workers) < len(self.waiting):
            self.start(device)

    def end(self) -> None:
        for process, _ in self.workers.values():
            process.terminate()
        for process, _ in self.workers.values():
            process.join()


def _died(exitcode: int) -> str:
    return f"signal {-exitcode}" if exitcode < 0 else f"exit status {exitcode}"


def _work(connection: Connection, factory: Callable[..., Evaluate], settings, log: str, parent: int) -> None:
    """The body of a worker process."""
    with open(log, "w", buffering=1) as file:  # also for what libraries print below Python
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)

    def on_samples(number: int) -> None:
        if (
            os.getppid() != parent
        ):  # the runner was killed: its successor wants the processor and the sample file
            os._exit(1)
        connection.send(("samples", number))

    try:
        evaluate = factory(settings)
    except Exception as error:
        traceback.print_exc()
        connection.send(("broken", _sentence(error)))
        return
    connection.send(("ready", None))
    try:
        while (cell := connection.recv()) is not None:
            try:
                result = evaluate(cell, on_samples)
            except CheckpointError as error:
                traceback.print_exc()
                connection.send(("broken", _sentence(error)))
                return
            except Exception as error:
                traceback.print_exc()
                result = {"status": "failed", "reason": _sentence(error)}
            connection.send(("result", result))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass


def _sentence(error: BaseException) -> str:
    """One line for a table; the whole traceback is in the worker's log. This project's own errors speak for
    themselves."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"
