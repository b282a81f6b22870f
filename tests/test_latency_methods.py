"""python -m libra.latency.methods on a model of toy width."""

import json

import pytest

from libra import Compression
from libra.latency import method_cost
from libra.latency.methods import compressions, main
from libra.methods import METHODS

SMALL = ["--model", "mini", "--layers", "6", "--keep", "28", "--dtype", "float32", "--device", "cpu"]
SOME = ["--methods", "libra,divprune,visionzip,downsample"]


def test_every_part_of_every_method_is_told_and_a_stopped_run_goes_on(tmp_path, capsys):
    path = tmp_path / "methods.json"
    command = [*SMALL, *SOME, "--json", str(path)]
    assert main([*command, "--pairs", "1"]) == 0
    first = json.loads(path.read_text())
    capsys.readouterr()
    assert main([*command, "--pairs", "2"]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found["rounds"][0] == first["rounds"][0] and found["selection"] == first["selection"]
    assert len(found["rounds"]) == 2 and not found["failed"]
    for name, text in {
        "vanilla": "all",
        "libra": "after layers",
        "divprune": "keep 28       input",
        "visionzip": "keep 28       tower",
        "downsample": "keep 28       tower",
    }.items():
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert text in line
        times = found["rounds"][1][name]
        assert times["tower"] > 0 and times["prefill"] > 0
    assert set(found["selection"]) == set(SOME[1].split(",")) and min(found["selection"].values()) > 0
    # Nothing is measured again where all is there.
    before = path.read_bytes()
    assert main([*command, "--pairs", "2"]) == 0 and path.read_bytes() == before


def test_the_summary_is_of_pairs():
    rounds = [
        {"vanilla": {"tower": 1.0, "prefill": 3.0}, "libra": {"tower": 1.0, "prefill": 1.0}},
        {"vanilla": {"tower": 2.0, "prefill": 8.0}, "libra": {"tower": 2.0, "prefill": 2.0}},
        {"vanilla": {"tower": 1.0, "prefill": 4.0}, "libra": {"tower": 1.0, "prefill": 2.0}},
    ]
    kept = {"rounds": rounds, "selection": {"libra": 0.25}, "failed": {"evs": "only videos"}}
    ways = {"libra": Compression(method="libra", layers=(1,), ratio=0.5), "evs": Compression(method="evs")}
    found = method_cost.summary(kept, ways)
    assert found["evs"] == {"failed": "only videos"}
    libra = found["libra"]
    assert (libra["tower"], libra["prefill"], libra["together"]) == (1.0, 1.75, 3.0)
    assert libra["ratio"] == 0.5 and libra["where"] == "after layer 1" and found["vanilla"]["ratio"] == 1


def test_what_it_refuses(tmp_path, capsys):
    path = tmp_path / "methods.json"
    assert main([*SMALL, "--methods", "random", "--pairs", "1", "--json", str(path)]) == 0
    capsys.readouterr()
    for arguments, sentence in (
        (
            [*SMALL, "--methods", "vanilla"],
            "error: --methods: vanilla is not a method that compresses; use libra",
        ),
        ([*SMALL, *SOME, "--json", str(path)], f"error: --json: {path} holds another measurement"),
        (["--model", "qwen2-vl-7b"], "error: the size of qwen2-vl-7b's vision tower"),
        ([*SMALL, "--keep", "0"], "error: argument --keep: 0 is not a whole number from 1 up"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.startswith(sentence)


def test_all_methods_have_a_compression():
    found = compressions(None, 64, "2/3", 8)
    assert set(found) == {name for name, method in METHODS.items() if method.compresses}
    assert found["libra"].layers == (1, 3, 5) and found["divprune"].keep == 64
