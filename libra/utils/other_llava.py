"""Is the ``llava`` that Python finds this project's? The original LLaVA installs a package of the same
name."""

import warnings
from importlib.util import find_spec
from pathlib import Path

MARK = "libra-merging"  # stands in our llava/__init__.py


def warn_if_llava_is_another() -> None:
    """Warn (RuntimeWarning) where ``import llava`` finds, or has found, another package than ours; nothing is
    imported.

    The file's text decides, not its place: installed without ``-e``, two packages of one name share a folder,
    the later wins.
    """
    try:
        spec = find_spec("llava")
    except ValueError:  # somebody put a bare module into sys.modules
        spec = None
    if spec is None:
        return
    found = Path(spec.origin) if spec.origin else None
    if found is not None and found.is_file() and MARK in found.read_text(encoding="utf-8", errors="replace"):
        return
    where = (
        found.parent
        if found is not None
        else next(iter(spec.submodule_search_locations or []), "an unknown place")
    )
    warnings.warn(
        f"`import llava` finds the package at {where}, not the one of libra-merging, so compression and the "
        f"embedded model will not work: put {Path(__file__).resolve().parents[2]} first on PYTHONPATH, or "
        "uninstall the other llava.",
        RuntimeWarning,
        stacklevel=2,
    )
