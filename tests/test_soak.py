"""--soak runs the soak tests only, and a second call only those that have not passed with this code."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SOURCE = """
import pytest
from pathlib import Path

def test_fast(): ...

@pytest.mark.soak
def test_long(): ...

@pytest.mark.soak
def test_that_fails_at_first():
    assert Path("mended").exists()
"""


def pytest_in(folder: Path, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "soak",
        "-p",
        "no:cacheprovider",
        *options,
        "tests",
    ]
    answer = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(TESTS)}, capture_output=True, text=True
    )
    return answer.stdout.splitlines()[-1].split(" in ")[0]


@pytest.mark.slow
def test_a_second_soak_goes_on_and_changed_code_begins_again(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    test = tmp_path / "tests/test_it.py"
    test.write_text(SOURCE)
    assert pytest_in(tmp_path) == "1 passed, 2 skipped"
    assert (
        pytest_in(tmp_path, "--soak", "-n", "2") == "1 failed, 1 passed"
    )  # of test_fast pytest-xdist says nothing
    (tmp_path / "mended").touch()
    assert pytest_in(tmp_path, "--soak") == "1 passed, 1 skipped, 1 deselected"
    test.write_text(SOURCE + "\n# changed\n")
    assert pytest_in(tmp_path, "--soak") == "2 passed, 1 deselected"
