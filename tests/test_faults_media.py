"""The faults of pictures, sizes and videos that were found by using the product, one test an entry; those of
the running page stand in test_web.py and every odd file at every entry point in test_media.py."""

import json
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import odd_files
import page_client
import pytest
from PIL import Image
from web_server import serving

from libra import media
from libra.figures import command as figures
from libra.media.fetch import fetch, is_public
from llava.eval import run_llava
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.serve import cli
from llava.serve.asked import Example, Mistake, Reader
from llava.serve.session import Loaded, Session
from llava.serve.speakers import LlavaSpeaker
from llava.train.data import VisualTokens
from llava.video import load_frames

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "mini/checkpoint")


def refused(main, capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in argv])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a2_a_picture_that_would_fill_memory_is_one_sentence_everywhere(loaded, tmp_path, capsys):
    """At the commands before a model is loaded; in training the sample is skipped and counted; on the page at
    its field."""
    bad = odd_files.write_bad(tmp_path)
    names = ("stick.png", "longer stick.png", "flat.png", "wide.png", "bomb.png")
    drawing = (
        "--model",
        "none",
        "--prompt",
        "?",
        "--config",
        ROOT / "configs/mini/r50.yaml",
        "--output",
        "a.pdf",
    )
    for name in names:
        path, options = tmp_path / name, ("--model-path", "none", "--image-file", tmp_path / name)
        said = {
            refused(run_llava.main, capsys, *options, "--query", "what ?"),
            refused(cli.main, capsys, *options),
            refused(figures.main, capsys, *drawing, "--image", path),
        }
        assert len(said) == 1 and bad[name] in said.pop()
        read = Reader(LlavaSpeaker(Loaded(*loaded, "mini")), {}, [], 1)
        with pytest.raises(Mistake, match="is too (narrow|large)") as mistake:
            read(json.dumps(page_client.fields(Path(path).read_bytes())).encode())
        assert mistake.value.field == "picture"
    data = odd_files.training_on(loaded, tmp_path, *bad)
    assert all(data[i]["unreadable"] and (data[i]["labels"] == -100).all() for i in range(len(bad)))


def test_a3_the_commands_refuse_what_never_ends(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    with serving() as server:
        server.bodies = {"/endless": endless}
        for name, sentence in (
            (tmp_path / "pipe", "not a regular file"),
            ("/dev/zero", "not a regular file"),
            (f"{server.address}/endless", "more than 268,435,456 bytes"),
        ):
            options = ("--model-path", "none", "--image-file", name)
            assert sentence in refused(run_llava.main, capsys, *options, "--query", "what ?")


# --- sizes, files and addresses ---


def test_a2_a_size_is_refused_before_anything_is_allocated(loaded, tmp_path):
    """A padded square of 20000 pixels a side would take 1.6 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    odd_files.write_bad(tmp_path)
    processor = loaded[2]
    for name in ("stick.png", "longer stick.png", "flat.png", "wide.png", "bomb.png"):
        with pytest.raises(ValueError):
            load_image(tmp_path / name)
    for aspect in ("pad", "square", "anyres"):
        config = SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=[[96, 192]])
        for size in ((1, 20000), (3000, 1)):
            with pytest.raises(ValueError, match="the image is too narrow"):
                process_images([Image.new("1", size)], processor, config)
    for points in ([[10**6, 10**6]], [[0, 96]], [[-96, 96]]):
        with pytest.raises(ValueError, match="image_grid_pinpoints"):
            process_images(
                [Image.new("1", (9, 9))],
                processor,
                SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=points),
            )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_a3_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (
        tmp_path / "pipe.png",
        tmp_path / "link.png",
        "/dev/zero",
        tmp_path,
        "none.png",
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises(ValueError, match="cannot be opened") as refused:
            media.open_image(path)
        assert len(str(refused.value)) < 400
    with pytest.raises(ValueError, match="cannot be read"):
        media.Video(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="has more than 999 bytes"):
        media.open_image(tmp_path / "large.png", media.Limits(bytes=999))


def endless(request):
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b"x" * 65536)


def dripping(where: str):
    def answer(request):
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X-A: 1\r\n\r\n" if where == "body" else b""))
        for _ in range(100):
            request.wfile.write(b"a")
            time.sleep(0.1)

    return answer


def of_length(text: str, body: bytes):
    def answer(request):
        request.send_response(200)
        request.send_header("Content-Length", text)
        request.end_headers()
        request.wfile.write(body)

    return answer


def redirecting(to: str):
    def answer(request):
        request.send_response(302)
        request.send_header("Location", to)
        request.end_headers()

    return answer


def packed(request):
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.end_headers()


def test_a3_downloads_end_and_private_networks_are_closed(odd):
    image, pixels = odd["rgb.png"]
    limits = media.Limits(bytes=100_000, seconds=1.0, addresses="any")
    with serving() as server:
        server.bodies = {
            "/a.png": image.read_bytes(),
            "/endless": endless,
            "/drip": dripping("body"),
            "/heads": dripping("head"),
            "/packed": packed,
            "/loop": redirecting("/loop"),
            "/to/a": redirecting("/a.png"),
            "/file": redirecting("file:///etc/passwd"),
            "/text": b"no image",
            "/long": b"x" * 100_001,
            "/many": of_length("many", image.read_bytes()),
            "/digits": of_length("9" * 5000, image.read_bytes()),
        }
        for path in ("/a.png", "/to/a", "/many", "/digits"):
            assert np.array_equal(media.open_image(server.address + path, limits), pixels)
        start = time.monotonic()
        for path, sentence in {
            "/endless": "it has more than 100,000 bytes",
            "/long": "it has more than 100,000 bytes",
            "/drip": "it takes longer than 1 seconds",
            "/heads": "it takes longer than 1 seconds",
            "/packed": "sends it packed",
            "/loop": "redirects more than 5 times",
            "/file": "is not valid",
            "/none": "answers 404 Not Found",
        }.items():
            with pytest.raises(
                ValueError, match=f"the image {server.address}{path} cannot be fetched: .*{sentence}"
            ):
                media.open_image(server.address + path, limits)
        assert time.monotonic() - start < 10
        with pytest.raises(ValueError, match="in no known format"):
            media.open_image(f"{server.address}/text", limits)
        for limits, sentence in (
            (media.FILES, "is an address, which is not taken here"),
            (media.Limits(addresses="public"), "on this machine or in a private network"),
        ):
            with pytest.raises(ValueError, match=sentence):
                media.open_image(f"{server.address}/a.png", limits)
        port = server.server_address[1]
        for host in ("localhost", "127.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "0.0.0.0"):
            with pytest.raises(ValueError, match="private network|no connection"):
                fetch(f"http://{host}:{port}/a.png", 100_000, 1.0, public_only=True)
    assert [is_public(ip) for ip in ("93.184.216.34", "2606:2800::1")] == [True, True]
    private = "10.0.0.1 169.254.169.254 ::1 fe80::1%eth0 ::ffff:10.0.0.1 64:ff9b::7f00:1 224.0.0.1 100.64.0.1"
    for ip in private.split():
        assert not is_public(ip), ip


# --- videos and folders of frames ---


def test_b9_a_folder_of_frames_is_in_natural_order_and_holds_pictures_only(tmp_path):
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "sub.png").mkdir()
    frames = load_frames(tmp_path, num_frames=12)
    assert [frame.getpixel((0, 0))[0] // 20 for frame in frames] == [
        round((i + 0.5) * 11 / 12 + 1e-6) for i in range(12)
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        load_frames(tmp_path / "empty")


def write_film(path: Path, times: list[int], matrix: tuple[int, ...] | None = None) -> None:
    """Frames of 64 x 48 with a green corner, each brighter than the one before, from ``times`` on in
    hundredths of a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=100)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 8_000_000
        for number, when in enumerate(times):
            pixels = np.full((48, 64, 3), (6 * number, 0, 0), np.uint8)
            pixels[:16, :16, 1] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = when
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if matrix:
        data = bytearray(path.read_bytes())
        place = data.index(b"tkhd") + 44
        data[place : place + 36] = np.array(matrix, ">i4").tobytes()
        path.write_bytes(data)


def test_b9_a_video_is_turned_by_its_matrix(tmp_path):
    one, last = 65536, 1 << 30
    corners = {  # where the green corner of the stored frames is shown
        (one, 0, 0, 0, one, 0, 0, 0, last): "top left",
        (0, one, 0, -one, 0, 0, 48 * one, 0, last): "top right",
        (-one, 0, 0, 0, -one, 0, 64 * one, 48 * one, last): "bottom right",
        (0, -one, 0, one, 0, 0, 0, 64 * one, last): "bottom left",
    }
    for matrix, corner in corners.items():
        write_film(tmp_path / "a.mp4", list(range(0, 60, 10)), matrix)
        (frame,) = load_frames(tmp_path / "a.mp4", num_frames=1)
        turned = corner in ("top right", "bottom left")
        assert frame.size == ((48, 64) if turned else (64, 48))
        pixels = np.asarray(frame)[:, :, 1] > 128
        half = {
            "top left": pixels[:8, :8],
            "top right": pixels[:8, -8:],
            "bottom right": pixels[-8:, -8:],
            "bottom left": pixels[-8:, :8],
        }
        assert {name for name, part in half.items() if part.mean() > 0.5} == {corner}


def test_b9_a_part_of_a_video_goes_by_the_frames_own_times(tmp_path):
    times = [0, 10, 20, 30, 40, 240, 250, 260, 270, 280]  # the fifth frame stands for two seconds
    write_film(tmp_path / "a.mp4", times)

    def shown(count: int, start: float, end: float) -> list[int]:
        frames = load_frames(tmp_path / "a.mp4", count, s=start, e=end)
        return [round(np.asarray(frame)[30:, 30:, 0].mean() / 6) for frame in frames]

    assert (
        shown(5, 2.4, 2.8) == [4, 5, 6, 7, 8]
        and shown(1, 1.0, 2.0) == [4]
        and shown(4, 0.0, 0.4) == [0, 1, 2, 3]
    )
    with pytest.raises(ValueError, match="no frame in the part asked for"):
        load_frames(tmp_path / "a.mp4", 3, s=9.0, e=10.0)


def test_a3_a_playlist_is_no_video(tmp_path):
    """FFmpeg would read the files and addresses that it names."""
    secret = tmp_path / "secret.ts"
    write_film(secret, list(range(0, 100, 10)))
    assert len(load_frames(secret, num_frames=2)) == 2
    playlist = f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    parts = f"ffconcat version 1.0\nfile {secret}\n"
    for name, text in (("list.m3u8", playlist), ("list.mp4", playlist), ("concat.mp4", parts)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_frames(tmp_path / name, num_frames=2)


def test_e6_an_image_that_would_lose_its_tiles_is_refused(tmp_path):
    """50 x 1 pixels: after cutting the padding off, no row of the tiles' tokens is left."""
    folder = ROOT / "tests/golden/llava_next_llama3/checkpoint"
    loaded = load_pretrained_model(str(folder), None, "llava-llama3", device="cpu")
    tokenizer, model, processor, length = loaded
    chat = Session(*loaded, "llava_llama_3")
    Image.new("RGB", (50, 1)).save(tmp_path / "line.png")
    Image.new("RGB", (50, 20)).save(tmp_path / "wide.png")
    with pytest.raises(
        ValueError,
        match=r"the image is too narrow \(50 x 1 pixels\): none of its tiles' tokens would be left",
    ):
        chat.show(tmp_path / "line.png")
    assert chat.pictures == [] and chat.show(tmp_path / "wide.png").tokens > 17
    tower, config = model.get_vision_tower(), model.config
    counts = VisualTokens(
        tower.num_patches, tower.config.image_size, config.mm_patch_merge_type, config.image_grid_pinpoints
    )
    data = odd_files.training_on(
        loaded, tmp_path, "line.png", "wide.png", pictures=config, visual_tokens=counts
    )
    assert [bool(data[0]["unreadable"]), bool(data[1]["unreadable"])] == [True, False]


def test_half_a_character_is_refused_and_a_very_low_temperature_takes_the_likeliest(loaded):
    """A byte that is not UTF-8 comes from the command line as half of a surrogate pair."""
    chat = Session(*loaded, "mini", [Image.new("RGB", (96, 96))])
    with pytest.raises(ValueError, match="the text has half of a surrogate pair"):
        chat.ask("caf\udce9 ?", max_new_tokens=1)
    read = Reader(LlavaSpeaker(Loaded(*loaded, "mini")), {}, [Example(Image.new("RGB", (96, 96)), "")], 1)
    with pytest.raises(Mistake, match="half of a surrogate pair") as mistake:
        read(json.dumps({"picture": "example:0", "question": "half \ud800"}).encode())
    assert mistake.value.field == "question"
    greedy = chat.ask("what digit is it ?", max_new_tokens=2).text
    again = Session(*loaded, "mini", [Image.new("RGB", (96, 96))])
    assert again.ask("what digit is it ?", max_new_tokens=2, temperature=1e-300).text == greedy


def test_e7_special_tokens_that_somebody_types_are_text(loaded):
    tokenizer = loaded[0]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def specials(question: str, **settings) -> list[int]:
        chat = Session(*loaded, "mini", [Image.new("RGB", (96, 96))], **settings)
        chat.ask(question, max_new_tokens=1)
        (_, asked), _ = chat.conversation.messages[-2:]
        turn = chat.conversation.copy()
        turn.messages = turn.messages[-2:]
        turn.messages[1][1] = None
        return [
            token
            for token in tokenizer_image_token(turn.get_prompt(), tokenizer)
            if token in special or token < 0
        ]

    plain = specials("what digit is it ?")
    for typed in ("what </s> is it ?", "</s></s> <s>what", "<</s>/s> it"):
        assert specials(typed) == specials(typed, typed_places=False) == plain, typed
    for typed in (
        "what is <image> it ?",
        "<image><image> <image-placeholder>",
        "<video> </s> <<image>image>",
    ):
        assert specials(typed, typed_places=False) == plain, typed
