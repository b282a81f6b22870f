"""Where compression's own time goes: the named ranges that it marks, read from torch's profiler."""

import os
from statistics import median

from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from .bench import Bench

PARTS = {  # record_function ranges, none within another, and what a table calls them
    "score": "score row",
    "select": "choice of targets",
    "similarity": "similarity",
    "merge": "merging",
    "gather": "moving what is kept",
    "layout": "host tables",
}


def seconds_by_part(events, on_device: bool) -> dict[str, float]:
    """Seconds of each part that the events name, summed over the compression layers.

    On a GPU a part's time is from its first kernel to its last one there; where the profiler has no such
    span, its kernels' own time.
    """
    host: dict = {}
    spans: dict = {}
    kernels: dict = {}
    for event in events:
        part = event.name.removeprefix("libra.")
        if part == event.name or part not in PARTS:
            continue
        on_host = event.device_type == DeviceType.CPU
        times = host if on_host else spans
        times[part] = times.get(part, 0.0) + event.time_range.elapsed_us() / 1e6
        if on_host and on_device:
            kernels[part] = kernels.get(part, 0.0) + event.device_time_total / 1e6
    return {part: spans.get(part, kernels[part]) for part in host} if on_device else host


def profile_parts(bench: Bench, runs: int) -> dict:
    """Medians over ``runs`` compressed prefills under the profiler, each against its own length, which the
    profiler adds to.

    Returns ``seconds`` of each part, their ``sum``, the ``prefill`` and the sum's ``share`` of it; ``shares``
    of each part; on a GPU ``host_seconds`` of each part too, the time to queue its work.

    Raises:
        ValueError: if the prefill marks no range at all.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would tell the terminal when it starts
    on_device = bench.device.type == "cuda"
    seen, host, prefills = [], [], []
    for _ in range(runs):
        with bench.mode(True):
            if bench.pictures:
                bench.see()
            with profile(use_device="cuda" if on_device else None, use_kineto=True) as profiler:
                _, seconds = bench.prefill()
        seen.append(seconds_by_part(profiler.function_events, on_device))
        host.append(seconds_by_part(profiler.function_events, False))
        prefills.append(seconds.wall)
    names = [part for part in PARTS if part in seen[0]]
    if not names:
        raise ValueError(
            f"the compressed prefill marks none of the ranges {', '.join(f'libra.{part}' for part in PARTS)}"
        )
    sums = [sum(parts.values()) for parts in seen]
    result = {
        "runs": runs,
        "seconds": {part: median(run[part] for run in seen) for part in names},
        "shares": {
            part: median(run[part] / prefill for run, prefill in zip(seen, prefills)) for part in names
        },
        "sum": median(sums),
        "prefill": median(prefills),
        "share": median(total / prefill for total, prefill in zip(sums, prefills)),
    }
    if on_device:
        result["host_seconds"] = {part: median(run[part] for run in host) for part in names}
    return result
