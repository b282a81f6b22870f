"""The embedded benchmark: the same everywhere, rightly labelled, reused and repaired."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from libra.mini import benchmark
from libra.mini.questions import EASY_VQA, SCENE_TYPES, TYPES, easy_vqa

STEPS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def answer_from_scene(kind: str, question: str, digits) -> str:
    """Reads a question's English and looks the answer up in the scene, without the code that made it."""
    board = {(digit.row, digit.column): digit for digit in digits}
    place = None
    if found := re.search(rf"the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})", question):
        place = ROWS.index(found[1]), COLUMNS.index(found[2])
    if kind == "position":
        return str(board[place].value)
    if kind == "color":
        return board[place].color
    if kind == "reading":
        return " ".join(str(board[key].value) for key in sorted(board))
    if kind == "counting":
        if row := re.search(r"in the (\w+) row", question):
            return str(sum(key[0] == ROWS.index(row[1]) for key in board))
        if question == "how many digits are there ?":
            return str(len(board))
        return str(sum(digit.color == question.split()[2] for digit in digits))
    if kind == "relation":
        down, right = STEPS[re.search(r"next (.*) the", question)[1]]
        cell = place
        while (cell := (cell[0] + down, cell[1] + right)) not in board:
            pass
        return str(board[cell].value)
    if kind == "yes_no":
        if there := re.search(r"is there a (\w+) digit", question):
            return "yes" if any(digit.color == there[1] for digit in digits) else "no"
        claim = question.split()[-2]
        digit = board[place]
        return "yes" if claim in (str(digit.value), digit.color) else "no"
    options = dict(re.findall(r"([ABCD]) (\d)", question))
    return next(letter for letter, value in options.items() if value == str(board[place].value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "data"
    benchmark.write_benchmark(path, 6)
    return path


@pytest.mark.parametrize("kind", SCENE_TYPES)
def test_answers_follow_from_the_scene(kind):
    for index in range(40):
        sample = benchmark.scene_sample(kind, index)
        assert sample.answer == answer_from_scene(kind, sample.question, sample.scene.digits), sample.question


def test_easy_vqa_asks_its_own_test_images_once_each():
    samples = benchmark.easy_vqa_samples(50)
    _, by_image = easy_vqa("test")
    pairs = {pair for questions in by_image.values() for pair in questions}
    assert all((sample.question, sample.answer) in pairs for sample in samples)
    assert (
        len({sample.image.tobytes() for sample in samples}) > 40
    )  # images of their own, but some shapes look alike
    with pytest.raises(ValueError, match="test images"):
        benchmark.easy_vqa_samples(10_000)


def test_questions_stay_the_same_when_there_are_more(folder, tmp_path):
    larger = benchmark.write_benchmark(tmp_path / "larger", 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert larger["sha256"] != manifest["sha256"]
    for kind in SCENE_TYPES:
        few, more = (
            load_dataset(
                "parquet", data_files=str(path / f"{kind}.parquet"), split="train", cache_dir=str(tmp_path)
            )
            for path in (folder, tmp_path / "larger")
        )
        assert few["question"] == more["question"][:6] and few["answer"] == more["answer"][:6]


def test_written_again_elsewhere_it_is_the_same(folder, tmp_path):
    again = benchmark.write_benchmark(tmp_path / "again", 6)
    assert again == json.loads((folder / "manifest.json").read_text())


def test_files_hold_what_the_manifest_says(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["types"]) == list(TYPES)
    for kind, entry in manifest["types"].items():
        rows = load_dataset(
            "parquet", data_files=str(folder / entry["file"]), split="train", cache_dir=str(tmp_path)
        )
        assert rows.column_names == ["question_id", "image", "question", "answer"]
        assert rows["question_id"] == [f"{kind}-{index}" for index in range(6)]
        counts = Counter(rows["answer"])
        assert counts[entry["majority_answer"]] == max(counts.values())
        assert entry["majority_share"] == max(counts.values()) / 6
        for row, sample in zip(rows, benchmark.samples_of(kind, 6), strict=True):
            assert np.array_equal(np.asarray(row["image"]), np.asarray(sample.image))
    assert (64, 64) == tuple(
        load_dataset(
            "parquet", data_files=str(folder / f"{EASY_VQA}.parquet"), split="train", cache_dir=str(tmp_path)
        )[0]["image"].size
    )


def test_the_right_folder_is_reused_and_a_damaged_one_written_anew(folder, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "samples_of", lambda *_: pytest.fail("it was drawn again"))
        manifest = benchmark.write_benchmark(folder, 6)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "color.parquet").write_bytes(b"damaged")
    assert benchmark.write_benchmark(folder, 6) == manifest
    assert (folder / "color.parquet").stat().st_size > 1000
    assert not list(folder.parent.glob("*.tmp"))


def test_another_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for flags in (
        ["--output", str(tmp_path), "--questions", "2"],
        ["--output", str(tmp_path / "new"), "--questions", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(flags)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "new").exists()
