"""Counters in Prometheus' text format."""

import threading
from collections import Counter

EDGES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds, of the histograms
_COUNTERS = {
    "requests_total": "Requests for an answer, by HTTP status.",
    "disconnects_total": "Requests whose client left before its answer was whole.",
    "prompt_tokens_total": "Tokens of the prompts, visual ones included.",
    "generated_tokens_total": "Tokens of the answers.",
    "visual_tokens_total": "Visual tokens of the prompts, before compression.",
    "visual_tokens_average_total": "Visual tokens that an average layer computed.",
}
_GAUGES = {
    "held": "Requests that were let in and have no whole answer yet.",
    "running": "Requests that are being answered, of those that are held.",
}
_SECONDS = {
    "first_token_seconds": "From a request's arrival to its first token.",
    "request_seconds": "From a request's arrival to the end of its answer.",
}


class Metrics:
    """Counts from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._times = {name: [0] * (len(EDGES) + 1) for name in _SECONDS}
        self._sums = dict.fromkeys(_SECONDS, 0.0)

    def add(self, name: str, amount: int = 1, labels: str = "") -> None:
        """Count one of ``_COUNTERS``, or move one of ``_GAUGES``; ``labels`` as in ``status="200"``."""
        with self._lock:
            self._counts[name, labels] += amount

    def took(self, name: str, seconds: float) -> None:
        """Put a time into one of the histograms."""
        with self._lock:
            self._times[name][sum(seconds > edge for edge in EDGES)] += 1
            self._sums[name] += seconds

    def text(self) -> str:
        """All of them, as Prometheus reads them."""
        with self._lock:
            counts, times, sums = (
                dict(self._counts),
                {k: list(v) for k, v in self._times.items()},
                dict(self._sums),
            )
        lines = []
        for kind, names in (("counter", _COUNTERS), ("gauge", _GAUGES)):
            for name, about in names.items():
                found = {labels: n for (own, labels), n in sorted(counts.items()) if own == name} or {"": 0}
                lines += _head(name, about, kind)
                lines += [
                    f"libra_{name}{f'{{{labels}}}' if labels else ''} {n:g}" for labels, n in found.items()
                ]
        for name, about in _SECONDS.items():
            lines += _head(name, about, "histogram")
            total = 0
            for edge, n in zip((*EDGES, "+Inf"), times[name]):
                total += n
                lines.append(f'libra_{name}_bucket{{le="{edge}"}} {total}')
            lines += [f"libra_{name}_sum {sums[name]:.6f}", f"libra_{name}_count {total}"]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP libra_{name} {about}", f"# TYPE libra_{name} {kind}"]
