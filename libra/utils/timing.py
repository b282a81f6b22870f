"""Things timed against each other: in turns within one run, so that a busy minute of the machine hits all."""

import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple, TypeVar

import torch

Mode = TypeVar("Mode")
Result = TypeVar("Result")


class Moment(NamedTuple):
    """Seconds on the wall clock and of this process's CPU time, which other processes on the machine do not
    lengthen."""

    wall: float
    cpu: float

    def since(self, start: "Moment") -> "Moment":
        return Moment(self.wall - start.wall, self.cpu - start.cpu)


def now(device: torch.device) -> Moment:
    """The moment when everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Moment(perf_counter(), process_time())


BUSY = "the machine was busy, these times mean nothing"
ROOM = 1.15  # how much longer than its CPU time a run may take, against the run that waited least


def was_busy(runs: Sequence[Moment]) -> bool:
    """Whether others had the processor while these runs were timed on it: wall and CPU time disagree.

    Of a run that has its threads' cores to itself the wall clock shows a fixed share of the CPU time, at most
    all of it. Busy is a machine where half of the runs took :data:`ROOM` times as long by that measure as the
    one that waited least, or where that one was off its core for as much.
    """
    shares = [run.wall / max(run.cpu, 1e-9) for run in runs]
    return bool(shares) and (median(shares) > ROOM * min(shares) or min(shares) > ROOM)


def in_order(number: int, modes: Sequence[Mode]) -> Sequence[Mode]:
    """The modes in the order of round ``number``: every other round goes backwards, so that a slow drift
    favours no mode."""
    return modes if number % 2 == 0 else modes[::-1]


def run_in_turns(
    ways: Mapping[Mode, Callable[[], Result]],
    rounds: int,
    after_each: Callable[[Mode], object] = lambda mode: None,
) -> list[dict[Mode, Result]]:
    """Run every way once in each round, see :func:`in_order`; of each round mode → result.

    ``after_each`` is called with the mode after every run, such as to move a bar.
    """
    results: list[dict[Mode, Result]] = [{} for _ in range(rounds)]
    for number, result in enumerate(results):
        for mode in in_order(number, list(ways)):
            result[mode] = ways[mode]()
            after_each(mode)
    return results


def run_warm_in_turns(
    ways: Mapping[Mode, Callable[[], Result]],
    rounds: int,
    after_each: Callable[[Mode], object] = lambda mode: None,
) -> list[dict[Mode, Result]]:
    """:func:`run_in_turns` after one round more, which does not count: the first call of a kind pays for what
    later ones have."""
    return run_in_turns(ways, rounds + 1, after_each)[1:]


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which torch computes on a single thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Interval:
    """A median with an interval between two of the sorted values; ``coverage`` is the probability that it
    holds the truth."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: list[float], level: float = 0.95) -> Interval:
    """The median and its order-statistic interval: exact for independent values of whatever distribution.

    The interval from the k-th smallest to the k-th largest of n misses the true median with probability
    2·P(Bin(n, ½) < k); k is the largest for which it covers ``level``. Fewer than six values cannot cover
    95%: then it is all of them, and ``coverage`` is smaller.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= level), default=1)
    return Interval(median(ordered), ordered[k - 1], ordered[-k], max(0.0, coverage(k)))


def paired_ratio(rounds: Sequence[Mapping[Mode, float]], mode: Mode, base: Mode) -> Interval:
    """The median over the rounds of one mode's figure over another's, and its interval."""
    return median_interval([figures[mode] / figures[base] for figures in rounds])


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated on a GPU, or resident in this process on a CPU, while ``run`` runs.

    Where the system cannot forget the process's earlier peak (it is not Linux), that counts too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the resident size
        run()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except OSError:
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None
