"""Can this Python run the project? ``python scripts/check_env.py [EXTRA …]``, with extras of setup.py.

The environment is tried, not compared: scripts/try_env.py imports what the extras need and answers one
question with compressed visual tokens. Before that only what is missing or too old is looked for; a package
newer than setup.py's ranges is tried as well. Prints the interpreter's path and exits with 0, or prints one
sentence that names the package and why and exits with 1.

.env_checked.jsonl, next to setup.py, remembers the outcome, so that the next call takes no half minute. It is
forgotten when a package comes, goes or changes its version, with another Python, other requirements or
another PYTHONPATH.
"""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REMEMBERED = ROOT / ".env_checked.jsonl"
WRITTEN_HERE = ("setup.py", "requirements.txt", "scripts/check_env.py", "scripts/try_env.py")


def required(extras: list[str]) -> list:
    """The requirements (packaging's) of the core and of these extras, as far as they are for this system."""
    from packaging.requirements import Requirement

    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    lines = dict.fromkeys([*setup["CORE"], *(line for extra in extras for line in setup["EXTRAS"][extra])])
    requirements = [Requirement(line) for line in lines]
    return [one for one in requirements if one.marker is None or one.marker.evaluate()]


def installed(name: str) -> str | None:
    """The version of a distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lower_bounds(requirement):
    """Its specifiers without the upper bounds."""
    return [one for one in requirement.specifier if not one.operator.startswith("<")]


def lacking(requirements: list) -> list[str]:
    """What is not installed, or older than its lower bound."""
    found = []
    for requirement in requirements:
        version = installed(requirement.name)
        asked = f"{requirement.name}{requirement.specifier}"
        if version is None:
            found.append(asked)
        elif not all(bound.contains(version, prereleases=True) for bound in lower_bounds(requirement)):
            found.append(f"{asked} (it has {version})")
    return found


def too_new(requirements: list) -> list[str]:
    """The installed packages above the upper bound of setup.py, each as "filelock 4.3.1 (setup.py: <4)"."""
    found = []
    for requirement in requirements:
        version = installed(requirement.name)
        upper = [one for one in requirement.specifier if one.operator.startswith("<")]
        if version and not all(bound.contains(version, prereleases=True) for bound in upper):
            found.append(f"{requirement.name} {version} (setup.py: {', '.join(map(str, upper))})")
    return found


def fingerprint(extras: list[str]) -> str:
    """A hash of all that the outcome depends on; it reads names of folders, no package, and takes a few
    milliseconds."""
    added = [
        Path(entry)
        for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if entry and Path(entry) != ROOT
    ]
    parts = [
        sorted(extras),
        sys.version,
        sys.prefix,
        sorted({info.name for entry in sys.path if entry for info in Path(entry).glob("*-info")}),
        [(str(folder), sorted((p.name, p.stat().st_mtime_ns) for p in folder.glob("*"))) for folder in added],
        [
            hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
            for name in WRITTEN_HERE
            if (ROOT / name).exists()
        ],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def remembered(key: str) -> str | None:
    """The sentence of an earlier trial, empty where it went well; None where there was none."""
    sentence = None
    if REMEMBERED.exists():
        for line in REMEMBERED.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off in the writing
                continue
            if record.get("key") == key:
                sentence = record["problem"]
    return sentence


def remember(key: str, problem: str) -> None:
    try:
        with REMEMBERED.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "python": sys.executable, "problem": problem}) + "\n")
    except OSError:
        pass  # a checkout that cannot be written to is tried every time


def try_out(extras: list[str], requirements: list) -> str:
    """Run scripts/try_env.py; what went wrong, in one clause that names the package, or an empty string."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="libra-try-") as folder:
        environment["HF_HOME"] = folder
        command = [sys.executable, str(ROOT / "scripts/try_env.py"), *extras]
        answer = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    steps = answer.stdout.splitlines()
    if answer.returncode == 0 and steps and steps[-1] == "all works":
        return ""
    doing = steps[-1] if steps else "starting Python"
    if answer.returncode < 0:
        why = f"the process died of signal {-answer.returncode}"
    else:
        why = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
    new = too_new(requirements)
    if new and "setup.py asks for" not in why:
        why += f"; newer than what was run: {', '.join(new)}"
    return f"fails at {doing}: {why}"


def problem(extras: list[str]) -> str:
    """Why this Python cannot run the core and these extras, as one sentence; an empty string where it can."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever python is on PATH runs this
        return f"{sys.executable} is Python {sys.version.split()[0]}, and 3.11 or newer is needed"
    if installed("packaging") is None:
        return f"{sys.executable} lacks packaging"
    requirements = required(extras)
    missing = lacking(requirements)
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}"
    key = fingerprint(extras)
    known = remembered(key)
    if known is None and remembered(fingerprint(["test"])) == "":
        if set(requirements) <= set(required(["test"])):
            known = ""  # all of it was tried together with more
    if known is None:
        print("Trying the installed packages (once, about half a minute) …", file=sys.stderr)
        known = try_out(extras, requirements)
        if "died of signal" not in known:  # that may have been a lack of memory
            remember(key, known)
    return known and f"{sys.executable} {known}"


if __name__ == "__main__":
    commands = argparse.ArgumentParser(
        usage="python scripts/check_env.py [EXTRA ...]", description="Can this Python run the project?"
    )
    commands.add_argument("extras", nargs="*", metavar="EXTRA", help="of setup.py, such as test or train")
    sentence = problem(commands.parse_args().extras)
    print(sentence or sys.executable)
    sys.exit(bool(sentence))
