"""What a report says beyond scores: the samples that downsampling fails, families of methods by kind of
question, and the pairs of rows that differ."""

import numpy as np
import pytest
from eval_cells import RUN, stored

from eval import blocks, pairs, report
from eval.measured import Measured
from eval.statistics import paired_difference
from eval.suites import SuiteRows, get_table
from libra.methods import METHODS

FIELD = get_table("field")
TASKS = SuiteRows(FIELD, "mini")["vanilla"].tasks


def answers(*wrong: int, n: int = 40) -> list[float]:
    return [float(i not in wrong) for i in range(n)]


def measured(**rows: list[float]) -> Measured:
    """The field's table with these answers of rows, the same to every task."""
    cells = [stored(FIELD, row, task, given) for row, given in rows.items() for task in TASKS]
    return Measured(FIELD, "mini", cells, dict.fromkeys(TASKS, 10.0), run=RUN)


BLIND = {"blind": answers(*range(38))}


def test_a_rows_control_costs_about_the_same_and_has_its_positions():
    found = measured(vanilla=answers())
    for row, control in (
        ("c33_fastv", "c33_downsample_original"),
        ("c11_divprune_compact", "c11_downsample_compact"),
        ("c22_vscan_two", "c22_downsample_compact"),
        ("c11_pyramiddrop", "c11_downsample_compact"),
        ("vanilla", None),
        ("blind", None),
    ):
        assert found.control(row) == control, row


def test_the_score_where_downsampling_fails():
    control = answers(0, 1, 2, 3)
    rows = {"vanilla": answers(), "c33_downsample_original": control, "c33_fastv": answers(2, 7)}
    found = measured(**rows, **BLIND)
    hard = found.hard("c33_fastv")
    assert len(found.averaged) == len(TASKS) and hard.value == 75 and hard.n == 4 * len(TASKS)
    assert hard.stderr == pytest.approx(100 * (0.75 * 0.25 / hard.n) ** 0.5)
    assert found.hard("c33_downsample_original").value == 0 and found.hard("vanilla") is None
    assert found.hard("c11_fastv") is None  # neither it nor its control was run
    grid = blocks.mini_grid(found, [])
    lines = {line[0]: line[-1] for line in grid.lines if not isinstance(line, str)}
    assert grid.header[-1] == "where downsampling fails"
    assert lines["FastV, early layer, 1/3"] == hard.show() and lines["vanilla"] == ""
    assert "VTC-Bench" in blocks.mini_text(found)[1]


def test_a_table_without_downsampling_has_no_such_column():
    table = get_table("1")
    tasks = SuiteRows(table, "mini")["vanilla"].tasks
    cells = [stored(table, row, task, answers(3)) for row in ("vanilla", "fastv") for task in tasks]
    grid = blocks.mini_grid(Measured(table, "mini", cells, {}, run=RUN), [])
    assert "where downsampling fails" not in grid.header


def test_families_by_kind_of_question():
    """The mean of a family's rows on a question against vanilla on it, over the tasks of a kind."""
    rows = {
        "vanilla": answers(),
        "c33_fastv": answers(0, 1),
        "c33_pyramiddrop": answers(1, 2, 3),
        "c33_sparsevlm": answers(0, 1),
        "c33_libra": answers(5),
        "c33_divprune_original": answers(*range(8)),
    }
    found = measured(**rows, **BLIND)
    grid = blocks.families_grid(found)
    lines = {}
    for line in grid.lines:
        if isinstance(line, str):
            heading = line
        else:
            lines[heading, line[0]] = line[1:]
    assert grid.header[1:] == list(FIELD.kinds)
    both = np.mean([rows["c33_pyramiddrop"], rows["c33_sparsevlm"]], axis=0).tolist()
    each = paired_difference(both, rows["vanilla"])
    # By hand: of 40 questions the two rows together lose one, and three by half: -2.5 of 40; the sum of
    # squares is 1.75, so the variance (1.75 - 40 * 0.0625²) / 39.
    assert each.value == -6.25 and each.stderr == pytest.approx(100 * (1.59375 / 39 / 40) ** 0.5)
    shown = lines["1/3, in several steps", "attention (2)"]
    for text, tasks in zip(shown, FIELD.kinds.values()):
        error = each.stderr / len(tasks) ** 0.5
        assert text.startswith(f"{each.value:.1f} ± {error:.1f}")
    assert ("1/3, after one early layer", "intervals and merging (1)") in lines
    assert ("1/3, after one early layer", "attention (1)") in lines
    assert lines["1/3, before the language model, original positions", "diversity (1)"][0].startswith("-20.0")
    assert blocks.FAMILIES in report.mini_block(found, [])


def test_every_method_that_compresses_has_a_family():
    assert all(method.family for method in METHODS.values() if method.compresses)


def test_kinds_and_the_tasks_of_the_fine_table():
    fine = get_table("fine")
    rows = SuiteRows(fine, "mini")
    assert {task for tasks in FIELD.kinds.values() for task in tasks} == set(TASKS)
    assert rows["vanilla"].tasks == [task for tasks in fine.kinds.values() for task in tasks]
    llava = SuiteRows(fine, "llava7b")["c22_fastv"]
    assert llava.tasks[0] == "pope" and llava.paper == {"pope": 68.3}


def test_pairs_of_a_section_beyond_three_standard_errors():
    """Counted for each type and over all; draws with other seeds are not compared with each other."""
    table = get_table("arena")
    tasks = SuiteRows(table, "mini")["vanilla"].tasks
    few, many = tasks[:2], tasks[2:]  # of these, fastv differs from the others in 3 of 40 answers, or in 20
    rows = {"q75_libra": (), "q75_random_0": (0,), "q75_random_1": (1,)}
    cells = [stored(table, "vanilla", task, answers(), "mini") for task in tasks]
    cells += [stored(table, "blind", task, answers(*range(38)), "mini") for task in tasks]
    cells += [stored(table, row, task, answers(*wrong)) for row, wrong in rows.items() for task in tasks]
    cells += [stored(table, "q75_fastv", task, answers(2, 3, 4)) for task in few]
    cells += [stored(table, "q75_fastv", task, answers(*range(20))) for task in many]
    found = Measured(table, "mini", cells, dict.fromkeys(tasks, 10.0), run=RUN)
    grid = pairs.pairs_grid(found)
    section = "after layer 2, 75%"
    # libra, fastv and two draws are six pairs without the one of the draws with each other; fastv is apart
    # from the three others, in the types where it fails half. 3 of 40 are 1.8 standard errors.
    assert grid.header[:2] == ["", "pairs"] and grid.header[-1] == "Avg"
    assert grid.lines[0] == [section, "5", *["0"] * len(few), *["3"] * len(many), grid.lines[0][-1]]
    # Over all types a difference of one answer, the same in each, is beyond the error of their mean: both
    # random draws from libra.
    assert grid.lines[0][-1] == "5"
    assert grid.lines[-1] == ["all sections", *grid.lines[0][1:]]
    assert pairs.PAIRS in report.mini_block(found, [])
    assert pairs.pairs_grid(measured(vanilla=answers(), c33_fastv=answers(1), c33_libra=answers(2))) is None
