"""The models behind the plug-in: LLaVA and VideoLLaMA-2 in their own format, transformers' models through
libra.attach; each against the same model called by hand, one sample at a time."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import lmms_fixtures as fixtures
import pytest
import torch
import yaml
from qwen_folder import write_qwen
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

import libra
from libra.lmms.lmms_libra import LibraModel
from libra.lmms.models_hf import class_of
from libra.lmms.models_llava import Llava
from libra.rows import Row
from llava.convert import convert
from llava.model.builder import load_pretrained_model
from llava.video import mm_infer, process_image, process_video

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "mini"
GOLDEN = Path(__file__).parent / "golden"
ASKED = fixtures.questions(5, seed=4)
OPTIONS = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def row(folder: Path, model: str, attention: str = "sdpa", **compression) -> Path:
    path = folder / f"{compression['method']}-{attention}.yaml"
    path.write_text(yaml.safe_dump({"model": model, "compression": compression, "attention": attention}))
    return path


def ask(model: LibraModel, documents: list[tuple[str, list]]) -> list[str]:
    """The answers to (text, what is shown), through the plug-in's front door."""
    model.task_dict = {"t": {"test": documents}}
    return model.generate_until(
        [
            SimpleNamespace(args=(text, OPTIONS, lambda document: document[1], number, "t", "test"))
            for number, (text, _) in enumerate(documents)
        ]
    )


# --- one model in two formats ---


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "mini-hf"
    convert(str(ROOT / "mini" / "checkpoint"), str(folder))
    return folder


@pytest.mark.parametrize("name", ["vanilla", "r50"])
def test_the_embedded_model_answers_alike_in_both_formats(converted, name):
    """In batches with padding, with an image, with none and with two."""
    texts = ["read all the digits in order .", *(question.text for question in ASKED), "what digit ?"]
    shown = [[ASKED[0].image], *([question.image] for question in ASKED), [ASKED[0].image, ASKED[1].image]]
    documents = list(zip(texts, shown)) + [("how many ?", [])]
    told = {}
    for path in (ROOT / "mini" / "checkpoint", converted):
        model = LibraModel(str(CONFIGS / f"{name}.yaml"), str(path), device="cpu", batch_size=3)
        model.set_row(Row.from_yaml(CONFIGS / f"{name}.yaml"), trace=True)
        answers = ask(model, documents)
        records = [model.records["t", number] for number in range(len(documents))]
        told[type(model.engine).__name__] = (
            answers,
            [(r["tokens"], r["cache_bytes"], r["trace"]) for r in records],
        )
    (ours, facts), (theirs, their_facts) = told["Llava"], told["HuggingFace"]
    assert theirs == ours and len(set(ours)) > 3 and ours[0].replace(" ", "").isdigit()
    for (tokens, held, trace), (their_tokens, their_held, their_trace) in zip(
        facts, their_facts, strict=True
    ):
        assert their_tokens == tokens and their_held == held
        assert [pytest.approx(stage, abs=1e-4) for stage in trace] == their_trace
    ends = [tokens[-1] if tokens else None for tokens, *_ in facts]
    assert ends == {"vanilla": [None] * 8, "r50": [32] * 6 + [64, None]}[name]


@pytest.mark.parametrize(
    "compression", [{"method": "vanilla"}, {"method": "libra", "layers": [1, 3], "ratio": 0.5}], ids=str
)
def test_llava_next_answers_alike_in_both_formats(tmp_path, compression):
    """Tiles, a newline a row, and a template that begins with a token the tokenizer writes too."""
    source = GOLDEN / "llava_next_llama3" / "checkpoint"
    convert(str(source), str(tmp_path / "hf"), conversation="llava_llama_3")
    path = row(tmp_path, "llava-next-8b", **compression)
    documents = [(question.text, [question.image]) for question in ASKED[:3]]
    documents.append(("Is it?", [ASKED[0].image.crop((0, 0, 40, 96))]))
    told = {}
    for folder in (source, tmp_path / "hf"):
        model = LibraModel(str(path), str(folder), device="cpu", batch_size=3)
        answers = ask(model, documents)
        told[type(model.engine).__name__] = (
            answers,
            [model.records["t", number]["tokens"] for number in range(4)],
        )
    assert told["Llava"] == told["HuggingFace"] and len(told) == 2 and len(set(told["Llava"][0])) == 4
    if compression["method"] == "libra":
        assert len({tokens[0] for tokens in told["Llava"][1]}) == 2  # the narrow image has fewer


def test_rows_follow_each_other_on_one_loaded_model(converted, tmp_path):
    model = LibraModel(str(CONFIGS / "r50.yaml"), str(converted), device="cpu", batch_size=2)
    documents = [(question.text, [question.image]) for question in ASKED[:2]]
    for name, last in (("r50", [32]), ("vanilla", []), ("fastv", [128]), ("r50", [32])):
        model.set_row(Row.from_yaml(CONFIGS / f"{name}.yaml"))
        ask(model, documents)
        assert model.records["t", 1]["tokens"][-1:] == last
    with pytest.raises(ValueError, match="layers: 40 is out of range"):
        model.set_row(Row.from_yaml(row(tmp_path, "mini", method="fastv", layers=[40])))
    model.set_row(Row.from_yaml(CONFIGS / "vanilla.yaml"))
    assert ask(model, documents) == ask(
        LibraModel(str(CONFIGS / "vanilla.yaml"), device="cpu", batch_size=2), documents
    )


# --- Qwen2-VL ---


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen(folder)
    return folder


def qwen_by_hand(folder: Path, compression, text: str, kind: str, shown) -> str:
    """The model and the processor as anybody would call them; sizes, placeholders and ids of one prompt."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2VLProcessor.from_pretrained(folder)
    prompt = f"<|vision_start|><|{kind}_pad|><|vision_end|> {text} answer"
    inputs = processor(text=[prompt], **{f"{kind}s": [shown]}, return_tensors="pt")
    with libra.attach(model, compression), torch.inference_mode():
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return processor.tokenizer.decode(
        said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


COMPRESSIONS = [
    {"method": "vanilla"},
    {"method": "libra", "layers": [1, 3], "ratio": 0.5},
    {"method": "fastv", "layers": [2], "ratio": 0.75},
]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=lambda compression: compression["method"])
def test_qwen2_vl_in_batches(qwen, tmp_path, compression):
    """Texts and images of different lengths, so that the batch is padded on the left."""
    path = row(tmp_path, "qwen2-vl-7b", **compression)
    model = LibraModel(str(path), str(qwen), device="cpu", batch_size=3)
    assert class_of(str(qwen)) == "Qwen2VLForConditionalGeneration"
    documents = [
        ("what is this", [ASKED[0].image]),
        ("w9 w10 w11 w12 w13 w14", [ASKED[1].image.crop((0, 0, 48, 96))]),
        ("w20", [ASKED[2].image]),
        ("w30 w31", []),
    ]
    answers = ask(model, documents)
    compression = Row.from_yaml(path).compression
    for (text, shown), answer in zip(documents[:3], answers):
        assert answer == qwen_by_hand(qwen, compression, text, "image", shown[0]), text
    assert len(set(answers)) == 4 and all(answers)
    tokens = [model.records["t", number]["tokens"] for number in range(4)]
    if compression.layers:
        assert [layers[0] for layers in tokens[:3]] == [
            16 * 12,
            6 * 12,
            16 * 12,
        ]  # merged patches of 8 pixels
        kept = round(round(192 * 0.5) * 0.5) if len(compression.layers) == 2 else 48
        assert [layers[-1] for layers in tokens[:3]] == [kept, kept * 6 // 16, kept]
    assert tokens[3] == []


def test_qwen2_vl_takes_videos_as_videos(qwen, tmp_path):
    film = fixtures.film(tmp_path / "film.mp4", [question.image for question in ASKED[:3]])
    path = row(tmp_path, "qwen2-vl-7b", method="libra", layers=[1], ratio=0.5)
    model = LibraModel(str(path), str(qwen), device="cpu", batch_size=2, frames="4")
    (answer,) = ask(model, [("what is this", [str(film)])])
    from llava.video import load_frames

    frames = load_frames(film, 4)
    assert answer == qwen_by_hand(qwen, Row.from_yaml(path).compression, "what is this", "video", frames)
    grid = Qwen2VLProcessor.from_pretrained(qwen).video_processor(videos=[frames], return_tensors="pt")[
        "video_grid_thw"
    ][0]
    assert grid[0] == 2 and model.records["t", 0]["tokens"][0] == int(grid.prod()) // 4


# --- VideoLLaMA-2 ---


@pytest.fixture(scope="module")
def videollama2(tmp_path_factory):
    """The golden checkpoint with a chat template."""
    folder, golden = tmp_path_factory.mktemp("videollama2") / "checkpoint", GOLDEN / "videollama2"
    shutil.copytree(golden / "checkpoint", folder)
    shutil.copytree(golden / "clip_tower", folder / "clip_tower")
    tokenizer = AutoTokenizer.from_pretrained(golden / "checkpoint")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("compression", COMPRESSIONS[:2], ids=lambda compression: compression["method"])
def test_videollama2(videollama2, tmp_path, compression):
    """Its own number of frames, cut out of the middle, its own prompt; an image is its kind of image."""
    path = row(tmp_path, "videollama2-7b", **compression)
    films = [fixtures.film(tmp_path / f"{i}.mp4", [q.image for q in ASKED[i : i + 3]]) for i in range(2)]
    model = LibraModel(str(path), str(videollama2), device="cpu", batch_size=3)
    texts = ["What is it?", "Which of these digits is shown first?", "Is it red?"]
    answers = ask(
        model, [(texts[0], [str(films[0])]), (texts[1], [str(films[1])]), (texts[2], [ASKED[0].image])]
    )
    tokenizer, alone, processor, _ = load_pretrained_model(
        str(videollama2), None, "VideoLLaMA2-7B", device="cpu"
    )
    alone.set_compression(Row.from_yaml(path).compression)
    pixels = [process_video(film, processor, aspect_ratio=None, num_frames=8) for film in films]
    for place, shown in enumerate([*pixels, process_image(ASKED[0].image, processor, aspect_ratio=None)]):
        modal = "video" if place < 2 else "image"
        assert answers[place] == mm_infer(shown, texts[place], alone, tokenizer, modal, max_new_tokens=5)
    assert len(set(answers)) > 1
    if compression["method"] == "libra":
        assert [model.records["t", number]["tokens"] for number in range(3)] == [
            [45] * 2 + [22] * 2 + [11] * 4
        ] * 3


# --- what cannot be ---


def test_frames_of_an_image_model_fit_or_it_says_so(tmp_path):
    film = fixtures.film(tmp_path / "film.mp4", [ASKED[0].image])
    model = LibraModel(str(CONFIGS / "r50.yaml"), device="cpu")
    assert model.engine.frames == 3  # of 256 tokens, in three quarters of 1024
    ask(model, [("what digit ?", [str(film)])])
    assert model.records["t", 0]["tokens"][0] == 3 * 256
    model = LibraModel(str(CONFIGS / "r50.yaml"), device="cpu", frames=5)
    with pytest.raises(
        ValueError, match=r"^task t, document 0: its prompt has 12\d\d tokens and the model takes 1024; show"
    ):
        ask(model, [("what digit ?", [str(film)])])
    with pytest.raises(ValueError, match="^frames must be a positive whole number, not '0'"):
        LibraModel(str(CONFIGS / "r50.yaml"), device="cpu", frames="0")


def test_a_video_that_is_not_one_is_named(tmp_path):
    model = LibraModel(str(CONFIGS / "r50.yaml"), device="cpu")
    (tmp_path / "film.mp4").write_text("no film")
    with pytest.raises(ValueError, match="^task t, document 0: the video .*film.mp4 cannot be read"):
        ask(model, [("what digit ?", [str(tmp_path / "film.mp4")])])
    with pytest.raises(
        ValueError, match="^task t, document 0: it shows bytes: the model libra takes images and video files"
    ):
        ask(model, [("what digit ?", [b"sound"])])


def test_a_checkpoint_that_cannot_be_driven(converted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({"model_type": "mllama", "vision_config": {}, "text_config": {}})
    )
    with pytest.raises(
        ValueError, match="is of type 'mllama', which libra.attach does not support; it supports .*Llava"
    ):
        LibraModel(str(CONFIGS / "r50.yaml"), str(other), device="cpu")
    mute = tmp_path / "mute"
    shutil.copytree(converted, mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="mute has no chat template"):
        LibraModel(str(CONFIGS / "r50.yaml"), str(mute), device="cpu")
    with pytest.raises(ValueError, match="has no conversation template"):
        Llava(str(ROOT / "mini" / "checkpoint"), "nonsense", "cpu", torch.float32)
    with pytest.raises(ValueError, match="nowhere"):
        LibraModel(str(CONFIGS / "r50.yaml"), str(tmp_path / "nowhere"), device="cpu")
