"""The page: what it reads and computes, where tokens lie, and its server."""

import base64
import builtins
import json
import shutil
import time
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
from page_client import RunningPage, data_uri, fields
from PIL import Image
from qwen_folder import write_qwen

from libra import Compression
from libra.engine.places_on_pictures import Block
from libra.engine.trace import FATES
from libra.mini import huggingface
from libra.rows import get_model
from libra.utils.server import listen
from llava.mm_utils import process_images
from llava.model.anyres import arrange_tiles
from llava.model.builder import load_pretrained_model
from llava.serve import overlay, web
from llava.serve.asked import Example, Mistake, Reader, fitting_rows, in_words
from llava.serve.page import ROUNDS, Desk
from llava.serve.session import Loaded, Session
from llava.serve.speakers import NOTHING, HookedSpeaker, LlavaSpeaker, Question, Spoken, flops_of, load

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "mini/checkpoint")
PICTURE = ROOT / "tests/golden/text_and_image_processing/image0.png"
SCENE = ROOT / "docs/images/scene.png"


@pytest.fixture(scope="module")
def loaded():
    return Loaded(*load_pretrained_model(MINI, None, "mini", device="cpu"), "mini")


@pytest.fixture(scope="module")
def speaker(loaded):
    return LlavaSpeaker(loaded)


def read(speaker, given: dict):
    return Reader(speaker, fitting_rows(speaker.config), [], 8)(json.dumps(given).encode())


# --- what the page reads ---


def test_only_rows_of_the_models_sizes_are_offered(loaded):
    fitting = fitting_rows(loaded.model.config)
    rows = {f"mini/{row}" for row in ("fastv", "r50", "r67", "random", "turbo", "windowed_fastv")}
    assert rows <= set(fitting) and all(name.startswith("mini/") for name in fitting)
    assert len(set(fitting.values())) == len(fitting)
    assert fitting["mini/r50"] == Compression.from_yaml(ROOT / "configs/mini/r50.yaml")
    spec = get_model("llava-1.5-7b")
    sizes = dict(
        num_hidden_layers=spec.layers, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size
    )
    rows = fitting_rows(SimpleNamespace(**sizes))
    assert {f"llava7b_{row}" for row in ("fastv", "turbo", "r50", "r67")} <= set(rows)
    assert "llava7b_vanilla" not in rows and not fitting.keys() & rows.keys()
    assert in_words(rows["llava7b_r67"]) == "67% removed after each of layers 7, 15, 23"


def test_both_methods_get_the_share_of_tokens(speaker):
    ways = [{"choice": "fastv", "layers": "1"}, {"choice": "divprune"}]
    asked = read(speaker, fields(SCENE.read_bytes(), ways=ways, share=50))
    plain, fastv, divprune = asked.compressions
    assert plain == NOTHING and asked.visual == 256
    assert fastv.layers == (1,) and divprune.keep == 128 and divprune.place == "input"
    for question, c in zip(asked.questions[1:], asked.compressions[1:]):
        tokens = speaker.ask(question, c).tokens
        assert sum(tokens) / len(tokens) == pytest.approx(128, abs=1)
    row = read(speaker, fields(SCENE.read_bytes(), ways=[{"choice": "mini/r50"}, {"choice": "libra"}]))
    assert row.compressions[1] == Compression.from_yaml(ROOT / "configs/mini/r50.yaml")


@pytest.mark.parametrize(
    "field, sentence, change",
    [
        ("picture", "give a picture", {"picture": None}),
        ("picture", "give a picture", {"picture": {"path": "/etc/passwd"}}),
        ("picture", "give a picture", {"picture": "/etc/passwd"}),
        ("picture", "give a picture", {"picture": "http://example.org/a.png"}),
        ("picture", "no such example", {"picture": "example:0"}),
        ("picture", "in no known format", {"picture": data_uri(b"no image")}),
        ("question", "write a question", {"question": " "}),
        ("question", "write a question", {"question": {"a": 1}}),
        ("question", "conversation is damaged", {"turns": [{"question": "what ?", "answers": ["a"]}]}),
        ("question", "conversation is damaged", {"turns": "none"}),
        ("share", "from 1 to 100 percent", {"share": 0}),
        ("share", "from 1 to 100 percent", {"share": True}),
        ("share", "from 1 to 100 percent", {"share": "50"}),
        ("way0", "choose two methods", {"ways": []}),
        ("way0", "choose a method from the list", {"ways": [{"choice": "../../etc/passwd"}, {}]}),
        ("way1", "choose a method from the list", {"ways": [{"choice": "fastv"}, None]}),
        (
            "way1",
            "'one' are not numbers",
            {"ways": [{"choice": "fastv"}, {"choice": "libra", "layers": "one"}]},
        ),
        ("way1", "99", {"ways": [{"choice": "fastv"}, {"choice": "libra", "layers": "99"}]}),
        ("way1", "layers", {"ways": [{"choice": "fastv"}, {"choice": "libra", "layers": 2}]}),
        ("way0", "out of range", {"share": 5}),
    ],
)
def test_a_mistake_names_its_field(speaker, field, sentence, change):
    with pytest.raises(Mistake, match=sentence) as mistake:
        read(speaker, fields(SCENE.read_bytes()) | change)
    assert mistake.value.field == field


def test_what_is_no_request_is_a_mistake(speaker):
    for body in (b"", b"[1]", b"{", b"[" * 100_000):
        with pytest.raises(Mistake, match="load the page again"):
            Reader(speaker, {}, [], 8)(body)


# --- what the page computes ---


def test_an_answer_comes_in_pieces_with_exact_figures(loaded, speaker):
    """The text is a session's, the pieces are the text, and figures are those of the sizes."""
    c, image = Compression(method="libra", layers=(2, 5), ratio=0.5), Image.open(SCENE).convert("RGB")
    for compression, tokens in ((NOTHING, [256] * 12), (c, [256] * 3 + [128] * 3 + [64] * 6)):
        pieces = []
        spoken = speaker.ask(
            Question(image, "describe the digits .", most=12), compression, pieces.append, True
        )
        assert spoken.tokens == tokens and "".join(pieces).strip() == spoken.text
        loaded.model.set_compression(compression if compression.compresses else None)
        session = Session(**vars(loaded), images=[image])
        assert session.ask("describe the digits .", max_new_tokens=12).text == spoken.text
        text = session._asked - 256
        columns = sum(tokens) + 12 * text + (6 * 1 + 3 * 1 if compression.compresses else 0)
        assert (
            columns - 12 <= spoken.cache / (2 * 128 * 4) <= columns + 12
        )  # compensation tokens, one a place
        assert (spoken.trace is None) == (compression is NOTHING)
    assert flops_of(speaker, [256] * 12) == 12 * (4 * 128**2 * 256 + 2 * 256**2 * 128 + 3 * 128 * 352 * 256)


def test_the_plain_cache_is_counted_without_the_answer(speaker):
    image = Image.open(SCENE).convert("RGB")
    short, long = (speaker.ask(Question(image, "describe the digits .", most=n), NOTHING) for n in (1, 9))
    assert short.cache == long.cache and short.cache % (12 * 2 * 128 * 4) == 0


def test_both_doors_say_the_same(speaker):
    """A model of transformers, through libra.attach, and LLaVA's own decoder on the same weights."""
    hooked = HookedSpeaker(*huggingface.load())
    image = Image.open(SCENE).convert("RGB")
    for turns in ((), (("how many digits are there ?", "3"),)):
        for c in (NOTHING, Compression(method="libra", ratio=0.5), Compression(method="divprune", keep=60)):
            ours, theirs = (
                one.ask(Question(image, "describe the digits .", turns, 12), c, trace=True)
                for one in (speaker, hooked)
            )
            assert (ours.text, ours.tokens, ours.cache) == (theirs.text, theirs.tokens, theirs.cache)
            assert (ours.trace is None) == (theirs.trace is None)
            if ours.trace is not None:
                for our, their in zip(overlay.stages_of(ours.trace, c), overlay.stages_of(theirs.trace, c)):
                    scores = [[value or 0 for value in stage.pop("importance")] for stage in (our, their)]
                    assert our == their and scores[0] == pytest.approx(scores[1], rel=1e-3)
        asked = Question(image, "what ?", turns)
        assert hooked.visual_tokens(asked) == speaker.visual_tokens(asked) == 256
    [view] = hooked.views(asked)
    assert view["picture"].startswith("data:image/png;base64,") and view["boxes"][17] == [
        1 / 16,
        1 / 16,
        2 / 16,
        2 / 16,
    ]
    with pytest.raises(ValueError, match="the model takes"):
        hooked.visual_tokens(Question(image, "what is it ? " * 2000))


def loaded_from(path, **options):
    """As the command loads it."""
    given = {"model_base": None, "load_8bit": False, "load_4bit": False, "conv_mode": None, **options}
    return load(SimpleNamespace(model_path=str(path), device="cpu", **given))


def test_a_model_is_loaded_in_either_format(tmp_path):
    assert isinstance(loaded_from(MINI), LlavaSpeaker)
    write_qwen(tmp_path)
    qwen = loaded_from(tmp_path)
    assert isinstance(qwen, HookedSpeaker)
    asked = Question(Image.new("RGB", (64, 32), "red"), "what is w9", most=4)
    assert qwen.visual_tokens(asked) == 32  # tokens of 8 × 8 pixels
    [view] = qwen.views(asked)
    assert view["boxes"][9] == [1 / 8, 1 / 4, 2 / 8, 2 / 4]
    plain, short = (
        qwen.ask(asked, c, trace=True) for c in (NOTHING, Compression(method="libra", layers=[0]))
    )
    layers = qwen.config.num_hidden_layers
    assert plain.tokens == [32] * layers and short.tokens == [32] + [16] * (layers - 1)
    assert short.cache < plain.cache and [len(stage.fate) for stage in short.trace.stages] == [32]
    hidden = Question(asked.image, "what <|image_pad|> is", most=1)
    assert qwen.visual_tokens(hidden) == 32  # a typed mark is text
    with pytest.raises(ValueError, match="--load-4bit is for checkpoints in LLaVA's own format"):
        loaded_from(tmp_path, load_4bit=True)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        loaded_from(tmp_path)


def test_a_conversation_is_read_again_with_its_own_answers(loaded, speaker):
    """As a chat on a cache that is filled anew for every question."""
    image = Image.open(SCENE).convert("RGB")
    loaded.model.set_compression(Compression(method="libra", ratio=0.5))
    chat = Session(**vars(loaded), images=[image], reprefill=True)
    turns = ()
    for text in ("how many digits are there ?", "describe the digits .", "what color is the 7 ?"):
        said = chat.ask(text, max_new_tokens=12).text
        loaded.model.set_compression(None)
        asked = Question(image, text, turns, 12)
        assert speaker.ask(asked, Compression(method="libra", ratio=0.5)).text == said
        turns += ((text, said),)
        loaded.model.set_compression(Compression(method="libra", ratio=0.5))


def test_a_desk_tells_its_answers_in_order(speaker):
    desk = Desk(
        speaker, "mini", 12, [Example(Image.open(SCENE).convert("RGB"), "describe the digits .", "?")]
    )
    shown = desk.warm_up()
    events = shown["events"]
    kinds = [next(iter(event)) for event in events]
    assert kinds[0] == "begin" and kinds.count("done") == 3 and kinds[-1] == "done"
    texts = [
        "".join(event["text"][1] for event in events if event.get("text", [None])[0] == i) for i in range(3)
    ]
    done = [event["done"][1] for event in events if "done" in event]
    assert [text.strip() for text in texts] == [one["text"] for one in done]
    plain, libra, fastv = done
    assert plain["flops_ratio"] == 1 and plain["stages"] == []
    assert [len(one["stages"]) for one in (libra, fastv)] == [3, 1]
    assert libra["cache"] < plain["cache"] and 0.4 < libra["flops_ratio"] < 0.5
    json.dumps(desk.about(shown))


class Clock:
    """A model that only notes in which order it is asked."""

    def __init__(self):
        self.order, self.config = [], None

    def ask(self, question, compression, say=False, trace=False):
        self.order.append(compression.name)
        assert question.most == 1 and not trace
        return Spoken("", [], 0, None)


def test_times_are_taken_in_turns(speaker):
    asked = read(speaker, fields(SCENE.read_bytes()))
    desk, events = Desk(speaker, "mini", 12), []
    desk.speaker = clock = Clock()
    desk.measure(asked, events.append)
    names = [c.name for c in asked.compressions]
    assert clock.order[:3] == names  # a round that does not count
    assert clock.order[3:] == [name for i in range(ROUNDS) for name in (names if i % 2 == 0 else names[::-1])]
    assert [event["round"][0] for event in events[:-1]] == list(range(1, 3 * (ROUNDS + 1) + 1))
    times = events[-1]["times"]
    assert times[0]["ratio"] == [1, 1, 1] and events[-1]["coverage"] >= 0.95
    for one in times:
        median, low, high = one["seconds"]
        assert 0 < low <= median <= high


# --- where tokens lie, and what is drawn there ---

SHAPES = [(100, 60), (40, 100), (64, 64), (200, 30)]


def model_with(aspect: str, merge: str = "flat", side: int = 4, edge: int = 56) -> SimpleNamespace:
    tower = SimpleNamespace(num_patches_per_side=side, config=SimpleNamespace(image_size=edge))
    config = SimpleNamespace(
        image_aspect_ratio=aspect,
        mm_patch_merge_type=merge,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56]],
    )
    return SimpleNamespace(takes_videos=False, get_vision_tower=lambda: tower, config=config)


def brightness(image: Image.Image, model) -> torch.Tensor:
    """The mean pixel of each visual token's patch, in the order of the tokens; newlines are nan."""
    from transformers import CLIPImageProcessor

    edge, config = 56, model.config
    processor = CLIPImageProcessor(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    pixels = process_images([image], processor, config)[0]
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    patches = pixels.mean(1).unfold(1, 14, 14).unfold(2, 14, 14).mean((3, 4)).flatten(1)[..., None]
    if config.image_aspect_ratio != "anyres":
        return patches[0, :, 0]
    newline = torch.full((1,), torch.nan)
    return arrange_tiles(
        patches, config.mm_patch_merge_type, image.size, config.image_grid_pinpoints, edge, newline
    )[:, 0]


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize(
    "setting",
    [
        ("pad", "flat"),
        ("square", "flat"),
        ("anyres", "flat"),
        ("anyres", "spatial"),
        ("anyres", "spatial_unpad"),
    ],
    ids="-".join,
)
def test_a_token_is_brightest_when_its_place_is_lit(setting, size):
    model = model_with(*setting)
    views = overlay.token_boxes(size, model)
    assert len(views) == (2 if setting[0] == "anyres" else 1)
    start, tried = 0, 0
    for view in views:
        for i, box in enumerate(view.tolist()):
            if box[0] != box[0]:
                continue
            left, top, right, bottom = (round(10 * edge) for edge in box)
            width, height = min(right, 10 * size[0]) - max(left, 0), min(bottom, 10 * size[1]) - max(top, 0)
            visible = max(width, 0) * max(height, 0) / ((right - left) * (bottom - top))
            if visible < 0.25 or setting[0] == "anyres" and i % 3:
                continue  # most of it is padding
            image = Image.new("RGB", (10 * size[0], 10 * size[1]))
            image.paste((255, 255, 255), (left, top, right, bottom))
            values = brightness(image, model)
            assert len(values) == sum(map(len, views))
            own = values[start : start + len(view)].nan_to_num(-1)
            assert own.argmax() == i and own[i] > visible / 2, (i, box)
            tried += 1
        start += len(view)
    assert tried >= 3


def test_boxes_are_as_many_as_the_model_has_tokens(loaded):
    image = Image.new("RGB", (120, 80))
    assert [len(view) for view in overlay.token_boxes(image.size, loaded.model)] == [256]
    folder = ROOT / "tests/golden/llava_next_llama3/checkpoint"
    next_model = load_pretrained_model(str(folder), None, "llava-llama3", device="cpu")
    _, model, processor, _ = next_model
    for size in SHAPES:
        pixels = process_images([Image.new("RGB", size)], processor, model.config)
        boxes = overlay.token_boxes(size, model)
        assert [sum(map(len, boxes))] == model.visual_tokens(pixels, [size])
        assert torch.isnan(boxes[1]).any()  # newlines
    speaker = LlavaSpeaker(Loaded(*next_model, "llava_llama_3"))
    asked = Question(Image.new("RGB", (100, 60)), "What?", most=2)
    views = speaker.views(asked)
    assert len(views) == 2 and None in views[1]["boxes"]  # the whole image, and its tiles with newlines
    assert sum(len(view["boxes"]) for view in views) == speaker.visual_tokens(asked)
    assert overlay.token_boxes((10, 10), SimpleNamespace(takes_videos=True)) is None


def test_what_became_of_each_token_as_json(speaker):
    image, c = Image.open(SCENE).convert("RGB"), Compression(method="libra", layers=(2, 5), ratio=0.5)
    trace = speaker.ask(Question(image, "describe the digits .", most=1), c, trace=True).trace
    first, second = json.loads(json.dumps(overlay.stages_of(trace, c)))
    assert [first["where"], first["left"]] == ["after layer 2", 128]
    assert [second["where"], second["left"]] == ["after layer 5", 64]
    for stage, left in ((first, 128), (second, 64)):
        assert all(len(stage[name]) == 256 for name in ("fate", "slot", "weight", "importance", "interval"))
        kept = [i for i, fate in enumerate(stage["fate"]) if FATES[fate] == "target"]
        assert len(kept) == left == len({stage["interval"][i] for i in kept})  # one an interval
        assert {stage["slot"][i] for i, fate in enumerate(stage["fate"]) if FATES[fate] == "merged"} <= set(
            kept
        )
    gone = [FATES[fate] == "gone" for fate in second["fate"]]
    assert sum(gone) == 128 and gone == [value is None for value in second["importance"]]
    assert gone == [interval < 0 for interval in second["interval"]]
    pruned = Compression(method="fastv", layers=(2,), ratio=0.5)
    trace = speaker.ask(Question(image, "describe the digits .", most=1), pruned, trace=True).trace
    assert overlay.stages_of(trace, pruned)[0]["interval"] is None


def test_blocks_become_boxes():
    picture = Image.new("RGB", (2000, 1000), "red")
    view, plain = overlay.of_blocks([Block(6, 2, picture, newline=True), Block(3, 2)])
    assert view["boxes"] == [
        [0, 0, 0.5, 0.5],
        [0.5, 0, 1, 0.5],
        None,
        [0, 0.5, 0.5, 1],
        [0.5, 0.5, 1, 1],
        None,
    ]
    assert plain["picture"] == "" and len(plain["boxes"]) == 3
    drawn = Image.open(BytesIO(base64.b64decode(view["picture"].partition(",")[2])))
    assert drawn.size == (640, 320) and drawn.getpixel((0, 0)) == (255, 0, 0)


# --- the server ---


def test_an_address_that_cannot_be_used_is_refused():
    with listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .* choose another --port"):
            listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 99999), ("256.0.0.1", 0)):
        with pytest.raises(ValueError, match="cannot be used"):
            listen(host, port)


def test_without_a_server_a_sentence_says_what_to_install(monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "uvicorn":
            raise ImportError("No module named 'uvicorn'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        web.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the page needs starlette and uvicorn (No module named 'uvicorn'); install them: pip install "
        "starlette uvicorn\n"
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The running page. In the end it is asked a question and told to stop before it has answered."""
    pytest.importorskip("starlette")
    with RunningPage(tmp_path_factory.mktemp("page")) as running:
        yield running


def test_a1_nothing_but_an_upload_is_read(page):
    """By path, by address, by reference, in any field and by any route."""
    secret = page.folder / "secret.png"
    shutil.copy(PICTURE, secret)
    wanted = (
        "/etc/passwd",
        str(secret),
        "~/.ssh/id_rsa",
        "secret.png",
        f"{ROOT}/llava/serve/static/../../../README.md",
        f"file://{secret}",
        f"{page.url}/example/0",
        "http://example.org/a.png",
        "example:-1",
        "example:99",
        "example:../1",
        "\0",
        "",
        "a" * 5000,
    )
    for path in wanted:
        for picture in (path, {"path": path}, [path]):
            [event] = page.ask(picture)
            assert event["error"]["field"] == "picture", path
        [event] = page.ask(PICTURE.read_bytes(), ways=[{"choice": path}, {"choice": "libra"}])
        assert event["error"]["field"] == "way0"
        for route in ("", "example/", "static/", "llava/serve/static/", "..%2f", "file="):
            if path and route + path != "example/0":
                assert page.get(f"/{route}{quote(path)}")[0] in (400, 404), path
    for route in ("docs", "openapi.json", "example/99", "example/x", "page.py", "static/page.js", "config"):
        assert page.get(f"/{route}")[0] == 404
    for route in ("ask", "time"):
        assert page.get(f"/{route}")[0] == 404
    assert page.post("/start", "{}")[0] == 404
    said = " ".join(page.refusals)
    assert str(page.folder) not in said.replace(str(secret), "") and "Traceback" not in said
    assert len(page.refusals) > 50 and "Traceback" not in page.log()
    files = {path.name for path in page.folder.rglob("*") if path.is_file()}
    assert files == {"log.txt", "secret.png"}  # nothing is stored


def test_the_policy_lets_a_browser_load_from_nowhere_else(page):
    connection = HTTPConnection("127.0.0.1", page.port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = answer.getheader("content-security-policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    text = answer.read().decode()
    connection.close()
    assert "style=" not in text and " on" + "click" not in text and "http" not in text


def test_a1_foreign_hosts_and_origins_are_refused(page):
    for host in (
        "evil.example",
        "127.evil.example",
        "localhost.evil.example",
        f"evil.example:{page.port}",
        "127.0.0.1@evil",
    ):
        assert page.get("/start", Host=host)[0] == 400, host
    for host in ("127.0.0.1", f"localhost:{page.port}", f"LOCALHOST:{page.port}", f"[::1]:{page.port}"):
        assert page.get("/start", Host=host)[0] == 200, host
    own = f"127.0.0.1:{page.port}"
    body = json.dumps({})
    for origin in (
        "http://evil.example",
        "null",
        f"http://{own}.evil.example",
        "http://127.0.0.1:1",
        f"http://localhost:{page.port}",
    ):
        assert page.post("/ask", body, Origin=origin)[0] == 403, origin
    assert page.post("/ask", body, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert page.post("/ask", body, Origin=f"http://{own}")[0] == 200


def test_a1_requests_have_a_limit(page):
    large = json.dumps(fields(b"x" * (21 * 2**20)))
    assert page.post("/ask", large)[0] == 413
    pieces = (large[start : start + 65536].encode() for start in range(0, len(large), 65536))
    assert page.post("/ask", pieces)[0] == 413


def test_d4_a_mistake_is_one_sentence_at_its_field(page):
    def said(*values, **others) -> tuple[str, str]:
        [event] = page.ask(*values, **others)
        return event["error"]["field"], event["error"]["message"]

    good = PICTURE.read_bytes()
    assert said(data_uri(b"no image"), name="notes <b>.png") == (
        "picture",
        "the image notes <b>.png is in no known format; give a PNG, JPEG or WebP file",
    )
    large = BytesIO()
    Image.new("1", (1, 20000)).save(large, "PNG")
    assert "too narrow (1 × 20000 pixels" in said(large.getvalue())[1]
    assert said(None) == ("picture", "give a picture")
    field, sentence = said(good, "what is it ? " * 2000)
    assert field == "question" and "the model takes" in sentence
    field, sentence = said(good, ways=[{"choice": "libra"}, {"choice": "fastv", "layers": "99"}])
    assert field == "way1" and "99" in sentence
    log = page.log()
    assert "Traceback" not in log and "Error" not in log


def test_e7_a_typed_special_token_is_text(page):
    for question in (
        "what </s> is <image> it ? <image>",
        "<s> <image-placeholder> <image-placeholder> </s></s> what digit ?",
    ):
        turns = [{"question": question, "answers": [question] * 3}]
        for others in ({}, {"turns": turns}):
            events = page.ask(PICTURE.read_bytes(), question, **others)
            assert not [event for event in events if "error" in event]
            assert [event["done"][0] for event in events if "done" in event] == [0, 1, 2]


def test_nobody_waits_for_an_answer_that_nobody_reads(page):
    """A reader that goes away frees the model, within a token."""
    for _ in range(3):
        page.begun(SCENE.read_bytes(), "describe the digits .").close()
    start = time.monotonic()
    assert "times" in page.ask(SCENE.read_bytes(), path="/time")[-1]
    assert time.monotonic() - start < 60


def test_e8_the_page_ends_in_time_and_leaves_nothing(page):
    """The last one of this file: it ends the page, in the middle of an answer."""
    connection = page.begun(SCENE.read_bytes(), "describe the digits .")
    start = time.monotonic()
    page.process.terminate()
    assert page.process.wait(30) == 0
    assert time.monotonic() - start < 5
    connection.close()
    assert {path.name for path in page.folder.iterdir()} <= {"log.txt", "secret.png"}
    assert "Traceback" not in page.log()
