"""Set-up: the ranges, the pins, the scripts, and the warning about another llava."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from libra.utils.other_llava import warn_if_llava_is_another

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


SEEDS = {"pip", "setuptools", "uv", "wheel"}  # what makes an environment


def installed() -> dict[str, metadata.Distribution]:
    """Of this environment: setuptools, once imported, has its own copies of nine packages on sys.path."""
    places = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return {
        canonicalize_name(found.metadata["Name"]): found
        for found in metadata.distributions(path=list(places))
        if found.metadata["Name"]
    }


def test_a_fresh_environment_is_the_lock():
    if not (Path(sys.prefix) / "libra-requirements").exists():
        pytest.skip("this environment was not made from requirements.txt by scripts/install.sh")
    found = {name: one.version for name, one in installed().items() if name not in SEEDS}
    assert found == {name: version for name, version in LOCKED.items() if name not in SEEDS}


def test_the_locked_packages_have_what_they_ask_for():
    """`pip check`, of the packages of the lock."""
    found = installed()
    for name in LOCKED:
        for line in found[name].requires or ():
            asked = Requirement(line)
            if asked.marker is None or asked.marker.evaluate({"extra": ""}):
                assert found[canonicalize_name(asked.name)].version in asked.specifier, (
                    f"{name} asks for {line}"
                )


def test_this_environment_is_tried_and_works():
    """Of the extra `test`, which holds the others; scripts/test.sh has just tried it, and the outcome is
    remembered."""
    answer = subprocess.run(
        [sys.executable, ROOT / "scripts/check_env.py", "test"], capture_output=True, text=True
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, sys.executable), answer.stderr


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with what the set-up reads, and a .venv that has this environment's packages and counts as
    installed."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    [packages] = (folder / ".venv").glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    with (folder / "requirements.txt").open() as lock:
        pins = subprocess.run(["cksum"], stdin=lock, capture_output=True, text=True, check=True).stdout
    (folder / ".venv/libra-requirements").write_text(pins)
    return folder


def check(folder: Path, *extras: str, **environment: str) -> tuple[int, str]:
    python = folder / ".venv/bin/python"
    command = [python, folder / "scripts/check_env.py", *extras]
    answer = subprocess.run(
        command, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True
    )
    return answer.returncode, answer.stdout.strip().removeprefix(f"{python} ")


def test_a_package_that_is_missing_or_too_old_is_named(checkout):
    core = ["torch>=999", "numpy>=1,<1.1", "no-such-package"]
    extras = {"test": ["pillow>=998", "not-for-this-system; python_version < '3'"]}
    (checkout / "setup.py").write_text(f"CORE = {core}\nEXTRAS = {extras}")
    torch, pillow = metadata.version("torch"), metadata.version("pillow")
    sentence = f"lacks torch>=999 (it has {torch}), no-such-package, pillow>=998 (it has {pillow})"
    assert check(checkout, "test") == (1, sentence)


def test_an_environment_is_tried_once_and_again_when_it_changes(checkout, tmp_path):
    trial = checkout / "scripts/try_env.py"
    good = f"open({str(tmp_path / 'tries')!r}, 'a').write('x')\nprint('all works')\n"
    tries = tmp_path / "tries"
    trial.write_text(good)
    [packages] = (checkout / ".venv").glob("lib/python*/site-packages")
    for _ in range(2):
        assert check(checkout)[0] == 0
    assert tries.read_text() == "x"
    (packages / "something-1.0.dist-info").mkdir()
    for _ in range(2):
        assert check(checkout)[0] == 0
    assert tries.read_text() == "xx"
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    assert check(checkout, PYTHONPATH=str(shadow))[0] == 0
    (shadow / "numpy.py").touch()
    assert check(checkout, PYTHONPATH=str(shadow))[0] == 0
    assert tries.read_text() == "xxxx"


def test_what_works_for_the_tests_is_not_tried_again_for_less(checkout, tmp_path):
    tries = tmp_path / "tries"
    (checkout / "setup.py").write_text(
        """CORE, EXTRAS = [], {"test": ["pillow"], "eval": ["pillow"], "lora": ["numpy"]}"""
    )
    (checkout / "scripts/try_env.py").write_text(
        f"open({str(tries)!r}, 'a').write('x')\nprint('all works')\n"
    )
    for extra, tried in (("eval", "x"), ("test", "xx"), ("eval", "xx"), ("lora", "xxx")):
        assert check(checkout, extra)[0] == 0 and tries.read_text() == tried, extra
    (checkout / "scripts/try_env.py").write_text(
        f"open({str(tries)!r}, 'a').write('x')\nprint('all works') # \n"
    )
    for extra, tried in (("test", "xxxx"), ("eval", "xxxx")):
        assert check(checkout, extra)[0] == 0 and tries.read_text() == tried, extra


def test_what_failed_is_remembered_too_unless_it_was_killed(checkout, tmp_path):
    trial = checkout / "scripts/try_env.py"
    tries = tmp_path / "tries"
    begin = f"import os, sys\nopen({str(tries)!r}, 'a').write('x')\nprint('import of torch 1', flush=True)\n"
    (checkout / "setup.py").write_text('CORE = ["numpy>=1,<1.1"]\nEXTRAS = {}')
    trial.write_text(begin + "sys.exit('ImportError: no')")
    newer = f"newer than what was run: numpy {metadata.version('numpy')} (setup.py: <1.1)"
    for _ in range(2):
        assert check(checkout) == (1, f"fails at import of torch 1: ImportError: no; {newer}")
    assert tries.read_text() == "x"
    trial.write_text(begin + "os.kill(os.getpid(), 9)")
    for _ in range(2):
        assert check(checkout) == (1, f"fails at import of torch 1: the process died of signal 9; {newer}")
    assert tries.read_text() == "xxx"


def test_a_package_that_lies_over_the_environment_stops_a_table_before_its_first_cell(checkout, tmp_path):
    """filelock without _api, which lmms-eval imports when it evaluates."""
    stub = tmp_path / "stub"
    (stub / "filelock").mkdir(parents=True)
    (stub / "filelock/__init__.py").write_text("class FileLock: ...\n")
    environment = {
        "PATH": os.environ["PATH"],
        "VIRTUAL_ENV": str(checkout / ".venv"),
        "PYTHONPATH": str(stub),
    }
    answer = subprocess.run(
        ["bash", checkout / "scripts/eval_table1.sh"], env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 2
    trying, error = answer.stderr.splitlines()
    assert trying.startswith("Trying the installed packages")
    assert error.startswith(f"error: {checkout}/.venv/bin/python fails at import of filelock")
    assert error.endswith(
        f"No module named 'filelock._api'; filelock comes from {stub}/filelock: take what lies over .venv's"
        " packages off"
        " PYTHONPATH, or delete .venv and run again."
    )
    assert not (checkout / "results").exists()


def test_the_active_environment_is_used_as_it_is(tmp_path):
    """Run from elsewhere, env.sh chooses this Python, puts the checkout on PYTHONPATH and makes no .venv."""
    bin_folder = Path(sys.executable).parent
    before = (ROOT / ".venv").exists()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    }
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    script = f'set -euo pipefail; . "{ROOT}/scripts/env.sh" test; command -v python; echo "$PYTHONPATH"'
    answer = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.stdout.split() == [str(bin_folder / "python"), str(ROOT)], answer.stderr
    assert (ROOT / ".venv").exists() == before


def test_an_unknown_extra_is_one_sentence():
    answer = subprocess.run(
        ["bash", "-c", f'. "{ROOT}/scripts/env.sh" nonsense'], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stderr == "error: there is no extra 'nonsense': use eval, train or test.\n"


def test_the_tests_of_other_versions_exist():
    chosen = [
        line for line in (ROOT / "tests/versions.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert len(set(chosen)) == len(chosen) >= 40
    for name in chosen:
        path, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(), name


def test_versions_need_a_mode_and_uv(tmp_path):
    command = ["bash", ROOT / "scripts/test_versions.sh"]
    answer = subprocess.run([*command, "oldest"], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (
        2,
        "error: name what to test: locked, lowest, newest or beyond.\n",
    )
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    answer = subprocess.run([*command, "lowest"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (
        2,
        "error: uv is needed to resolve the versions: pip install uv\n",
    )


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("*.sh")) + [ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_scripts_parse_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("# Source me") or re.search(r"^set -euo pipefail$", text, re.M)


@pytest.mark.parametrize("script", ["check_env", "methods_page", "models_page"])
def test_help_does_nothing_else(script):
    written = [ROOT / "docs/methods.md", ROOT / "docs/models.md", ROOT / "README.md"]
    before = [page.stat().st_mtime_ns for page in written]
    command = [sys.executable, ROOT / f"scripts/{script}.py", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.startswith("usage:")
    assert [page.stat().st_mtime_ns for page in written] == before


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
