"""Samples a second: what is run, in which batches, and what the command says of it."""

import json
from functools import partial

import pytest

from eval import throughput
from libra.lmms.lmms_libra import LibraModel
from libra.mini import benchmark


@pytest.mark.slow
def test_each_row_runs_at_each_batch_size(tmp_path, monkeypatch, capsys):
    batches, plain = [], LibraModel._finish

    def finish(self, batch):
        batches.append((bool(self.compression.layers), len(batch)))
        plain(self, batch)

    monkeypatch.setattr(LibraModel, "_finish", finish)
    monkeypatch.setattr(
        benchmark, "write_benchmark", partial(benchmark.write_benchmark, count=6)
    )  # 300 take a minute
    flags = ["--limit", "2", "--tasks", "attribute", "--batch-sizes", "1,2", "--repeats", "2"]
    found = tmp_path / "found.json"
    assert throughput.main([*flags, "--benchmark", str(tmp_path / "benchmark"), "--json", str(found)]) == 0
    one_round = [(False, 1)] * 2 + [(False, 2)] + [(True, 1)] * 2 + [(True, 2)]
    assert sorted(batches) == sorted(
        3 * one_round
    )  # with the round that warms up, and nothing taken from a log
    rates = json.loads(found.read_text())["samples_a_second"]
    assert {row: {size: len(values) for size, values in by.items()} for row, by in rates.items()} == {
        "vanilla": {"1": 2, "2": 2},
        "r50": {"1": 2, "2": 2},
    }
    assert all(rate > 0 for by in rates.values() for values in by.values() for rate in values)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and shown[1].startswith("vanilla  1") and shown[1].endswith("1.00 ×")


def test_what_is_wrong_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--rows", "fastw", "--benchmark", str(tmp_path)])
    assert stop.value.code == 2 and "error: row fastw is unknown" in capsys.readouterr().err
