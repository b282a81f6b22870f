"""``llava.eval.run_llava`` and ``llava.serve.cli`` on a tiny checkpoint of random weights."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from libra import Compression
from llava.conversation import conv_templates
from llava.eval import run_llava
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.serve import cli
from llava.serve.session import AnswerStreamer, Session
from llava.video import mm_infer, process_video

GOLDEN = Path(__file__).parent / "golden/text_and_image_processing"
IMAGES = [str(GOLDEN / f"image{k}.png") for k in range(2)]
COMPRESSION = "compression: {method: fastv, layers: [1], ratio: 0.5}\nmodel: mini\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    )
    tower.save_pretrained(folder / "vision_tower")
    CLIPImageProcessor.from_pretrained(GOLDEN / "image_processor").save_pretrained(folder / "vision_tower")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers/sp700_legacyFalse")
    tokenizer.save_pretrained(folder)
    config = LlavaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tokenizer_model_max_length=512,
        mm_vision_tower=str(folder / "vision_tower"),
        mm_hidden_size=16,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
        mm_patch_merge_type="flat",
        conversation="mini",
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    model.config.mm_vision_tower = "vision_tower"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_pretrained_model(str(checkpoint), None, "tiny", device="cpu")


@pytest.fixture
def row(tmp_path):
    path = tmp_path / "row.yaml"
    path.write_text(COMPRESSION)
    return str(path)


@pytest.fixture
def once(loaded, monkeypatch):
    """Loads the checkpoint once for all tests that do not test the loading."""

    def load(model_path, model_base, model_name, device="cuda", compression=None, **kwargs):
        loaded[1].set_compression(compression)
        return loaded

    monkeypatch.setattr("llava.model.builder.load_pretrained_model", load)


def reference(loaded, template, turns, images, tokens, compression=None):
    """The answer to the last turn, by the model alone."""
    tokenizer, model, processor, _ = loaded
    conversation = conv_templates[template].copy()
    for i, text in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], text)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    model.set_compression(compression)
    pixels = process_images([Image.open(path) for path in images], processor, model.config)
    new = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


def refused(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in output.err and output.out == ""
    return lines[0]


def arguments(checkpoint, **changes) -> list[str]:
    given = {
        "model-path": str(checkpoint),
        "image-file": IMAGES[0],
        "max-new-tokens": "6",
        "device": "cpu",
    } | changes
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_one_question(checkpoint, loaded, capsys):
    run_llava.main([*arguments(checkpoint), "--query", "What is this?"])
    answer = reference(loaded, "mini", ["<image>\nWhat is this?", None], IMAGES[:1], 6)
    assert answer and capsys.readouterr().out.strip() == answer


def test_two_images_another_template_and_compression(checkpoint, loaded, once, row, capsys):
    argv = arguments(
        checkpoint, **{"image-file": ",".join(IMAGES), "conv-mode": "vicuna_v1", "compression": row}
    )
    run_llava.main([*argv, "--query", "Are they alike?"])
    fastv = Compression(method="fastv", layers=(1,), ratio=0.5)
    turns = ["<image>\n<image>\nAre they alike?", None]
    assert capsys.readouterr().out.strip() == reference(loaded, "vicuna_v1", turns, IMAGES, 6, fastv)
    assert loaded[1].compression_stats["visual_tokens"] == [[32], [32], [16]]


def test_eval_model_takes_the_originals_arguments(checkpoint, loaded, once, capsys):
    args = SimpleNamespace(
        model_path=str(checkpoint),
        model_base=None,
        model_name="tiny",
        query="Look: <image-placeholder> what?",
        conv_mode=None,
        image_file=IMAGES[1],
        sep=",",
        temperature=0,
        top_p=None,
        num_beams=2,
        max_new_tokens=5,
    )
    answer = run_llava.eval_model(args)
    assert capsys.readouterr().out.strip() == answer
    tokenizer, model, processor, _ = loaded
    prompt = tokenizer_image_token("USER: Look: <image> what? ASSISTANT:", tokenizer, return_tensors="pt")[
        None
    ]
    pixels = process_images([Image.open(IMAGES[1])], processor, model.config)
    new = model.generate(
        prompt, images=pixels, do_sample=False, num_beams=2, max_new_tokens=5, pad_token_id=0
    )
    assert answer == tokenizer.decode(new[0], skip_special_tokens=True).strip()


def talk(checkpoint, monkeypatch, capsys, lines: list[str], *options, **changes):
    """What the terminal conversation printed, stdout and stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    cli.main([*arguments(checkpoint, **changes), *options])
    return capsys.readouterr()


def said(output: str) -> list[str]:
    """The answers without the notes."""
    return [part.split("\n[")[0] for part in output.split("ASSISTANT: ")[1:]]


def test_a_conversation(checkpoint, loaded, once, row, capsys, monkeypatch):
    lines = ["What is this?", "Where is the <image> ?", "And what else?", "", "never asked"]
    output = talk(checkpoint, monkeypatch, capsys, lines, compression=row)
    fastv = Compression(method="fastv", layers=(1,), ratio=0.5)
    first = reference(loaded, "mini", ["<image>\nWhat is this?", None], IMAGES[:1], 6, fastv)
    chat = Session(*loaded, "mini", [Image.open(IMAGES[0])])
    assert chat.ask("What is this?", max_new_tokens=6).text == first
    second = chat.ask("And what else?", max_new_tokens=6).text
    assert [answer.strip() for answer in said(output.out) if "USER" not in answer] == [first, second]
    note = "[visual tokens 16 → 8, 13 on average over 3 layers; first token after "
    assert output.out.count(note) == 2 and output.out.count("USER: ") == 4 and "read again" not in output.out
    assert output.err == (
        "error: images to show: none, places for them in the question: <image>;"
        " write <image-placeholder> once for each of them, or leave it out\n"
    )


def test_reprefill_runs_the_whole_conversation_again(checkpoint, loaded, once, row, capsys, monkeypatch):
    output = talk(
        checkpoint, monkeypatch, capsys, ["What is this?", "And what else?"], "--reprefill", compression=row
    )
    fastv = Compression(method="fastv", layers=(1,), ratio=0.5)
    turns = ["<image>\nWhat is this?", None]
    turns[1] = reference(loaded, "mini", turns, IMAGES[:1], 6, fastv)
    second = reference(loaded, "mini", [*turns, "And what else?", None], IMAGES[:1], 6, fastv)
    assert [answer.strip() for answer in said(output.out)] == [turns[1], second]


def test_images_may_be_shown_later(checkpoint, loaded, once, row, capsys, monkeypatch):
    wrong = ["/image missing.png", "/video clip.mp4", "/imag a.png", "/image"]
    lines = [*wrong, "What is this?", f"/image {IMAGES[1]}", "And this?", "/new", "Hello?", "/help"]
    output = talk(checkpoint, monkeypatch, capsys, lines, compression=row)
    assert f"[{IMAGES[1]}: 16 visual tokens, shown with the next question]\n" in output.out
    assert (
        "visual tokens 32 → 16, 27 on average" in output.out
    )  # both images, each as its own question left it
    errors = output.err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert "missing.png cannot be opened" in errors[0] and "videos are for VideoLLaMA-2" in errors[1]
    assert (
        "/imag a.png is not a command; they are /image FILE" in errors[2]
        and "/image is not a command" in errors[3]
    )
    assert (
        "[a new conversation]\n" in output.out and output.out.count("[visual tokens ") == 2
    )  # none after /new
    assert "/image FILE   show an image" in output.out
    chat = Session(*loaded, "mini", [Image.open(IMAGES[0])])
    want = [chat.ask("What is this?", max_new_tokens=6).text]
    chat.show(IMAGES[1])
    want.append(chat.ask("And this?", max_new_tokens=6).text)
    assert [answer.strip() for answer in said(output.out)[:2]] == want


def test_a_conversation_may_begin_without_images(checkpoint, once, row, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello?\n/image {IMAGES[0]}\nWhat is this?\n"))
    cli.main(
        ["--model-path", str(checkpoint), "--device", "cpu", "--max-new-tokens", "3", "--compression", row]
    )
    output = capsys.readouterr()
    assert output.err == "" and "\n[first token after" in output.out and "[visual tokens 16 → 8" in output.out


def test_a_conversation_without_compression_ends_with_the_input(
    checkpoint, loaded, once, capsys, monkeypatch
):
    output = talk(checkpoint, monkeypatch, capsys, ["What is this?"], **{"image-file": ",".join(IMAGES)}).out
    answer = reference(loaded, "mini", ["<image>\n<image>\nWhat is this?", None], IMAGES, 6)
    assert f"ASSISTANT: {answer}\n[visual tokens 32; first token after " in output


def test_a_long_conversation_is_refused_and_stays_as_it_was(loaded):
    tokenizer, model, processor, length = loaded
    session = Session(tokenizer, model, processor, length, "mini", [Image.open(IMAGES[0])])
    with pytest.raises(ValueError, match="the model takes 512; start a new one"):
        session.ask("word " * 600)
    assert session.conversation.messages == []


def test_the_stop_text_is_neither_printed_nor_kept(loaded, capsys, monkeypatch):
    tokenizer, model, processor, length = loaded
    words = tokenizer("It is a cat.###", add_special_tokens=False, return_tensors="pt").input_ids

    def generate(ids, stopping_criteria, streamer, **kwargs):
        streamer.put(ids)
        for n in range(1, words.shape[1] + 1):
            streamer.put(words[:, n - 1])
            assert bool(stopping_criteria(words[:, :n], None).all()) == (n == words.shape[1])
        streamer.end()
        return words

    monkeypatch.setattr(model, "generate", generate)
    answer = Session(tokenizer, model, processor, length, "llava_v0", [Image.open(IMAGES[0])]).ask(
        "What?", stream=True
    )
    assert answer.text == "It is a cat." and capsys.readouterr().out == "It is a cat.\n"
    assert answer.first_token > 0


def test_the_first_token_is_not_the_prompt(loaded):
    streamer = AnswerStreamer(loaded[0], None)
    streamer.put(torch.zeros(1, 0, dtype=torch.long))
    assert streamer.first_token_at is None
    streamer.put(torch.tensor([369]))
    assert streamer.first_token_at is not None


@pytest.mark.parametrize("main", [run_llava.main, cli.main])
def test_help_has_an_example(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--model-path mini/checkpoint --image-file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change,message",
    [
        ({"image-file": "missing.png"}, "missing.png cannot be opened"),
        ({"video-file": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"image-file": __file__}, "in no known format"),
        ({"image-file": "cut.png"}, "cut.png is damaged"),
        ({"compression": "missing.yaml"}, "missing.yaml"),
        ({"compression": "unknown.yaml"}, "did you mean ratio?"),
        ({"compression": "deep.yaml"}, "layers: 99 is out of range"),
        ({"conv-mode": "vicuna"}, "no conversation template 'vicuna'"),
        ({"model-path": "missing/folder"}, "missing/folder"),
        ({"model-path": "cut"}, "cut"),
        ({"model-path": "bad_config"}, "bad_config"),
        ({"temperature": "-1"}, "-1 is not a number from 0 up"),
        ({"max-new-tokens": "0"}, "0 is not a whole number from 1 up"),
        ({"top-p": "much"}, "much is not a number in (0, 1]"),
    ],
)
@pytest.mark.parametrize("command", ["run_llava", "cli"])
def test_bad_input_is_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, command, change, message):
    monkeypatch.chdir(tmp_path)
    Path("cut.png").write_bytes(Path(IMAGES[0]).read_bytes()[:5000])
    Path("unknown.yaml").write_text("method: libra\nlayers: [1]\nratoi: 0.5\n")
    Path("deep.yaml").write_text("method: libra\nlayers: [99]\n")
    if change.get("model-path") in ("cut", "bad_config"):
        broken = Path(shutil.copytree(checkpoint, change["model-path"]))
        if broken.name == "cut":
            weights = broken / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        else:
            (broken / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    main, query = (run_llava.main, ["--query", "What?"]) if command == "run_llava" else (cli.main, [])
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
    assert message in refused(main, [*arguments(checkpoint, **change), *query], capsys)


def test_quantised_weights_need_a_gpu(checkpoint, capsys):
    argv = [*arguments(checkpoint), "--query", "What?", "--load-8bit"]
    assert "--load-8bit needs a GPU" in refused(run_llava.main, argv, capsys)


def test_images_and_their_places_must_agree(checkpoint, once, capsys):
    argv = [*arguments(checkpoint), "--query", "<image-placeholder> or <image-placeholder> ?"]
    assert "images to show: <image>, places for them in the question: <image> <image>;" in refused(
        run_llava.main, argv, capsys
    )


def test_run_llava_needs_something_to_look_at(checkpoint, capsys):
    argv = ["--model-path", str(checkpoint), "--query", "What?"]
    assert "give --image-file or --video-file" in refused(run_llava.main, argv, capsys)


# --- videos ---

VIDEO = Path(__file__).parent / "golden/videollama2"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory):
    """The golden VideoLLaMA-2 with a chat template."""
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("videos") / "VideoLLaMA2-tiny"
    shutil.copytree(VIDEO / "checkpoint", folder)
    shutil.copytree(VIDEO / "clip_tower", folder / "clip_tower")
    tokenizer = AutoTokenizer.from_pretrained(VIDEO / "checkpoint")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for i in range(10):
        Image.new("RGB", (40, 30), (25 * i, 90, 200 - 20 * i)).save(folder / f"{i:02}.png")
    return str(folder)


def asked(video_checkpoint, clip, question: str) -> str:
    tokenizer, model, processor, _ = load_pretrained_model(
        str(video_checkpoint), None, "VideoLLaMA2", device="cpu"
    )
    return mm_infer(
        process_video(clip, processor, aspect_ratio=None), question, model, tokenizer, max_new_tokens=6
    )


@pytest.fixture
def about_the_clip(video_checkpoint, clip) -> list[str]:
    """Flags of a chat about the video."""
    return f"--model-path {video_checkpoint} --video-file {clip} --device cpu --max-new-tokens 6".split()


def test_a_video(video_checkpoint, clip, about_the_clip, capsys):
    run_llava.main([*about_the_clip, "--query", "What happens?"])
    answer = capsys.readouterr().out.strip()
    assert answer == asked(video_checkpoint, clip, "What happens?")


def test_a_conversation_about_a_video_and_an_image(
    video_checkpoint, clip, about_the_clip, capsys, monkeypatch, tmp_path
):
    compression = tmp_path / "libra.yaml"
    compression.write_text("method: libra\nlayers: [1, 3]\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"What happens?\n/image {IMAGES[0]}\nAnd here?\n"))
    cli.main([*about_the_clip, "--compression", str(compression)])
    output = capsys.readouterr()
    assert output.err.count("error") == 0 and "read again" not in output.out
    assert "visual tokens 45 → 22 → 11" in output.out and "visual tokens 90 → 44 → 22" in output.out
    assert f"{IMAGES[0]}: 45 visual tokens" in output.out

    loaded = load_pretrained_model(str(video_checkpoint), None, "VideoLLaMA2", device="cpu")
    chat = Session(*loaded, None)
    chat.show(clip, "video")
    chat.show(IMAGES[0])
    with pytest.raises(
        ValueError, match="to show: <video> <image>, places for them in the question: <image> <video>"
    ):
        chat.ask("First <image>, then <video>")
    chat.ask("See <image-placeholder> and <image-placeholder>", max_new_tokens=2)
    assert chat.conversation.messages[0][1] == "See <video> and <image>" and chat.limit == 4096
    loaded[0].chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat_template refuses this conversation: roles must alternate"):
        chat.ask("And now?")
    loaded[0].chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat_template"):
        chat.ask("And now?")
