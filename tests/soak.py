"""The soak tier: ``--soak`` runs the tests marked ``soak`` and no others, and a second call goes on where the
first stopped.

results/soak/passed.jsonl remembers what passed, a line each: the test, the digest of the code, the date. A
test that passed with the very same code, torch and transformers is skipped; delete the file to run everything
again.
"""

import hashlib
import json
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

CODE = ("libra", "llava", "eval", "mini", "configs", "scripts", "tests")


def pytest_addoption(parser):
    parser.addoption(
        "--soak",
        action="store_true",
        help="run the tests marked soak, and only these; goes on where it stopped",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: very long, resumable; run with --soak")
    config.pluginmanager.register(Soak(config), "soak-tier")


def digest(root: Path) -> str:
    """A hash of every file under root's code folders, and of the versions of torch and transformers."""
    total = hashlib.sha256()
    for package in ("torch", "transformers"):
        try:
            total.update(metadata.version(package).encode())
        except metadata.PackageNotFoundError:
            pass  # the test of this file needs neither
    for path in sorted(path for folder in CODE for path in (root / folder).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "__pycache__" not in name and not name.startswith("mini/run/"):
            total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


class Soak:
    """Selects the soak tests, skips those that passed before, and writes down those that pass now."""

    def __init__(self, config):
        self.selected = config.getoption("soak")
        self.records = config.rootpath / "results/soak/passed.jsonl"
        self.writes = self.selected and not hasattr(
            config, "workerinput"
        )  # of pytest-xdist's processes the first one only
        self.digest = digest(config.rootpath) if self.selected else ""
        self.passing = set()

    def passed_before(self) -> dict[str, str]:
        """The tests that passed with this code, and when. A line that was cut off in the writing does not
        count."""
        dates = {}
        if self.records.exists():
            for line in self.records.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["code"] == self.digest:
                    dates[record["test"]] = record["date"]
        return dates

    def pytest_collection_modifyitems(self, config, items):
        soak = [item for item in items if item.get_closest_marker("soak")]
        if not self.selected:
            for item in soak:
                item.add_marker(pytest.mark.skip(reason="soak: run with --soak"))
            return
        config.hook.pytest_deselected(items=[item for item in items if item not in soak])
        items[:] = soak
        before = self.passed_before()
        for item in soak:
            if item.nodeid in before:
                item.add_marker(
                    pytest.mark.skip(reason=f"soak: passed with this code on {before[item.nodeid]}")
                )

    def pytest_runtest_logreport(self, report):
        if not self.writes or report.outcome != "passed":
            self.passing.discard(report.nodeid)
        elif report.when == "call":
            self.passing.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid in self.passing:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"test": report.nodeid, "code": self.digest, "date": date}
            self.records.parent.mkdir(parents=True, exist_ok=True)
            with self.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
