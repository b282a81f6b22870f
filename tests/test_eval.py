"""The runner, the sample log and the report, with a stand-in for the model; the real harness under
``slow``."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from eval_cells import RUN, rows, share, stored
from eval_stand_ins import broken, stand_in

from eval import report, run, statistics
from eval.cells import Cell, read_cells, read_json
from eval.harness import Settings, summary, trace_summary
from eval.measured import Measured
from eval.pool import PoolError
from eval.statistics import Figure
from eval.suites import get_table, get_task, row_files
from libra.config import Compression
from libra.flops import cost
from libra.identity import row_identity
from libra.lmms.samples import SampleLog
from libra.mini.questions import TYPES
from libra.rows import Row, get_model

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = get_table(1)


def log_at(path: Path, settings: str = "s") -> SampleLog:
    return SampleLog(path, settings, lambda record: isinstance(record.get("answer"), str))


def test_log_keeps_records_and_cuts_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    with log_at(path) as log:
        log.append([{"task": "t", "doc_id": 0, "answer": "a"}, {"task": "t", "doc_id": 1, "answer": "é"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (1, first - 1, first, first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with log_at(path) as log:
            assert len(log) == whole[:cut].count(b"\n") + (
                cut in (first - 1, len(whole) - 1)
            )  # only its line's end is missing
            log.append([{"task": "t", "doc_id": 7, "answer": "z"}])
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
        with log_at(path) as log:
            assert log.get("t", 7)["answer"] == "z" and log.get("u", 7) is None


def test_of_two_records_the_later_counts_and_those_of_other_settings_do_not(tmp_path):
    path = tmp_path / "log.jsonl"
    for answer, settings in (("a", "s"), ("b", "s"), ("c", "other")):
        with log_at(path, settings) as log:
            log.append([{"task": "t", "doc_id": 0, "answer": answer}])
    with log_at(path) as log:
        assert log.get("t", 0)["answer"] == "b" and len(log) == 1
    with log_at(path, "third") as log:
        assert len(log) == 0


def cell_of(row: str, task: str = "mini_attribute", limit: int | None = 4, data: str = "feed") -> Cell:
    spec = rows(TABLE, "mini").get(row, Row("mini", Compression(method="vanilla"), name=row))
    own = {**row_identity(spec), "blind": False, **({} if row in rows(TABLE, "mini") else {"name": row})}
    settings = {"row": own, "task": {"name": task}, "data": {"sha256": data}, "run": {**RUN, "limit": limit}}
    return Cell("mini", row, task, spec, "weights", settings)


def fill(cells, output, devices=("cpu", "cpu"), factory=stand_in) -> int:
    settings = Settings(str(output), "cpu", 1, 4, "float32", False)
    output.mkdir(exist_ok=True)
    failed, unwritten = run.fill(
        cells, {"questions": 4}, output, settings, devices, "python -m eval.run --table 1", factory
    )
    assert not unwritten
    return failed


def calls(output) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (output / "calls").iterdir()}


def test_a_failed_cell_and_a_dead_worker_cost_only_their_own_cells(tmp_path, capfd):
    cells = [cell_of(row) for row in ("vanilla", "raises", "dies", "fastv", "r50")]
    assert fill(cells, tmp_path / "out") == 2
    stored = {cell.row: read_json(cell.path(tmp_path / "out")) for cell in cells}
    assert [row for row, cell in stored.items() if cell["status"] == "ok"] == ["vanilla", "fastv", "r50"]
    assert stored["raises"]["reason"] == "no such thing"
    assert stored["dies"]["reason"] == "the worker process died (signal 9)"
    assert stored["r50"]["correct"] == [1.0, 0.0, 1.0, 0.0] and stored["r50"]["machine"]["processes"] == 2
    assert "chatter" not in capfd.readouterr().out


def test_a_row_that_fails_without_a_word_costs_only_its_own_times(tmp_path):
    pytest.importorskip("lmms_eval")
    from types import SimpleNamespace

    import torch

    from eval.turns import InTurns, is_timing, timing

    def set_row(row):
        if row == "bad":
            raise NotImplementedError

    record = {"seconds": 0.5, "cache_bytes": 8}
    model = SimpleNamespace(
        device=torch.device("cpu"), set_row=set_row, records={0: record}, generate_until=lambda requests: [""]
    )
    request = SimpleNamespace(args=("?", {}, None, 0, "task", "test"))
    with SampleLog(tmp_path / "log.jsonl", "s", is_timing) as log:
        timed = InTurns(model, {"bad": "bad", "good": "good"}, log, lambda count: None)
        timed.task_dict = {}
        timed.generate_until([request])
    rows = timing(timed)["turns"]
    assert rows["bad"] == {"reason": "NotImplementedError: no message"} and rows["good"]["seconds"] == [0.5]


def test_finished_cells_are_kept_and_others_done_again(tmp_path):
    output = tmp_path / "out"
    cells = [cell_of("vanilla"), cell_of("raises"), cell_of("fastv")]
    fill(cells, output, devices=["cpu"])
    fill(cells, output, devices=["cpu"])
    assert calls(output) == {
        "mini.vanilla.mini_attribute": 1,
        "mini.raises.mini_attribute": 2,
        "mini.fastv.mini_attribute": 1,
    }
    cells[2].path(output).write_text('{"status": "o')
    fill([cell_of("vanilla", limit=3), cell_of("fastv")], output, devices=["cpu"])
    fill([cell_of("vanilla", limit=3, data="other")], output, devices=["cpu"])
    assert calls(output) == {
        "mini.vanilla.mini_attribute": 3,
        "mini.raises.mini_attribute": 2,
        "mini.fastv.mini_attribute": 2,
    }


def test_finished_cells_need_no_worker_and_a_broken_one_is_one_sentence(tmp_path):
    fill([cell_of("vanilla")], tmp_path, devices=["cpu"])
    assert fill([cell_of("vanilla")], tmp_path, factory=broken) == 0
    with pytest.raises(PoolError, match="^RuntimeError: the model does not load$"):
        fill([cell_of("fastv")], tmp_path, factory=broken)
    assert not cell_of("fastv").path(tmp_path).exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--rows", "r50,r51"], "error: row r51 is unknown"),
        (["--tasks", "colour"], "error: task colour is not a task"),
        (["--limit", "0"], "error: argument --limit: 0 is not a whole number"),
        (["--checkpoint", "mini/nowhere"], "error: checkpoint mini/nowhere is missing"),
        (["--suite", "qwen2vl7b"], "error: suite qwen2vl7b is not in table 1; use one of mini, llava7b"),
        (["--suite", "llava7b"], "error: checkpoint liuhaotian/llava-v1.5-7b is not in the local cache"),
    ],
)
def test_what_cannot_run_says_why_and_writes_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    output = ["--output", str(tmp_path / "out"), "--benchmark", str(tmp_path / "benchmark")]
    with pytest.raises(SystemExit) as stopped:
        run.main(["--table", "1", "--device", "cpu", *output, *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(sentence) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_statistics_are_numpys():
    rng = np.random.default_rng(0)
    ours, vanilla = rng.random(300) < 0.7, rng.random(300) < 0.8
    figure = Figure(70.0, 2.0, 300)
    pair = statistics.paired_difference(ours, vanilla)
    difference = ours.astype(float) - vanilla
    assert pair.value == pytest.approx(100 * difference.mean())
    assert pair.stderr == pytest.approx(100 * np.std(difference, ddof=1) / np.sqrt(300))
    mean = statistics.mean_of([figure, pair])
    assert mean.value == pytest.approx((figure.value + pair.value) / 2)
    assert mean.stderr == pytest.approx(np.hypot(figure.stderr, pair.stderr) / 2)
    assert statistics.mean_of([figure, Figure(1.0)]).stderr is None
    assert statistics.paired_difference(ours, ours) == Figure(0.0, 0.0, 300)
    with pytest.raises(ValueError, match="differ in number"):
        statistics.paired_difference(ours, vanilla[1:])


def test_a_cells_summary_counts_documents_in_order():
    samples = [{"doc_id": i, "exact_match": value} for i, value in enumerate((1.0, 0.0, 1.0, 1.0))]
    records = [
        {"tokens": [8, 4], "seconds": 0.5},
        {"tokens": [6, 3], "seconds": 0.25},
        {"tokens": [], "seconds": 1.0},
    ]
    cell = summary(0.75, get_task("mini_attribute"), samples, records)
    assert (
        cell["score"] == 75 and cell["correct"] == [1, 0, 1, 1] and cell["n"] == 4 and cell["seconds"] == 1.75
    )
    assert cell["stderr"] == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 4))
    assert cell["tokens_per_layer"] == [7.0, 3.5] and cell["trace"] == [] and cell["groups"] == {}
    mme = summary(
        1500.0, get_task("mme"), [{"doc_id": 0, "mme_perception_score": {"score": 1}}, {"doc_id": 1}], []
    )
    assert (mme["score"], mme["stderr"], mme["correct"], mme["tokens_per_layer"]) == (
        1500.0,
        None,
        None,
        None,
    )


def test_parts_of_a_benchmark_have_their_own_score():
    durations = ["short", "short", "long", "long", "long"]
    samples = [
        {"doc_id": i, "videomme_perception_score": {"duration": duration, "score": float(i in (0, 3))}}
        for i, duration in enumerate(durations)
    ]
    cell = summary(40.0, get_task("videomme"), samples, [])
    assert cell["score"] == 40 and cell["correct"] == [1, 0, 0, 1, 0]
    assert cell["stderr"] == pytest.approx(100 * (0.4 * 0.6 / 5) ** 0.5)
    assert list(cell["groups"]) == ["short", "long"] and cell["groups"]["short"]["score"] == 50
    third = {"score": 100 / 3, "stderr": 100 * (2 / 9 / 3) ** 0.5, "n": 3}
    assert cell["groups"]["long"] == pytest.approx(third)


def test_a_trace_is_averaged_over_samples():
    traces = [[[0.9, 0.0], [0.5, 0.62]], [[0.7, 0.2], [None, 1.0]]]
    first, second = trace_summary(traces, (2, 5))
    assert (
        first["layer"] == 2
        and first["similarity"] == pytest.approx(0.8)
        and first["share"] == pytest.approx(0.1)
    )
    assert first["similarity_stderr"] == pytest.approx(0.1 / 2**0.5)
    assert second["similarity"] == 0.5 and second["similarity_stderr"] == 0
    assert [i for i, count in enumerate(second["histogram"]) if count] == [12, 19] and sum(
        first["histogram"]
    ) == 2
    nothing = trace_summary([[[None, None]]], (1,))[0]
    assert nothing["similarity"] is None and nothing["share"] is None and sum(nothing["histogram"]) == 0
    assert trace_summary([], (1,)) == []


@pytest.mark.parametrize(
    "vanilla, majority, blind, expected",
    [
        (80.0, 50.0, 55.0, True),
        (79.9, 10.0, 10.0, False),
        (80.0, 55.1, 10.0, False),
        (90.0, 10.0, 65.1, False),
        (90.0, 65.0, 65.0, True),
    ],
)
def test_learned(vanilla, majority, blind, expected):
    assert statistics.is_learned(vanilla, majority, blind) is expected


def fill_results(folder: Path, compressed: int = 70, failed: bool = False) -> None:
    """All mini cells: vanilla 90% but for colour (60%), blind 30%, the others ``compressed``."""
    others = ("fastv", "turbo", "r50", "r67", "random", "windowed_fastv")
    rows = {"vanilla": 90, "blind": 30, **dict.fromkeys(others, compressed)}
    (folder / "cells").mkdir(parents=True)
    for row, percent in rows.items():
        for kind in TYPES:
            cell = stored(
                TABLE, row, f"mini_{kind}", share(60 if (row, kind) == ("vanilla", "attribute") else percent)
            )
            if failed and (row, kind) == ("r50", "reading"):
                cell = {**cell, "status": "failed", "reason": "OutOfMemoryError: too large"}
            (folder / "cells" / f"mini.{row}.mini_{kind}.json").write_text(json.dumps(cell))
    benchmark = {
        "questions": 100,
        "seed": 1,
        "sha256": "feed",
        "types": {kind: {"majority_share": 0.25} for kind in TYPES},
    }
    (folder / "benchmark.json").write_text(json.dumps(benchmark))


def table_rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first Markdown table after a heading: first column → the others."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *others = (part.strip() for part in line.strip("|").split("|"))
        rows[first] = others
    return rows


def test_report_shows_measured_and_printed_figures(tmp_path):
    fill_results(tmp_path)
    text = report.write_report(tmp_path, TABLE)
    mini = table_rows(text, "## The embedded model")
    assert mini[""][:3] == ["FLOPs", "reading", "reading small"] and mini[""][9] == "attribute †"
    assert mini["vanilla"][0] == "100%" and mini["vanilla"][1] == "90.0 ± 3.0"
    assert "seconds" not in mini[""] and "No method is recommended by it" in text
    assert mini["vanilla"][-2] == f"90.0 ± {3 / 12**0.5:.1f}"  # Avg leaves attribute out
    pair = 100 * np.std([1.0] * 20 + [0.0] * 80, ddof=1) / 10 / 12**0.5
    assert mini["Libra-Merging, 50%"][-1] == f"-20.0 ± {pair:.1f} *"  # more than two standard errors
    assert (
        mini["most frequent answer"][1] == "25.0" and mini["vanilla, grey images (blind)"][1] == "30.0 ± 4.6"
    )
    spec, c = get_model("mini"), Row.from_yaml(row_files(TABLE, "mini")["r50"]).compression
    plain = Compression(method="vanilla")
    assert (
        mini["Libra-Merging, 50%"][0]
        == f"{100 * cost(spec, c).total / cost(spec, plain).total:.0f}%"
        != "100%"
    )
    paper = table_rows(text, "### LLaVA-1.5-7B")
    assert paper["Libra-Merging, 50%"][:4] == ["1.78 T (47%)", "1.78 T (47%)", "paper's", "61.3"]
    assert paper[""][2:] == ["ours"] + [""] * 8  # the last row without a name: not measured
    for line in (
        "commit: abc",
        "A CPU, 2 cores, 2 processes",
        "sha256 feed",
        "`python -m eval.run --table 1`",
    ):
        assert line in text
    assert str(tmp_path) not in text and os.uname().nodename not in text
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")


def test_csv_has_a_line_a_figure(tmp_path):
    fill_results(tmp_path)
    report.write_report(tmp_path, TABLE)
    with open(tmp_path / "table1.csv") as file:
        lines = list(csv.DictReader(file))
    (line,) = [x for x in lines if (x["suite"], x["row"], x["task"]) == ("mini", "fastv", "mini_relation")]
    assert float(line["score"]) == 70 and float(line["difference"]) == -20
    assert line["n"] == "100" and line["source"] == "measured"
    (line,) = [x for x in lines if (x["suite"], x["row"], x["task"]) == ("next8b", "turbo", "mme")]
    assert (line["source"], line["score"]) == ("paper", "1505.3")


def test_what_counts_is_decided_without_the_compressed_rows(tmp_path):
    chosen = []
    for compressed in (0, 100):
        fill_results(tmp_path / str(compressed), compressed)
        majority = {f"mini_{kind}": 25.0 for kind in TYPES}
        chosen.append(
            Measured(TABLE, "mini", list(read_cells(tmp_path / str(compressed)).values()), majority).averaged
        )
    assert chosen[0] == chosen[1] == [f"mini_{kind}" for kind in TYPES if kind != "attribute"]


def test_a_failed_and_a_missing_cell_show_and_leave_the_averages_empty(tmp_path):
    fill_results(tmp_path, failed=True)
    (tmp_path / "cells" / "mini.turbo.mini_position.json").unlink()
    text = report.write_report(tmp_path, TABLE)
    mini = table_rows(text, "## The embedded model")
    assert mini["Libra-Merging, 50%"][1] == "failed (1)" and mini["Libra-Merging, 50%"][-2:] == ["", ""]
    assert "(1) Libra-Merging, 50%, reading: failed: OutOfMemoryError: too large" in text
    assert mini["Turbo"][5] == "" and mini["Turbo"][-2:] == ["", ""] and mini["FastV"][-2]


def test_report_of_an_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 2 and "holds no cells" in capsys.readouterr().err
    (tmp_path / "cells").mkdir()
    assert report.main([str(tmp_path)]) == 0
    assert "No cell has been computed yet." in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model untrained: answers are noise, but the same noise every time."""
    from mini.build import build_clip, build_model, build_tokenizer, save_clip

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer()
    save_clip(build_clip(tokenizer, 0), tokenizer, folder / "vision_tower")
    model = build_model(folder / "vision_tower", tokenizer, 0)
    model.config.mm_vision_tower = "vision_tower"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(checkpoint, output, benchmark, *more) -> list[str]:
    return [
        sys.executable,
        "-m",
        "eval.run",
        "--table",
        "1",
        "--rows",
        "vanilla,r50,blind",
        "--tasks",
        "reading,yes_no",
        "--limit",
        "24",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--checkpoint",
        str(checkpoint),
        "--output",
        str(output),
        "--benchmark",
        str(benchmark),
        *more,
    ]


def answers(output: Path) -> dict[str, dict[int, tuple]]:
    """Of each sample file its finished samples: document → what was answered."""
    found = {}
    for path in (output / "samples").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
        found[path.name] = {line["doc_id"]: (line["answer"], tuple(line["tokens"])) for line in lines}
    return found


SEED = 20_261_121  # of the moments of the kills


@pytest.mark.slow
def test_three_kills_lose_no_finished_sample_and_change_no_number(checkpoint, tmp_path):
    data, moments = tmp_path / "benchmark", random.Random(SEED)
    whole, output = (
        tmp_path / "whole" / "table",
        tmp_path / "killed" / "table",
    )  # apart, so that no cell is reused
    first = subprocess.run(command(checkpoint, whole, data), cwd=REPOSITORY, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    finished = answers(whole)
    batches = sum(len(records) for records in finished.values()) // 4
    kept: dict[str, dict] = {}
    for kill in range(3):
        # Few enough batches that every kill finds work left.
        goal = sum(map(len, kept.values())) // 4 + moments.randint(1, batches // 8)
        delay = moments.uniform(0, 0.3)
        runner = subprocess.Popen(
            command(checkpoint, output, data),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while runner.poll() is None and sum(map(len, answers(output).values())) < 4 * goal:
            time.sleep(0.02)
        time.sleep(delay)
        assert runner.poll() is None, f"kill {kill} came too late"
        runner.kill()  # the runner alone: its orphaned workers must leave by themselves
        runner.wait()
        assert runner.returncode == -9
        now = answers(output)
        for name, records in kept.items():
            assert records.items() <= now[name].items()  # nothing that was finished is lost or changed
        kept = now
    assert 0 < sum(map(len, kept.values())) < 4 * batches
    files = {path.name: path.read_bytes() for path in (output / "samples").glob("*.jsonl")}
    subprocess.run(command(checkpoint, output, data), cwd=REPOSITORY, check=True, capture_output=True)
    for name, before in files.items():  # the log was only added to, after its last whole line
        assert (output / "samples" / name).read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert answers(output) == finished and len(finished) == 6
    for path in (whole / "cells").iterdir():
        one, resumed = read_json(path), read_json(output / "cells" / path.name)
        assert one["n"] == 24
        for key in ("score", "correct", "tokens_per_layer", "trace", "config_hash"):
            assert one[key] == resumed[key]
        if ".r50." in path.name:
            assert one["tokens_per_layer"] == [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3
    again = subprocess.run(
        command(checkpoint, output, data), cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    assert "6 cells, 0 failed" in again.stderr


@pytest.mark.slow
def test_harness_command_line_from_a_plain_checkout(checkpoint, tmp_path):
    from libra.mini.benchmark import write_benchmark

    write_benchmark(tmp_path / "results" / "benchmark", 6)
    arguments = f"config={REPOSITORY}/configs/mini/r50.yaml,pretrained={checkpoint},blind=true"
    arguments += f",sample_log={tmp_path}/log.jsonl"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "libra.lmms",
            "--model_args",
            arguments,
            "--tasks",
            "mini_attribute",
            "--limit",
            "6",
            "--batch_size",
            "4",
            "--device",
            "cpu",
            "--output_path",
            str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    (result,) = (tmp_path / "out").rglob("*results.json")
    assert "exact_match,none" in json.loads(result.read_text())["results"]["mini_attribute"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_model_batches_text_only_rows_and_refuses_a_task_without_images(checkpoint, tmp_path):
    from types import SimpleNamespace

    from PIL import Image

    from libra.lmms.lmms_libra import LibraModel

    model = LibraModel(
        str(REPOSITORY / "configs/mini/r50.yaml"), pretrained=str(checkpoint), device="cpu", batch_size="3"
    )
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
    documents = [{"images": [Image.fromarray(image)]} for image in noise] + [{"images": []}]
    model.task_dict = {"t": {"test": documents}}
    options = {"max_new_tokens": 4, "until": ["\n\n"]}

    def request(i, text):
        return SimpleNamespace(args=(text, options, lambda doc: doc["images"], i, "t", "test"))

    texts = ("what color ?", "read all the digits in order .", "a", "how many ?", "a b")
    requests = [request(i, text) for i, text in enumerate(texts)]
    together = model.generate_until(requests)
    assert model.records["t", 0]["tokens"][-1] == 32 and model.records["t", 4]["tokens"] == []
    assert [model.generate_until([one])[0] for one in requests[:4]] == together[:4]
    assert options == {"max_new_tokens": 4, "until": ["\n\n"]}  # the harness's cache keys
    with pytest.raises(ValueError, match="task t gives no image"):
        model.generate_until([requests[4]])
    model.set_row(Row.from_yaml(REPOSITORY / "configs/mini/vanilla.yaml"))
    assert len(model.generate_until([requests[4]])) == 1
    model.set_row(Row.from_yaml(REPOSITORY / "configs/mini/r50.yaml"), blind=True)
    blind = model.generate_until(requests[:1])
    for document in documents[:4]:
        document["images"] = [Image.fromarray(255 - np.asarray(document["images"][0]))]
    assert model.generate_until(requests[:1]) == blind  # what the images show does not matter
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
