"""The embedded benchmark: the same everywhere, rightly labelled, reused and repaired."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from libra.mini import benchmark
from libra.mini.films import FILM_TYPES
from libra.mini.questions import EASY_VQA, SCENE_TYPES, TYPES
from libra.mini.scenes import COLOR_NAMES
from libra.mini.shapes import easy_vqa

STEPS = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def named(words: list[str], digits) -> list:
    """The digits of a value, a colour or both, as the words of a question name them."""
    wanted = {word for word in words if word in COLOR_NAMES or word.isdigit()}
    return [digit for digit in digits if wanted <= {digit.color, str(digit.value)}]


def counted(question: str, digits) -> str:
    if row := re.search(r"in the (\w+) row", question):
        return str(sum(digit.row == ROWS.index(row[1]) for digit in digits))
    return str(len(named(question.split(), digits)))


def related(question: str, board: dict, place: tuple[int, int]) -> str:
    down, right = STEPS[re.search(r"next (.*) the", question)[1]]
    while (place := (place[0] + down, place[1] + right)) not in board:
        pass
    return str(board[place].value)


def chosen(question: str, digit) -> str:
    options = dict(re.findall(r"([ABCD]) (\w+)", question))
    assert len(options) == 4 == len(set(options.values()))
    right = digit.color if question.startswith("color") else str(digit.value)
    return next(letter for letter, option in options.items() if option == right)


def answer_from_scene(kind: str, question: str, digits) -> str:
    """Reads a question's English and looks the answer up in the scene, without the code that made it."""
    board = {(digit.row, digit.column): digit for digit in digits}
    order = [board[key] for key in sorted(board)]
    place, words = None, question.split()
    if found := re.search(rf"the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})", question):
        place = ROWS.index(found[1]), COLUMNS.index(found[2])
    if kind == "yes_no":
        return "yes" if named(words, [board[place]] if place else digits) else "no"
    if kind == "attribute":
        (digit,) = named(words, digits)
        return digit.color if words[1] == "color" else str(digit.value)
    if kind == "find":
        where = [f"{ROWS[digit.row]} {COLUMNS[digit.column]}" for digit in named(words, digits)]
        assert len(where) < 2
        return where[0] if where else "nowhere"
    return {
        "position": lambda: str(board[place].value),
        "reading": lambda: " ".join(str(digit.value) for digit in order),
        "caption": lambda: " ".join(f"{digit.color} {digit.value}" for digit in order),
        "counting": lambda: counted(question, digits),
        "relation": lambda: related(question, board, place),
        "extreme": lambda: str((min if "smallest" in words else max)(digit.value for digit in digits)),
        "multiple_choice": lambda: chosen(question, board[place]),
    }[kind.removesuffix("_small")]()


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
        if SCENE_TYPES[kind].small is not None:
            covered = max(np.bincount(sample.scene.owners[sample.scene.owners >= 0]))
            assert covered <= 25 if SCENE_TYPES[kind].small else covered > 8


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
    assert list(manifest["types"]) == [*TYPES, *FILM_TYPES]
    for kind, entry in manifest["types"].items():
        rows = load_dataset(
            "parquet", data_files=str(folder / entry["file"]), split="train", cache_dir=str(tmp_path)
        )
        shown = "frames" if kind in FILM_TYPES else "image"
        assert rows.column_names == ["question_id", shown, "question", "answer"]
        assert rows["question_id"] == [f"{kind}-{index}" for index in range(6)]
        counts = Counter(rows["answer"])
        assert counts[entry["majority_answer"]] == max(counts.values())
        assert entry["majority_share"] == max(counts.values()) / 6
        for row, sample in zip(rows, benchmark.samples_of(kind, 6), strict=True):
            frames = row[shown] if kind in FILM_TYPES else [row[shown]]
            for frame, own in zip(frames, sample.frames, strict=True):
                assert np.array_equal(np.asarray(frame), np.asarray(own))
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
    (folder / "find.parquet").write_bytes(b"damaged")
    assert benchmark.write_benchmark(folder, 6) == manifest
    assert (folder / "find.parquet").stat().st_size > 1000
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
