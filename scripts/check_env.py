"""Does this Python have the packages that setup.py asks for? ``python scripts/check_env.py [EXTRA …]``

Prints the interpreter's path and exits with 0, or says on stderr what is missing and exits with 1.
"""

import runpy
import sys
from importlib import metadata
from pathlib import Path


def missing(extras: list[str]) -> list[str]:
    """The requirements of the core and the named extras that the installed packages do not meet; nothing is imported."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever python is on PATH runs this
        return ["python>=3.11"]
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["packaging"]
    setup = runpy.run_path(str(Path(__file__).resolve().parents[1] / "setup.py"), run_name="setup")
    lacking = []
    for line in [*setup["CORE"], *(line for extra in extras for line in setup["EXTRAS"][extra])]:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # not for this system
        try:
            met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met and line not in lacking:
            lacking.append(line)
    return lacking


if __name__ == "__main__":
    lacking = missing(sys.argv[1:])
    if lacking:
        sys.exit(f"{sys.executable} lacks {', '.join(lacking)}")
    print(sys.executable)
