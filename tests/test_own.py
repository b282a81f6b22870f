"""A user's own model, rows and tasks in a table, as docs/own.md walks through it."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval import report, suites
from eval.own import Own, model_of
from eval.run import main
from libra import rows
from libra.rows import get_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own.md").read_text(encoding="utf-8")
FILE = re.compile(r"```\w+\n# (my_\S+)\n(.*?)```", re.DOTALL)
(COMMANDS,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files in an empty folder, which is the working directory. What becomes known in this process
    is forgotten after the test."""
    for name, text in FILE.findall(PAGE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    monkeypatch.chdir(tmp_path)
    registries = (rows.ADDED, suites.OWN_TASKS, suites.SUITES)
    before = [dict(registry) for registry in registries]
    yield tmp_path
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_models_sizes_come_from_its_checkpoint(tmp_path):
    spec, shipped = model_of("mine=mini/checkpoint:mini"), get_model("mini")
    for key in ("layers", "hidden_size", "intermediate_size", "kv_size", "visual_tokens", "conversation"):
        assert getattr(spec, key) == getattr(shipped, key), key
    assert (spec.name, spec.checkpoint) == ("mine", "mini/checkpoint")
    tiled = model_of(f"tiled={ROOT}/tests/golden/llava_next_llama3/checkpoint")
    assert tiled.visual_tokens == () and tiled.conversation is None
    for text, sentence in (
        ("mini/checkpoint", "write NAME=PATH"),
        ("a.b=mini/checkpoint", "write NAME=PATH"),
        (f"mine={tmp_path}", "sizes of .* cannot be read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model_of(text)


def test_what_does_not_fit_is_one_sentence(folder, capsys):
    model = ("--model", "mine=mini/checkpoint:mini")
    assert "--table is missing" in refused(capsys)
    assert "name their folder with --configs" in refused(capsys, *model)
    assert "leave out --table 1" in refused(capsys, *model, "--configs", "my_rows", "--table", "1")
    own_rows = (*model, "--configs", "my_rows", "--dry-run")
    assert "task scene is unknown" in refused(capsys, *own_rows)
    (folder / "empty").mkdir()
    assert "no .yaml file in it" in refused(capsys, *own_rows, "--include-path", "empty")
    (folder / "empty" / "gqa.yaml").write_text("task: gqa\n")
    assert "gqa is a task of this project" in refused(capsys, *own_rows, "--include-path", "empty")
    taken = ("--model", "mini=mini/checkpoint", "--configs", "my_rows")
    assert "is a model of models.yaml" in refused(capsys, *taken)
    other = ("--model", "other=mini/checkpoint", "--configs", "my_rows")
    assert "has no rows" in refused(capsys, *other)


def test_lmms_evals_own_names_are_tasks(folder):
    task = suites.get_task("docvqa_val")
    assert (task.harness, task.metric, suites.from_harness("docvqa_val")) == ("docvqa_val", "", True)
    assert not suites.from_harness("mini_counting")
    with pytest.raises(ValueError, match="did you mean docvqa_val"):
        suites.get_task("docvqa_vall")


def test_a_dry_run_says_what_the_page_would_compute(folder, capsys):
    first = shlex.split(COMMANDS.splitlines()[0])[3:]
    assert main(first) == 0
    said = capsys.readouterr().out
    assert "Rows of one's own · mine · 4 cells" in said and "tasks: scene, counting" in said
    assert re.search(r"^half +half at each quarter of the depth +2, 5, 8 +50% +44%", said, re.M)
    assert not (folder / "results").exists()


def test_an_edited_task_is_another_one(folder):
    suites.add_tasks(folder / "my_tasks")
    before = suites.task_digest(suites.get_task("scene"))
    (folder / "my_tasks" / "scene.py").write_text("# another\n")
    assert suites.task_digest(suites.get_task("scene")) not in (before, None)


def test_a_results_folder_remembers(folder):
    brought = Own((model_of("mine=mini/checkpoint:mini"),), Path("my_rows"), Path("my_tasks"), "own")
    brought.save(folder / "results")
    found = Own.load(folder / "results")
    assert found.models == brought.models and found.table == "own"
    assert (found.configs, found.tasks) == (folder / "my_rows", folder / "my_tasks")
    assert Own.load(folder) == Own()


def test_a_damaged_memory_is_refused_in_a_sentence(tmp_path, capsys):
    for text in ("{", '{"table": "own"}', '{"table": "own", "models": [{"name": "mine"}]}'):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(SystemExit):
            report.main([str(tmp_path)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path / 'own.json'} is damaged (") and "Traceback" not in error


@pytest.mark.slow
def test_the_pages_commands_fill_a_table(folder):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for line in COMMANDS.splitlines():
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        answer = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
    report = (folder / "results" / "own" / "own.md").read_text(encoding="utf-8")
    assert report == answer.stdout.rstrip("\n") + "\n"
    assert "## mine, measured" in report and "One small model" not in report
    shown = report.split("Each task's own metric")[0]
    assert "| vanilla | 100% |" in shown and "| half at each quarter of the depth | 44% |" in shown
    assert "±" not in shown  # two answers carry none
    assert (folder / "results" / "own" / "own.png").is_file()
    with open(folder / "results" / "own" / "own.csv", encoding="utf-8", newline="") as file:
        found = {(line["row"], line["task"]): line for line in csv.DictReader(file)}
    assert {line["status"] for line in found.values()} == {"ok"} and len(found) == 4
    assert {float(line["score"]) for line in found.values()} <= {0.0, 50.0, 100.0}
    assert found["half", "scene"]["suite"] == "mine" and found["half", "scene"]["n"] == "2"
