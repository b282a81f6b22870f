"""The page: what it computes, what it draws, and the page itself in a headless browser."""

import builtins
import json
import os
import re
import shutil
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
from page_client import RunningPage
from PIL import Image

from libra import Compression
from libra.engine.trace import COMPENSATION, DROPPED, GONE, MERGED, TARGET
from libra.rows import get_model
from libra.utils.server import listen
from llava.mm_utils import process_images
from llava.model.anyres import arrange_tiles
from llava.model.builder import load_pretrained_model
from llava.serve import overlay, web
from llava.serve import page as the_page
from llava.serve.session import Loaded, Session
from llava.serve.uploads import Uploads

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "mini/checkpoint")
PICTURE = ROOT / "tests/golden/text_and_image_processing/image0.png"


@pytest.fixture(scope="module")
def loaded():
    return Loaded(*load_pretrained_model(MINI, None, "mini", device="cpu"), "mini")


# --- what the page computes ---


def test_only_rows_of_the_models_sizes_are_offered(loaded):
    fitting = the_page.fitting_rows(loaded.model)
    assert {
        f"mini/{row}.yaml" for row in ("fastv", "r50", "r67", "random", "turbo", "windowed_fastv")
    } <= set(fitting)
    assert all(name.startswith("mini/") for name in fitting) and len(set(fitting.values())) == len(fitting)
    assert fitting["mini/r50.yaml"] == Compression.from_yaml(ROOT / "configs/mini/r50.yaml")
    spec = get_model("llava-1.5-7b")
    sizes = dict(
        num_hidden_layers=spec.layers, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size
    )
    rows = the_page.fitting_rows(SimpleNamespace(config=SimpleNamespace(**sizes)))
    assert {f"llava7b_{row}.yaml" for row in ("fastv", "turbo", "r50", "r67")} <= set(rows)
    assert "llava7b_vanilla.yaml" not in rows and not fitting.keys() & rows.keys()
    assert the_page.in_words(rows["llava7b_r67.yaml"]) == "libra, 67% after layers 7, 15, 23"


def test_own_compression():
    assert the_page.own_compression("fastv", "3, 1 2", 0.25) == Compression(
        method="fastv", layers=(1, 2, 3), ratio=0.25
    )
    for layers, message in (
        ("one", "'one' are not numbers"),
        (" ", "there are no layers"),
        ("-1", "before the language model"),
    ):
        with pytest.raises(ValueError, match=message):
            the_page.own_compression("fastv", layers, 0.5)


def test_two_answers_with_times_and_drawings(loaded):
    image, compression = Image.open(PICTURE), Compression(method="libra", layers=(2, 5), ratio=0.5)
    vanilla, short = (
        the_page.answer(loaded, image, "how many digits are there ?", c, 8) for c in (None, compression)
    )
    assert vanilla.visual_tokens == [256] * 12 and short.visual_tokens == [256] * 3 + [128] * 3 + [64] * 6
    assert vanilla.drawings == [] and [note for _, note in short.drawings] == [
        "after layer 2: 128 tokens left",
        "after layer 5: 64 tokens left",
    ]
    for run, c in ((vanilla, None), (short, compression)):
        assert 0 < run.first_token <= run.seconds
        loaded.model.set_compression(c)
        assert (
            run.answer
            == Session(**vars(loaded), images=[image])
            .ask("how many digits are there ?", max_new_tokens=8)
            .text
        )
    text = the_page.table(vanilla, short)
    assert "| visual tokens, stage by stage | 256 | 256 → 128 → 64 |" in text
    assert (
        "| visual tokens of an average layer | 256 | 128 |" in text and f"| {short.first_token:.3f} |" in text
    )


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
    small = Image.new("RGB", (100, 60))
    run = the_page.answer(Loaded(*next_model, "llava_llama_3"), small, "What?", Compression(layers=[1]), 2)
    assert [drawing.size for drawing, _ in run.drawings] == [
        (2 * 480 + 8, 288)
    ]  # the whole image and its tiles
    assert overlay.token_boxes((10, 10), SimpleNamespace(takes_videos=True)) is None


def test_a_stage_is_drawn_by_fate():
    image = Image.new("RGB", (40, 40), (200, 200, 200))
    boxes = overlay.token_boxes(image.size, model_with("pad"))
    fate = torch.full((16,), DROPPED, dtype=torch.int8)
    fate[:4] = torch.tensor([TARGET, MERGED, COMPENSATION, GONE], dtype=torch.int8)
    drawing = overlay.draw_stage(image, boxes, SimpleNamespace(fate=fate))
    assert drawing.size == (480, 480)
    middle = [drawing.getpixel((60 + 120 * i, 60)) for i in range(4)] + [drawing.getpixel((60, 180))]
    assert middle[0] == (200, 200, 200) and drawing.getpixel((0, 0)) == overlay._FRAME
    merged, compensated, gone, dropped = middle[1:]
    assert merged[2] > merged[0] and compensated[0] > compensated[2]  # bluish, orange
    assert max(gone) < max(dropped) < 100 and len(set(middle)) == 5
    with pytest.raises(ValueError, match="16 visual tokens and the record 3"):
        overlay.draw_stage(image, boxes, SimpleNamespace(fate=fate[:3]))


# --- the server ---


def test_an_address_that_cannot_be_used_is_refused():
    with listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .* choose another --port"):
            listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 99999), ("256.0.0.1", 0)):
        with pytest.raises(ValueError, match="cannot be used"):
            listen(host, port)


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        web.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the page needs gradio (No module named 'gradio'); install it: pip install gradio\n"
    )


def test_uploads_go_by_age_and_size_and_examples_stay(tmp_path):
    (tmp_path / "example.png").write_bytes(b"e" * 100)
    uploads = Uploads(tmp_path, seconds=60, size=1000)
    uploads.keep()
    for age, name in enumerate(("new", "used", "old", "older")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"a" * 400)
        os.utime(tmp_path / name / "a.png", (time.time() - 20 * age,) * 2)
    assert uploads.read(str(tmp_path / "used/a.png")) == b"a" * 400  # which makes it the newest
    uploads.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["example.png", "new", "used"]
    os.utime(tmp_path / "new/a.png", (time.time() - 100,) * 2)
    uploads.sweep()
    with pytest.raises(ValueError, match="the image is gone, 1 minutes after its last use; upload it again"):
        uploads.read(str(tmp_path / "new/a.png"))


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The running page. In the end it is asked a question and told to stop before it has answered."""
    pytest.importorskip("gradio")
    with RunningPage(tmp_path_factory.mktemp("page")) as running:
        yield running


def listening_at(port: int) -> set[str]:
    """The IPv4 and IPv6 addresses (hexadecimal, as the kernel writes them) at which somebody listens to a
    port."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def test_a1_nothing_but_an_upload_is_read(page):
    """By path, by address, by reference, in any field and by any route."""
    upload = page.upload(PICTURE.read_bytes())
    assert page.ask({"path": upload})["data"][0].isdigit()
    secret = page.folder / "secret.png"
    shutil.copy(PICTURE, secret)
    link = Path(upload).with_name("link.png")
    link.symlink_to(secret)
    wanted = (
        "/etc/passwd",
        str(secret),
        "~/.ssh/id_rsa",
        "secret.png",
        f"{Path(upload).parent}/../../secret.png",
        str(link),
        f"file://{secret}",
        f"{page.url}/config",
        "http://example.org/a.png",
        "\0",
        "",
        "a" * 5000,
    )
    for path in wanted:
        for extra in ({}, {"is_stream": True}, {"url": f"{page.url}/gradio_api/file={upload}"}):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}, **extra}
            assert page.join([file, "what ?", "mini/r50.yaml", "libra", "2", 0.5])[0] == 403, path
        for field in range(1, 6):
            values = [{"path": upload}, "what ?", "mini/r50.yaml", "libra", "2", 0.5]
            values[field] = [{"deep": file}]
            assert page.join(values)[0] == 403
        for route in ("file=", "proxy=", "stream/", "file/"):
            assert page.get(f"/gradio_api/{route}{quote(path)}")[0] in (400, 404), path
    body = json.dumps(
        {"data": [{"path": upload}, "what ?", "mini/r50.yaml", "libra", "2", 0.5], "fn_index": page.ask_index}
    )
    for route in (
        "call/ask",
        "api/ask",
        "run/ask",
        "call/v2/ask",
        "component_server",
        "process_recording",
        "vibe-code/",
    ):
        assert page.post(f"/gradio_api/{route}", body)[0] == 404
    assert page.post("/gradio_api/run/predict", body)[0] == 404  # past the queue
    for number in (
        "dev/reload",
        "monitoring",
        "runs",
        "docs",
        "openapi.json",
        "gradio_api/openapi.json",
        "gradio_api/token",
    ):
        assert page.get(f"/{number}")[0] == 404
    assert page.get(f"/gradio_api/file={upload}") == (200, PICTURE.read_bytes())
    said = " ".join(page.refusals)
    assert (
        str(page.folder) not in said
        and str(ROOT) not in said
        and "Traceback" not in said
        and len(page.refusals) > 50
    )
    copies = [path for path in page.folder.rglob("*") if path.is_file() and b"root:" in path.read_bytes()]
    assert copies == [] and "Traceback" not in page.log()


def test_a1_foreign_hosts_and_origins_are_refused(page):
    for host in (
        "evil.example",
        "127.evil.example",
        "localhost.evil.example",
        f"evil.example:{page.port}",
        "127.0.0.1@evil",
    ):
        assert page.get("/config", Host=host)[0] == 400, host
    for host in ("127.0.0.1", f"localhost:{page.port}", f"LOCALHOST:{page.port}", f"[::1]:{page.port}"):
        assert page.get("/config", Host=host)[0] == 200, host
    own = f"127.0.0.1:{page.port}"
    body = json.dumps({"data": [], "session_hash": "x", "fn_index": 99})
    for origin in (
        "http://evil.example",
        "null",
        f"http://{own}.evil.example",
        "http://127.0.0.1:1",
        f"http://localhost:{page.port}",
    ):
        assert page.post("/gradio_api/queue/join", body, Origin=origin)[0] == 403, origin
    assert page.post("/gradio_api/queue/join", body, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert page.post("/gradio_api/reset", json.dumps({"event_id": "x"}), Origin=f"http://{own}")[0] == 200


def test_a1_uploads_have_a_limit(page):
    for chunked in (False, True):
        assert page.upload(b"x" * (21 * 2**20), chunked=chunked, refused=True) == 413
    assert page.post("/gradio_api/queue/join", json.dumps({"data": ["x" * 300_000]}))[0] == 413
    assert not [path for path in page.folder.rglob("*") if path.is_file() and path.stat().st_size > 2**20]


def test_d4_a_mistake_is_one_sentence_and_earlier_answers_stand(page):
    def said(field: int, *values):
        """The sentence at a field; the answers are left as they were."""
        *answers, image, question, compression = page.ask(*values)["data"]
        assert all(one == {"__type__": "update"} for one in answers)
        beside = [image, question, compression]
        assert [one["visible"] for one in beside] == [place == field for place in range(3)]
        return beside[field]["value"]

    good = {"path": page.upload(PICTURE.read_bytes())}
    text = {"path": page.upload(b"no image", "notes <b>.png"), "orig_name": "notes <b>.png"}
    assert (
        said(0, text) == "the image notes &lt;b&gt;.png is in no known format; give a PNG, JPEG or WebP file"
    )
    large = BytesIO()
    Image.new("1", (1, 20000)).save(large, "PNG")
    assert "too narrow (1 × 20000 pixels" in said(0, {"path": page.upload(large.getvalue())})
    assert said(0, None) == said(0, {"url": "data:image/png;base64,AAAA"}) == "give an image"
    assert said(1, good, " ") == said(1, good, 5) == said(1, good, {"a": 1}) == "write a question"
    assert "the model takes" in said(1, good, "what is it ? " * 2000)
    for choice in ("none", None, ["mini/r50.yaml"], "../../etc/passwd"):
        assert said(2, good, "what ?", choice) == "choose a compression from the list"
    for own in (
        ("libra", "one", 0.5),
        ("libra", "99", 0.5),
        ("glue", "2", 0.5),
        ("libra", 2, 0.5),
        ("libra", "2", []),
    ):
        assert said(2, good, "what ?", the_page.OWN, *own)
    log = page.log()
    assert "Traceback" not in log and "Error" not in log


def test_e7_a_typed_special_token_is_text(page):
    upload = page.upload(PICTURE.read_bytes())
    for question in (
        "what </s> is <image> it ? <image>",
        "<s> <image-placeholder> <image-placeholder> </s></s> what digit ?",
    ):
        assert isinstance(
            page.ask({"path": upload}, question)["data"][0], str
        )  # not a sentence about places for images


def test_the_page_in_a_browser(page):
    """Upload, ask, two answers with times, the drawings; a wrong setting is a message; nothing but the server
    is asked."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = find_browser()
    if browser_path is None:
        pytest.skip("there is no chromium here")
    if Path("/proc/net/tcp").exists():
        assert listening_at(page.port) == {"0100007F"}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1366, "height": 768})
        tab.set_default_timeout(30_000)
        asked, refused, statuses = [], [], set()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("response", lambda response: statuses.add(response.status))
        tab.on("console", lambda message: refused.append(message.text))
        tab.goto(page.url)
        tab.get_by_text("read all the digits in order .").wait_for()  # an example
        ask = tab.get_by_role("button", name="Ask", exact=True)
        ask.click()
        tab.get_by_text("give an image").first.wait_for()

        tab.set_input_files("input[type=file]", str(PICTURE))
        tab.get_by_role("button", name="Remove Image").or_(tab.get_by_label("Remove Image")).first.wait_for()
        tab.get_by_label("Question").first.fill("how many digits are there ?")
        ask.click()
        tab.get_by_text("256 → 128 → 64 → 32").wait_for()
        assert (
            tab.get_by_text("give an image").count() == 0
            or not tab.get_by_text("give an image").first.is_visible()
        )
        for label in ("Vanilla", "Compressed"):
            assert re.fullmatch(r"\d+", tab.get_by_label(label, exact=True).input_value())
        seconds = tab.locator("tr", has_text="seconds to the first token").locator("td").all_inner_texts()
        assert all(0 < float(cell) < 60 for cell in seconds[1:]) and len(seconds) == 3
        drawn = tab.get_by_text("after layer 8: 32 tokens left")
        drawn.first.wait_for()
        tab.wait_for_function(
            "[...document.images].filter(i => Math.max(i.naturalWidth, i.naturalHeight) == 480).length >= 3"
        )
        assert tab.evaluate(
            "document.documentElement.scrollWidth <= window.innerWidth"
        )  # fits a laptop's screen
        tab.get_by_label("Question").first.fill(" ")
        ask.click()
        tab.get_by_text("write a question").wait_for()
        assert tab.get_by_text("256 → 128 → 64 → 32").is_visible()  # the answers stand
        tab.get_by_text("read all the digits in order .").click()
        tab.wait_for_function("document.querySelector('textarea').value.startsWith('read all')")
        browser.close()
    assert len(asked) > 10 and all(url.startswith((f"{page.url}/", "data:", "blob:")) for url in asked)
    assert statuses <= {200, 206, 304}  # no route that the page needs is closed
    assert not [text for text in refused if "Content Security Policy" in text]  # nothing else was even tried


def test_e8_the_page_ends_in_time_and_leaves_nothing(page):
    """The last one of this file: it ends the page, in the middle of an answer."""
    upload = page.upload(PICTURE.read_bytes())
    assert page.join([{"path": upload}, "what ?", "mini/r50.yaml", "libra", "2", 0.5])[0] == 200
    start = time.monotonic()
    page.process.terminate()
    assert page.process.wait(30) == 0
    assert time.monotonic() - start < 5
    assert not list(page.folder.glob("libra-web-*")) and "Traceback" not in page.log()
