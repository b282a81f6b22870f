"""Commands start in a moment: help and errors come before anything large is imported, and what is not a
command says so."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import libra

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("libra", "llava", "eval", "mini")
LARGE = ("torch", "transformers", "lmms_eval", "datasets", "starlette", "sklearn", "matplotlib")
HELP = """
import contextlib, io, json, runpy, sys, time
found = {}
for command in sys.argv[1:]:
    sys.argv[:] = [command, "--help"]
    text, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert not stop.code, (command, stop.code)
    large = [name for name in LARGE if name in sys.modules]
    found[command] = text.getvalue(), time.process_time() - start, large
print(json.dumps(found))
"""


def commands() -> list[str]:
    """Every module that runs as a command, by its text."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__main__.py":
            found.append(name.removesuffix(".__main__"))
        elif 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            found.append(name)
    return found


def run(*words: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, **options
    )


def test_every_help_comes_in_a_moment_and_says_how_to_call_it(tmp_path):
    answer = run("-c", f"LARGE = {LARGE!r}\n{HELP}", *commands(), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    for command, (text, seconds, large) in json.loads(answer.stdout).items():
        assert text.startswith(f"usage: python -m {command} "), command
        assert not large, f"{command} imports {large} before it shows its help"
        assert seconds < 1.5, command


def test_flops_need_neither_torch_nor_transformers_and_a_second(tmp_path):
    code = (
        "import sys, time; from libra.flops import main; main(['--config', 'llava7b_r50', '--json']); "
        f"print(sorted(set({LARGE!r}) & set(sys.modules)), time.process_time(), file=sys.stderr)"
    )
    answer = run("-c", code, cwd=tmp_path)
    large, seconds = answer.stderr.rsplit(maxsplit=1)
    assert large == "[]" and float(seconds) < 1, answer.stderr


def test_importing_libra_imports_nothing_large_and_offers_every_name():
    code = (
        f"import sys, libra; print(sorted(set({LARGE!r}) & set(sys.modules)), set(libra.__all__) <= "
        "set(dir(libra)))"
    )
    assert run("-c", code).stdout == "[] True\n"
    assert all(getattr(libra, name) is not None for name in libra.__all__)
    with pytest.raises(AttributeError, match="module 'libra' has no attribute 'atach'"):
        libra.atach  # noqa: B018


def test_no_module_has_the_name_of_a_public_function():
    """Python sets an imported module as an attribute of its package, where it would hide the function."""
    modules = {path.stem for path in (ROOT / "libra").iterdir()}
    assert not modules & set(libra.__all__)


def test_what_type_checkers_see_is_what_there_is():
    """The imports under TYPE_CHECKING name each public name's module as the lazy table does."""
    tree = ast.parse((ROOT / "libra/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == libra._MODULES and set(seen) == set(libra.__all__)


@pytest.mark.parametrize(
    "module", ["libra", "libra.merge", "libra.latency.bench", "llava", "llava.serve", "mini"]
)
def test_a_module_without_a_command_says_so(module, tmp_path):
    answer = run("-m", module, cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith(
        f"error: {module} is not a command; use python -m {module.split('.')[0]}."
    )
    assert answer.stderr.count("\n") == 1


def test_the_packages_name_all_their_commands(tmp_path):
    for package in PACKAGES:
        listed = (
            run("-m", f"{package}.nothing", cwd=tmp_path).stderr.strip().split("python -m ")[1].split(" | ")
        )
        assert listed == [command for command in commands() if command.split(".")[0] == package]
