"""The commands of README and the pages: all flags exist, and what needs nothing but the repository runs as it
stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
MODULE = re.compile(r"-m ((?:libra|llava|eval|mini)[\w.]*)(.*)")
# Why a command does not run in test_commands_run, by a pattern that it matches. Each has to match one.
ELSEWHERE = {
    r"liuhaotian/|llava-hf/|Qwen/": "downloads a checkpoint",
    r"FOLDER|PICTURES|photo\.png|(data|samples)\.json|(norm|row|half)\.yaml": "the reader's own files",
    r"mini\.page|-m libra\.serve ": "a server: test_web.py, test_serve.py",
    r"scripts/\w+\.sh": "sets an environment up, or runs for long: test_packaging.py, test_train_scripts.py",
    r"libra\.latency|eval\.throughput|serve\.bench": "minutes of measuring: test_latency.py",
    r"pip install|uv build": "test_wheel.py",
    r"my_rows|results/own": "test_own.py",
    r"results/table1 --seeds": "needs the two tables that the commands before it filled: test_seeds.py",
    r"llava\.convert llava-1\.5": "needs the folder that the command before it wrote",
    r"^(for|done)\b": "a loop around servers",
    r"-m lmms_eval": "needs the installed package: test_wheel.py",
}
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for module in sys.argv[1:]:
    sys.argv[:] = [module, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    found[module] = text.getvalue()
print(json.dumps(found))
"""


def commands(page: Path) -> list[str]:
    """The commands of a page's shell blocks, a line each, without comments."""
    found = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            found += [" ".join(line.split())] if line else []
    return found


COMMANDS = {page: commands(page) for page in PAGES}
ALL = [(page, line) for page, lines in COMMANDS.items() for line in lines]


def why_not(line: str) -> str:
    return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, line)), "")


def test_every_flag_exists():
    """In the blocks, and in the text between them."""
    named = [(page, found) for page, line in ALL for found in MODULE.findall(line)]
    for page in PAGES:
        inline = re.findall(r"`python ([^`]+)`", page.read_text(encoding="utf-8"))
        named += [(page, found) for line in inline for found in MODULE.findall(line)]
    modules = sorted({module for _, (module, _) in named} - {"libra.lmms"})  # its flags are lmms-eval's
    words = [sys.executable, "-c", HELP, *modules]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    helps = json.loads(
        subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    trainers = " ".join(
        f"--{field.name}" for field in fields(TrainingArguments)
    )  # which its --help leaves out
    helps["llava.train.train"] += trainers
    assert len(modules) > 15 and all("usage" in text for text in helps.values())
    wrong = [
        f"{page.name}: {module} has no {flag}"
        for page, (module, rest) in named
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", rest)
        if module in helps and not re.search(rf"{flag}(?![\w-])", helps[module])
    ]
    assert not wrong


def test_every_reason_is_one():
    """A pattern that no command matches is gone from the pages."""
    unused = [pattern for pattern in ELSEWHERE if not any(re.search(pattern, line) for _, line in ALL)]
    assert not unused


RUN = [(page, [line for line in lines if not why_not(line)]) for page, lines in COMMANDS.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, lines", [pair for pair in RUN if pair[1]], ids=lambda given: getattr(given, "stem", "")
)
def test_commands_run(page, lines, tmp_path):
    """As they stand, one after the other, where the repository's pictures lie."""
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "python": sys.executable}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in lines:
        answer = subprocess.run(
            ["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, f"{line}\n{answer.stderr}"
        assert answer.stdout.strip() or list(tmp_path.iterdir()), line


def test_readmes_first_answer_is_among_them():
    first = next(lines for page, lines in RUN if page.name == "README.md")
    assert any("run_llava" in line and "--compression" in line for line in first)
