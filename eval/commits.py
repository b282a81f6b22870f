"""Which commit computed a cell: what is published must be of one."""

from collections.abc import Sequence

from libra.utils.provenance import commit, require_clean

from .cells import code


def commits(cells: Sequence[dict]) -> list[str]:
    """Each cell's commit. A cell of an edited checkout whose code is that of the commit that is here now, to
    the statement, is that commit's: what was edited then took no part in it."""
    here, now = None, ""
    if not all(map(is_commit, (cell["commit"] for cell in cells))) and is_commit(commit()):
        here, now = code(), commit()
    return [now if cell["settings"]["run"]["code"] == here else cell["commit"] for cell in cells]


def is_commit(label: str) -> bool:
    """Whether :func:`libra.utils.provenance.commit` named a commit and nothing that was edited after it."""
    return label != "unknown" and not label.endswith("-dirty")


def require_commits(cells: Sequence[dict]) -> None:
    """Raises ValueError unless the checkout is clean and so was that of every cell."""
    require_clean()
    others = [cell for cell, label in zip(cells, commits(cells)) if not is_commit(label)]
    if others:
        name = "{suite}.{row}.{task}".format_map(others[0])
        raise ValueError(
            f"{len(others)} of {len(cells)} cells were computed in an edited checkout, {name} at "
            f"{others[0]['commit']}, and their code is not this commit's: run eval.run, which computes them "
            "again, then publish"
        )
