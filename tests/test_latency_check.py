"""The regression guard: what it compares, when it fails, and what it says."""

import json
from dataclasses import replace

import pytest
import torch

from libra.latency import check as guard
from libra.latency import main
from libra.utils.timing import one_thread


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A narrow slice, timed without a clock; returns the file of its figures."""
    narrow = replace(guard.SLICE, hidden_size=128, intermediate_size=128, kv_size=128, visual_tokens=(32,))
    monkeypatch.setattr(guard, "SLICE", narrow)
    monkeypatch.setattr(guard, "time_ratios", lambda made, **_: dict.fromkeys(made, 0.5))
    path = tmp_path / "expected.json"
    assert guard.check(update=True, path=path, progress=False) == 0
    return path


@pytest.fixture
def counted(small, monkeypatch):
    """The same, with the counts as they were written, so that nothing is run again."""
    counts = json.loads(small.read_text())["counts"]
    monkeypatch.setattr(guard, "benches", lambda: dict.fromkeys(guard.METHODS))
    monkeypatch.setattr(guard, "count", lambda made: counts)
    return small


def change(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_was_written_is_what_is_found(small, capsys):
    capsys.readouterr()
    assert guard.check(path=small, progress=False) == 0
    assert capsys.readouterr().out == (
        "operations and bytes as committed; CPU time over the plain model's: libra 0.500 (committed 0.500),"
        " fastv 0.500 (committed 0.500)\n"
    )
    written = json.loads(small.read_text())
    assert written["written_by"] == "python -m libra.latency --check --update"
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]
    layers, tokens = guard.SLICE.layers, 32 + 64
    assert written["counts"]["vanilla"]["cache_bytes"] == 4 * 2 * 128 * layers * tokens


@pytest.mark.parametrize(
    "figure, words",
    [
        ("operations", "multiply-accumulates"),
        ("cache_bytes", "bytes of the KV cache"),
        ("memory_bytes", "peak bytes"),
        ("queued", "queued tensor operations"),
    ],
)
def test_a_count_that_is_off_by_one_is_a_line(counted, capsys, figure, words):
    counts = json.loads(counted.read_text())["counts"]
    value = counts["fastv"][figure]
    counts["fastv"][figure] -= 1
    change(counted, counts=counts)
    capsys.readouterr()
    assert guard.check(path=counted, progress=False) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"fastv: {value:,} {words}, committed {value - 1:,} (+")
    assert last == "1 deviation(s); if they are meant: python -m libra.latency --check --update"


def test_peak_bytes_of_another_torch_are_not_compared(counted, capsys):
    stored = json.loads(counted.read_text())
    stored["counts"]["libra"]["memory_bytes"] = 1
    change(counted, counts=stored["counts"], versions={**stored["versions"], "torch": "1.0.0"})
    capsys.readouterr()
    assert guard.check(path=counted, progress=False) == 0
    assert (
        "peak bytes and queued operations are not compared, they were counted with another torch, 1.0.0"
        in capsys.readouterr().out
    )
    stored["counts"]["libra"]["operations"] += 1
    change(counted, counts=stored["counts"])
    assert guard.check(path=counted, progress=False) == 1


@pytest.mark.parametrize(
    "first, second, status",
    [
        (0.57, None, 0),
        (0.43, None, 0),
        (0.58, 0.56, 0),
        (0.58, 0.59, 1),
        (0.42, 0.41, 1),
    ],
)
def test_a_time_ratio_has_to_leave_the_margin_twice(counted, capsys, monkeypatch, first, second, status):
    answers, asked = [{"libra": first, "fastv": 0.5}, {"libra": second}], []
    monkeypatch.setattr(guard, "time_ratios", lambda made, **_: asked.append(list(made)) or answers.pop(0))
    capsys.readouterr()
    assert guard.check(path=counted, progress=False) == status
    assert asked == [["libra", "fastv"], *[["libra"]] * (second is not None)]
    lines = capsys.readouterr().out.splitlines()
    if status:
        assert lines[0] == (
            f"libra: {second:.3f} of the plain prefill's CPU time, committed 0.500 ({second / 0.5 - 1:+.0%},"
            " margin 15%)"
        )
    else:
        assert f"libra {second or first:.3f} (committed 0.500)" in lines[0]


def test_ratios_are_medians_of_runs_in_turns(monkeypatch):
    narrow = replace(guard.SLICE, hidden_size=128, intermediate_size=128, kv_size=128, visual_tokens=(32,))
    monkeypatch.setattr(guard, "SLICE", narrow)
    seen = guard.time_ratios(guard.benches(), pairs=3, progress=False)
    assert seen.keys() == guard.METHODS.keys() and all(0.1 < ratio < 20 for ratio in seen.values())


def test_it_runs_on_one_thread_and_gives_the_others_back(small, monkeypatch):
    before, inside = torch.get_num_threads(), []
    monkeypatch.setattr(guard, "count", lambda made: inside.append(torch.get_num_threads()) or 1 / 0)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            guard.check(path=small, progress=False)
        assert inside == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"counts": {}, "time_ratios": {}, "versions": {"torch": "2"}}']
)
def test_damaged_figures_are_one_sentence(tmp_path, content):
    path = tmp_path / "expected.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match="expected.json is missing or damaged; write it with python -m libra.latency --check"
    ):
        guard.check(path=path, progress=False)


def test_the_committed_figures_are_of_this_slice():
    expected = guard.read()
    assert expected["counts"]["vanilla"][
        "cache_bytes"
    ] == 4 * 2 * guard.SLICE.kv_size * guard.SLICE.layers * (576 + 64)
    for name, ratio in expected["time_ratios"].items():
        promised = expected["counts"][name]["operations"] / expected["counts"]["vanilla"]["operations"]
        assert abs(ratio / promised - 1) < guard.MARGIN, f"{name}: the slice is not bound by its operations"


def test_the_slice_takes_what_is_committed():
    """The half of the guard that needs no clock: a change of any of these counts fails here, not only in
    `.ci/run`."""
    with one_thread():
        counts = guard.count(guard.benches())
    assert not guard.count_deviations(counts, guard.read()), f"if they are meant: {guard.UPDATE}"


def test_command(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("libra.latency.command.check", lambda update: asked.append(update) or 1)
    assert main(["--check"]) == 1 and main(["--check", "--update"]) == 1 and asked == [False, True]
