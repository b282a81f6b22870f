"""A control: Libra-Merging's choice of targets (§3.2) without its merging (§3.3)."""

from .registry import Method

METHOD = Method(
    "windowed-fastv",
    description="the most important token of each interval; the rest is dropped (a control)",
    section="§3.2 without §3.3",
    keys={"select": "intervals", "merge": "drop"},
    family="intervals",
)
