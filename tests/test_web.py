"""The page: what it computes, what it draws, and the page itself in a headless browser."""

import builtins
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from libra import Compression
from libra.registry import get_model
from libra.trace import COMPENSATION, DROPPED, GONE, MERGED, TARGET
from llava.mm_utils import process_images
from llava.model.anyres import arrange_tiles
from llava.model.builder import load_pretrained_model
from llava.serve import overlay, web
from llava.serve.session import Loaded, Session

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "mini/checkpoint")
PICTURE = ROOT / "tests/golden/text_and_image_processing/image0.png"


@pytest.fixture(scope="module")
def loaded():
    return Loaded(*load_pretrained_model(MINI, None, "mini", device="cpu"), "mini")


# --- what the page computes ---


def test_only_rows_of_the_models_sizes_are_offered(loaded):
    fitting = web.fitting_rows(loaded.model)
    assert {f"mini/{row}.yaml" for row in ("fastv", "r50", "r67", "random", "turbo", "windowed_fastv")} <= set(fitting)
    assert all(name.startswith("mini/") for name in fitting) and len(set(fitting.values())) == len(fitting)
    assert fitting["mini/r50.yaml"] == Compression.from_yaml(ROOT / "configs/mini/r50.yaml")
    spec = get_model("llava-1.5-7b")
    sizes = dict(num_hidden_layers=spec.layers, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size)
    rows = web.fitting_rows(SimpleNamespace(config=SimpleNamespace(**sizes)))
    assert {f"llava7b_{row}.yaml" for row in ("fastv", "turbo", "r50", "r67")} <= set(rows)
    assert "llava7b_vanilla.yaml" not in rows and not fitting.keys() & rows.keys()
    assert web.in_words(rows["llava7b_r67.yaml"]) == "libra, 67% after 7, 15, 23"


def test_own_compression():
    assert web.own_compression("fastv", "3, 1 2", 0.25) == Compression(method="fastv", layers=(1, 2, 3), ratio=0.25)
    for layers, message in (("one", "'one' are not numbers"), (" ", "there are no layers"), ("-1", "layers")):
        with pytest.raises(ValueError, match=message):
            web.own_compression("fastv", layers, 0.5)


def test_two_answers_with_times_and_drawings(loaded):
    image, compression = Image.open(PICTURE), Compression(method="libra", layers=(2, 5), ratio=0.5)
    vanilla, short = (web.answer(loaded, image, "how many digits are there ?", c, 8) for c in (None, compression))
    assert vanilla.visual_tokens == [256] * 12 and short.visual_tokens == [256] * 3 + [128] * 3 + [64] * 6
    assert vanilla.drawings == [] and [note for _, note in short.drawings] == [
        "after layer 2: 128 tokens left", "after layer 5: 64 tokens left"
    ]
    for run, c in ((vanilla, None), (short, compression)):
        assert 0 < run.first_token <= run.seconds
        loaded.model.set_compression(c)
        assert run.answer == Session(**vars(loaded), images=[image]).ask("how many digits are there ?", max_new_tokens=8).text
    text = web.table(vanilla, short)
    assert "| visual tokens, stage by stage | 256 | 256 → 128 → 64 |" in text
    assert "| visual tokens of an average layer | 256 | 128 |" in text and f"| {short.first_token:.3f} |" in text


# --- where tokens lie, and what is drawn there ---

SHAPES = [(100, 60), (40, 100), (64, 64), (200, 30)]


def model_with(aspect: str, merge: str = "flat", side: int = 4, edge: int = 56) -> SimpleNamespace:
    tower = SimpleNamespace(num_patches_per_side=side, config=SimpleNamespace(image_size=edge))
    config = SimpleNamespace(
        image_aspect_ratio=aspect, mm_patch_merge_type=merge, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56]]
    )
    return SimpleNamespace(placeholders=(-200,), get_vision_tower=lambda: tower, config=config)


def brightness(image: Image.Image, model) -> torch.Tensor:
    """The mean pixel of each visual token's patch, in the order of the tokens; newlines are nan."""
    from transformers import CLIPImageProcessor

    edge, config = 56, model.config
    processor = CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, image_mean=[0, 0, 0], image_std=[1, 1, 1]
    )
    pixels = process_images([image], processor, config)[0]
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    patches = pixels.mean(1).unfold(1, 14, 14).unfold(2, 14, 14).mean((3, 4)).flatten(1)[..., None]
    if config.image_aspect_ratio != "anyres":
        return patches[0, :, 0]
    newline = torch.full((1,), torch.nan)
    return arrange_tiles(patches, config.mm_patch_merge_type, image.size, config.image_grid_pinpoints, edge, newline)[:, 0]


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize(
    "setting", [("pad", "flat"), ("square", "flat"), ("anyres", "flat"), ("anyres", "spatial"), ("anyres", "spatial_unpad")],
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
    run = web.answer(Loaded(*next_model, "llava_llama_3"), Image.new("RGB", (100, 60)), "What?", Compression(layers=[1]), 2)
    assert [drawing.size for drawing, _ in run.drawings] == [(2 * 480 + 8, 288)]  # the whole image and its tiles
    assert overlay.token_boxes((10, 10), SimpleNamespace(placeholders=(-200, -201))) is None


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
    with web.listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .* choose another --port"):
            web.listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 99999), ("256.0.0.1", 0)):
        with pytest.raises(ValueError, match="cannot be used"):
            web.listen(host, port)
    assert [web.is_local(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.7")] == [True] * 3 + [False] * 2


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        web.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the page needs gradio (No module named 'gradio'); install it: pip install gradio\n"
    )


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def server(tmp_path):
    """The address of the page on a free port; it ends quietly and leaves no files."""
    pytest.importorskip("gradio")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava.serve.web", "--port", "0", "--device", "cpu"]
    with open(tmp_path / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        watchdog = threading.Timer(240, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        found = re.match(r"open (http://127\.0\.0\.1:\d+) in a browser", line)
        try:
            assert found, (tmp_path / "errors.txt").read_text()
            yield found[1]
        finally:
            process.terminate()
            process.communicate()
            watchdog.cancel()
    assert process.returncode == 0 and not list(tmp_path.glob("libra-web-*"))
    assert "Traceback" not in (tmp_path / "errors.txt").read_text()


def listening_at(port: int) -> set[str]:
    """The IPv4 and IPv6 addresses (hexadecimal, as the kernel writes them) at which somebody listens to a port."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def test_the_page_in_a_browser(server):
    """Upload, ask, two answers with times, the drawings; a wrong setting is a message; nothing but the server is asked."""
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = find_browser()
    if browser_path is None:
        pytest.skip("there is no chromium here")
    if Path("/proc/net/tcp").exists():
        assert listening_at(int(server.rsplit(":")[-1])) == {"0100007F"}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(20_000)
        asked, refused = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: refused.append(message.text))
        page.goto(server)
        page.get_by_text("read all the digits in order .").wait_for()  # an example
        ask = page.get_by_role("button", name="Ask", exact=True)
        ask.click()
        page.get_by_text("give an image and a question").first.wait_for()

        page.set_input_files("input[type=file]", str(PICTURE))
        page.get_by_role("button", name="Remove Image").or_(page.get_by_label("Remove Image")).first.wait_for()
        page.get_by_label("Question").first.fill("how many digits are there ?")
        ask.click()
        page.get_by_text("256 → 128 → 64 → 32").wait_for()
        for label in ("Vanilla", "Compressed"):
            assert re.fullmatch(r"\d+", page.get_by_label(label, exact=True).input_value())
        seconds = page.locator("tr", has_text="seconds to the first token").locator("td").all_inner_texts()
        assert all(0 < float(cell) < 60 for cell in seconds[1:]) and len(seconds) == 3
        drawn = page.get_by_text("after layer 8: 32 tokens left")
        drawn.first.wait_for()
        page.wait_for_function(
            "[...document.images].filter(i => Math.max(i.naturalWidth, i.naturalHeight) == 480).length >= 3"
        )
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # fits a laptop's screen
        browser.close()
    assert len(asked) > 10 and all(url.startswith((f"{server}/", "data:", "blob:")) for url in asked)
    assert not [text for text in refused if "Content Security Policy" in text]  # nothing else was even tried
