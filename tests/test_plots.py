"""The look of the pictures, and a table's pictures from its cells' figures or its published CSV."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text

from eval import plots
from eval.plots import Published
from eval.statistics import Figure
from eval.suites import BLIND, SuiteRows, get_table
from libra.utils.plotting import Point, label, new_figure, save_both, style_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def test_no_two_of_a_pictures_rows_share_a_colour_or_a_marker():
    styles = [style_of(number) for number in range(plots.NAMED)]
    for key in ("color", "marker"):
        assert len({style[key] for style in styles}) == plots.NAMED


@pytest.mark.parametrize("seed", range(3))
def test_names_cover_neither_points_nor_each_other(seed):
    draw = np.random.default_rng(seed)
    points = [
        Point(float(x), float(y), f"a method with a name, {i}", "black")
        for i, (x, y) in enumerate(draw.uniform(0, 100, (9, 2)))
    ]
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.plot([p.x for p in points], [p.y for p in points], "o")
    axes.margins(0.15)
    label(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert [text.get_text() for text in axes.texts] == [p.name for p in sorted(points, key=lambda p: p.y)]
    for i, box in enumerate(boxes):
        assert not [other for other in boxes[:i] if box.overlaps(other)]
        assert not [p for p in points if box.contains(*axes.transData.transform((p.x, p.y)))]
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("one", "two"):
        figure = new_figure(2, 2)
        figure.subplots().plot([0, 1], [0, 1], **style_of(0))
        save_both(figure, tmp_path / f"{name}.png")
    for ending in ("png", "svg"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()


def test_a_published_table_is_drawn_from_its_csv(tmp_path):
    """Its averages are those of its Markdown, and every row's name stands in the picture."""
    (tmp_path / "table3.csv").write_bytes((RESULTS / "table3.csv").read_bytes())
    assert plots.main([str(tmp_path / "table3.csv")]) == 0
    shown, text = Published(RESULTS / "table3.csv"), (RESULTS / "table3.md").read_text(encoding="utf-8")
    drawn = {
        name: (tmp_path / f"{name}.svg").read_text(encoding="utf-8") for name in ("table3", "table3_traces")
    }
    for name, row in shown.rows.items():
        assert f"| {shown.average(name).show()} |" in text, name
        assert row.title.replace("&", "&amp;") in drawn["table3"], name
    assert "R = 80%" in drawn["table3_traces"] and "Hierarchical + PTI + IGM<" in drawn["table3_traces"]
    assert not shown.stages("hierarchical_r50", "share")  # an average has no compensation token
    assert list(shown.stages("libra_r50", "share")) == [2, 5, 8]


def test_names_leave_room_for_the_lines(tmp_path):
    """The arena's titles say layers and rate again, which its headings say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # axes that collapse
        plots.traces(Published(RESULTS / "arena.csv"), tmp_path / "arena_traces.png")
    drawn = (tmp_path / "arena_traces.svg").read_text(encoding="utf-8")
    assert ">Libra-Merging<" in drawn and "Libra-Merging, layers" not in drawn


def test_averages_leave_out_what_is_not_learned():
    shown = Published(RESULTS / "table1.csv")
    assert BLIND in shown.rows and len(shown.averaged) == 13
    assert shown.average("r50").show() == "88.6 ± 0.5"


def test_many_rows_have_a_panel_for_each_heading(tmp_path):
    table = get_table("arena")
    rows = SuiteRows(table, "mini")
    many = SimpleNamespace(
        table=table,
        suite="mini",
        rows=rows,
        averaged=["mini_reading"],
        average=lambda name: Figure(50.0 + len(name), 1.0, 300),
        flops_ratio=lambda name: 0.5,
        time_ratio=lambda name: None,
    )
    plots.accuracy(many, tmp_path / "arena.png")
    drawn = (tmp_path / "arena.svg").read_text(encoding="utf-8")
    assert (tmp_path / "arena.png").is_file() and drawn.count("50% of the FLOPs") == len(table.sections) - 1
    for heading, names in table.sections.items():
        assert heading in drawn
        assert not heading or all(rows[name].title.partition(", ")[0] in drawn for name in names)


def test_what_all_names_end_in_is_said_once():
    titles = ["FastV, layer 2, 50%", "random, draw 1, layer 2, 50%"]
    assert plots.without_end(titles) == ["FastV", "random, draw 1"]
    assert plots.without_end(["FastV, 50%"]) == ["FastV"]
    assert plots.without_end(["FastV", "FastV, 50%"]) == ["FastV", "FastV, 50%"]


def test_what_is_no_table_is_a_sentence(tmp_path, capsys):
    (tmp_path / "table1.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        plots.main([str(tmp_path / "table1.csv")])
    assert stop.value.code == 2 and "has no figures of the embedded model" in capsys.readouterr().err
