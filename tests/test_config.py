"""The configuration: what a compression resolves to, and that every wrong one is a sentence naming the key
and the file."""

import dataclasses
import itertools
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from libra import rows
from libra.config import Compression, ConfigError
from libra.methods import DEFAULTS, MERGERS, METHODS, SELECTORS, Merge, Select
from libra.rows import Row, compression_from
from libra.utils.provenance import REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "row.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_without_a_method_it_is_intervals_and_igm():
    c = Compression()
    assert (c.method, c.select, c.merge, c.layers) == (None, "intervals", "igm", None)
    assert (c.ratio, c.tau, c.eta, c.importance, c.information_weight, c.seed) == (
        0.5,
        0.7,
        "mean",
        "last",
        1.0,
        0,
    )
    assert (c.score_layer, c.positions, c.rounding) == ("same", "original", "round")


@pytest.mark.parametrize(
    "method, select, merge",
    [
        ("libra", "intervals", "igm"),
        ("fastv", "topk", "drop"),
        ("turbo", "information", "average"),
        ("windowed-fastv", "intervals", "drop"),
        ("libra-mean", "intervals", "igm"),
        ("random", "random", "drop"),
        ("pyramiddrop", "topk", "drop"),
    ],
)
def test_a_method_expands(method, select, merge):
    c = Compression(method=method, layers=(3,))
    assert (c.select, c.merge) == (select, merge)
    others = ("next", "compact", "floor") if method == "pyramiddrop" else ("same", "original", "round")
    assert (c.score_layer, c.positions, c.rounding) == others


def test_libra_mean_is_libra_but_for_who_scores():
    mean, libra = (Compression(method=method, layers=(3,), ratio=0.6) for method in ("libra-mean", "libra"))
    assert (mean.importance, libra.importance) == ("mean", "last")
    assert dataclasses.replace(mean, method="libra", importance="last") == libra


def test_explicit_keys_override_the_method():
    c = Compression(
        method="pyramiddrop", merge="average", rounding="round", positions="original", layers=(3,)
    )
    assert (c.select, c.merge, c.score_layer, c.positions, c.rounding) == (
        "topk",
        "average",
        "next",
        "original",
        "round",
    )


def test_methods_name_only_what_exists():
    for name, method in METHODS.items():
        assert set(method.keys) <= set(DEFAULTS), name
        assert method.keys.get("select", "topk") in SELECTORS and method.keys.get("merge", "drop") in MERGERS
        assert method.description and "\n" not in method.description and method.section


def test_values_are_normalised_and_the_result_is_hashable():
    c = Compression(layers=[23, 7, 15], ratio="2/3", tau=1, eta=2)
    assert c.layers == (7, 15, 23) and c.ratio == 2 / 3 and isinstance(c.tau, float) and c.eta == 2.0
    assert c == Compression(layers=range(7, 24, 8), ratio=Fraction(2, 3), tau=1.0, eta=2.0)
    assert len({c, dataclasses.replace(c), Compression(layers=(7,))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.ratio = 0.1


def test_constructor_errors_name_key_value_and_mend():
    for keys, *words in (
        ({"ratio": 1}, "ratio", "1", "[0, 1)"),
        ({"ratio": -0.1}, "ratio", "-0.1", "[0, 1)"),
        ({"ratio": float("nan")}, "ratio", "nan"),
        ({"ratio": "3/3"}, "ratio", "3/3", "[0, 1)"),
        ({"ratio": "1/0"}, "ratio", "1/0"),
        ({"ratio": "half"}, "ratio", "half", "2/3"),
        ({"ratio": True}, "ratio", "True", "number"),
        ({"tau": 1.1}, "tau", "1.1", "[-1, 1]"),
        ({"tau": -1.1}, "tau", "-1.1", "[-1, 1]"),
        ({"tau": "1e-1"}, "tau", "1e-1", "without quotes"),
        ({"eta": "median"}, "eta", "median", "mean", "positive"),
        ({"eta": 0}, "eta", "0", "positive"),
        ({"eta": float("inf")}, "eta", "inf", "positive"),
        ({"layers": (-2,)}, "layers", "-2", "from 0"),
        ({"keep": 0}, "keep", "0", "keep: 64"),
        ({"keep": True}, "keep", "True"),
        ({"keep": 1.5}, "keep", "1.5"),
        ({"keep": 64, "ratio": 0.5}, "ratio", "keep: 64", "0.5", "remove all but one"),
        ({"tokens": 0}, "tokens", "0", "192"),
        ({"flops": 1}, "flops", "1", "(0, 1)"),
        ({"ratio": []}, "ratio", "[]", "one for each"),
        ({"ratio": [0.5, 2]}, "ratio", "2", "[0, 1)"),
        ({"method": "cdpruner", "as_released": 1}, "as_released", "1", "true or false"),
        ({"layers": (3, 7, 3)}, "layers", "[3, 7, 3]", "twice"),
        (
            {"method": "visionzip", "keep": "adaptive"},
            "keep",
            "select prumerge and prumerge-plus in the tower",
        ),
        ({"method": "prumerge", "keep": "adaptive", "at": "input"}, "keep", "in the tower"),
        ({"layers": 3}, "layers", "3", "list"),
        ({"layers": "7"}, "layers", "7", "list"),
        ({"layers": (True,)}, "layers", "True", "whole"),
        ({"layers": (1.0,)}, "layers", "1.0", "whole"),
        ({"method": "fastvv"}, "method", "fastvv", "did you mean fastv?", "pyramiddrop"),
        ({"select": "interval"}, "select", "interval", "did you mean intervals?", "topk"),
        ({"merge": "mean"}, "merge", "mean", "igm-neg"),
        ({"importance": "first"}, "importance", "first", "last, mean, tower"),
        ({"score_layer": "previous"}, "score_layer", "previous", "same, next"),
        ({"positions": 1}, "positions", "1", "original, compact"),
        ({"rounding": "up"}, "rounding", "up", "round, floor, ceil"),
        ({"select": "random", "seed": True}, "seed", "True", "whole"),
        ({"select": "random", "seed": -1}, "seed", "-1"),
        ({"select": "information", "information_weight": "high"}, "information_weight", "high", "number"),
        ({"select": "information", "information_weight": -1}, "information_weight", "-1"),
    ):
        with pytest.raises(ConfigError) as error:
            Compression(**keys)
        text = sentence(error)
        assert text.startswith(f"{words[0]}: ") and all(word in text for word in words), text


@pytest.mark.parametrize(
    "keys, key",
    [
        ({"method": "vanilla", "layers": (3,)}, "layers"),
        ({"method": "vanilla", "ratio": 0.3}, "ratio"),
        ({"method": "vanilla", "select": "topk"}, "select"),
        ({"method": "fastv", "tau": 0.5}, "tau"),
        ({"merge": "igm-pos", "tau": 0.5}, "tau"),
        ({"merge": "igm-neg", "tau": 0.5}, "tau"),
        ({"merge": "average", "eta": 1.0}, "eta"),
        ({"method": "libra", "information_weight": 2}, "information_weight"),
        ({"method": "libra", "seed": 1}, "seed"),
        ({"method": "random", "importance": "mean"}, "importance"),
        ({"method": "random", "score_layer": "next"}, "score_layer"),
        ({"method": "divprune", "importance": "mean"}, "importance"),
        ({"method": "divprune", "as_released": True}, "as_released"),
        ({"method": "turbo", "compensation": "reserved"}, "compensation"),
    ],
)
def test_a_key_without_effect_is_refused(keys, key):
    with pytest.raises(ConfigError) as error:
        Compression(**keys)
    assert re.match(rf"{key}: .* has no effect: .*; remove {key}$", sentence(error))


@pytest.mark.parametrize(
    "keys",
    [
        {"merge": "igm-pos", "eta": 0.5},
        {"merge": "igm-neg", "eta": 0.5},
        {"select": "information", "information_weight": 5},
        {"method": "random", "seed": 3},
        {"method": "random", "merge": "igm", "importance": "mean", "tau": 0.2},
        {"ratio": 0},
        {"merge": "igm-neg", "compensation": "reserved"},
    ],
)
def test_a_key_with_effect_is_taken(keys):
    c = Compression(layers=(1,), **keys)
    assert all(getattr(c, key) == value for key, value in keys.items())


def test_in_a_dict_a_key_without_effect_is_refused_even_at_its_default():
    for keys, key in (
        ({"method": "fastv", "layers": [3], "tau": 0.7}, "tau"),
        ({"method": "turbo", "layers": [3], "eta": "mean"}, "eta"),
        ({"method": "libra", "layers": [3], "seed": 0}, "seed"),
        ({"method": "libra", "layers": [3], "information_weight": 1.0}, "information_weight"),
        ({"method": "vanilla", "ratio": 0.5}, "ratio"),
        ({"method": "fastv", "layers": [3], "compensation": "ragged"}, "compensation"),
    ):
        with pytest.raises(ConfigError) as error:
            Compression.from_dict(keys, "some/row.yaml")
        assert re.match(rf"some/row.yaml: {key}: .* has no effect", sentence(error))


def all_compressions():
    parts = [(None, s, m) for s in [None, *SELECTORS] for m in [None, *MERGERS]]
    parts += [(name, s, m) for name in METHODS for s, m in ((None, None), ("topk", "igm"))]
    for (method, select, merge), layers in itertools.product(parts, [None, (), (7, 15, 23)]):
        if method and (
            not METHODS[method].compresses and (select or layers) or layers and not METHODS[method].places
        ):
            continue
        if select and SELECTORS[select].shrinks and layers != ():
            continue  # before the language model only
        if select and layers and "grid" in SELECTORS[select].needs:
            continue  # once only
        if merge and MERGERS[merge].follows and select not in MERGERS[merge].follows:
            continue
        early = method and METHODS[method].place != "layers"
        keys = {"at": "input", "importance": "tower"} if early and select else {"layers": layers}
        yield Compression(method=method, select=select, merge=merge, **keys)
    yield Compression(steps=STEPS, positions="centre")
    others = {"importance": "mean", "score_layer": "next", "positions": "compact", "rounding": "ceil"}
    yield Compression(layers=(1, 2), ratio=2 / 3, tau=-0.3, eta=0.01, **others)
    yield Compression(method="random", layers=(1,), seed=12345)
    yield Compression(method="cdpruner", keep=64, as_released=True)
    yield Compression(method="libra", layers=(1, 5), keep=40)
    yield Compression(method="libra", layers=(1, 5), ratio=("2/3", 0.5))
    yield Compression(method="libra", tokens=192)
    yield Compression(method="libra", layers=(1, 5), flops=0.4)
    yield Compression(method="turbo", layers=(1,), information_weight=0.1, ratio=0.1)
    yield Compression(method="pyramiddrop", layers=(1,), rounding="round")
    yield Compression(method="libra", layers=(1,), compensation="reserved")
    yield Compression(method="libra-input", compensation="reserved", keep=64)


def test_dict_round_trip_is_exact_through_json_and_yaml():
    for c in all_compressions():
        keys = c.to_dict()
        assert Compression.from_dict(keys) == c
        assert Compression.from_dict(json.loads(json.dumps(keys))) == c
        assert Compression.from_dict(yaml.safe_load(yaml.safe_dump(keys))) == c
    assert Compression(method="vanilla").to_dict() == {"method": "vanilla"}


def test_compensation():
    """The word; left out of the keys where it is the paper's, as files have it from before."""
    assert "compensation" not in Compression(layers=(1,)).to_dict()
    c = Compression(layers=(1,), compensation="reserved")
    assert c.to_dict()["compensation"] == "reserved" and c.reserves and not Compression(layers=(1,)).reserves
    mixed = Compression(steps=[{"layers": [1], "compensation": "reserved"}, {"method": "fastv", "at": 3}])
    assert [part.reserves for part in mixed.parts] == [True, False] and not mixed.reserves
    with pytest.raises(ConfigError, match="compensation: fixed is unknown; use one of ragged, reserved"):
        Compression(compensation="fixed")


def test_check_layers():
    Compression(layers=(0, 11)).check_layers(12)
    with pytest.raises(
        ConfigError, match=r"^layers: 99 is out of range: the model has layers 0 to 11; use .* \[2, 5, 8\]$"
    ):
        Compression(layers=(3, 99)).check_layers(12)
    with pytest.raises(ConfigError, match=r"^a\.yaml: layers: 12 "):
        Compression(layers=(12,)).check_layers(12, "a.yaml")
    with pytest.raises(ConfigError, match="score_layer: next needs one after it"):
        Compression(method="pyramiddrop", layers=(11,)).check_layers(12)


def test_a_registered_select_and_merge_are_names_like_any_other(monkeypatch):
    monkeypatch.setitem(SELECTORS, "mine", Select(SELECTORS["topk"].function))
    monkeypatch.setitem(MERGERS, "my-merge", Merge(MERGERS["drop"].function))
    keys = {
        "select": "mine",
        "merge": "my-merge",
        "layers": [1],
        "tau": 0.1,
        "seed": 4,
    }  # they may read any key
    assert Compression.from_dict(Compression.from_dict(keys).to_dict()).seed == 4


def test_yaml_bare_and_row(write):
    expected = Compression(method="libra", layers=(7, 15, 23), ratio=2 / 3)
    assert Compression.from_yaml(write("{method: libra, layers: [23, 7, 15], ratio: 2/3}")) == expected
    block = "compression: {method: libra, layers: [7, 15, 23], ratio: 2/3}"
    path = write(f"model: mini\n{block}\ntasks: [gqa]\npaper: {{table: 1, flops: 1.41}}")
    assert Compression.from_yaml(str(path)) == expected
    row = Row.from_yaml(path)
    assert (row.model, row.compression, row.tasks, row.name) == ("mini", expected, ["gqa"], "row")
    assert row.paper == {"table": 1, "flops": 1.41} and row.path == str(path)
    assert Row.from_yaml(write("model: mini\ncompression: {method: vanilla}\nname: plain")).name == "plain"


ROW = "model: mini\ncompression: {method: vanilla}\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("method: libra\nlaers: [3]", ["laers", "did you mean layers?"]),
        ("method: libra\nlayers: []", ["layers", "vanilla"]),
        ("method: vanilla\nlayers: [3]", ["layers", "[3]", "no effect"]),
        ("method: libra\nlayers: [3]\nratio:", ["ratio", "no value"]),
        ("method: libra\nlayers: [3]\nratio: 1.0", ["ratio", "1.0", "[0, 1)"]),
        ("method: libra\nlayers: [3]\nratio: yes", ["ratio", "True", "number"]),
        ("method: libra\nlayers: [3]\ntau: 2", ["tau", "2", "[-1, 1]"]),
        ("method: libra\nlayers: [3]\nlayers: [7]", ["layers", "written twice", "line 3"]),
        ("1: 2", ["1", "method"]),
        ("- libra", ["no keys"]),
        ("", ["no keys"]),
        ("method: [libra", ["not valid YAML", "line"]),
        ("method: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
        (ROW + "task: [gqa]", ["task", "did you mean tasks?"]),
        (ROW + "ratio: 0.5", ["ratio", "compression:"]),
        (ROW + "tasks: gqa", ["tasks", "gqa", "list"]),
        (ROW + "tasks: [gqa, gqa]", ["tasks", "twice"]),
        (ROW + "paper: 1", ["paper", "1", "mapping"]),
        (ROW + "paper: {flops: [1]}", ["paper", "flops", "[1]"]),
        (ROW + "paper: {flops: high}", ["paper", "flops", "high"]),
        (ROW + "name: 7", ["name", "7"]),
        ("model: 7\ncompression: {method: vanilla}", ["model", "7"]),
        ("model: mini", ["compression", "missing"]),
        ("compression: {method: vanilla}", ["model", "missing"]),
        ("model: mini\ncompression: libra", ["compression", "libra", "mapping"]),
        ("model: mini\ncompression: {method: libra, layers: [1], tua: 0.5}", ["tua", "did you mean tau?"]),
        ("model: mini\ncompression: {method: libra, layers: []}", ["layers", "vanilla"]),
    ],
)
def test_file_errors_name_the_key_and_the_file(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        Compression.from_yaml(path)
    text = sentence(error)
    assert text.startswith(f"{path}: ") and all(word in text for word in words), text


def test_files_that_cannot_be_read(tmp_path, write):
    write(ROW)
    for name, word in (
        ("rows.yaml", "did you mean row.yaml?"),
        ("sub/x", "check the path"),
        ("", "cannot be read"),
    ):
        path = tmp_path / name
        with pytest.raises(ConfigError) as error:
            Row.from_yaml(path)
        assert sentence(error).startswith(f"{path}: ") and word in sentence(error)
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(ConfigError, match="picture.yaml: .*UTF-8"):
        Row.from_yaml(tmp_path / "picture.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_row_of_configs_loads_and_fits_its_model(path):
    row = Row.from_yaml(path)
    row.compression.check_layers(rows.get_model(row.model).layers)
    assert row.tasks
    assert re.match(r"# \w", path.read_text(encoding="utf-8")), "line 1: which row of which table it is"
    accuracies = [row.paper[task] for task in row.tasks if task in row.paper]
    if "avg" in row.paper:  # the paper's Avg leaves MME out
        others = [row.paper[task] for task in row.tasks if task != "mme"]
        assert row.paper["avg"] == pytest.approx(sum(others) / len(others), abs=0.051)
    of_the_paper = row.model != "mini" and re.fullmatch(r"configs|table\d", path.parent.name)
    assert len(accuracies) == len(row.tasks) or not of_the_paper


def test_table_1_and_the_mini_rows_are_complete():
    rows = {"vanilla", "fastv", "turbo", "r50", "r67"}
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS}
    expected = {f"{model}_{row}" for model in ("llava7b", "llava13b", "next8b") for row in rows}
    expected |= {f"mini/{row}" for row in rows | {"random", "windowed_fastv"}}
    assert expected <= names


def test_models():
    models = rows.load_models()
    assert list(models) == [
        "llava-1.5-7b",
        "llava-1.5-13b",
        "llava-next-8b",
        "videollama2-7b",
        "qwen2-vl-7b",
        "mini",
    ]
    mini = rows.get_model("mini")
    assert (mini.layers, mini.hidden_size, mini.intermediate_size, mini.kv_size) == (12, 128, 352, 128)
    assert mini.visual_tokens == (256,)
    assert (mini.checkpoint, mini.conversation) == ("mini/checkpoint", "mini")
    with pytest.raises(ConfigError) as error:
        rows.get_model("llava-1.5-8b", "row.yaml")
    text = sentence(error)
    assert (
        text.startswith("row.yaml: model: llava-1.5-8b is unknown; did you mean llava-1.5-7b?")
        and "qwen2-vl-7b" in text
    )


def test_the_place_before_the_language_model_has_three_spellings():
    by_word, by_list, by_at = (
        Compression(method="random", **keys)
        for keys in ({"layers": "input"}, {"layers": (-1,)}, {"at": "input"})
    )
    assert by_word == by_list == by_at and by_at.layers == (-1,) and by_at.place == "input"
    assert (
        Compression(method="divprune").place == "input" and Compression(method="visionzip").place == "tower"
    )
    assert Compression(method="divprune", at=3) == Compression(method="divprune", layers=(3,))
    both = Compression(method="random", layers=(-1, 3))
    assert both.at is None and Compression.from_dict(both.to_dict()) == both
    for c in (by_at, Compression(method="visionzip"), Compression(method="divprune", at="tower")):
        assert Compression.from_dict(c.to_dict()) == c and c.to_dict()["at"] == c.place


STEPS = [{"at": "input", "method": "visionzip", "keep": 192}, {"at": 15, "method": "fastv", "ratio": 0.5}]


def test_steps_are_compressions_one_after_another():
    c = Compression(steps=STEPS)
    assert c.where == "before the language model, then after layer 15"
    assert c.layers == (-1, 15) and c.positions == "original" and c.acts and c.place == "layers"
    assert c.needs == ("tower_cls|tower_received", "tower_keys") and c.amount == "keep 192, then ratio 0.5"
    assert Compression.from_dict(c.to_dict()) == c and hash(c) == hash(Compression(steps=STEPS))
    assert [(step.layer, step.part.method, step.left) for step in c.schedule(32)] == [
        (-1, "visionzip", 1), (15, "fastv", 1),
    ]  # fmt: skip
    centre = Compression(steps=STEPS, positions="centre")
    assert {part.positions for part in centre.steps} == {"centre"}
    natural = Compression(
        steps=[{"method": "libra"}, {"method": "tome", "keep": 9}, {"at": "tower", "method": "divprune"}]
    )
    assert natural.layers is None and natural.at_depth(32).layers == (-1, -1, 7, 15, 23)
    assert [step.part.place for step in natural.schedule(32)][:2] == ["tower", "input"]
    assert [step.left for step in natural.schedule(32)] == [1, 1, 3, 2, 1]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"steps": []}, "steps: .* is not a list of compressions; write for example"),
        ({"steps": 3}, "steps: 3 is not a list"),
        ({"steps": STEPS, "ratio": 0.5}, "ratio: 0.5 has no effect next to steps; write it in a step"),
        ({"steps": STEPS, "method": "libra"}, "method: libra has no effect next to steps"),
        ({"steps": STEPS + STEPS[1:]}, "steps: two of them are at 15"),
        ({"steps": [STEPS[0], {"at": -1, "method": "tome"}]}, "steps: two of them are at input; give each"),
        ({"steps": [{"method": "vanilla"}]}, "steps: method vanilla compresses nothing; remove it"),
        ({"steps": [Compression(steps=STEPS)]}, "steps: a step has steps of its own"),
        ({"steps": [{"method": "pyramiddrop"}, STEPS[0]]}, "positions: the steps have compact and original"),
        ({"steps": [{"method": "libra", "kep": 3}]}, "kep: is not a key of compression; did you mean keep"),
        ({"at": "input"}, "importance: last is the decoder's attention, .* write importance: tower"),
        ({"at": "tower", "importance": "tower"}, "at: merge igm makes a compensation token"),
        ({"at": "tower", "method": "cdpruner"}, "at: method cdpruner compares with the question"),
        ({"at": "somewhere"}, "at: somewhere is not a place; write tower, input, or the number"),
        ({"at": "input", "layers": [3]}, "at: input and layers: .* both say where"),
        ({"at": "input", "layers": 3}, "at: input and layers: 3 both say where; remove one"),
        ({"at": 2, "layers": "somewhere"}, "at: 2 and layers: somewhere both say where"),
        ({"at": 40}, "layers: 40 is out of range: the model has layers 0 to 31"),
        ({"method": "evs", "layers": [-1, 3]}, "layers: method evs reads the grid .* give it one place"),
        ({"select": "vidcom2", "merge": "drop"}, "layers: select vidcom2 with merge drop reads the grid"),
        ({"steps": [STEPS[1], {"at": 20, "method": "pool"}]}, "method pool .* put it before the others"),
        (
            {"steps": [{"at": "tower", "method": "tome"}, {"method": "vscan"}]},
            "vscan reads the grid of a pic",
        ),
        (
            {"steps": [{"method": "fastv"}, {"select": "evs", "merge": "igm", "at": 9}]},
            "evs with merge igm reads the grid",
        ),
    ],
)
def test_what_a_place_or_a_list_of_steps_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        Compression(**keys).at_depth(32)


def test_the_input_is_one_place_whichever_key_names_it():
    named = [{"at": "input"}, {"layers": "input"}, {"layers": [-1]}, {"at": -1}, {"at": [-1]}]
    first, *others = (Compression(method="divprune", **key) for key in named)
    assert all(other == first for other in others) and first.at == "input"
    assert Compression.from_dict(first.to_dict()) == first


def test_what_reads_the_grid_comes_first():
    first = Compression(steps=[STEPS[1], {"method": "vscan", "keep": 9}])
    assert [step.part.method for step in first.at_depth(32).schedule(32)] == ["vscan", "fastv"]


@pytest.mark.parametrize("merge", [name for name, traits in MERGERS.items() if traits.follows])
def test_a_merge_that_goes_on_from_certain_selects_is_refused_with_others(merge):
    """It would fail in the middle of a call: what it reads is not there."""
    follows = MERGERS[merge].follows
    for select in follows:
        assert Compression(select=select, merge=merge, layers=[3]).merge == merge
    for select in SELECTORS.keys() - follows:
        with pytest.raises(ConfigError, match=f"merge: {merge} goes on from .* write select: {follows[0]}"):
            Compression(select=select, merge=merge, layers=[3])


@pytest.mark.parametrize(
    "given, keys, same",
    [
        (None, {"ratio": 0.3}, Compression(method="libra", ratio=0.3)),
        (None, {"select": "topk", "ratio": 0.3}, Compression(select="topk", ratio=0.3)),
        ("divprune", {"keep": 64}, Compression(method="divprune", keep=64)),
        ("windowed_fastv", {}, Compression(method="windowed-fastv")),
        ("mini/r50", {}, Compression.named("mini/r50")),
        ("configs/mini/r50.yaml", {"keep": 9}, Compression(method="libra", layers=(2, 5, 8), keep=9)),
        ({"method": "fastv"}, {"layers": (3,)}, Compression(method="fastv", layers=(3,))),
        (Compression(method="libra", keep=9), {"ratio": 0.5}, Compression(method="libra", ratio=0.5)),
        (Compression(method="libra", keep=9), {"ratio": None}, Compression(method="libra", keep=9)),
    ],
)
def test_whatever_names_a_compression(given, keys, same, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert compression_from(given, **keys) == same


@pytest.mark.parametrize(
    "given, files, sentence",
    [
        ("dvprune", True, "dvprune is neither a method nor a row"),
        ("dvprune", True, "did you mean divprune?"),
        ("no/such.yaml", True, "there is no such file, and no row of that name"),
        ("configs/mini/r50.yaml", False, "neither a method nor a row"),
        (5, True, "is not a mapping"),
    ],
)
def test_what_names_none_is_refused(given, files, sentence, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        compression_from(given, files=files)


def test_keys_beside_steps_are_refused():
    steps = Compression(steps=[{"method": "fastv", "layers": [3]}])
    with pytest.raises(ConfigError, match="^ratio: this compression has steps; write it in a step$"):
        compression_from(steps, ratio=0.5)
