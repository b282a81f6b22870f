"""A table over several trainings of the embedded model: mean, spread and order, and what is refused."""

import csv
import json
from math import sqrt

import numpy as np
import pytest
from eval_cells import RUN, share, stored

from eval import report
from eval.measured import Measured
from eval.seeds import Seed, Seeds, average_grid, spread, write_seeds
from eval.suites import get_table
from libra.identity import digest

TABLE = get_table(1)
TASKS = ("mini_attribute", "mini_find")
KINDS = {task.removeprefix("mini_"): {"majority_share": 0.2} for task in TASKS}
OTHER = {**RUN, "checkpoint": {"sha256": "x"}}


def answers(*wrong: int, n: int = 100) -> list[float]:
    return [float(i not in wrong) for i in range(n)]


def cells(rows: dict[str, list[float]], run=RUN, tasks=TASKS, **more) -> list[dict]:
    rows = {"vanilla": share(100), "blind": share(10), **rows}
    return [stored(TABLE, row, task, given, run=run, **more) for row, given in rows.items() for task in tasks]


def put(folder, given: list[dict], benchmark: str = "feed"):
    (folder / "cells").mkdir(parents=True)
    for cell in given:
        name = "{suite}.{row}.{task}.json".format_map(cell)
        (folder / "cells" / name).write_text(json.dumps(cell))
    manifest = {"sha256": benchmark, "questions": 100, "types": KINDS}
    (folder / "benchmark.json").write_text(json.dumps(manifest))
    return folder


def seeds(*rows: dict[str, list[float]]) -> Seeds:
    majority = dict.fromkeys(TASKS, 20.0)
    given = []
    for number, own in enumerate(rows):
        run = {**RUN, "checkpoint": {"sha256": f"w{number}"}}
        measured = Measured(TABLE, "mini", cells(own, run), majority)
        given.append(Seed(f"seed{number}", measured, {"sha256": "feed", "types": KINDS}))
    return Seeds(TABLE, given)


def test_mean_and_spread_by_hand():
    """80 and 90 right of 100 with the two seeds: mean difference -15, spread 10/√2; the questions' error is
    that of what both seeds together answered to a question."""
    one, two = answers(*range(20)), answers(*range(10))
    found = seeds({"r50": one}, {"r50": two})
    assert [figure.value for figure in found.scores("r50", TASKS)] == [80, 90]
    mean = found.mean("r50", TASKS, "vanilla")
    lost = np.array([1.0] * 10 + [0.5] * 10 + [0.0] * 80)
    assert mean.value == pytest.approx(-15)
    assert mean.stderr == pytest.approx(100 * lost.std(ddof=1) / sqrt(100) / sqrt(len(TASKS)))
    assert found.mean("r50", TASKS).value == pytest.approx(85)
    assert spread(found.differences("r50", TASKS)) == pytest.approx(10 / sqrt(2))
    line = next(line for line in average_grid(found).lines if line[0] == "Libra-Merging, 50%")
    assert line[1:5] == [
        *(found.scores("r50", TASKS)[i].show() for i in range(2)),
        found.mean("r50", TASKS).show(),
        "7.1",
    ]
    assert line[-2].startswith("-15.0 ± ") and line[-2].endswith(" *") and line[-1] == "7.1"


def test_a_mean_of_the_same_answers_has_no_spread_and_their_error():
    same = answers(*range(0, 100, 7))
    found = seeds({"r50": same}, {"r50": same})
    alone = found.first.difference("r50")
    assert found.mean("r50", TASKS, "vanilla").stderr == pytest.approx(alone.stderr)
    assert spread(found.differences("r50", TASKS)) == 0


def test_the_order_of_rows_with_each_seed():
    """r50 before fastv with both, turbo and random the other way round with the second."""
    first = {
        "r50": answers(),
        "fastv": answers(*range(40)),
        "turbo": answers(),
        "random": answers(*range(30)),
    }
    second = {**first, "turbo": answers(*range(30)), "random": answers()}
    pairs = seeds(first, second).pairs()
    assert pairs.all == 6
    assert len(pairs.against) == 1 and pairs.against[0].startswith(
        "Turbo minus random (control): +30.0 ± 3.3, -30.0"
    )
    # r50 and turbo, r50 and random are equal with one seed; fastv is below turbo and random with both.
    assert (pairs.agree, pairs.sure) == (3, 3)


def test_only_rows_and_types_that_all_have_and_types_that_all_have_learned():
    majority = dict.fromkeys(TASKS, 20.0)
    whole = cells({"r50": share(90), "fastv": share(50)})
    part = cells({"r50": share(80)}, OTHER)
    weak = [cell for cell in part if (cell["row"], cell["task"]) != ("vanilla", "mini_find")]
    weak.append(stored(TABLE, "vanilla", "mini_find", share(60), run=OTHER))
    given = [
        Seed(name, Measured(TABLE, "mini", own, majority), {"sha256": "feed", "types": KINDS})
        for name, own in (("table1", whole), ("seed1", weak))
    ]
    found = Seeds(TABLE, given)
    assert found.averaged == ["mini_attribute"] and found.not_averaged == {"seed1": ["find"]}
    assert not found.first.has("fastv")
    assert found.left_out == ["table1 also has fastv, attribute", "table1 also has fastv, find"]


def test_what_an_edited_checkout_computed_is_not_published(tmp_path):
    home = put(tmp_path / "table1", cells({"r50": share(80)}))
    other = put(tmp_path / "table1_seed1", cells({"r50": share(90)}, OTHER, commit="abc-dirty"))
    with pytest.raises(ValueError, match="publish"):
        write_seeds(TABLE, [home, other], tmp_path / "docs")
    assert not (tmp_path / "docs").exists() and not (home / "table1_seeds.md").exists()


def test_two_folders_of_one_name_are_refused(tmp_path):
    folders = [
        put(tmp_path / name, cells({"r50": share(80)}, {**RUN, "checkpoint": {"sha256": name}}))
        for name in ("table1", "a/table1_s1", "b/table1_s1")
    ]
    with pytest.raises(ValueError, match="two results folders are called s1"):
        write_seeds(TABLE, folders)


def test_cells_of_rows_that_changed_are_named(tmp_path):
    home = put(tmp_path / "table1", cells({"r50": share(80)}))
    stale = cells({"r50": share(90)}, OTHER)
    for cell in stale:
        cell["settings"]["row"] = {**cell["settings"]["row"], "compression": "another"}
        cell["config_hash"] = digest(cell["settings"])
    other = put(tmp_path / "table1_seed1", stale)
    with pytest.raises(ValueError, match="no cell of .*table1_seed1 fits the rows as they are now"):
        write_seeds(TABLE, [home, other])


def test_the_command_writes_its_files(tmp_path, capsys):
    home = put(tmp_path / "table1", cells({"r50": answers(*range(20))}))
    put(tmp_path / "table1_seed1", cells({"r50": answers(*range(10))}, OTHER, checkpoint="out/seed1"))
    assert report.main([str(home), "--seeds", str(tmp_path / "table1_seed1")]) == 0
    text = capsys.readouterr().out
    assert (home / "table1_seeds.md").read_text() == text.removesuffix("\n")
    assert (home / "table1_seeds.tex").is_file()
    assert text.startswith("# Table 1: methods on image benchmarks, over seeds")
    assert "80.0 / 90.0" in text and "-15.0" in text
    assert "- seed1: another training, sha256 x; 6 cells" in text and str(tmp_path) not in text
    with open(home / "table1_seeds.csv", encoding="utf-8", newline="") as file:
        lines = {(line["row"], line["task"], line["seed"]): line for line in csv.DictReader(file)}
    assert lines["r50", "avg", "shipped"]["difference"] == "-20.0000"
    assert lines["r50", "avg", "mean"]["difference"] == "-15.0000"
    assert float(lines["r50", "mini_find", "spread"]["score"]) == pytest.approx(10 / sqrt(2), abs=1e-4)
    assert lines["blind", "avg", "mean"]["difference"] == ""


@pytest.mark.parametrize(
    "given, benchmark, sentence",
    [
        (cells({"r50": share(80)}), "feed", "b has the weights of a"),
        (cells({"r50": share(80)}, OTHER), "beef", "b answers another benchmark (sha256 beef)"),
        (cells({"r50": share(80, 50)}, OTHER), "feed", "r50, attribute has 50 answers with b and 100"),
        (
            cells({"r50": share(80)}, {**OTHER, "dtype": "bfloat16"}),
            "feed",
            "has another dtype with b than with a",
        ),
        ([], "feed", "b holds no cells of the embedded model: fill it with python -m eval.run --table 1"),
    ],
    ids=["weights", "benchmark", "number", "dtype", "empty"],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path, capsys, given, benchmark, sentence):
    home = put(tmp_path / "table1_a", cells({"r50": share(90)}))
    other = put(tmp_path / "table1_b", given, benchmark)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(home), "--table", "1", "--seeds", str(other)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert sentence in error


def test_three_seeds_have_a_deviation(tmp_path):
    folders = [
        put(
            tmp_path / name,
            cells({"r50": share(percent)}, {**RUN, "checkpoint": {"sha256": name}}),
        )
        for name, percent in (("table1", 70), ("table1_s1", 80), ("table1_s2", 84))
    ]
    text = write_seeds(TABLE, folders)
    assert "| Avg, shipped | Avg, s1 | Avg, s2 | Avg, mean | over seeds |" in text
    assert f"| {np.std([70, 80, 84], ddof=1):.1f} |" in text and "trained 3 times" in text
