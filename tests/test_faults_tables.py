"""What was once wrong with tables and their cells, a test an entry of the list of faults."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from eval_cells import RUN, share, stored
from eval_stand_ins import ratio_as_score
from test_eval import cell_of, fill_results, log_at, table_rows
from test_tables import fill, settings_for

from eval import plan as planning
from eval import report, run, suites
from eval.cells import check_unchanged, read_cell, read_cells
from eval.suites import get_table
from libra import identity
from libra.identity import checkpoint_identity, code_digests, digest, file_digest
from libra.mini.questions import TYPES
from libra.rows import Row
from libra.utils.provenance import require_clean

ROOT = Path(__file__).resolve().parent.parent
TABLE = get_table(1)


@pytest.fixture
def make_plan(tmp_path, monkeypatch):
    """Plans of Table 1 with rows in ``tmp_path``/configs and questions that nobody reads."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(suites, "CONFIGS", tmp_path / "configs")
    entry = {"majority_share": 0.25, "file_sha256": "f", "content_sha256": "c", "file": "attribute.parquet"}
    manifest = {"questions": 4, "seed": 1, "sha256": "feed", "types": {"attribute": entry, "reading": entry}}
    monkeypatch.setattr("libra.mini.benchmark.write_benchmark", lambda _: manifest)

    def make(rows=("r50",), tasks=("attribute",), **more):
        return planning.plan(
            TABLE, "mini", planning.Wanted(list(rows), list(tasks), benchmark=tmp_path, **more)
        )

    make.manifest = manifest
    return make


def shown_rows(text: str) -> list[str]:
    """The rows of the embedded model's table, without its two heading lines and the most frequent answer."""
    return list(table_rows(text, "## The embedded model"))[2:]


# A wrong result without a word.


def test_b1_a_row_edited_while_its_table_runs_takes_no_part_in_it(make_plan, tmp_path):
    output, row = tmp_path / "table1", tmp_path / "configs" / "mini" / "r50.yaml"
    plan = make_plan()
    row.write_text(row.read_text().replace("ratio: 0.5", "ratio: 0.8"))
    assert Row.from_yaml(row).compression.ratio == 0.8
    assert run.fill(
        plan.cells, plan.manifest, output, settings_for(output), ["cpu"], "command", ratio_as_score
    ) == (0, [])
    cell = read_cell(plan.cells[0].path(output))
    assert (
        cell["settings"]["row"]["compression"]["ratio"] == 0.5 and cell["score"] == 50.0
    )  # settings and answers agree
    shown = table_rows(report.write_report(output, TABLE, plan=plan), "## The embedded model")
    assert shown["Libra-Merging, 50%"][9] == "50.0"  # the run's own table has it, under the row as it was
    again = make_plan()
    assert not again.cells[0].is_finished(output)  # and the edited row is another one
    text = report.write_report(output, TABLE, plan=again)
    assert (
        "No cell has been computed yet." in text
        and "- left out: 1 cell with ratio 0.5, not 0.8 (r50, attribute)" in text
    )


@pytest.mark.parametrize("changed", ["checkpoint", "code", "benchmark"])
def test_b1_what_changes_between_plan_and_worker_fails_the_cell(make_plan, tmp_path, changed):
    (tmp_path / "attribute.parquet").write_bytes(b"questions")
    make_plan.manifest["types"]["attribute"]["file_sha256"] = file_digest(tmp_path / "attribute.parquet")
    (cell,) = make_plan().cells
    loaded = {name: cell.settings["run"][name] for name in ("checkpoint", "code")}
    check_unchanged(cell, loaded)
    if changed == "benchmark":
        (tmp_path / "attribute.parquet").write_bytes(b"others")
    else:
        loaded[changed] = {"sha256": "another"}
    with pytest.raises(
        ValueError, match=f"^the {changed} changed after the run was planned; run the same command again$"
    ):
        check_unchanged(cell, loaded)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in LLaVA's layout, with its tower next to it; nobody loads it."""
    folder = tmp_path / "weights" / "model"
    (folder.parent / "tower").mkdir(parents=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "tower"}))
    (folder.parent / "tower" / "config.json").write_text("{}")
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
    ):
        (folder / name).write_text("1")
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "../tower/config.json",
        "../tower/model.safetensors",
        "additional_chat_templates/x.jinja",
    ],
)
def test_b2_everything_that_can_change_an_answer_changes_the_checkpoint(checkpoint, file):
    before = checkpoint_identity(str(checkpoint))
    assert checkpoint_identity(str(checkpoint)) == before
    (checkpoint / file).parent.mkdir(exist_ok=True)
    with open(checkpoint / file, "a") as opened:
        opened.write(" ")
    assert checkpoint_identity(str(checkpoint)) != before


def test_b2_links_are_followed_and_what_nobody_reads_does_not_count(checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (checkpoint / "tower").symlink_to(tmp_path / "elsewhere")
    (checkpoint / "loop").symlink_to(checkpoint)
    before = checkpoint_identity(str(checkpoint))
    for idle in ("README.md", "trainer_state.json", ".gitattributes", "checkpoint-100/model.safetensors"):
        (checkpoint / idle).parent.mkdir(exist_ok=True)
        (checkpoint / idle).write_text("2")
    assert checkpoint_identity(str(checkpoint)) == before
    (tmp_path / "elsewhere" / "config.json").write_text('{"hidden_size": 8}')
    assert checkpoint_identity(str(checkpoint)) != before


def test_b2_large_weights_count_by_content_and_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(identity.LARGE)
    before, times = file_digest(path), path.stat()
    (remembered,) = (tmp_path / "cache" / "libra-merging" / "digests").iterdir()
    assert remembered.read_text() == before == file_digest(path)
    remembered.write_text("0" * 64)
    assert file_digest(path) == "0" * 64  # not read again
    with open(path, "r+b") as file:
        file.write(b"1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size, inode and time as before
    assert file_digest(path) not in (before, "0" * 64)
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("no folder")
    assert file_digest(path) not in (before, "0" * 64)


def test_b2_a_hub_name_counts_with_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("org/model", "org/tower"):
        for revision in ("a" * 40, "b" * 40):
            place = tmp_path / f"models--{name.replace('/', '--')}"
            (place / "snapshots" / revision).mkdir(parents=True)
            (place / "snapshots" / revision / "config.json").write_text(
                json.dumps({"mm_vision_tower": "org/tower"})
            )
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs" / "main").write_text(revision)
    now = {"hub": "org/model", "revision": "b" * 40, "tower": {"hub": "org/tower", "revision": "b" * 40}}
    assert checkpoint_identity("org/model") == now
    (tmp_path / "models--org--model" / "refs" / "main").write_text("a" * 40)
    assert checkpoint_identity("org/model") == {**now, "revision": "a" * 40}


def test_b2_code_counts_by_what_it_says_wherever_it_stands(tmp_path):
    texts = {
        "merge.py": 'import torch\n\n\ndef weights(n):\n    """Shares."""\n    return torch.ones(n) / n  # '
        "equal\n",
        "step.py": "from .merge import weights\n\n\ndef step(n):\n    return weights(n)\n",
    }

    def digest_of(files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return code_digests({"pack": sorted(folder.rglob("*.py"))})

    before = digest_of(texts)
    joined = (
        '"""Both."""\nimport torch\ndef step(n): return weights(n)\n\ndef weights(n):\n  return '
        "(torch.ones(n)\n / n)\n"
    )
    moved = {
        "ops/merge.py": texts["merge.py"],
        "step.py": texts["step.py"].replace(".merge", "pack.ops.merge"),
    }
    assert digest_of({"one.py": joined}) == digest_of(moved) == before
    for name, old, new in (
        ("merge.py", "/ n ", "* n "),
        ("merge.py", "import torch", "import numpy as torch"),
        ("step.py", "weights(n)", "weights(1)"),
        ("step.py", "import weights", "import other as weights"),
    ):
        assert digest_of({**texts, name: texts[name].replace(old, new)}) != before
    # Of two functions of one name it matters which is imported.
    two = {**texts, "kernels.py": "def weights(n):\n    return None\n"}
    assert digest_of(two) != digest_of({**two, "step.py": texts["step.py"].replace(".merge", ".kernels")})


def test_b2_an_answer_of_other_settings_is_not_taken_from_a_log(tmp_path):
    with log_at(tmp_path / "log.jsonl", digest({"ratio": 0.5})) as log:
        log.append([{"task": "t", "doc_id": 0, "answer": "a"}])
    with log_at(tmp_path / "log.jsonl", digest({"ratio": 0.8})) as log:
        assert log.get("t", 0) is None
        log.append([{"task": "t", "doc_id": 0, "answer": "b"}])
    with log_at(tmp_path / "log.jsonl", digest({"ratio": 0.5})) as log:
        assert log.get("t", 0)["answer"] == "a"  # nothing is lost either


@pytest.mark.slow
def test_b2_and_c1_the_models_own_log_keeps_rows_apart_and_a_lost_answer_comes_from_its_whole_batch(tmp_path):
    from PIL import Image

    from libra.lmms.lmms_libra import LibraModel

    documents = [{"images": [Image.new("RGB", (96, 96), color)]} for color in ("red", "green", "blue")]
    questions = ("what color ?", "how many red digits are there ?", "is there a blue digit ?")
    log, batches = tmp_path / "log.jsonl", []

    def answers(row: str, texts=questions) -> list[str]:
        model = LibraModel(
            Row.from_yaml(ROOT / f"configs/mini/{row}.yaml"), device="cpu", batch_size=3, sample_log=str(log)
        )
        model.task_dict = {"t": {"test": documents}}
        plain = model.engine.generate
        model.engine.generate = lambda samples, options: (
            batches.append(len(samples)) or plain(samples, options)
        )
        options = {"max_new_tokens": 4}
        requests = [
            SimpleNamespace(args=(text, options, lambda doc: doc["images"], i, "t", "test"))
            for i, text in enumerate(texts)
        ]
        said = model.generate_until(requests)
        model.sample_log.close()
        return said

    first = answers("r50")
    assert answers("r50") == first and batches == [3]
    answers("vanilla")
    assert batches == [3, 3] and answers("r50") == first and batches == [3, 3]  # each row has its own
    answers("r50", ("what digit ?", *questions[1:]))
    assert batches == [3, 3, 3]  # another question under the same number
    lines = log.read_bytes().splitlines(True)
    assert len(lines) == 7
    log.write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:6]]))
    assert answers("r50") == first and batches == [
        3,
        3,
        3,
        3,
    ]  # not alone: in another batch it may round otherwise
    assert len(log.read_bytes().splitlines()) == 7


def put(folder: Path, *cells: dict) -> Path:
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        (folder / "cells" / f"{cell['suite']}.{cell['row']}.{cell['task']}.json").write_text(json.dumps(cell))
    return folder


def test_b3_only_cells_that_fit_are_shown_and_the_others_named(tmp_path):
    late = "2026-02-02T00:00:00+00:00"
    fits = [stored(TABLE, row, "mini_attribute", share(90), date=late) for row in ("vanilla", "r50")]
    settings = stored(TABLE, "r67", "mini_attribute", share(10))["settings"]
    compression = {**settings["row"]["compression"], "ratio": 0.9}
    other_ratio = {**settings, "row": {**settings["row"], "compression": compression}}
    others = [
        stored(TABLE, "r67", "mini_attribute", share(10), settings=other_ratio),
        stored(TABLE, "fastv", "mini_attribute", share(10), run={**RUN, "limit": 20}),
        stored(TABLE, "turbo", "mini_attribute", share(10), run={**RUN, "checkpoint": {"sha256": "other"}}),
        stored(TABLE, "random", "mini_attribute", share(10), run={**RUN, "code": {"libra": "old"}}),
        stored(TABLE, "blind", "mini_attribute", share(10), run={**RUN, "dtype": "float16"}),
        stored(
            TABLE, "r50", "mini_reading", share(10), settings={**fits[1]["settings"], "data": {"sha256": "d"}}
        ),
        stored(TABLE, "vanilla", "mini_reading", share(10), date=late),
    ]
    text = report.write_report(put(tmp_path, *fits, *others), TABLE)
    rows = table_rows(text, "## The embedded model")
    assert shown_rows(text) == ["vanilla", "Libra-Merging, 50%"] and rows["Libra-Merging, 50%"][1] == ""
    for line in (
        "1 cell with ratio 0.9, not 0.6667 (r67, attribute)",
        "1 cell with limit 20, not none (fastv, attribute)",
        "1 cell with another checkpoint (turbo, attribute)",
        "1 cell with other code (random, attribute)",
        "1 cell with dtype float16, not float32 (blind, attribute)",
        "1 cell with other questions (r50, reading)",
    ):
        assert f"- left out: {line}\n" in text
    csv = (tmp_path / "table1.csv").read_text()
    assert "mini,fastv" not in csv and "mini,r50,mini_attribute" in csv


def test_b3_another_checkpoint_stands_in_heading_captions_and_command(make_plan, tmp_path):
    other = tmp_path / "my weights"
    shutil.copytree(ROOT / "mini" / "checkpoint", other)
    plan = make_plan(checkpoint=str(other))
    assert plan.cells[0].other == str(other)
    assert make_plan(checkpoint="mini/checkpoint").cells[0].other is None
    assert (
        make_plan(checkpoint="mini/checkpoint").cells[0].config_hash == plan.cells[0].config_hash
    )  # the same weights
    arguments = [
        "--table",
        "1",
        "--rows",
        "r50",
        "--checkpoint",
        str(other),
        "--dtype",
        "bfloat16",
        "--batch-size",
        "2",
    ]
    told = run.command(run.parser().parse_args(arguments))
    assert f"--checkpoint '{other}' --batch-size 2 --dtype bfloat16" in told.replace("--rows r50 ", "")
    output = tmp_path / "table1"
    run.fill(plan.cells, plan.manifest, output, settings_for(output), ["cpu"], told, ratio_as_score)
    text = report.write_report(output, TABLE)
    assert (
        f"## The embedded model, checkpoint {other}, measured" in text and f"--checkpoint '{other}'" in text
    )
    assert f"checkpoint {other}" in (tmp_path / "table1" / "table1.tex").read_text().replace(r"\_", "_")


def test_b3_cells_of_other_versions_are_shown_as_such(tmp_path):
    cells = [stored(TABLE, row, "mini_attribute", share(90)) for row in ("vanilla", "fastv", "r50")]
    cells[2]["versions"] = {"python": "3", "torch": "1"}
    text = report.write_report(put(tmp_path, *cells), TABLE)
    assert "Libra-Merging, 50%" in table_rows(text, "## The embedded model")
    assert "- versions: python 3, torch 2\n- other versions: python 3, torch 1 (r50, attribute)\n" in text


# Lost or stuck.


def test_c1_one_bad_line_costs_only_its_own_answer(tmp_path):
    path = tmp_path / "log.jsonl"
    with log_at(path) as log:
        log.append([{"task": "t", "doc_id": i, "answer": str(i)} for i in range(6)])
    lines = path.read_bytes().splitlines(True)
    lines[1], lines[3] = b'{"task": "t", "doc\n', b"\xff\x00 12\n"
    lines[4] = b'["a list"]\n'
    path.write_bytes(b"".join(lines))
    with log_at(path) as log:
        assert [log.get("t", i) is not None for i in range(6)] == [True, False, True, False, False, True]
        log.append([{"task": "t", "doc_id": 3, "answer": "again"}])
    with log_at(path) as log:
        assert len(log) == 4 and log.get("t", 3)["answer"] == "again"


WRONG = {
    "empty": lambda cell: {},
    "list": lambda cell: [cell],
    "old": lambda cell: {**cell, "format": 1},
    "no score": lambda cell: {key: value for key, value in cell.items() if key != "score"},
    "short": lambda cell: {**cell, "correct": cell["correct"][:-1]},
    "no answers": lambda cell: {**cell, "n": 0, "correct": []},
    "words": lambda cell: {**cell, "correct": ["yes"] * 4},
    "nan": lambda cell: {**cell, "score": float("nan")},
    "status": lambda cell: {**cell, "status": "done"},
    "machine": lambda cell: {**cell, "machine": {}},
    "relabelled": lambda cell: {**cell, "settings": {**cell["settings"], "data": {"sha256": "other"}}},
}


@pytest.mark.parametrize("damage", ["torn", *WRONG])
def test_c3_a_cell_that_cannot_be_read_is_an_empty_cell(damage, tmp_path):
    cells = [stored(TABLE, row, "mini_attribute", share(50, 4)) for row in ("vanilla", "r50")]
    place = put(tmp_path / "table1", *cells) / "cells" / "mini.r50.mini_attribute.json"
    assert read_cell(place) == cells[1]
    text = json.dumps(cells[1])
    place.write_text(text[: len(text) // 2] if damage == "torn" else json.dumps(WRONG[damage](cells[1])))
    assert (
        read_cell(place) is None
        and read_cells(tmp_path / "table1")["mini.vanilla.mini_attribute"] == cells[0]
    )
    if damage not in ("torn", "empty"):
        return  # the report reads them all alike
    text = report.write_report(tmp_path / "table1", TABLE)
    assert shown_rows(text) == ["vanilla"]
    assert "- left out: mini.r50.mini_attribute, which cannot be read" in text


def test_c3_a_damaged_cell_is_computed_again_and_the_others_are_kept(tmp_path):
    cells, output = [cell_of("vanilla"), cell_of("r50")], tmp_path / "table1"
    fill(cells, output)
    cells[1].path(output).write_text("{}")
    (output / "cells" / ".mini.r50.mini_attribute.json.7-7.tmp").write_text("of a run that was killed")
    assert fill(cells, output) == (0, []) and all(cell.is_finished(output) for cell in cells)
    calls = {path.name: path.stat().st_size for path in (output / "calls").iterdir()}
    assert calls == {"mini.vanilla.mini_attribute": 1, "mini.r50.mini_attribute": 2}
    assert sorted(path.name for path in (output / "cells").iterdir()) == sorted(
        cell.path(output).name for cell in cells
    )


# Found later in the same round.


def test_e5_a_record_without_an_answer_is_computed_again(tmp_path):
    path = tmp_path / "log.jsonl"
    with log_at(path) as log:
        log.append(
            [
                {"task": "t", "doc_id": i, **answer}
                for i, answer in enumerate(({"answer": "a"}, {}, {"answer": 7}))
            ]
        )
    with log_at(path) as log:
        assert log.get("t", 0) and log.get("t", 1) is None and log.get("t", 2) is None


def test_e5_a_cell_is_on_the_disk_when_it_is_finished(tmp_path, monkeypatch):
    synced, plain = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    fill([cell_of("vanilla")], tmp_path / "table1")
    cells = str(tmp_path / "table1" / "cells")
    assert synced[-1] == cells and synced[-2].startswith(f"{cells}/.mini.vanilla.mini_attribute.json.")
    with log_at(tmp_path / "samples" / "log.jsonl") as log:
        assert synced[-1] == str(tmp_path / "samples")  # its name
        log.append([{"task": "t", "doc_id": 0, "answer": "a"}])
    assert synced[-1] == str(tmp_path / "samples" / "log.jsonl")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository in the place of ours."""
    folder = tmp_path / "checkout"
    (folder / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr("libra.utils.provenance.REPOSITORY", folder)
    (folder / "code.py").write_text("1")

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    for arguments in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        git(*arguments)
    return folder


def test_e9_what_is_published_comes_from_a_clean_commit(checkout, tmp_path, capsys):
    require_clean()
    fill_results(tmp_path / "table1")
    published = checkout / "docs" / "results"
    report.write_report(tmp_path / "table1", TABLE, publish=published)
    report.write_report(tmp_path / "table1", TABLE, publish=published)  # what was published is no change
    for suffix in ("md", "csv", "tex", "png"):
        assert (published / f"table1.{suffix}").read_bytes() == (
            tmp_path / "table1" / f"table1.{suffix}"
        ).read_bytes()
    before = (published / "table1.md").read_bytes()
    (checkout / "new.py").write_text("2")
    with pytest.raises(SystemExit) as stopped:
        run.main(["--table", "1", "--publish", "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert error.startswith(
        "error: what is published names its commit, and this checkout differs from it (new.py): commit the"
    )
    with pytest.raises(ValueError, match="differs from it"):
        report.write_report(tmp_path / "table1", TABLE, publish=published)
    assert (published / "table1.md").read_bytes() == before


def test_e9_cells_of_an_edited_checkout_are_not_published(checkout, tmp_path):
    from eval.cells import code

    put(tmp_path / "table1", stored(TABLE, "vanilla", "mini_attribute", share(90), commit="abc-dirty"))
    with pytest.raises(
        ValueError,
        match="1 of 1 cells were computed in an edited checkout, mini.vanilla.mini_attribute at abc-d",
    ):
        report.write_report(tmp_path / "table1", TABLE, publish=tmp_path / "published")
    assert not (tmp_path / "published").exists() and (tmp_path / "table1" / "table1.md").exists()
    # Unless all that was edited took no part in the answers.
    own = stored(
        TABLE, "vanilla", "mini_attribute", share(90), run={**RUN, "code": code()}, commit="abc-dirty"
    )
    text = report.write_report(put(tmp_path / "table1", own), TABLE, publish=tmp_path / "published")
    assert "dirty" not in text and (tmp_path / "published" / "table1.md").exists()
    (checkout / "code.py").write_text("2")
    assert "- commit: abc-dirty" in report.write_report(tmp_path / "table1", TABLE)


def test_e9_no_error_is_told_that_the_answers_do_not_carry(tmp_path):
    cells = [
        stored(TABLE, "vanilla", "mini_attribute", share(100, 6)),
        stored(TABLE, "r50", "mini_attribute", [1.0, 0.0] * 3),
        stored(TABLE, "vanilla", "mini_reading", share(100)),
        stored(TABLE, "r50", "mini_reading", share(90)),
    ]
    text = report.write_report(put(tmp_path, *cells), TABLE)
    rows = table_rows(text, "## The embedded model")
    column = {name: number for number, name in enumerate(rows[""])}
    assert (
        rows["vanilla"][column["attribute"]] == "100.0"
        and rows["Libra-Merging, 50%"][column["attribute"]] == "50.0"
    )
    assert (
        rows["vanilla"][column["reading"]] == "100.0"
        and rows["Libra-Merging, 50%"][column["reading"]] == "90.0 ± 3.0"
    )
    assert "± 0.0" not in text and "nan" not in text


def test_e9_rows_that_were_not_chosen_are_not_printed(tmp_path):
    cells = [stored(TABLE, row, "mini_attribute", share(50)) for row in ("vanilla", "r50")]
    cells.append(stored(TABLE, "r50", "gqa", share(60), suite="llava7b"))
    text = report.write_report(put(tmp_path, *cells), TABLE)
    assert shown_rows(text) == ["vanilla", "Libra-Merging, 50%"]
    part = text[text.index("### LLaVA-1.5-7B") : text.index("### LLaVA-1.5-13B")]
    assert part.count("| ours |") == 1 and part.count("| paper's |") == 5  # the paper's figures stay
    assert (
        text[text.index("### LLaVA-1.5-13B") : text.index("### LLaVA-NeXT")].count("| ours |") == 5
    )  # nothing was run


def test_e9_a_dry_run_tells_the_time_from_the_published_tables(tmp_path, monkeypatch, capsys):
    entry = {"file": "x", "file_sha256": "f", "content_sha256": "c", "majority_share": 0.2}
    manifest = {"questions": 300, "seed": 1, "sha256": "feed", "types": dict.fromkeys(TYPES, entry)}
    monkeypatch.setattr("libra.mini.benchmark.write_benchmark", lambda _: manifest)
    assert run.main(["--table", "6", "--dry-run", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert (
        "judging by the tables in docs/results, on their machine, and FLOPs" in told
        and "cannot be told" not in told
    )


# Tracebacks and unclear sentences.


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, status, sentence",
    [
        (
            ["--tasks", "mini_attribute", "--model_args", "config=nowhere.yaml"],
            1,
            "error: nowhere.yaml: there is no such file",
        ),
        (
            ["--tasks", "mini_atribute", "--model_args", "config=configs/mini/r50.yaml"],
            1,
            "error: Tasks not found: mini_atribute",
        ),
        (["--model_args", "config=configs/mini/r50.yaml"], 1, "error: name tasks with --tasks"),
        (["--config", "nowhere.yaml"], 2, "error: Config file does not exist: nowhere.yaml"),
        (["--tasks", "list"], 0, ""),
    ],
)
def test_d8_the_harness_does_not_exit_with_0_after_an_error(arguments, status, sentence):
    command = [sys.executable, "-m", "libra.lmms", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr and (not sentence or "Traceback" not in done.stderr)
