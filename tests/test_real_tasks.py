"""The paper's benchmarks: lmms-eval's own tasks, unchanged and offline, on rows of their exact schema, with
the embedded model behind the plug-in, against answers that are made here by hand, question by question."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import lmms_fixtures as fixtures
import numpy as np
import pytest

from eval import data, samples, suites
from eval.cells import Cell, what_is_loaded
from eval.harness import Harness, Settings
from eval.pool import _sentence, run_cells
from eval.suites import Task
from libra.rows import Row
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.video import load_frames

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "mini" / "checkpoint"
R50 = ROOT / "configs" / "mini" / "r50.yaml"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ASKED = fixtures.questions(8)
HINTS = ["", "read the image", "", ""]


class ByHand:
    """A checkpoint and r50's compression without the harness and without our plug-in: one prompt, one
    answer."""

    def __init__(self, checkpoint: Path):
        self.tokenizer, self.model, self.processor, _ = load_pretrained_model(
            str(checkpoint), None, "mini", device="cpu"
        )
        self.model.set_compression(Row.from_yaml(R50).compression)

    def __call__(self, text: str, images: list, most: int = 16) -> str:
        talk = conv_templates["mini"].copy()
        talk.append_message(talk.roles[0], " ".join(["<image>"] * len(images)) + "\n" + text)
        talk.append_message(talk.roles[1], None)
        ids = tokenizer_image_token(talk.get_prompt(), self.tokenizer, return_tensors="pt")[None]
        assert self.model.config.image_aspect_ratio == "pad"
        pixels = process_images(images, self.processor, self.model.config)
        said = self.model.generate(ids, images=pixels, do_sample=False, max_new_tokens=most)
        return self.tokenizer.decode(said[0], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that plays the hub, as the working directory, with the harness's caches in it."""
    import datasets

    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_HOME", str(root))
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        patch.setenv("TQDM_DISABLE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {
        "words": CHECKPOINT,
        "letters": fixtures.lettered(CHECKPOINT, tmp_path_factory.mktemp("lettered") / "mini"),
        "boxes": fixtures.lettered(CHECKPOINT, tmp_path_factory.mktemp("boxed") / "mini", *fixtures.BOXES),
    }


@pytest.fixture(scope="module")
def by_hand(checkpoints):
    return {name: ByHand(path) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def harness(place):
    return Harness(Settings(str(place / "results"), "cpu", 1, 3, "float32", online=True))


@pytest.fixture(autouse=True)
def fresh(place):
    """No test meets another's data: the harness keeps what it has read of a data set."""
    shutil.rmtree(place / "cache", ignore_errors=True)


@pytest.fixture
def measure(harness, checkpoints, monkeypatch):
    """measure(task, "words" or "letters") → its cell, the texts the harness asked and the answers, by
    document."""
    from eval import harness as module

    seen = {}
    plain = module.summary

    def summary(score, task, samples, records, layers):
        seen["asked"] = [sample["arguments"][0] for sample in samples]
        seen["answers"] = [
            record["answer"] for record in sorted(records, key=lambda record: record["doc_id"])
        ]
        seen["tokens"] = [record["tokens"] for record in records]
        return plain(score, task, samples, records, layers)

    monkeypatch.setattr(module, "summary", summary)

    def run(task: str, model: str) -> tuple[dict, list[str], list[str]]:
        heard = []
        cell = real_cell(task, checkpoints[model], purpose="measured")
        result = harness(cell, heard.append)
        assert result["status"] == "ok" and result["n"] == sum(heard) == len(seen["answers"])
        assert all(
            np.array(tokens[:3]).min() > 4 * tokens[-1] > 0 for tokens in seen["tokens"]
        )  # compressed, all of them
        return result, seen["asked"], seen["answers"]

    return run


def wrong(answer: str) -> str:
    return {"yes": "no", "no": "yes", "A": "B", "B": "A"}.get(answer, f"not {answer}")


def first_words(answers: list[str]) -> list[str]:
    """What a task takes of an answer that goes on."""
    return [answer.split()[0] for answer in answers]


def marked(answers: list[str], right: list[bool]) -> list[str]:
    """What the data set holds to be true, so that exactly the answers of ``right`` are."""
    return [answer if good else wrong(answer) for answer, good in zip(answers, right, strict=True)]


def stderr(p: float, n: int) -> float:
    return 100 * (p * (1 - p) / n) ** 0.5


def test_gqa(place, by_hand, measure):
    texts = [question.text + SHORT for question in ASKED[:4]]
    answers = [by_hand["words"](text, [question.image]) for text, question in zip(texts, ASKED)]
    fixtures.gqa(
        place, ASKED[:4], [a.upper() for a in marked(answers, [True, False, True, True])]
    )  # case does not matter
    cell, asked, said = measure("gqa", "words")
    assert asked == texts and said == answers and len(set(answers)) > 1
    assert (
        cell["score"] == 75
        and cell["correct"] == [1, 0, 1, 1]
        and cell["stderr"] == pytest.approx(stderr(0.75, 4))
    )
    assert cell["tokens_per_layer"] == [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3


def test_scienceqa_img(place, by_hand, measure):
    texts = [
        (f"Context: {hint}\n" if hint else "")
        + question.choice
        + "\n"
        + "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", question.options))
        + LETTER
        for question, hint in zip(ASKED[:4], HINTS)
    ]
    answers = [by_hand["letters"](text, [question.image]) for text, question in zip(texts, ASKED)]
    fixtures.scienceqa(place, ASKED[:4], marked(answers, [False, True, False, False]), HINTS)
    cell, asked, said = measure("scienceqa_img", "letters")
    assert asked == texts and said == answers
    assert (
        cell["score"] == 25
        and cell["correct"] == [0, 1, 0, 0]
        and cell["stderr"] == pytest.approx(stderr(0.25, 4))
    )


def test_mme(place, by_hand, measure):
    """Perception alone, two points a pair: the mean of a category's pairs, summed over its categories."""
    texts = [question.text + SHORT for question in ASKED]
    answers = [by_hand["words"](text, [question.image]) for text, question in zip(texts, ASKED)]
    right = [True, True, True, False, False, False, True, True]
    categories = ["existence"] * 4 + ["color"] * 2 + ["code_reasoning"] * 2
    fixtures.mme(
        place, ASKED, [answer.capitalize() for answer in marked(first_words(answers), right)], categories
    )
    cell, asked, said = measure("mme", "words")
    assert asked == texts and said == answers and len(set(answers)) > 1
    assert cell["score"] == ((100 + 100) + (50 + 0)) / 2 + 0  # the cognition pair is not in it
    assert cell["stderr"] is None and cell["correct"] is None


def test_pope(place, by_hand, measure):
    """F1 of "yes" over all questions; an answer that goes on is neither yes nor no to the harness."""
    texts = [question.text + SHORT for question in ASKED]
    answers = [by_hand["words"](text, [question.image]) for text, question in zip(texts, ASKED)]
    right = [True, True, False, True, True, False, True, True]
    truth = marked(first_words(answers), right)
    fixtures.pope(place, ASKED, truth)
    cell, asked, said = measure("pope", "words")
    assert asked == texts and said == answers and set(truth) == {"yes", "no"}
    pairs = list(zip(answers, truth))
    precision = pairs.count(("yes", "yes")) / answers.count("yes")
    recall = pairs.count(("yes", "yes")) / (pairs.count(("yes", "yes")) + pairs.count(("no", "yes")))
    expected = 100 * 2 * precision * recall / (precision + recall)
    assert cell["score"] == pytest.approx(expected) and 0 < expected < 100


# --- the suite fine ---


def test_vqav2_lite(place, by_hand, measure):
    """Ten people's answers, as TextVQA's."""
    texts = [question.text + SHORT for question in ASKED[:4]]
    answers = [by_hand["words"](text, [question.image]) for text, question in zip(texts, ASKED)]
    people = [[answer] * same + [wrong(answer)] * (10 - same) for answer, same in zip(answers, (10, 3, 0, 2))]
    fixtures.vqav2(place, ASKED[:4], people)
    cell, asked, said = measure("vqav2_lite", "words")
    assert asked == texts and said == answers
    shares = [1, (3 * 2 / 3 + 7) / 10, 0, (2 * 1 / 3 + 8 * 2 / 3) / 10]
    assert cell["correct"] == pytest.approx(shares) and cell["score"] == pytest.approx(25 * sum(shares))


def test_docvqa(place, by_hand, measure):
    """Any of the allowed answers, letter by letter: one of which half is missing gets a half."""
    texts = [question.text + SHORT for question in ASKED[:4]]
    answers = [by_hand["words"](text, [question.image], 32) for text, question in zip(texts, ASKED)]
    allowed = [[answers[0].upper()], ["something else", answers[1]], [answers[2] + answers[2]], [answers[3]]]
    fixtures.docvqa(place, ASKED[:4], allowed)
    cell, asked, said = measure("docvqa", "words")
    assert asked == texts and said == answers
    assert cell["correct"] == pytest.approx([1, 1, 0.5, 1]) and cell["score"] == pytest.approx(87.5)


def test_chartqa(place, by_hand, measure):
    """Words exactly, whatever their case."""
    texts = [question.text + "\nAnswer the question with a single word." for question in ASKED[:4]]
    answers = [by_hand["words"](text, [question.image]) for text, question in zip(texts, ASKED)]
    fixtures.chartqa(place, ASKED[:4], [a.upper() for a in marked(answers, [True, False, True, True])])
    cell, asked, said = measure("chartqa", "words")
    assert asked == texts and said == answers
    assert cell["correct"] == [1, 0, 1, 1] and cell["score"] == 75


def test_ocrbench_and_a_second_row_of_it(place, by_hand, measure):
    """The harness's own sum goes on from row to row of one process; each row has its own here."""
    texts = [question.text for question in ASKED[:4]]
    answers = [by_hand["words"](text, [question.image], 128) for text, question in zip(texts, ASKED)]
    right = [True, True, False, True]
    truth = [[f"{answer}x" if not good else answer.upper()] for answer, good in zip(answers, right)]
    fixtures.ocrbench(place, ASKED[:4], truth)
    for _ in range(2):
        cell, asked, said = measure("ocrbench", "words")
        assert asked == texts and said == answers
        assert cell["correct"] == [1, 1, 0, 1] and cell["score"] == 75
        assert cell["stderr"] == pytest.approx(stderr(0.75, 4))


def test_refcoco(place, by_hand, measure):
    """One question a sentence; the answered box has to share half of the union with the right one."""
    before = (
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
        "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please provide the "
        "bounding box coordinate of the region this sentence describes: "
    )
    sentences = [["the left one", "is there a red 3 ?"], ["is the digit at the top left a 4 ?"]]
    pictures = [ASKED[0].image, ASKED[0].image, ASKED[1].image]
    texts = [before + sentence for several in sentences for sentence in several]
    answers = [by_hand["boxes"](text, [image], 64) for text, image in zip(texts, pictures)]
    first = [answer[: answer.index("]") + 1] for answer in answers]
    assert set(first) <= set(fixtures.BOXES)
    width, height = ASKED[0].image.size
    middle = [0.25 * width, 0.25 * height, 0.5 * width, 0.5 * height]
    fixtures.refcoco(place, ASKED[:2], [middle, [0.0, 0.0, 0.25 * width, height]], sentences)
    cell, asked, said = measure("refcoco", "boxes")
    assert asked == texts and [a[: a.index("]") + 1] for a in said] == first
    right = [float(box == fixtures.BOXES[0]) for box in first[:2]] + [0.0]
    assert cell["correct"] == right and cell["score"] == pytest.approx(100 * sum(right) / 3)


@pytest.mark.parametrize(
    "box, right",
    [([0, 0, 1, 1], 1), ([0, 0, 1, 0.5], 1), ([0, 0, 1, 0.4], 0), ([2, 2, 3, 3], 0), ([0] * 4, 0)],
)
def test_two_boxes_overlap_by_half_of_their_union(box, right):
    assert samples.overlap({"bbox": [0, 0, 1, 1], "pred": box}) == right


@pytest.mark.parametrize("language", ["en", "cn"])
def test_mmbench(place, by_hand, measure, language):
    """Exact matching; what the data set calls "nan" is not in the prompt."""
    end = {"en": LETTER, "cn": "\n请直接使用所提供的选项字母作为答案回答。"}[language]
    texts = []
    for number, (question, hint) in enumerate(zip(ASKED[:4], HINTS)):
        options = list(zip("ABCD", question.options))[: 3 if number == 3 else 4]
        listed = "There are several options:\n" + "\n".join(
            f"{letter}. {option}" for letter, option in options
        )
        texts.append((f"{hint} " if hint else "") + f"{question.choice} {listed}\n{end}")
    answers = [by_hand["letters"](text, [question.image]) for text, question in zip(texts, ASKED)]
    right = {"en": [True, True, False, True], "cn": [False, True, False, True]}[language]
    fixtures.mmbench(place, ASKED[:4], marked(answers, right), [hint or "nan" for hint in HINTS], language)
    cell, asked, said = measure(f"mmbench_{language}_static", "letters")
    assert asked == texts and said == answers
    assert cell["score"] == 100 * sum(right) / 4 and cell["stderr"] is None


@pytest.mark.parametrize("ocr", [True, False], ids=["with reference OCR tokens", "the harness's own"])
def test_textvqa(place, by_hand, measure, monkeypatch, ocr):
    """Ten people's answers: an answer that three others gave is right."""
    tokens = [["3", "left"], [], ["digit"], ["0"]]
    reference = [f"\nReference OCR token: {', '.join(words)}" if ocr else "" for words in tokens]
    texts = [question.text.capitalize() + words + SHORT for question, words in zip(ASKED, reference)]
    answers = [by_hand["words"](text, [question.image], 32) for text, question in zip(texts, ASKED)]
    people = [[answer] * same + [wrong(answer)] * (10 - same) for answer, same in zip(answers, (10, 3, 0, 2))]
    fixtures.textvqa(place, ASKED[:4], people, tokens)
    monkeypatch.setitem(
        suites.PAPER_TASKS, "textvqa_stock", Task("textvqa_stock", "textvqa_val", "exact_match", 100, "")
    )
    cell, asked, said = measure("textvqa_ocr" if ocr else "textvqa_stock", "words")
    assert asked == texts and said == answers
    # Each person is left out once: of three that agree, each sees two others.
    shares = [1, (3 * 2 / 3 + 7) / 10, 0, (2 * 1 / 3 + 8 * 2 / 3) / 10]
    assert cell["correct"] == pytest.approx(shares) and cell["score"] == pytest.approx(25 * sum(shares))


@pytest.mark.parametrize("subtitled", [False, True], ids=["without subtitles", "with subtitles"])
def test_videomme(place, by_hand, measure, subtitled):
    """Frames of a film as so many images, and the score of each duration."""
    lines = [
        ("00:00:00,000", "00:00:01,500", "the first digit"),
        ("00:00:02,000", "00:00:02,900", "not the last one"),
        ("00:01:00,000", "00:01:02,000", "after the end"),
    ]
    texts, frames = [], []
    for number, question in enumerate(ASKED[:4]):
        path = fixtures.film(
            place / f"videomme/data/film{number}.mp4", [q.image for q in ASKED[number : number + 3]]
        )
        if number != 3:
            fixtures.subtitles(place / f"videomme/subtitle/film{number}.srt", lines)
        frames.append(load_frames(path, 3))
        options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", question.options))
        text = (
            "Select the best answer to the following multiple-choice question based on the video and the"
            " subtitles. Respond"
            f" with only the letter (A, B, C, or D) of the correct option.\n{question.choice}\n{options}\n"
        )
        spoken = "the first digit\nnot the last one" if number != 3 else "No subtitles available"
        before = f"This video's subtitles are listed below: \n{spoken}\n"
        texts.append(before + text + "The best answer is:" if subtitled else text + LETTER)
    answers = [by_hand["letters"](text, images) for text, images in zip(texts, frames)]
    fixtures.videomme(
        place,
        ASKED[:4],
        marked(first_words(answers), [True, False, True, True]),
        ["short"] * 2 + ["medium", "long"],
    )
    cell, asked, said = measure("videomme_w_subtitle" if subtitled else "videomme", "letters")
    assert asked == texts and said == answers
    assert cell["score"] == 75 and cell["correct"] == [1, 0, 1, 1]
    assert {name: (group["score"], group["n"]) for name, group in cell["groups"].items()} == {
        "short": (50, 2),
        "medium": (100, 1),
        "long": (100, 1),
    }
    assert cell["tokens_per_layer"][0] == 3 * 256 and cell["tokens_per_layer"][-1] == 3 * 32


# --- what goes wrong ---


@pytest.fixture
def hasty(monkeypatch):
    """The harness tries a data set five times, two seconds apart; here without the seconds."""
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())


def real_cell(
    task: str,
    checkpoint: Path = CHECKPOINT,
    row: str = "r50",
    limit: int | None = None,
    purpose: str = "asked",
) -> Cell:
    """A cell; cells of another ``purpose`` do not share their answers."""
    spec = Row.from_yaml(ROOT / "configs" / "mini" / f"{row}.yaml")
    run = {**what_is_loaded(str(checkpoint)), "limit": limit}
    return Cell("mini", row, task, spec, str(checkpoint), {"row": {"of": [task, row, purpose]}, "run": run})


def reason(harness, task: str) -> str:
    """Why a cell failed, as a table says it."""
    with pytest.raises(ValueError) as failed:
        harness(real_cell(task), lambda count: None)
    return _sentence(failed.value)


def test_a_missing_data_set_and_a_damaged_image_are_named_and_the_next_cell_runs(place, harness, hasty):
    shutil.rmtree(place / "lmms-lab-encoder", ignore_errors=True)
    why = reason(harness, "scienceqa_img")
    assert (
        why.startswith("the data of task scienceqa_img cannot be loaded (")
        and "lmms-lab-encoder/ScienceQA" in why
    )
    assert why.endswith("; python -m eval.data --tasks scienceqa_img --yes downloads it")
    path = fixtures.mme(place, ASKED[:4], ["Yes"] * 4, ["existence"] * 4)
    whole = path.read_bytes()
    fixtures.damage(path, 2)
    assert (
        reason(harness, "mme")
        == "task mme, document 2: its image is damaged (OSError); download the data set again"
    )
    path.write_bytes(whole)
    shutil.rmtree(place / "cache")
    assert harness(real_cell("mme"), lambda count: None)["status"] == "ok"


def test_a_missing_film_is_named(place, harness):
    shutil.rmtree(place / "videomme", ignore_errors=True)
    fixtures.film(place / "videomme/data/film0.mp4", [ASKED[0].image])
    fixtures.videomme(place, ASKED[:2], ["A", "B"], ["short", "long"])
    why = reason(harness, "videomme")
    assert why.startswith("task videomme, document 1: video path:") and "film1.mp4 does not exist" in why


@pytest.mark.slow
def test_through_the_pool_a_failed_cell_leaves_the_others(place, by_hand, tmp_path):
    """GQA, whose harness starts processes of its own, in a worker; then cells that fail and one that does
    not."""
    shutil.rmtree(place / "lmms-lab-encoder", ignore_errors=True)
    fixtures.gqa(place, ASKED[:4], ["yes"] * 4)
    fixtures.damage(fixtures.mme(place, ASKED[:4], ["Yes"] * 4, ["existence"] * 4), 1)
    cells = [real_cell(task) for task in ("mme", "gqa", "scienceqa_img")] + [real_cell("gqa", row="vanilla")]
    settings, results = Settings(str(tmp_path), "cpu", 1, 2, "float32", online=True), {}
    run_cells(
        cells,
        Harness,
        settings,
        ["cpu"],
        tmp_path / "logs",
        lambda cell, count: None,
        lambda cell, result: results.update({cell.name: result}),
    )
    assert {name: result["status"] for name, result in results.items()} == {
        "mini.r50.mme": "failed",
        "mini.r50.gqa": "ok",
        "mini.r50.scienceqa_img": "failed",
        "mini.vanilla.gqa": "ok",
    }
    answers = [by_hand["words"](question.text + SHORT, [question.image]) for question in ASKED[:4]]
    assert results["mini.r50.gqa"]["correct"] == [float(answer == "yes") for answer in answers]
    assert results["mini.r50.mme"]["reason"].startswith("task mme, document 1: its image is damaged")
    assert "ScienceQA" in results["mini.r50.scienceqa_img"]["reason"]


# --- getting the data ---


class Hub:
    """What the hub tells of data sets: the sizes of their files and the licence of their card."""

    asked: list[str] = []

    def dataset_info(self, name, files_metadata, timeout):
        assert files_metadata
        Hub.asked.append(name)
        files = {
            "README.md": 10,
            "testdev_balanced_images/a.parquet": 2_000_000_000,
            "train_images/b.parquet": 10**12,
            "testdev_balanced_instructions/c.parquet": 500_000_000,
        }
        siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in files.items()]
        return SimpleNamespace(
            siblings=siblings, card_data={"license": "cc-by-4.0"} if "GQA" in name else None
        )


@pytest.fixture
def hub(monkeypatch):
    Hub.asked = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)


def test_size_and_licence_are_told_before_anything_is_downloaded(hub, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(data, "fetch", fetched.append)
    assert data.main(["--table", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (gqa,) = [line for line in lines if "/GQA " in line]
    assert "2.50 GB" in gqa and gqa.endswith("cc-by-4.0 (its card says)")  # of the two folders that are read
    (science,) = [line for line in lines if "/ScienceQA " in line]
    assert (
        science.endswith("CC BY-NC-SA 4.0") and lines[-1] == "nothing was downloaded; add --yes to download"
    )
    assert len([line for line in lines if "huggingface.co" in line]) == len(Hub.asked) == 6 and not fetched
    assert data.main(["--tasks", "mme, videomme", "--yes"]) == 0
    assert [task.harness for task in fetched] == ["mme", "videomme"]
    assert "2 tasks are ready" in capsys.readouterr().err


def test_downloading_lays_the_data_where_a_run_reads_it(place, harness, hub, monkeypatch, capsys):
    fixtures.scienceqa(place, ASKED[:4], ["A"] * 4, HINTS)
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **_: harness.tasks)
    assert data.main(["--tasks", "scienceqa_img", "--yes"]) == 0
    assert list((place / "cache").rglob("*.arrow"))
    assert harness(real_cell("scienceqa_img"), lambda count: None)["n"] == 4


def test_every_task_of_the_rows_is_known_to_the_harness_and_to_eval_data(harness):
    named = {table: data.tasks_of([table]) for table in suites.TABLES if suites.TABLES[table].suites}
    assert {*"1234567", "field", "fine"} <= {*named} and all(named.values())
    for task in {task for tasks in named.values() for task in tasks}:
        assert suites.get_task(task).harness in harness.tasks.all_tasks and task in data.DATA
    assert named["2"] == ["videomme", "videomme_w_subtitle"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--table", "8"], "error: argument --table: invalid choice: '8'"),
        (
            ["--tasks", "gqa,mini_color"],
            "error: task mini_color reads no data set of the hub; use one of gqa, ",
        ),
        ([], "error: one of the arguments --table --tasks is required"),
        (
            ["--table", "2", "--yes"],
            "error: the model hub does not answer (OSError): connect to the internet",
        ),
    ],
)
def test_what_cannot_be_downloaded_says_why(arguments, sentence, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(SystemExit) as stopped:
        data.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(sentence) and error.count("\n") == 1
