"""Worker processes that each take one cell after another; the death of one costs the cell it had in hand."""

import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
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
    context = multiprocessing.get_context("spawn")
    waiting = deque(cells)
    workers: dict[Connection, tuple] = {}  # our end of a worker's pipe → its process and its device
    at_work: dict[Connection, Cell] = {}

    numbers = count()

    def start(device: str) -> None:
        ours, theirs = context.Pipe()
        log = log_folder / f"worker-{next(numbers)}.log"
        own = replace(settings, device=device)
        process = context.Process(
            target=_work, args=(theirs, factory, own, str(log), os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        workers[ours] = process, device

    for old in log_folder.glob("worker-*.log"):
        old.unlink()
    try:
        for device, _ in zip(devices, list(waiting)):
            start(device)
        while workers:
            for connection in wait(list(workers)):
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    process, device = workers.pop(connection)
                    process.join()
                    connection.close()
                    if (cell := at_work.pop(connection, None)) is not None:
                        on_result(
                            cell,
                            {
                                "status": "failed",
                                "reason": f"the worker process died ({_died(process.exitcode)})",
                            },
                        )
                    elif process.exitcode:
                        raise PoolError(
                            f"a worker process died while starting ({_died(process.exitcode)})"
                        ) from None
                    if len(workers) < len(waiting):
                        start(device)
                    continue
                if kind == "samples":
                    on_samples(at_work[connection], value)
                    continue
                if kind == "broken":
                    raise PoolError(value)
                if kind == "result":
                    on_result(at_work.pop(connection), value)
                if waiting:
                    at_work[connection] = waiting.popleft()
                    connection.send(at_work[connection])
                else:
                    connection.send(None)
    finally:
        for process, _ in workers.values():
            process.terminate()
        for process, _ in workers.values():
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
