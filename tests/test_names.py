"""Rows and models by name, in either spelling, wherever one is taken; a wrong name suggests the near one."""

import os
from pathlib import Path

import pytest

import libra
from eval.plan import Wanted, plan
from eval.suites import get_table
from libra import flops, rows
from libra.checkpoints import find_checkpoint
from libra.config import ConfigError
from libra.rows import Row, get_model
from llava.model.weights import local_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_compression_by_the_name_of_its_row(elsewhere):
    expected = libra.Compression(method="libra", layers=(7, 15, 23), ratio=0.5)
    for name in ("llava7b_r50", "llava7b-r50"):
        assert libra.Compression.named(name) == libra.Compression.from_yaml(name) == expected
    assert libra.Compression.from_yaml("configs/llava7b_r50.yaml") == expected  # as the documents write it
    with pytest.raises(
        ConfigError, match=r"^llava7b_r5 is not the name of a row; did you mean llava7b_r50\?$"
    ):
        libra.Compression.named("llava7b_r5")
    with pytest.raises(ConfigError, match="is not the name of a row; the names are llava13b_fastv, "):
        libra.Compression.named("")


def test_every_row_has_a_name(elsewhere):
    names = rows.shipped_rows()
    assert len(names) == len(list((ROOT / "configs").rglob("*.yaml"))) > 100
    row = Row.from_yaml("mini/windowed-fastv")
    assert (row.path, row.name) == ("mini/windowed_fastv", "windowed_fastv")


def test_a_file_comes_before_a_name(elsewhere):
    Path("llava7b_r50").write_text("{method: fastv, layers: [2], ratio: 0.5}")
    assert libra.Compression.from_yaml("llava7b_r50").method == "fastv"
    assert libra.Compression.named("llava7b_r50").method == "libra"


@pytest.mark.parametrize(
    "given, hint",
    [
        ("llava7b_r5O", "did you mean llava7b_r50?"),
        ("mine.yml", "did you mean mine.yaml?"),
        ("no/such.yaml", "check the path"),
    ],
)
def test_a_wrong_row_suggests_a_near_one(given, hint, elsewhere, capsys):
    Path("mine.yaml").write_text("{method: vanilla}")
    with pytest.raises(SystemExit) as stop:
        flops.main(["--config", given])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == f"error: {given}: there is no such file, and no row of that name; {hint}\n"
    )


@pytest.mark.parametrize(
    "key, word, name",
    [
        ("method", "windowed_fastv", "windowed-fastv"),
        ("merge", "igm_pos", "igm-pos"),
        ("select", "topk", "topk"),
    ],
)
def test_both_spellings_are_one_name(key, word, name):
    c = libra.Compression(**{key: word}, layers=(1,))
    assert (
        getattr(c, key) == name
        and c == libra.Compression(**{key: name}, layers=(1,))
        and c.to_dict()[key] == name
    )


def test_a_model_by_name(elsewhere):
    assert Path(find_checkpoint("mini")).samefile(ROOT / "mini/checkpoint")
    assert Path(find_checkpoint("mini/checkpoint")).samefile(ROOT / "mini/checkpoint")
    assert local_folder("mini").samefile(ROOT / "mini/checkpoint")
    assert find_checkpoint("llava-1.5-7b") == "liuhaotian/llava-v1.5-7b"
    assert find_checkpoint("somebody/some-model") == "somebody/some-model"
    assert get_model("llava_1.5_7b") is get_model("llava-1.5-7b")
    with pytest.raises(
        ConfigError, match=r"^mimi is neither a folder nor a model's name; did you mean mini\?$"
    ):
        find_checkpoint("mimi")


def test_a_folder_comes_before_a_models_name(elsewhere):
    os.mkdir("mini")
    assert Path(find_checkpoint("mini")).samefile(
        ROOT / "mini/checkpoint"
    )  # a folder without a model, as in the repository
    Path("mini/config.json").write_text("{}")
    assert find_checkpoint("mini") == "mini"


def test_rows_and_tasks_of_a_table_in_either_spelling():
    todo = plan(
        get_table("3"), "llava7b", Wanted(["hierarchical-r50", "pti_r67"], ["scienceqa-img"], dry=True)
    )
    assert [cell.row for cell in todo.cells] == ["hierarchical_r50", "pti_r67"]
    assert {cell.task for cell in todo.cells} == {"scienceqa_img"}
    with pytest.raises(ValueError, match="row hierarchical-r5 is unknown"):
        plan(get_table("3"), "llava7b", Wanted(["hierarchical-r5"], dry=True))
    with pytest.raises(ValueError, match="task scienceqa is not a task"):
        plan(get_table("3"), "llava7b", Wanted(tasks=["scienceqa"], dry=True))
