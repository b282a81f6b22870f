"""How many visual tokens each layer sees."""

import pytest

from libra.budget import actual, average, counted, keeps, kept, model_flops, nominal, reserved, solve
from libra.config import Compression, ConfigError
from libra.rows import Row, get_model


@pytest.mark.parametrize(
    "n, ratio, rounding, expected",
    [
        (576, 0.5, "round", 288),
        (576, 2 / 3, "round", 192),
        (576, 2 / 3, "ceil", 192),  # (1 - 2/3) * 576 is a hair above 192
        (10, 0.8, "floor", 2),  # (1 - 0.8) * 10 is a hair below 2
        (5, 0.5, "round", 2),  # halves go to even
        (7, 0.5, "round", 4),
        (7, 0.5, "floor", 3),
        (7, 0.5, "ceil", 4),
        (1, 0.95, "round", 1),
        (3, 0.95, "floor", 1),
        (0, 0.5, "round", 0),
        (9, 0.0, "floor", 9),
        (9, 0.0, "ceil", 9),
    ],
)
def test_kept(n, ratio, rounding, expected):
    assert kept(n, ratio, rounding) == expected


def test_kept_lies_between_one_and_all_and_the_roundings_are_in_order():
    for n in range(1, 80):
        for percent in range(0, 100, 3):
            low, middle, high = (kept(n, percent / 100, rounding) for rounding in ("floor", "round", "ceil"))
            assert 1 <= low <= middle <= high <= n
            exact = n * (100 - percent)  # in hundredths, without float error
            assert (low, high) == (max(1, exact // 100), -(-exact // 100))


def test_an_unknown_rounding_is_named():
    with pytest.raises(ConfigError, match="rounding: up is unknown; use one of round, floor, ceil"):
        kept(5, 0.5, "up")


def test_compression_after_layer_l_leaves_l_plus_one_long_layers():
    c = Compression(layers=(1, 3), ratio=0.5)
    assert nominal(c, 6, 10) == [10, 10, 5, 5, 2.5, 2.5]
    assert actual(c, 6, [10]) == [10, 10, 5, 5, 2, 2]
    assert actual(Compression(layers=(5,)), 6, [10]) == [10] * 6
    assert nominal(Compression(layers=()), 3, 7) == actual(Compression(method="vanilla"), 3, [7]) == [7, 7, 7]


def test_spans_are_shortened_each_by_itself():
    c = Compression(layers=(0, 1), ratio=2 / 3)
    assert actual(c, 3, [1, 2, 8, 9]) == [20, 1 + 1 + 3 + 3, 1 + 1 + 1 + 1]
    assert actual(c, 3, []) == [0, 0, 0]


def test_reserved_compensation_tokens_are_counted():
    """One for each row and step that removes anything, from the layer after the step on."""
    keys = {"layers": (0, 2, 3), "ratio": 0.5}
    c = Compression(compensation="reserved", **keys)
    assert reserved(c, 6, [8]) == [0, 1, 1, 2, 3, 3] and actual(c, 6, [8]) == [8, 4, 4, 2, 1, 1]
    assert reserved(c, 6, [4, 4]) == [0, 1, 1, 2, 2, 2]  # nothing is left to remove in the third step
    assert reserved(c, 6, []) == reserved(Compression(**keys), 6, [8]) == [0] * 6
    assert counted(c, 6, 8, whole=True) == [8, 5, 5, 4, 4, 4] and counted(c, 6, 8)[0] == 8
    early = Compression(method="libra-input", keep=3, compensation="reserved")
    assert reserved(early, 2, [8]) == [1, 1] and reserved(early, 2, [3]) == [0, 0]
    solved = solve(Compression(compensation="reserved", layers=(0, 2, 3), tokens=100), get_model("mini"), 256)
    assert average(counted(solved, 12, 256)) == pytest.approx(100)


def test_pyramiddrop_keeps_what_its_own_code_keeps():
    # Golden data: layer list [2, 4, 6] of 8, ratios 0.5, 0.25, 0.125 of 144 tokens, acting on the input of
    # those layers.
    c = Compression(method="pyramiddrop", layers=(1, 3, 5), ratio=0.5)
    assert actual(c, 8, [144]) == [144, 144, 72, 72, 36, 36, 18, 18]


@pytest.mark.parametrize("ratio, tokens", [("1/2", 270), ("2/3", 213), ("4/5", 180)])
def test_average_tokens_of_llava_7b(ratio, tokens):
    c = Compression(layers=(7, 15, 23), ratio=ratio)
    assert round(average(nominal(c, 32, 576))) == tokens
    assert round(average(actual(c, 32, [576]))) == tokens


def test_a_layer_that_is_not_there_is_named():
    for count in (lambda c: nominal(c, 12, 256), lambda c: actual(c, 12, [256])):
        with pytest.raises(ConfigError, match="layers: 99 is out of range: the model has layers 0 to 11"):
            count(Compression(layers=(99,)))


def test_keep_is_reached_with_the_last_compression_in_equal_ratios():
    c = Compression(method="libra", layers=(1, 3, 5), keep=64)
    assert actual(c, 8, [512]) == [512, 512, 256, 256, 128, 128, 64, 64]
    assert nominal(c, 8, 512) == pytest.approx([512, 512, 256, 256, 128, 128, 64, 64])
    for n in (1, 63, 64, 65, 100, 577, 2880):
        counts = actual(c, 8, [n, 7])
        assert counts[-1] == min(n, 64) + 7 and counts == sorted(counts, reverse=True)
    assert nominal(c, 8, 30) == [30] * 8


def test_before_the_language_model_every_layer_has_what_is_kept():
    c = Compression(method="divprune", keep=64)
    assert actual(c, 4, [576]) == nominal(c, 4, 576) == [64] * 4
    assert actual(Compression(method="divprune", ratio="2/3"), 3, [576, 30]) == [202] * 3


def test_several_ratios_are_taken_one_after_the_other():
    c = Compression(layers=(1, 3), ratio=[0.5, 0.75])
    assert actual(c, 6, [16]) == nominal(c, 6, 16) == [16, 16, 8, 8, 2, 2]
    assert keeps([[16]], c, left=2) == [[8]] and keeps([[8]], c, left=1) == [[2]]
    with pytest.raises(ConfigError, match="ratio: .0.5, 0.5. has not one number for each layer"):
        Compression(layers=(1,), ratio=[0.5, 0.5])
    with pytest.raises(ConfigError, match=r"ratio: there are 2 for layers \[1, 3, 5\]; give one for each"):
        Compression(method="libra", ratio=[0.5, 0.5]).at_depth(8)


@pytest.mark.parametrize("tokens, ratio", [(192, 0.7111), (128, 0.8296), (64, 0.9481)])
def test_average_tokens_as_the_field_counts_them(tokens, ratio):
    spec = get_model("llava-1.5-7b")
    c = solve(Compression(method="fastv", layers=(1,), tokens=tokens), spec, 576)
    assert c.tokens is None and c.ratio == pytest.approx(ratio, abs=1e-4)
    assert average(nominal(c, 32, 576)) == pytest.approx(tokens)


def test_a_share_of_the_flops():
    spec, c = get_model("llava-1.5-7b"), Compression(method="libra", layers=(7, 15, 23), flops=0.4)
    solved = solve(c, spec, 576)
    whole = model_flops(spec, [576] * 32)
    assert model_flops(spec, nominal(solved, 32, 576)) == pytest.approx(0.4 * whole)
    assert solve(solved, spec, 576) is solved


def test_a_budget_out_of_reach_says_the_range():
    spec, c = get_model("llava-1.5-7b"), Compression(method="libra", layers=(7, 15, 23), tokens=128)
    with pytest.raises(
        ConfigError, match=r"^tokens: 128 is out of range: after layers \[7, 15, 23\] .* 146 to 576;"
    ):
        solve(c, spec, 576)


def test_a_budget_of_a_whole_model_is_solved_by_a_rows_file_and_refused_elsewhere(tmp_path):
    path = tmp_path / "row.yaml"
    path.write_text("model: llava-1.5-7b\ncompression: {method: fastv, layers: [1], tokens: 192}\n")
    c = Row.from_yaml(path).compression
    assert c.tokens is None and average(nominal(c, 32, 576)) == pytest.approx(192)
    unsolved = Compression.from_yaml(path)
    assert unsolved.to_dict()["tokens"] == 192 and Compression.from_dict(unsolved.to_dict()) == unsolved
    with pytest.raises(
        ConfigError, match="^tokens: 192 is a budget of a whole model; give ratio or keep, or make it a ratio"
    ):
        unsolved.at_depth(32)
    with pytest.raises(
        ConfigError, match="^tokens: 192 is a budget of a whole model; give ratio or keep here"
    ):
        keeps([[576]], unsolved)
    path.write_text("model: qwen2-vl-7b\ncompression: {method: fastv, layers: [1], tokens: 192}\n")
    with pytest.raises(
        ConfigError, match="row.yaml: tokens: 192 needs one number of visual tokens, which qwen2-vl-7b"
    ):
        Row.from_yaml(path)
    assert Compression(method="divprune", tokens=64) == Compression(method="divprune", keep=64)


def test_steps_and_the_input_are_counted():
    steps = [{"at": "input", "method": "divprune", "keep": 192}, {"at": 1, "method": "fastv", "ratio": 0.5}]
    c = Compression(steps=steps)
    assert actual(c, 4, [576, 100]) == [292, 292, 146, 146]
    assert nominal(c, 4, 576) == pytest.approx([192, 192, 96, 96])
    assert actual(Compression(method="tome", keep=64), 3, [576]) == [64] * 3
    twice = Compression(method="random", layers=(-1, 1), keep=16)
    assert nominal(twice, 3, 64) == pytest.approx([32, 32, 16]) and actual(twice, 3, [64]) == [32, 32, 16]
    spec = get_model("llava-1.5-7b")
    assert Compression(method="divprune", tokens=64).keep == 64
    half = solve(Compression(method="divprune", flops=0.5), spec, 576)
    assert half.at == "input" and model_flops(spec, nominal(half, 32, 576)) == pytest.approx(
        0.5 * model_flops(spec, [576] * 32)
    )
