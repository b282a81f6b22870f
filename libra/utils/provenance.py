"""Where a measurement comes from: machine, versions, commit."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = "docs/results"


def machine() -> dict:
    """Processor model and the cores this process may use; no names, no paths."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    return {"cpu": model, "cores": cores()}


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of packages, "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with ``-dirty`` where :func:`changes` are; ``unknown`` outside git."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changes() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def changes() -> list[str]:
    """The files that are not as the checkout's commit has them, new ones too. Those of :data:`PUBLISHED` do
    not count, for publishing one table must not stop the next. Raises OSError or CalledProcessError outside
    git."""
    lines = _git(
        "status", "--porcelain", "--untracked-files=all", "--", ".", f":(exclude){PUBLISHED}"
    ).splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


def require_clean() -> None:
    """Raises ValueError, for what is to be published, unless the checkout is exactly its commit."""
    try:
        changed = changes()
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            "what is published names its commit, and this is not a git checkout: publish from one"
        ) from None
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            "what is published names its commit, and this checkout differs from it "
            f"({', '.join(changed[:3])}{more}): commit the changes or put them aside, then run the same "
            "command again"
        )


def _git(*arguments: str) -> str:
    if not (REPOSITORY / ".git").exists():  # an installed package may lie in somebody else's checkout
        raise FileNotFoundError(f"{REPOSITORY} is not a git checkout")
    run = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()
