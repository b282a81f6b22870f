"""Runs of the training command on two processes of this machine, for tests: as a launcher starts them,
without its imports.

A server process imports everything once and forks the processes; what they are told is what torchrun tells
its own.
"""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["llava.train.recipe", "deepspeed"])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _train(rank: int, port: str, said: str, flags: list[str], prepare: Callable[[], None] | None) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # another ninja builds anew
    )
    from llava.train.train import main

    if prepare is not None:
        prepare()
    main(flags)


@contextmanager
def started(
    output: Path, flags: list[str], prepare: Callable[[], None] | None = None
) -> Iterator[list[BaseProcess]]:
    """Two processes that train with ``flags``; what they say goes to a file next to ``output``. Killed when
    left.

    ``prepare``, a function of a module, is called first in each of them.
    """
    port, said = free_port(), str(output.with_suffix(".log"))
    processes = [CONTEXT.Process(target=_train, args=(rank, port, said, flags, prepare)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def train(output: Path, flags: list[str], prepare: Callable[[], None] | None = None) -> list[dict]:
    """Train to the end; gives the log."""
    with started(output, flags, prepare) as processes:
        pending = {process.sentinel: process for process in processes}
        while pending:
            ended = [pending.pop(sentinel) for sentinel in wait(list(pending), timeout=300)]
            for process in ended:
                process.join()
            good = ended and not any(process.exitcode for process in ended)
            assert good, output.with_suffix(".log").read_text()[-3000:]
    return json.loads((output / "trainer_state.json").read_text())["log_history"]
