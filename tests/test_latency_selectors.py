"""python -m libra.latency.selectors on a model of toy width."""

import json

import pytest

from libra.latency.selector_cost import grid_of
from libra.latency.selectors import main
from libra.methods import METHODS


def test_every_method_before_the_language_model_has_its_share(tmp_path, capsys):
    path = tmp_path / "shares.json"
    assert (
        main(["--model", "mini", "--visual-tokens", "48", "--keep", "8", "--pairs", "2", "--json", str(path)])
        == 0
    )
    told, found = capsys.readouterr().out, json.loads(path.read_text())["methods"]
    assert set(found) == {name for name, method in METHODS.items() if method.place != "layers"}
    for name, row in found.items():
        assert name in told and row["step"] > 0 and row["prefill"] > 0 and row["share"] > 0


def test_what_it_refuses(capsys):
    for arguments, sentence in (
        (["--keep", "576"], "error: --keep: 576 of 576 tokens leave nothing to choose"),
        (["--model", "llava"], "error: model: llava is unknown"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.startswith(sentence)


def test_the_most_square_grid():
    assert grid_of(576) == (24, 24) and grid_of(48) == (6, 8) and grid_of(7) == (1, 7)
