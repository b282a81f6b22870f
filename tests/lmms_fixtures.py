"""A handful of rows of the real benchmarks, in the very layout in which lmms-eval's own tasks read them from
the hub.

Every writer makes ``ROOT/<data set>/{README.md, <folder>/<split>-00000-of-00001.parquet}``; ``load_dataset``
with the name on the hub finds them when ROOT is the working directory. Video-MME's films and subtitles lie
where ``HF_HOME=ROOT`` puts them.
"""

import json
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from libra.mini.questions import multiple_choice, yes_no
from libra.mini.scenes import draw_scene

TEXT, NUMBER, IMAGE, TEXTS = Value("string"), Value("int64"), Image(), List(Value("string"))


@dataclass(frozen=True)
class Question:
    """A scene with something to ask: ``text`` alone is answered by yes or no, ``options`` belong to
    ``choice``."""

    image: Picture.Image
    text: str
    choice: str
    options: list[str]


def questions(count: int, seed: int = 0) -> list[Question]:
    """Wide images, so that padding to a square and cutting one out differ."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        scene = draw_scene(rng, "test")
        choice, listing = multiple_choice(rng, scene.digits)[0].split(" ? ")
        wide = Picture.new("RGB", (128, 96), (90, 90, 90))
        wide.paste(Picture.fromarray(scene.image), (16, 0))
        made.append(Question(wide, yes_no(rng, scene.digits)[0], f"{choice} ?", listing.split()[1::2]))
    return made


def write(root: Path, name: str, split: str, features: dict, rows: list[dict], config: str = "") -> Path:
    """One split of a data set; a second call with another ``config`` adds to it. Returns the parquet file."""
    folder = root / name / (config or "data")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    entries = [
        f"- config_name: {part.name if part.name != 'data' else 'default'}\n  data_files:\n"
        + "".join(
            f"  - split: {file.name.split('-')[0]}\n    path: {part.name}/{file.name}\n"
            for file in sorted(part.glob("*.parquet"))
        )
        for part in sorted((root / name).iterdir())
        if part.is_dir()
    ]
    (root / name / "README.md").write_text("---\nconfigs:\n" + "".join(entries) + "---\n")
    return path


def gqa(root: Path, asked: list[Question], answers: list[str]) -> None:
    name = "lmms-lab-encoder/GQA"
    rows = [
        {
            "id": str(i),
            "imageId": f"n{i}",
            "question": q.text,
            "answer": a,
            "fullAnswer": a,
            "isBalanced": True,
        }
        for i, (q, a) in enumerate(zip(asked, answers, strict=True))
    ]
    features = {
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": Value("bool"),
    }
    write(root, name, "testdev", features, rows, "testdev_balanced_instructions")
    pictures = [{"id": f"n{i}", "image": q.image} for i, q in enumerate(asked)]
    write(root, name, "testdev", {"id": TEXT, "image": IMAGE}, pictures, "testdev_balanced_images")


def scienceqa(root: Path, asked: list[Question], letters: list[str], hints: list[str]) -> None:
    rows = [
        {
            "image": q.image,
            "question": q.choice,
            "choices": q.options,
            "answer": "ABCD".index(letter),
            "hint": hint,
        }
        for q, letter, hint in zip(asked, letters, hints, strict=True)
    ]
    features = {"image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": NUMBER, "hint": TEXT}
    write(root, "lmms-lab-encoder/ScienceQA", "test", features, rows, "ScienceQA-IMG")


def mme(root: Path, asked: list[Question], answers: list[str], categories: list[str]) -> Path:
    """Two questions of one category a ``question_id``."""
    rows = [
        {
            "question_id": f"{category}/{i // 2}.png",
            "image": q.image,
            "question": q.text + " Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for i, (q, answer, category) in enumerate(zip(asked, answers, categories, strict=True))
    ]
    features = {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT}
    return write(root, "lmms-lab-encoder/MME", "test", features, rows)


def pope(root: Path, asked: list[Question], answers: list[str]) -> None:
    rows = [
        {
            "id": str(i),
            "question_id": str(i + 1),
            "question": q.text,
            "answer": answer,
            "image_source": f"COCO_val2014_{i:012d}",
            "image": q.image,
            "category": ("adversarial", "popular", "random")[i % 3],
        }
        for i, (q, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    texts = ("id", "question_id", "question", "answer", "image_source", "category")
    write(root, "lmms-lab-encoder/POPE", "test", {**dict.fromkeys(texts, TEXT), "image": IMAGE}, rows)


def mmbench(root: Path, asked: list[Question], letters: list[str], hints: list[str], language: str) -> None:
    """Absent hints and options are the text "nan", as there; the last row has three options."""
    rows = [
        {
            "index": 100 + i,
            "question": q.choice,
            "hint": hint,
            "answer": letter,
            **dict(zip("ABCD", q.options)),
            "category": "ocr",
            "L2-category": "perception",
            "image": q.image,
            "source": "made",
            "split": "dev",
        }
        for i, (q, letter, hint) in enumerate(zip(asked, letters, hints, strict=True))
    ]
    rows[-1]["D"] = "nan"
    texts = ("question", "hint", "answer", "A", "B", "C", "D", "category", "L2-category", "source", "split")
    features = {"index": NUMBER, **dict.fromkeys(texts, TEXT), "image": IMAGE}
    write(root, "lmms-lab-encoder/MMBench", "dev", features, rows, language)


def vqav2(root: Path, asked: list[Question], answers: list[list[str]]) -> None:
    """Ten people's answers a question, in the subset that lmms-eval calls lite."""
    rows = [
        {
            "question_type": "is the",
            "multiple_choice_answer": ten[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(ten, 1)
            ],
            "image_id": i,
            "answer_type": "yes/no",
            "question_id": 10 * i,
            "question": q.text,
            "image": q.image,
        }
        for i, (q, ten) in enumerate(zip(asked, answers, strict=True))
    ]
    one = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}
    texts = ("question_type", "multiple_choice_answer", "answer_type", "question")
    features = {**dict.fromkeys(texts, TEXT), "answers": [one], "image": IMAGE}
    features |= dict.fromkeys(("image_id", "question_id"), NUMBER)
    write(root, "lmms-lab-encoder/LMMs-Eval-Lite", "lite", features, rows, "vqav2_val")


def refcoco(root: Path, asked: list[Question], boxes: list[list[float]], said: list[list[str]]) -> None:
    """Boxes as (left, top, width, height) in pixels; each is described by several sentences."""
    rows = [
        {
            "question_id": str(i),
            "image": q.image,
            "question": "Please carefully observe the area circled in the image",
            "answer": sentences,
            "segmentation": box,
            "bbox": box,
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{i:012d}.jpg",
        }
        for i, (q, box, sentences) in enumerate(zip(asked, boxes, said, strict=True))
    ]
    numbers = List(Value("float32"))
    features = {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXTS, "file_name": TEXT}
    features |= {"segmentation": numbers, "bbox": numbers, "iscrowd": NUMBER}
    write(root, "lmms-lab-encoder/RefCOCO", "val", features, rows)


def docvqa(root: Path, asked: list[Question], answers: list[list[str]]) -> None:
    rows = [
        {
            "questionId": str(i),
            "question": q.text,
            "question_types": ["layout"],
            "image": q.image,
            "docId": i,
            "ucsf_document_id": f"d{i}",
            "ucsf_document_page_no": "1",
            "answers": allowed,
            "data_split": "val",
        }
        for i, (q, allowed) in enumerate(zip(asked, answers, strict=True))
    ]
    texts = ("questionId", "question", "ucsf_document_id", "ucsf_document_page_no", "data_split")
    features = {**dict.fromkeys(texts, TEXT), "question_types": TEXTS, "answers": TEXTS}
    features |= {"image": IMAGE, "docId": NUMBER}
    write(root, "lmms-lab-encoder/DocVQA", "validation", features, rows, "DocVQA")


def chartqa(root: Path, asked: list[Question], answers: list[str]) -> None:
    rows = [
        {
            "type": ("human_test", "augmented_test")[i % 2],
            "question": q.text,
            "answer": answer,
            "image": q.image,
        }
        for i, (q, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    features = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE}
    write(root, "lmms-lab-encoder/ChartQA", "test", features, rows)


def ocrbench(root: Path, asked: list[Question], answers: list[list[str]]) -> None:
    kinds = ("Regular Text Recognition", "Doc-oriented VQA", "Key Information Extraction")
    rows = [
        {
            "dataset": "IIIT5K",
            "question": q.text,
            "question_type": kinds[i % 3],
            "answer": allowed,
            "image": q.image,
        }
        for i, (q, allowed) in enumerate(zip(asked, answers, strict=True))
    ]
    features = {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": IMAGE}
    write(root, "echo840/OCRBench", "test", features, rows)


def textvqa(root: Path, asked: list[Question], answers: list[list[str]], tokens: list[list[str]]) -> None:
    rows = [
        {"question_id": i, "image": q.image, "question": q.text, "answers": ten, "ocr_tokens": ocr}
        for i, (q, ten, ocr) in enumerate(zip(asked, answers, tokens, strict=True))
    ]
    features = {
        "question_id": NUMBER,
        "image": IMAGE,
        "question": TEXT,
        "answers": TEXTS,
        "ocr_tokens": TEXTS,
    }
    write(root, "lmms-lab-encoder/textvqa", "validation", features, rows)


def videomme(root: Path, asked: list[Question], letters: list[str], durations: list[str]) -> None:
    """The questions; :func:`film` makes what they are about."""
    rows = [
        {
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Geography",
            "videoID": f"film{i}",
            "question_id": f"{i}-1",
            "task_type": "OCR Problems",
            "question": q.choice,
            "answer": letter,
            "options": [f"{name}. {option}" for name, option in zip("ABCD", q.options)],
        }
        for i, (q, letter, duration) in enumerate(zip(asked, letters, durations, strict=True))
    ]
    texts = (
        "duration",
        "domain",
        "sub_category",
        "videoID",
        "question_id",
        "task_type",
        "question",
        "answer",
    )
    write(root, "lmms-eval/Video-MME", "test", {**dict.fromkeys(texts, TEXT), "options": TEXTS}, rows)


def film(path: Path, scenes: list[Picture.Image], seconds: int = 3, rate: int = 4) -> Path:
    """An mp4 that shows the scenes one after the other."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *scenes[0].size, "yuv420p", 4_000_000
        count = seconds * rate
        for i in range(count):
            frame = av.VideoFrame.from_image(scenes[i * len(scenes) // count])
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def subtitles(path: Path, lines: list[tuple[str, str, str]]) -> None:
    """An .srt of (start, end, text), each text in the font tag that Video-MME's files have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [
        f'{number}\n{start} --> {end}\n<font color="white" size=".72c">{text}</font>\n\n'
        for number, (start, end, text) in enumerate(lines, 1)
    ]
    path.write_text("".join(blocks))


def damage(path: Path, row: int) -> None:
    """Cut the image of a parquet file's row short."""
    table = parquet.read_table(path)
    images = table["image"].to_pylist()
    images[row]["bytes"] = images[row]["bytes"][:40]
    place = table.schema.get_field_index("image")
    field = table.schema.field(place)
    parquet.write_table(table.set_column(place, field, pyarrow.array(images, field.type)), path)


BOXES = ("[0.25, 0.25, 0.75, 0.75]", "[0.5, 0.5, 1.0, 1.0]")


def lettered(checkpoint: Path, folder: Path, yes: str = "A", no: str = "B") -> Path:
    """A copy of the embedded model that says A for yes and B for no, or other words, and nothing else."""
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    for one, other in (("yes", yes), ("no", no)):
        number = words.pop(one)
        if other in words:
            words[one] = words[other]
        words[other] = number
    path.write_text(json.dumps(content))
    path = folder / "generation_config.json"
    others = [number for word, number in words.items() if word not in (yes, no, "</s>")]
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "suppress_tokens": others,
                "begin_suppress_tokens": [words["</s>"]],
            }
        )
    )
    return folder
