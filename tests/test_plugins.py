"""One's own select in one's own file: --import, a row's `plugins`, an installed entry point; never by a
request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINE = """
import libra

@libra.register_select("norm")
def norm(candidates, c):
    return candidates.top(candidates.hidden.float().norm(dim=-1))
"""
ROW = """
model: mini
compression: {select: norm, merge: igm, layers: [2, 5, 8], ratio: 0.5}
tasks: [mini_reading]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "row.yaml").write_text(ROW)
    (tmp_path / "asking.yaml").write_text(f"plugins: [mine.py]\n{ROW}")
    installed = tmp_path / "site" / "mine-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[libra.methods]\nnorm = mine\n")
    return tmp_path


def python(*words, folder, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, path)])}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )


def flops(*words, folder, path=()):
    return python("-m", "libra.flops", *words, folder=folder, path=path)


def test_a_row_alone_runs_no_code(folder):
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    for file, sentence in (
        ("asking.yaml", "which runs only where you say --allow-plugins"),
        ("row.yaml", "select: norm is unknown"),
    ):
        done = flops("--config", file, folder=folder)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--config", "row.yaml", "--import", "mine.py"),
        ("--import", "mine", "--config", "row.yaml"),
        ("--config", "asking.yaml", "--allow-plugins"),
        ("--config", "asking.yaml", "--import", "mine.py"),
    ],
)
def test_a_module_of_ones_own(folder, words):
    done = flops(*words, folder=folder)
    assert done.returncode == 0 and "norm" in done.stdout, done.stderr


def test_an_installed_entry_point_is_found_by_its_name(folder):
    done = flops("--config", "row.yaml", folder=folder, path=(folder, folder / "site"))
    assert done.returncode == 0 and "norm" in done.stdout, done.stderr


def test_a_module_that_fails_is_one_sentence(folder):
    (folder / "mine.py").write_text("import nothing_of_this_name")
    done = flops("--config", "row.yaml", "--import", "mine.py", folder=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--import" in done.stderr and "nothing_of_this_name" in done.stderr
    (folder / "inner").mkdir()
    (folder / "inner" / "json.py").write_text(MINE)
    assert "another module is called json" in flops("--import", "inner/json.py", folder=folder).stderr


def test_a_request_leads_to_no_import(folder):
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    code = """
from libra.serve.request import compression_of
try:
    compression_of({"select": "norm", "ratio": 0.5})
except ValueError as error:
    print("refused", error)
"""
    done = python("-c", code, folder=folder, path=(folder, folder / "site"))
    assert done.stdout.startswith("refused select: norm is unknown"), done.stdout + done.stderr


def test_a_cell_knows_the_code_of_its_row(folder):
    code = """
from libra.identity import row_identity
from libra.rows import Row
from libra.utils import plugins
plugins.load("mine.py")
print(row_identity(Row.from_yaml("row.yaml"))["own"])
"""
    first = python("-c", code, folder=folder)
    assert first.returncode == 0 and first.stdout.startswith("{'mine': "), first.stderr
    assert python("-c", code, folder=folder).stdout == first.stdout
    (folder / "mine.py").write_text(MINE.replace("norm(dim", "norm(p=1, dim"))
    assert python("-c", code, folder=folder).stdout != first.stdout


@pytest.mark.slow
def test_the_harness_evaluates_a_row_with_a_method_of_ones_own(folder):
    done = python(
        *("-m", "libra.lmms", "--import", "mine.py", "--tasks", "mini_reading", "--limit", "2"),
        *("--model_args", "config=row.yaml"),
        folder=folder,
    )
    assert done.returncode == 0 and "mini_reading" in done.stdout, done.stderr
