"""Set-up: the ranges, the pins, the scripts, and the warning about another llava."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from libra.shadow import warn_if_llava_is_another

ROOT = Path(__file__).resolve().parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def requirements(lines) -> list[Requirement]:
    """What each line asks for, without comments, hashes and what is not for this system."""
    found = (Requirement(line.split(" #")[0].strip(" \\")) for line in lines if re.match(r"\w", line))
    return [r for r in found if r.marker is None or r.marker.evaluate()]


RANGES = requirements([*SETUP["CORE"], *SETUP["EXTRAS"]["test"]])
LISTED = requirements((ROOT / "requirements.in").read_text().splitlines())
LOCK = (ROOT / "requirements.txt").read_text()
LOCKED = {r.name: str(r.specifier).removeprefix("==") for r in requirements(LOCK.splitlines())}


def test_the_lock_has_what_setup_py_and_the_short_list_ask_for():
    assert {r.name for r in LISTED} == {r.name for r in RANGES}
    for requirement in [*RANGES, *LISTED]:
        assert LOCKED[requirement.name] in requirement.specifier, requirement


def test_every_entry_of_the_lock_has_hashes_and_no_index():
    entries = re.split(r"\n(?=[\w-])", LOCK.split("\n", 2)[2])
    assert len(entries) > 150
    assert [entry.split(" ")[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"^--|://|==[\d.]+(a|b|rc|\.dev|\+)", LOCK, re.M)


@pytest.mark.parametrize("extra", ["eval", "train", "test"])
def test_this_environment_has_what_setup_py_asks_for(extra):
    answer = subprocess.run([sys.executable, ROOT / "scripts/check_env.py", extra], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == (0, sys.executable), answer.stderr


def test_a_package_out_of_range_is_named(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/check_env.py").write_text((ROOT / "scripts/check_env.py").read_text())
    ranges = 'CORE = ["torch>=999", "numpy>=1", "no-such-package"]\nEXTRAS = {"test": ["numpy>=998"]}'
    (tmp_path / "setup.py").write_text(ranges)
    answer = subprocess.run([sys.executable, tmp_path / "scripts/check_env.py", "test"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.strip().endswith("lacks torch>=999, no-such-package, numpy>=998")


def test_the_active_environment_is_used_as_it_is(tmp_path):
    """Run from elsewhere, env.sh chooses this Python, puts the checkout on PYTHONPATH and makes no .venv."""
    bin_folder = Path(sys.executable).parent
    before = (ROOT / ".venv").exists()
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    script = f'set -euo pipefail; . "{ROOT}/scripts/env.sh" test; command -v python; echo "$PYTHONPATH"'
    answer = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.stdout.split() == [str(bin_folder / "python"), str(ROOT)], answer.stderr
    assert (ROOT / ".venv").exists() == before


def test_an_unknown_extra_is_one_sentence():
    answer = subprocess.run(["bash", "-c", f'. "{ROOT}/scripts/env.sh" nonsense'], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr == "error: there is no extra 'nonsense': use eval, train or test.\n"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")) + [ROOT / ".ci/run"], ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("# Source me") or re.search(r"^set -euo pipefail$", text, re.M)


def other_llava(folder: Path) -> Path:
    (folder / "llava").mkdir()
    (folder / "llava/__init__.py").write_text("from .model import LlavaLlamaForCausalLM\n")
    return folder


def test_our_llava_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_llava_is_another()


def test_another_llava_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(other_llava(tmp_path))
    monkeypatch.delitem(sys.modules, "llava", raising=False)
    with pytest.warns(RuntimeWarning, match=re.escape(str(tmp_path / "llava"))):
        warn_if_llava_is_another()


def test_what_needs_our_llava_warns_of_another(tmp_path):
    """The embedded model's package when it is imported, the runner when it is called."""
    environment = {**os.environ, "PYTHONPATH": f"{other_llava(tmp_path)}:{ROOT}"}
    calls = "import mini; from eval.run import main; main(['--table', '1', '--rows', 'none'])"
    code = [sys.executable, "-W", "always", "-c", calls]
    answer = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2 and "error: row none is unknown" in answer.stderr, answer.stderr
    assert answer.stderr.count(f"`import llava` finds the package at {tmp_path / 'llava'}") == 2
