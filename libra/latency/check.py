"""Whether the speed is still what it was: counts and bytes exactly, time ratios within a margin, against
committed figures.

The slice is wide and short enough to be bound by its matrix products, so that the ratio of two CPU times is
nearly that of their operations and hardly depends on the processor. Absolute times are never compared.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import Compression
from ..rows import ModelSpec
from ..utils.files import write_json
from ..utils.provenance import machine, versions
from ..utils.timing import one_thread, paired_ratio, run_warm_in_turns
from .bench import Bench, Prompt
from .operations import of_prefill
from .random_weights import random_model

EXPECTED = Path(__file__).with_name("expected.json")
UPDATE = "python -m libra.latency --check --update"
MARGIN = 0.15  # of a time ratio
PAIRS = 5
SLICE = ModelSpec(
    name="slice",
    layers=4,
    hidden_size=1024,
    intermediate_size=2816,
    kv_size=1024,
    visual_tokens=(576,),
    checkpoint="",
)
METHODS = {
    "libra": Compression(method="libra", layers=(0, 1, 2), ratio=0.5),
    "fastv": Compression(method="fastv", layers=(0,), ratio=0.5),
}
COUNTS = {
    "operations": "multiply-accumulates",
    "cache_bytes": "bytes of the KV cache",
    "memory_bytes": "peak bytes",
    "queued": "queued tensor operations",
}
OF_TORCH = ("memory_bytes", "queued")  # what another version of torch may count otherwise


def benches() -> dict[str, Bench]:
    """The slice under each method, on one model: float32, random weights, 576 visual and 64 text tokens."""
    model = random_model(SLICE, SLICE.layers, torch.float32)
    return {name: Bench(model, c, Prompt(SLICE.visual_tokens[0])) for name, c in METHODS.items()}


def count(made: dict[str, Bench]) -> dict[str, dict[str, int]]:
    """Operations, cache bytes and peak bytes: one layer's in ``vanilla``, compression's in each method; and
    how many operations a prefill queues, those of ``vanilla`` and what each method adds to them."""
    figures = {}
    first = next(iter(made.values()))
    plain, queued = first.count(False), of_prefill(first, False).operations.total()
    figures["vanilla"] = {
        "operations": plain.operations,
        "cache_bytes": plain.cache,
        "memory_bytes": plain.layer,
        "queued": queued,
    }
    for name, bench in made.items():
        counted = bench.count(True)
        figures[name] = {
            "operations": counted.operations,
            "cache_bytes": counted.cache,
            "memory_bytes": counted.peak,
            "queued": of_prefill(bench, True).operations.total() - queued,
        }
    return figures


def _cpu_seconds(bench: Bench) -> float:
    return bench.run(True).prefill.cpu


def time_ratios(made: dict[str, Bench], pairs: int = PAIRS, progress: bool = True) -> dict[str, float]:
    """The median, over runs in turns, of each method's CPU time over the plain model's, on the threads that
    are set."""
    plain = next(iter(made.values()))
    ways: dict[str, Callable[[], float]] = {
        "vanilla": lambda: plain.run(False).prefill.cpu,
        **{name: partial(_cpu_seconds, bench) for name, bench in made.items()},
    }
    total = (pairs + 1) * len(ways)
    with tqdm(total=total, desc="timing", unit=" prefills", disable=not progress) as bar:
        times = run_warm_in_turns(ways, pairs, lambda _: bar.update())
    return {name: paired_ratio(times, name, "vanilla").median for name in made}


def same_torch(expected: dict) -> bool:
    """Whether the committed figures were counted with this version of torch."""
    return versions(("torch",))["torch"] == expected["versions"]["torch"]


def count_deviations(found: dict[str, dict[str, int]], expected: dict) -> list[str]:
    """One line for each of ``count``'s figures that is not the committed one; what another version of torch
    counts otherwise is left out where the committed ones are another version's."""
    lines = []
    left_out = () if same_torch(expected) else OF_TORCH
    for mode, figures in found.items():
        for name, value in figures.items():
            before = expected["counts"][mode][name]
            if value != before and name not in left_out:
                lines.append(
                    f"{mode}: {value:,} {COUNTS[name]}, committed {before:,} ({value / before - 1:+.2%})"
                )
    return lines


def time_deviations(found: dict[str, float], expected: dict[str, float]) -> dict[str, str]:
    """A line for each method whose time ratio left the margin."""
    return {
        name: f"{name}: {ratio:.3f} of the plain prefill's CPU time, committed {expected[name]:.3f}"
        f" ({ratio / expected[name] - 1:+.0%}, margin {MARGIN:.0%})"
        for name, ratio in found.items()
        if abs(ratio / expected[name] - 1) > MARGIN
    }


def read(path: Path = EXPECTED) -> dict:
    """The committed figures. ValueError where there are none that can be read."""
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        complete = (
            all(
                name in expected["time_ratios"] and expected["counts"][name].keys() == COUNTS.keys()
                for name in METHODS
            )
            and expected["counts"]["vanilla"].keys() == COUNTS.keys()
            and "torch" in expected["versions"]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{path.name} is missing or damaged; write it with {UPDATE}")
    return expected


def check(update: bool = False, path: Path = EXPECTED, progress: bool = True) -> int:
    """The command: prints what was compared; 0, or 1 where anything deviates. With ``update`` writes the
    figures instead.

    Raises:
        ValueError: if the committed figures cannot be read.
    """
    expected = None if update else read(path)
    with one_thread():
        made = benches()
        counts = count(made)
        ratios = time_ratios(made, progress=progress)
        if not update:
            slow = time_deviations(ratios, expected["time_ratios"])
            if slow:  # a busy machine's fault, unless it happens twice
                again = time_ratios({name: made[name] for name in slow}, progress=progress)
                ratios |= again
                slow = time_deviations(again, expected["time_ratios"])
    if update:
        figures = {
            "written_by": UPDATE,
            "cpu": machine()["cpu"],
            "versions": versions(("torch", "transformers")),
            "counts": counts,
            "time_ratios": ratios,
        }
        write_json(path, figures)
        print(f"{path.name}: written")
        return 0
    if not same_torch(expected):
        print(
            "note: peak bytes and queued operations are not compared, they were counted with another torch, "
            f"{expected['versions']['torch']}"
        )
    deviations = count_deviations(counts, expected) + list(slow.values())
    for line in deviations:
        print(line)
    if deviations:
        print(f"{len(deviations)} deviation(s); if they are meant: {UPDATE}")
        return 1
    print(
        "operations and bytes as committed; CPU time over the plain model's: "
        + ", ".join(
            f"{name} {ratio:.3f} (committed {expected['time_ratios'][name]:.3f})"
            for name, ratio in ratios.items()
        )
    )
    return 0
