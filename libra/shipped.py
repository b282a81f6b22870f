"""What comes with the package, by name: table rows (`llava7b_r50`, `mini/table3/libra_r50`) and the embedded
model (`mini`).

In the repository they lie in `configs/` and `mini/checkpoint/`; setup.py copies them into the package.
"""

from functools import cache
from pathlib import Path

from .utils.names import spelled
from .utils.provenance import REPOSITORY
from .utils.sentences import ConfigError, did_you_mean, show

_PACKAGE = Path(__file__).resolve().parent


def _folder(inside: str, above: str) -> Path:
    """A folder of the installed package, else the repository's."""
    return _PACKAGE / inside if (_PACKAGE / inside).is_dir() else REPOSITORY / above


CONFIGS = _folder("configs", "configs")
EMBEDDED = _folder("mini/checkpoint", "mini/checkpoint")


@cache
def rows() -> dict[str, Path]:
    """Name → file of every shipped row. The name is the path below configs/, without .yaml."""
    return {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))
    }


def row(name: str) -> Path:
    """The file of a shipped row. Raises ConfigError for another name."""
    found = spelled(name, rows())
    if found is None:
        hint = (
            did_you_mean(str(name), rows())
            or f" the names are {', '.join(list(rows())[:3])} …, the files of configs/"
        )
        raise ConfigError(f"{show(name)} is not the name of a row;{hint}")
    return rows()[found]


def find_row(given: str | Path) -> tuple[Path, str]:
    """The file that a user means, and what to call it: a path, else the name of a shipped row, which may also
    be written as `configs/NAME.yaml`. Raises ConfigError where there is neither.
    """
    path = Path(given)
    try:
        if path.exists():
            return path, str(given)
    except (OSError, ValueError):  # a name too long, or with a zero byte: whoever opens it says so
        return path, str(given)
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    found = spelled(name, rows())
    if found is None:
        beside = [other.name for other in path.parent.glob("*.yaml")]
        hint = did_you_mean(path.name, beside) or did_you_mean(name, rows()) or " check the path"
        raise ConfigError(f"{path}: there is no such file, and no row of that name;{hint}")
    return rows()[found], found
