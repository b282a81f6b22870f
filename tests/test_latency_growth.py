"""How cost grows: one file a cell, a run that goes on where it stopped, a table and a picture."""

import json

import pytest
import torch
from PIL import Image
from test_latency import command

from libra.latency import Prompt, main
from libra.latency.growth import pairs_for

GRID = {(20, 1), (20, 2), (40, 1)}  # 40 × 2 is over the limit


def grow(folder, *more: str) -> int:
    return main(
        command(
            "--random-weights",
            "--layers",
            "4",
            "--compression-layers",
            "1,2",
            "--visual-tokens",
            "40,20",
            "--batch",
            "1,2",
            "--max-tokens",
            "40",
            "--text-tokens",
            "8",
            "--pairs",
            "2",
            "--grow",
            "--output",
            str(folder),
            *more,
        )
    )


def rows(text: str) -> dict[tuple[int, int], list[str]]:
    """A table's figures by visual tokens and batch."""
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {(int(line[0]), int(line[1])): line[2:] for line in lines[1:]}


def test_large_cells_get_fewer_pairs():
    assert [pairs_for(Prompt(n, batch=b), 9) for n, b in ((144, 1), (4096, 1), (1024, 8), (16384, 1))] == [
        9,
        9,
        4,
        3,
    ]
    assert [pairs_for(Prompt(16384), pairs) for pairs in (1, 2, 40)] == [1, 2, 10]


def test_a_grid_is_measured_once(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "growth"
    assert grow(folder) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        *(f"{n}x{b}.json" for n, b in GRID),
        "growth.md",
        "growth.png",
    }
    assert printed == (folder / "growth.md").read_text(encoding="utf-8")
    found = rows(printed)
    assert list(found) == [(20, 1), (20, 2), (40, 1), (40, 2)] and not any(found.pop((40, 2)))
    for (visual, batch), (pairs, *_, measured, flops, over, share, similarity, extra) in found.items():
        cell = json.loads((folder / f"{visual}x{batch}.json").read_text(encoding="utf-8"))
        assert cell["prompt"] == {"visual": visual, "text": 8, "batch": batch, "images": [1]}
        assert cell["versions"] and cell["date"]
        assert int(pairs) == len(cell["prefill"]["pairs"]) == 2
        assert measured.startswith(f"{cell['prefill']['ratio']['median']:.3f} [") and measured.endswith("50%")
        assert float(flops) == pytest.approx(cell["flops"]["formula"]["ratio"], abs=6e-4)
        assert float(over) == pytest.approx(float(measured.split()[0]) / float(flops), rel=3e-3, abs=6e-3)
        assert (share, similarity) == (
            f"{cell['parts']['share']:.2%}",
            f"{cell['parts']['shares']['similarity']:.2%}",
        )
        assert extra == f"{cell['extra_memory']['ratio']:.2f}"
    assert Image.open(folder / "growth.png").width > 1000

    measured = []
    monkeypatch.setattr(
        "libra.latency.growth.measure", lambda bench, *_, **__: measured.append(bench.prompt) or 1 / 0
    )
    assert grow(folder) == 0 and not measured
    assert capsys.readouterr().out == printed
    (folder / "20x2.json").unlink()
    with pytest.raises(ZeroDivisionError):
        grow(folder)
    assert measured == [Prompt(20, 8, 2)]


def test_a_cell_of_other_settings_is_not_taken(capsys, tmp_path):
    assert grow(tmp_path, "--visual-tokens", "20", "--batch", "1") == 0
    capsys.readouterr()
    for options, words in (
        (["--text-tokens", "10"], "20x1.json was measured with another prompt; give another --output"),
        (["--compression-layers", "2"], "20x1.json was measured with another compression"),
    ):
        with pytest.raises(SystemExit):
            grow(tmp_path, *options)
        assert words in capsys.readouterr().err


def test_a_cell_that_cannot_be_read_is_measured_again(tmp_path):
    arguments = ("--visual-tokens", "20", "--batch", "1")
    assert grow(tmp_path, *arguments) == 0
    path = tmp_path / "20x1.json"
    whole = json.loads(path.read_text())
    for damaged in (
        "{}",
        path.read_text()[:50],
        json.dumps({key: value for key, value in whole.items() if key != "prefill"}),
    ):
        path.write_text(damaged)
        assert grow(tmp_path, *arguments) == 0
        assert json.loads(path.read_text()).keys() == whole.keys()


def test_a_run_that_is_stopped_says_so(capsys, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("libra.latency.growth.measure", stop)
    with pytest.raises(SystemExit):
        grow(tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: stopped; the finished cells are kept, and the same command goes on"


def test_a_cell_without_memory_is_a_failed_cell_and_tried_again(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("libra.latency.growth.measure", full)
        assert grow(tmp_path, "--visual-tokens", "20", "--batch", "1") == 0
    assert (
        rows(capsys.readouterr().out)[20, 1][:2] == ["", "out of memory"]
        and not (tmp_path / "growth.png").exists()
    )
    assert grow(tmp_path, "--visual-tokens", "20", "--batch", "1") == 0
    assert rows(capsys.readouterr().out)[20, 1][0] == "2" and (tmp_path / "growth.png").exists()


def test_a_larger_cell_of_an_earlier_run_stays_in_the_table(capsys, tmp_path):
    sizes = ["--visual-tokens", "20,40", "--batch", "1", "--pairs", "1"]
    assert grow(tmp_path, *sizes) == 0
    whole = capsys.readouterr().out
    assert grow(tmp_path, *sizes, "--max-tokens", "20") == 0
    assert capsys.readouterr().out == whole and all(rows(whole)[(40, 1)])
