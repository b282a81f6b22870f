"""Every table's rows, the plan of a run, and what reports make of cells: reuse, a full disk, LaTeX, Avg, Sim,
times."""

import csv
import errno
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from eval_cells import ORIGIN, rows, share, stored
from eval_stand_ins import stand_in
from test_eval import cell_of, table_rows
from walk import walked

from eval import filling, report, run
from eval import plan as planning
from eval.cells import TURNS, check_unchanged, finished_elsewhere, read_cells, read_json
from eval.formats import Grid, escape, latex, markdown
from eval.harness import Settings, trace_summary
from eval.measured import Measured
from eval.statistics import Figure, Spread
from eval.suites import CONFIGS, SUITES, TABLES, SuiteRows, columns, get_table, get_task, row_files
from libra.config import ATTENTIONS, ConfigError
from libra.flops import cost
from libra.mini.films import FILM_TYPES
from libra.mini.questions import TYPES
from libra.rows import Row, get_model
from libra.utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
ASKED, FILMS = ([f"mini_{kind}" for kind in kinds] for kinds in (TYPES, FILM_TYPES))
PLACES = [(table, suite) for table in TABLES.values() for suite in ("mini", *table.suites)]
RATIO_PRINTED_HIGHER = {("next8b", 47): 46, ("next8b", 37): 36}


@pytest.mark.parametrize("table, suite", PLACES, ids=lambda value: getattr(value, "stem", value))
def test_rows_load_in_order_and_name_known_tasks_and_models(table, suite):
    files = row_files(table, suite)
    assert files and set(files) <= set(table.order)  # no row without its place
    assert list(SuiteRows(table, suite)) == [name for name in table.order if name in SuiteRows(table, suite)]
    assert next(iter(files)) == table.plain(next(iter(files)))
    titles = []
    for path in dict.fromkeys(files.values()):
        row = Row.from_yaml(path)
        row.compression.check_layers(get_model(row.model).layers)
        assert (
            row.tasks
            and [get_task(task) for task in row.tasks]
            and row.title != row.name
            or row.title == "vanilla"
        )
        assert (row.model == "mini") == (suite == "mini")
        titles.append(row.title)
    assert len(set(titles)) == len(titles)


def test_no_row_file_is_left_out():
    used = {path for table, suite in PLACES for path in row_files(table, suite).values()}
    assert used == {path for folder in {path.parent for path in used} for path in folder.glob("*.yaml")}


def test_tables_share_one_set_of_learned_types():
    """Or one of films: equal rows of different tables are one measurement. A table that asks less says so in
    its ``tasks``."""
    for table, suite in PLACES:
        if suite == "mini":
            found = [Row.from_yaml(path).tasks for path in row_files(table, suite).values()]
            all_of = [[kinds] * len(found) for kinds in (ASKED, FILMS)]
            assert found in all_of, f"{table.name}: its rows' tasks must all be {ASKED}, or all {FILMS}"


@pytest.mark.parametrize(
    "table, suite", [p for p in PLACES if p[1] != "mini"], ids=lambda value: getattr(value, "stem", value)
)
def test_computed_flops_are_the_printed_ones(table, suite):
    for path in row_files(table, suite).values():
        row = Row.from_yaml(path)
        if "flops" in row.paper:
            total = cost(get_model(row.model), row.compression).total
            assert f"{total / 1e12:.2f}" == f"{row.paper['flops']:.2f}", path.name
        if "percent" in row.paper:
            printed = RATIO_PRINTED_HIGHER.get((suite, row.paper["percent"]), row.paper["percent"])
            assert f"{100 * planning.flops_ratio(row.model, row.compression):.0f}" == f"{printed}", path.name
        # Every figure belongs to a column.
        names = {column.key for column in columns(row.tasks)} | {"table", "flops", "percent", "avg", "sim"}
        times = {f"{task}_{what}" for task in row.tasks for what in ("time", "memory", "latency")}
        assert set(row.paper) <= names | times, path.name


def test_rows_are_points_of_the_papers_grid():
    def row(name):
        return Row.from_yaml(CONFIGS / f"{name}.yaml")

    names = ("merging_r50", "hierarchical_r67", "pti_r67", "libra_r80")
    three = {name: row(f"table3/llava7b_{name}").compression for name in names}
    assert [(c.select, c.merge, c.layers) for c in three.values()] == [
        ("information", "average", (3,)),
        ("information", "average", (7, 15, 23)),
        ("intervals", "average", (7, 15, 23)),
        ("intervals", "igm", (7, 15, 23)),
    ]
    assert three["hierarchical_r67"].ratio == 2 / 3
    for layer, name in ((3, "prune"), (15, "merge")):
        c = row(f"table4/llava7b_{name}_l{layer}").compression
        assert (c.select, c.ratio, c.layers) == ("topk", 0.8, (layer,))
    assert row("table5/llava7b_igm").compression == row("table4/llava7b_igm_l15").compression
    assert row("table7/qwen2vl7b_fastv").attention == "eager"
    assert row("table7/qwen2vl7b_fastv_hybrid").attention == "flash_attention_2"
    # The same fraction of the depth: 3, 15, {7, 15, 23} of 32 layers are 1, 5, {2, 5, 8} of 12.
    mapped = {(): (), (3,): (1,), (15,): (5,), (7, 15, 23): (2, 5, 8)}
    for number in ("3", "4", "5", "6"):
        for name, path in row_files(get_table(number), "mini").items():
            other = row_files(get_table(number), "llava7b").get(
                name.replace("_l1", "_l3").replace("_l5", "_l15")
            )
            if other is not None:
                ours, theirs = Row.from_yaml(path).compression, Row.from_yaml(other).compression
                assert ours.layers == mapped[theirs.layers] and (ours.select, ours.merge, ours.ratio) == (
                    theirs.select,
                    theirs.merge,
                    theirs.ratio,
                )


def test_arena_sections_cost_the_same():
    table = get_table("arena")
    for heading, names in table.sections.items():
        if heading.startswith("after"):
            rows = [Row.from_yaml(row_files(table, "mini")[name]) for name in names]
            ratios = {planning.flops_ratio("mini", row.compression) for row in rows}
            assert len(ratios) == 1 and len(rows) >= 8
            assert sum(row.compression.select == "random" for row in rows) == 3
            assert len({row.compression for row in rows}) == len(rows)


def test_title_and_attention_of_a_row(tmp_path):
    path = tmp_path / "row.yaml"
    text = "model: mini\ncompression: {method: vanilla}\n"
    path.write_text(text)
    assert (Row.from_yaml(path).title, Row.from_yaml(path).attention) == ("row", "sdpa")
    for attention in ATTENTIONS:
        path.write_text(f"{text}attention: {attention}\ntitle: Vanilla, plain\n")
        assert (Row.from_yaml(path).title, Row.from_yaml(path).attention) == ("Vanilla, plain", attention)
    for line, words in (
        ("attention: flash", "attention: flash is unknown;.* use one of eager, sdpa, flash_attention_2"),
        ("attention: false", "attention: False is unknown"),
        ("title: 7", "title: 7 is not a name"),
    ):
        path.write_text(f"{text}{line}\n")
        with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {words}"):
            Row.from_yaml(path)


# Plans.


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A manifest in place of the written questions: a plan reads nothing else of them."""
    types = {
        kind: {"file": f"{kind}.parquet", "majority_share": 0.25, "file_sha256": "f", "content_sha256": kind}
        for kind in TYPES
    }
    return tmp_path_factory.mktemp("benchmark"), {"questions": 4, "seed": 1, "sha256": "feed", "types": types}


@pytest.fixture
def make_plan(benchmark, monkeypatch):
    folder, manifest = benchmark
    monkeypatch.setattr("libra.mini.benchmark.write_benchmark", lambda _: manifest)
    return lambda table, suite="mini", **more: planning.plan(
        get_table(table), suite, planning.Wanted(benchmark=folder, **more)
    )


def test_rows_that_say_the_same_share_their_cells_between_tables(make_plan):
    def hashes(table, **more):
        return {
            (cell.row, cell.task): cell.config_hash
            for cell in make_plan(table, tasks=["attribute"], **more).cells
        }

    one, three, four, five, arena = (hashes(name) for name in ("1", "3", "4", "5", "arena"))
    seven = hashes("7")
    color = "mini_attribute"
    assert one["vanilla", color] == three["vanilla", color] == arena["vanilla", color] == seven["sdpa", color]
    assert one["vanilla", color] != one["blind", color] and seven["vanilla", color] != seven["sdpa", color]
    assert one["turbo", color] == three["merging_r50", color]
    assert one["r50", color] == three["libra_r50", color] == arena["h50_libra", color]
    assert four["igm_l5", color] == five["igm", color]
    assert (
        three["pti_r50", color] == arena["h50_average", color]
    )  # select and merge by name or by method: the same answers
    assert len(set(arena.values())) == len(arena)


def test_cells_go_task_by_task_so_that_a_worker_still_has_the_pictures_features(make_plan):
    tasks = [cell.task for cell in make_plan("1").cells]
    assert tasks == [task for task in dict.fromkeys(tasks) for _ in range(tasks.count(task))]


def test_rows_of_ones_own_folder_come_last(make_plan, tmp_path, capsys):
    with pytest.raises(ValueError, match="there is no .yaml file in it"):
        make_plan("1", configs=tmp_path)
    (tmp_path / "half.yaml").write_text(
        "model: mini\ncompression: {method: fastv, layers: [5], ratio: 0.5}\n"
        "tasks: [mini_reading, mini_find]\n"
    )
    cells = make_plan("1", rows=["vanilla", "half"], tasks=["reading"], configs=tmp_path).cells
    assert [cell.name for cell in cells] == ["mini.vanilla.mini_reading", "mini.half.mini_reading"]
    assert list(make_plan("1", configs=tmp_path).rows)[-1] == "half"
    arguments = [
        "--table",
        "1",
        "--configs",
        str(tmp_path),
        "--rows",
        "half",
        "--output",
        str(tmp_path / "results"),
    ]
    assert run.main([*arguments, "--dry-run"]) == 0
    assert re.search(r"^half +half +5 +50%", capsys.readouterr().out, re.MULTILINE)
    assert f"--configs {tmp_path}" in run.command(run.parser().parse_args(arguments))
    (tmp_path / "r50.yaml").write_text((tmp_path / "half.yaml").read_text())
    with pytest.raises(ValueError, match="the table has a row r50 already; rename r50.yaml"):
        make_plan("1", configs=tmp_path)


def test_a_dry_run_of_table_e_trains_nothing(tmp_path, capsys):
    from mini import finetune
    from mini.finetuning import RECORD

    output = tmp_path / "tableE"
    command = ["whole_r50", "--output", str(output), "--steps", "7", "--processes", "2", "--batch", "3"]
    command += ["--benchmark", str(tmp_path / "benchmark"), "--dry-run"]
    assert finetune.main(command) == 0
    out = capsys.readouterr().out
    for kind in ("whole", "compressed"):
        assert f"fine-tuning, visual tokens {kind}: 7 steps of 6 conversations to train\n" in out
    assert re.search(r"^whole_r50 .* 44% +0 +0 +0 +13$", out, re.MULTILINE)
    assert "fine-tuned first: python -m mini.finetune" in out
    assert not list(tmp_path.rglob(RECORD)) and not list(tmp_path.rglob("*.png"))


def test_table_e_asks_every_checkpoint_and_shows_what_compressing_costs_each(make_plan, tmp_path):
    with pytest.raises(ValueError, match="python -m mini.finetune"):
        make_plan("E", rows=["whole_r50"])
    assert "mini.finetune" in make_plan("E", rows=["whole_r50"], dry=True).amiss
    for who in ("whole", "compressed"):
        (tmp_path / who).mkdir()
        (tmp_path / who / "config.json").write_text(json.dumps({"is": who}))
    wanted = dict(tasks=["attribute"], trained=tmp_path)
    plan = make_plan("E", **wanted)
    cells = {cell.row: cell for cell in plan.cells}
    assert list(cells) == get_table("E").order
    assert len({cell.config_hash for cell in cells.values()}) == 6
    assert cells["start_vanilla"].config_hash == make_plan("1", tasks=["attribute"]).cells[0].config_hash
    assert cells["whole_r50"].checkpoint == str(tmp_path / "whole")
    loaded = {**plan.run, "checkpoint": cells["whole_r50"].settings["row"]["trained"]["checkpoint"]}
    check = replace(cells["whole_r50"], data=None)
    check_unchanged(check, {name: loaded[name] for name in ("checkpoint", "code")})
    with pytest.raises(ValueError, match="the checkpoint changed"):
        check_unchanged(check, {name: plan.run[name] for name in ("checkpoint", "code")})
    right = dict(zip(cells, ([1, 1], [1, 0], [1, 1], [0, 0], [1, 1], [1, 1])))
    for name, cell in cells.items():
        figures = {"score": 50.0 * sum(right[name]), "stderr": None, "n": 2, "correct": right[name]}
        write_text(cell.path(tmp_path), json.dumps(cell.record({**result(2), **figures, **ORIGIN})))
    log = {"losses": [[1, 2.0], [2, 0.5]], "train_runtime": 90.0}
    setup = dict(samples=32, turns=3, steps=2, rows=16, learning_rate=3e-4, seed=1, processes=2)
    sizes = {"name": "tiny", "rows": 2, "visual": 64, "text": 8}
    cost = {"sizes": sizes, "pairs": 1, "cpu_seconds": [2.0, 1.0], "flops_ratio": 0.5}
    cost |= {"ratio": {"median": 0.5, "low": 0.4, "high": 0.6}, "peak_bytes": [3 << 20, 2 << 20]}
    noted = {"setup": setup, "training": {"whole": log, "compressed": log}, "cost": [cost]}
    write_text(tmp_path / "training.json", json.dumps(noted))
    text = report.write_report(tmp_path, get_table("E"), plan=plan)
    differences = text.partition("Paired differences to vanilla")[2].splitlines()
    lines = [line.split("|")[2:-1] for line in differences if line.startswith("| Libra-Merging, 50% |")]
    assert [[part.strip() for part in line if part.strip()] for line in lines] == [
        ["-50.0"],
        ["-100.0"],
        ["+0.0"],
    ]
    assert "- fine-tuned with all visual tokens: last training loss 0.500, 1.5 minutes" in text
    assert "| tiny | 2 × (64 + 8) | 2.000 | 1.000 | 0.500 (0.400 to 0.600, 1 pairs) |" in text
    (tmp_path / "whole" / "config.json").write_text("{}")  # fine-tuned again: its old cells do not fit
    again = make_plan("E", **wanted)
    newer = {**again.cells[2].record({**result(2), **ORIGIN}), "date": "2027"}
    write_text(again.cells[2].path(tmp_path), json.dumps(newer))
    assert "1 cell with another checkpoint (whole_r50, attribute)" in report.write_report(
        tmp_path, get_table("E"), plan=again
    )


def test_a_plan_reads_only_the_rows_that_it_computes(make_plan):
    with walked() as walk:
        plan = make_plan("1", rows=["r50"], tasks=["attribute"])
    assert walk.parses == 1 and len(plan.rows) > 1 and plan.rows["r50"] is plan.cells[0].spec


def test_timed_tables_have_one_cell_of_turns_a_task(make_plan):
    plan = make_plan("6", limit=3)
    turns = [cell for cell in plan.cells if cell.row == TURNS]
    assert [cell.task for cell in turns] == ASKED and {cell.limit for cell in turns} == {3}
    assert [name for name, _ in turns[0].turns] == [
        "vanilla",
        "fastv_r50",
        "libra_r50",
        "fastv_r80",
        "libra_r80",
    ]
    assert planning.samples(turns[0], plan.manifest) == 15 and make_plan("6").cells[-1].limit == 20
    assert "turns" not in turns[0].record({}) and str(CONFIGS) not in json.dumps(turns[0].record({}))


def result(n: int = 4, seconds: float = 1.0) -> dict:
    figures = {
        "score": 0.0,
        "stderr": 0.0,
        "n": n,
        "correct": [0.0] * n,
        "tokens_per_layer": None,
        "groups": {},
        "trace": [],
    }
    return {"status": "ok", **figures, "seconds": seconds, **ORIGIN}


def test_dry_run_tells_rows_cells_and_hours_and_writes_nothing(make_plan, tmp_path, monkeypatch, capsys):
    output = tmp_path / "table3"
    arguments = ["--table", "3", "--dry-run", "--output", str(output), "--device", "cpu", "--processes", "2"]
    assert run.main(arguments) == 0
    first = capsys.readouterr().out
    assert "Table 3: components · The embedded model · 143 cells" in first
    assert re.search(
        r"About \d+ (seconds|minutes) with 2 workers for 143 cells, judging by the tables in docs/results",
        first,
    )
    (line,) = [line.split() for line in first.splitlines() if line.startswith("libra_r67 ")]
    assert line[-8:] == ["5,", "8", "67%", "35%", "0", "0", "0", "13"]
    assert not list(tmp_path.iterdir())

    cells = [cell for cell in make_plan("3").cells if cell.row in ("vanilla", "merging_r50")]
    for cell in cells:  # vanilla lies in Table 1's folder, Merging in its own
        path = cell.path(tmp_path / ("table1" if cell.row == "vanilla" else "table3"))
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = 900.0 * planning.flops_ratio("mini", cell.spec.compression)
        path.write_text(json.dumps(cell.record(result(seconds=seconds))))
    half = next(cell for cell in make_plan("3").cells if cell.row == "libra_r80")
    half.samples_path(output).parent.mkdir()
    half.samples_path(output).write_text("")
    assert run.main(arguments) == 0
    second = capsys.readouterr().out
    counts = {
        line.split()[0]: line.split()[-4:]
        for line in second.splitlines()
        if line.endswith(tuple("0123456789"))
    }
    assert counts["vanilla"] == ["0", "13", "0", "0"] and counts["merging_r50"] == ["13", "0", "0", "0"]
    assert counts["libra_r80"] == ["0", "0", "1", "12"] and counts["pti_r67"] == ["0", "0", "0", "13"]
    there = ("vanilla", "merging_r50")
    left = [row for name, row in rows(get_table("3"), "mini").items() if name not in there]
    hours = sum(13 * 900.0 * planning.flops_ratio("mini", row.compression) for row in left) / 2 / 3600
    assert (
        f"About {hours:.1f} hours with 2 workers for 117 cells, judging by earlier cells and FLOPs" in second
    )


def test_dry_run_of_a_model_that_is_not_here(monkeypatch, capsys, tmp_path):
    def absent(name):
        raise planning.CheckpointError(f"checkpoint {name} is nowhere")

    monkeypatch.setattr(planning, "require_checkpoint", absent)
    for suite, table in (("qwen2vl7b", "7"), ("videollama2", "2")):
        assert (
            run.main(
                [
                    "--table",
                    table,
                    "--suite",
                    suite,
                    "--dry-run",
                    "--output",
                    str(tmp_path),
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        told = capsys.readouterr().out
        assert (
            SUITES[suite] in told
            and "It cannot run as it is: checkpoint" in told
            and "cannot be told" in told
        )
    assert "by image" not in told and "34%" in told


def test_estimate_scales_by_flops_and_knows_when_it_cannot(make_plan):
    plan = make_plan("5", tasks=["attribute", "reading"])
    assert planning.estimate(plan.cells, [], plan.manifest) is None
    vanilla = plan.cells[0].record(result(n=10, seconds=20.0))
    gone = {**vanilla["settings"]["row"], "compression": {"select": "gone"}}
    old = {**vanilla, "settings": {**vanilla["settings"], "row": gone}}
    told = planning.timed_cells([vanilla, old, plan.cells[0].record({"status": "failed"})])
    seconds = planning.estimate(plan.cells, told, plan.manifest)
    ratios = [planning.flops_ratio("mini", cell.spec.compression) for cell in plan.cells]
    assert seconds == pytest.approx(sum(4 * 2.0 * ratio for ratio in ratios))


# The runner.


def settings_for(output: Path) -> Settings:
    output.mkdir(parents=True, exist_ok=True)
    return Settings(str(output), "cpu", 1, 4, "float32", False)


def fill(cells, output, devices=("cpu",)) -> tuple[int, list[dict]]:
    return run.fill(cells, {"questions": 4}, output, settings_for(output), list(devices), "command", stand_in)


def test_equal_cells_of_other_tables_are_reused(tmp_path):
    fill([cell_of("vanilla")], tmp_path / "table1")
    fill([cell_of("raises")], tmp_path / "table2")
    twin = replace(cell_of("vanilla"), row="sdpa")
    assert twin.config_hash == cell_of("vanilla").config_hash and twin.name != cell_of("vanilla").name
    output = tmp_path / "table3"
    other_limit = replace(cell_of("vanilla", limit=3), row="other")
    assert fill([twin, other_limit, cell_of("raises")], output)[0] == 1
    assert sorted(path.name for path in (output / "calls").iterdir()) == [
        "mini.other.mini_attribute",
        "mini.raises.mini_attribute",
    ]
    stored = read_json(twin.path(output))
    assert stored["row"] == "sdpa" and stored["reused_from"] == "table1/mini.vanilla.mini_attribute"
    assert stored["correct"] == read_json(cell_of("vanilla").path(tmp_path / "table1"))["correct"]
    assert twin.is_finished(output)
    fill([replace(twin, row="flash")], tmp_path / "table4")  # of a cell that was reused itself
    assert (
        read_json(tmp_path / "table4/cells/mini.flash.mini_attribute.json")["reused_from"]
        == "table1/mini.vanilla.mini_attribute"
    )
    assert all(cell["row"] != TURNS for _, cell in finished_elsewhere(output).values())


def test_a_full_disk_costs_only_the_cells_it_hits(tmp_path, monkeypatch, capfd):
    output = tmp_path / "table1"
    full = {"mini.fastv.mini_attribute.json": 9, "mini.r50.mini_attribute.json": 1}  # the latter only once

    def short_of_room(write):
        def writes(path, content):
            if full.get(path.name, 0) > 0:
                full[path.name] -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, content)

        return writes

    monkeypatch.setattr(filling, "write_json", short_of_room(filling.write_json))
    cells = [cell_of(row) for row in ("vanilla", "fastv", "r50", "turbo")]
    failed, unwritten = fill(cells, output)
    assert failed == 1 and [cell.row for cell in cells if cell.is_finished(output)] == [
        "vanilla",
        "r50",
        "turbo",
    ]
    (lost,) = unwritten
    assert (
        lost["row"] == "fastv" and lost["reason"] == "its file could not be written: No space left on device"
    )
    assert "failed: mini.fastv.mini_attribute: its file could not be written" in capfd.readouterr().err
    assert not [path for path in (output / "cells").iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(report, "write_text", short_of_room(report.write_text))
    full["table1.csv"] = 1
    text = report.write_report(output, get_table(1), unwritten=unwritten)
    assert "FastV, attribute: failed: its file could not be written: No space left on device" in text
    assert text.endswith("\ntable1.csv could not be written: No space left on device\n")
    assert (output / "table1.md").exists() and not (output / "table1.csv").exists()
    full.clear()
    assert fill([cell_of("fastv")], output) == (0, [])


def test_a_sample_log_on_a_full_disk_fails_its_cell_alone(tmp_path):
    assert fill([cell_of("full"), cell_of("vanilla")], tmp_path / "table1")[0] == 1
    stored = read_json(cell_of("full").path(tmp_path / "table1"))
    assert stored["reason"] == "OSError: [Errno 28] No space left on device"
    assert cell_of("vanilla").is_finished(tmp_path / "table1")


def test_workers_take_the_devices_in_turn_and_a_replaced_one_keeps_its_own(tmp_path):
    cells = (
        [cell_of(f"device{number}") for number in range(6)]
        + [cell_of("dies")]
        + [cell_of(f"later{n}") for n in range(4)]
    )
    assert fill(cells, tmp_path / "out", devices=["cuda:0", "cuda:1", "cuda:2"])[0] == 1
    used = {
        (tmp_path / "out" / "devices" / path.name).read_text()
        for path in (tmp_path / "out" / "devices").iterdir()
    }
    assert used <= {"cuda:0", "cuda:1", "cuda:2"} and len(used) >= 2


def test_devices_of_workers(monkeypatch):
    assert run.worker_devices(["cuda:0", "cuda:1"], None) == ["cuda:0", "cuda:1"]
    assert run.worker_devices(["cuda:0", "cuda:1"], 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert run.worker_devices(["cpu"], 1) == ["cpu"] and 1 <= len(run.worker_devices(["cpu"], None)) <= 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert run.worker_devices(None, None) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert set(run.worker_devices(None, None)) == {"cpu"}


# Reports.


def stage(layer: int, similarity: float | None, part: float) -> dict:
    (told,) = trace_summary([[[similarity, part]], [[similarity, part]]], (layer,))
    return told


def results(
    folder: Path, table: str, percents: dict[str, int], tasks=ASKED, suite: str = "mini", **more
) -> Path:
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for row, percent in percents.items():
        for task in tasks:
            cell = stored(get_table(table), row, task, share(percent), suite, **more)
            (folder / "cells" / f"{suite}.{row}.{task}.json").write_text(json.dumps(cell))
    return folder


def cells_of(text: str, heading: str) -> list[list[str]]:
    """The lines of the Markdown table after a heading."""
    part = text[text.index(heading) :].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]


def test_differences_to_vanilla_and_to_the_row_above_and_their_marks(tmp_path):
    results(tmp_path, "5", {"vanilla": 90, "igm_pos": 70, "igm_neg": 71, "igm": 90})
    rows = table_rows(report.write_report(tmp_path, get_table(5)), "## The embedded model")
    vanilla, above = (rows[""].index(name) for name in ("Δ to vanilla", "Δ to the row above"))
    assert rows["IGM-pos"][vanilla].startswith("-20.0 ± ") and rows["IGM-pos"][vanilla].endswith(" *")
    assert (
        rows["IGM-pos"][above] == "" and rows["vanilla"][vanilla] == ""
    )  # the first compressed row has none above
    one = (
        100 * math.sqrt(0.01 * 0.99 * 100 / 99) / 10 / math.sqrt(13)
    )  # one question of 100 in each of thirteen types
    assert rows["IGM-neg"][above] == f"+1.0 ± {one:.1f} *"
    assert rows["IGM"][vanilla] == "+0.0"


def test_avg_rules(tmp_path):
    results(tmp_path, "3", {"vanilla": 60, "libra_r50": 50})
    results(
        tmp_path,
        "3",
        {"libra_r50": 40},
        ["gqa", "scienceqa_img", "mmbench_en_static", "mmbench_cn_static"],
        "llava7b",
    )
    results(tmp_path, "3", {"libra_r50": 100}, ["mme"], "llava7b", score=1500.0, stderr=None, correct=None)
    text = report.write_report(tmp_path, get_table(3))
    # Without a blind run every type counts, however badly it was learned.
    mini = table_rows(text, "## The embedded model")
    assert mini["vanilla"][mini[""].index("Avg")].startswith("60.0 ±")
    header, *lines = cells_of(text, "### LLaVA-1.5-7B")
    at = next(i for i, line in enumerate(lines) if "PTI + IGM, 50%" in line[0])
    printed, ours, apart = (line[header.index("Avg (without MME)")] for line in lines[at : at + 3])
    assert printed == "63.3" and ours.startswith("40.0 ±") and apart == "-23.3"
    assert [line[header.index("MME")] for line in lines[at : at + 3]] == ["1502.5", "1500.0", "-2.5"]
    # With one, Avg takes what vanilla and blind show to be learned.
    results(tmp_path / "arena", "arena", {"vanilla": 90, "blind": 30, "q75_libra": 50})
    results(tmp_path / "arena", "arena", {"blind": 70}, ["mini_attribute"])
    majority = dict.fromkeys(ASKED, 25.0)
    measured = Measured(get_table("arena"), "mini", list(read_cells(tmp_path / "arena").values()), majority)
    assert (
        measured.averaged == [task for task in ASKED if task != "mini_attribute"]
        and measured.decided["mini_attribute"] is False
    )


def test_sim_and_compensation_share_in_report_csv_and_picture(tmp_path):
    results(tmp_path, "4", {"vanilla": 90, "prune_l1": 50}, trace=[])
    results(tmp_path, "4", {"merge_l1": 60}, trace=[stage(1, 0.8433, 0.0)])
    results(tmp_path, "4", {"igm_l5": 60}, trace=[stage(5, 0.5955, 0.25)])
    results(tmp_path, "4", {"igm_l5": 60}, ASKED[:1], trace=[stage(5, 0.6955, 0.87)])
    text = report.write_report(tmp_path, get_table(4))
    rows = table_rows(text, "## The embedded model")
    sim, part = rows[""].index("Sim"), rows[""].index("into compensation")
    assert (rows["Pruning, layer 1"][sim], rows["Merging, layer 1"][sim]) == ("", "0.843")
    assert rows["Merging, layer 1"][part] == ""  # an average has no compensation token
    assert (
        rows["IGM, layer 5"][sim] == f"{(12 * 0.5955 + 0.6955) / 13:.3f}"
        and rows["IGM, layer 5"][part] == "30%"
    )
    assert "table4_traces" not in text  # one layer a row: the column says it all
    with open(tmp_path / "table4.csv") as file:
        lines = {(line["row"], line["task"]): line for line in csv.DictReader(file)}
    assert lines["igm_l5", "mini_attribute"]["similarity"] == "0.5955"
    assert lines["igm_l5", "mini_attribute"]["compensation_share"] == "0.2500"
    assert "0.8433" in text.split("### LLaVA-1.5-7B")[1]  # the paper's Sim


def timing(seconds: dict[str, float], n: int = 3, peak: int | None = None) -> dict:
    rows = {
        name: {
            "seconds": [taken * (i + 1) for i in range(n)],
            "cache_bytes": 1000 * taken,
            "peak_bytes": peak,
        }
        for name, taken in seconds.items()
    }
    return {"turns": rows, "score": None, "stderr": None, "correct": None, "n": n}


def test_times_are_ratios_on_the_same_questions(tmp_path):
    names = ["vanilla", "fastv_r50", "libra_r50", "fastv_r80", "libra_r80"]
    results(tmp_path, "6", dict.fromkeys(names, 50))
    turns = timing(dict(zip(names, (2.0, 1.0, 1.5, 0.5, 0.5))))
    turns["turns"]["fastv_r80"] = {"reason": "ImportError: no flash-attn"}
    results(tmp_path, "6", {TURNS: 0}, **turns)
    text = report.write_report(tmp_path, get_table(6))
    rows = table_rows(text, "## The embedded model")
    column = {name: rows[""].index(name) for name in rows[""]}
    libra = rows["Libra-Merging, 50%, eager"]
    assert (
        libra[column["time, of vanilla's"]] == "0.75 (0.75–0.75)"
        and libra[column["cache, of vanilla's"]] == "75%"
    )
    assert libra[column["seconds a question"]].startswith("3.0000 (")
    assert rows["FastV, 80%, eager"][column["seconds a question"]] == "failed (1)"
    assert "(1) FastV, 80%, eager, timing: failed: ImportError: no flash-attn" in text
    drawn = (tmp_path / "table6.svg").read_text(encoding="utf-8")
    assert "time of a question" in drawn and "Libra-Merging, 50%, eager" in drawn and "FLOPs" not in drawn
    assert "FastV, 80%, eager" not in drawn and "![Accuracy against time](table6.png)" in text
    assert "over 39 questions" in text and Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)


def test_times_of_the_papers_models(tmp_path):
    scores = {"score": 1700.0, "stderr": None, "correct": None, "n": 2374}
    results(tmp_path, "7", {"vanilla": 50, "libra_hybrid": 50}, ["mme"], "qwen2vl7b", **scores)
    results(
        tmp_path,
        "7",
        {TURNS: 0},
        ["mme"],
        "qwen2vl7b",
        **timing({"vanilla": 0.2, "libra_hybrid": 0.1}, peak=17 * 2**30),
    )
    lines = cells_of(report.write_report(tmp_path, get_table(7)), "### Qwen2-VL-7B")
    at = next(i for i, line in enumerate(lines) if line[0].startswith("Libra-Merging"))
    assert lines[0][2:6] == ["MME", "MME time", "MME memory", "MME latency"]
    assert lines[at][1:6] == ["paper's", "1690.3", "08:19", "17.6 GB", "0.210 s"]
    assert lines[at + 1][1:6] == ["ours", "1700.0", "07:55", "17.0 GB", "0.200 s"]
    assert lines[at + 2][1:6] == ["ours − paper's", "+9.7", "−00:24", "-0.6 GB", "-0.010 s"]


def test_durations_of_video_mme(tmp_path):
    parts = {
        "short": {"score": 55.0, "stderr": 1.0, "n": 90},
        "medium": {"score": 46.0, "stderr": 1.0, "n": 9},
    }
    results(tmp_path, "2", {"libra": 50}, ["videomme"], "videollama2", groups=parts)
    lines = cells_of(report.write_report(tmp_path, get_table(2)), "### VideoLLaMA-2")
    assert lines[0][4:8] == ["overall w/o subs", "overall w subs", "short w/o subs", "short w subs"]
    at = next(i for i, line in enumerate(lines) if line[0] == "Libra-Merging")
    assert lines[at][4:12] == ["48.8", "52.9", "55.3", "59.0", "46.4", "52.6", "44.7", "47.0"]
    assert lines[at + 1][4:9] == ["50.0 ± 5.0", "", "55.0 ± 1.0", "", "46.0"]  # of nine answers
    assert lines[at + 2][6] == "-0.3"


def test_grids_in_markdown_and_latex():
    grid = Grid(["", "a_b & c"], [["50% ± 1 *", "x|y"], "R = 50%", ["λ", "Δ"]], "costs #1")
    assert markdown(grid)[2:] == ["| 50% ± 1 * | x\\|y |", "| **R = 50%** |  |", "| λ | Δ |"]
    text = latex(grid)
    assert r" & a\_b \& c \\" in text and r"50\% $\pm$ 1 $^{*}$ & x\textbar{}y \\" in text
    assert r"\multicolumn{2}{l}{\textit{R = 50\%}} \\" in text and r"\caption{costs \#1}" in text
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lr}"):
        assert part in text
    assert escape("a\\b{c}~^") == r"a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("arena", "field", "video"))) for name in TABLES],
)
def test_every_report_is_latex_without_a_bare_sign(name, tmp_path):
    (tmp_path / "cells").mkdir()
    text = report.write_report(tmp_path, get_table(name))
    tex = (tmp_path / f"{get_table(name).stem}.tex").read_text()
    assert tex.isascii(), {c for c in tex if not c.isascii()}
    assert not re.search(r"(?<!\\)[%#_]", tex) and tex.count(r"\begin{table}") == tex.count(r"\end{table}")
    assert tex.count(r"\begin{table}") == len(get_table(name).suites)  # nothing was measured
    for line in tex.splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            columns_of = re.findall(r"(?<!\\)&", line)
            assert len(columns_of) >= 1
    assert text.startswith(f"# {get_table(name).title}") and "No cell has been computed yet." in text
    assert report.main([str(tmp_path), "--table", name]) == 0


def test_a_results_folder_tells_its_table(tmp_path):
    for name in TABLES:
        assert report.table_of(tmp_path / get_table(name).stem) == name
    assert report.table_of(tmp_path / "try") is None
    with pytest.raises(ValueError, match="table 8 is unknown; use one of 1, 2"):
        get_table(8)


def test_sim_of_a_run_is_the_one_computed_by_hand():
    from libra.engine.tokens import VisualTokens
    from libra.lmms.lmms_libra import LibraModel
    from libra.mini.benchmark import samples_of

    row = Row.from_yaml(CONFIGS / "mini/table4/igm_l5.yaml")
    model = LibraModel(row.path, device="cpu", batch_size=2)
    documents = [
        {"images": [sample.image], "question": sample.question} for sample in samples_of("attribute", 2)
    ]
    model.task_dict = {"t": {"test": documents}}
    requests = [
        SimpleNamespace(
            args=(document["question"], {"max_new_tokens": 2}, lambda doc: doc["images"], i, "t", "test")
        )
        for i, document in enumerate(documents)
    ]
    seen = []
    compress = VisualTokens.compress

    def spy(self, hidden, attention):
        seen.append((hidden.clone(), (self.spans > 0).clone()))
        step = compress(self, hidden, attention)
        seen[-1] += (step[2].targets, step[2].importance)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisualTokens, "compress", spy)
        model.set_row(row, trace=True)
        answers = model.generate_until(requests)
    ((hidden, visual, _, importance),) = seen
    order = sorted(
        range(2), key=lambda i: len(documents[i]["question"])
    )  # the batch is sorted by the prompt's length
    for place, i in enumerate(order):
        tokens = torch.nn.functional.normalize(hidden[place, visual[place]].double(), dim=-1)
        kept = importance[place].topk(51).indices
        rest = torch.tensor([n for n in range(256) if n not in set(kept.tolist())])
        best = (tokens[rest] @ tokens[kept].T).max(1).values
        ((sim, part),) = model.records["t", i]["trace"]
        assert sim == pytest.approx(float(best.mean()), abs=1e-5)
        assert part == pytest.approx(float((best <= row.compression.tau).double().mean()), abs=1e-6)
    model.set_row(row)
    assert model.generate_until(requests) == answers and model.records["t", 0]["trace"] == []
    # Another attention gives the same answers, and the cache at the end is that of the shorter stages.
    model.set_row(Row.from_yaml(CONFIGS / "mini/table6/vanilla.yaml"))
    model.generate_until(requests[:1])
    assert model.engine.model.config._attn_implementation == "eager"
    whole = model.records["t", 0]["cache_bytes"]
    text = whole // (12 * 2 * 128 * 4) - 256
    model.set_row(Row.from_yaml(CONFIGS / "mini/table6/libra_r50.yaml"))
    model.generate_until(requests[:1])
    extra = model.records["t", 0]["cache_bytes"] // (2 * 128 * 4) - (12 * text + 2 * 256 + 10 * 128)
    assert extra in (0, 10)  # a compensation token in the ten layers that follow, or none


def test_figures_mark_what_exceeds_two_standard_errors():
    assert (
        Figure(-2.1, 1.0, 99).significant
        and not Figure(2.0, 1.0, 99).significant
        and not Figure(9.0, None, 99).significant
    )
    assert Figure(1.234, 0.5, 99).show(1, sign=True) == "+1.2 ± 0.5" and Figure(1.0).show(2) == "1.00"
