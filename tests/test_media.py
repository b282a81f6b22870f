"""The one gate for pictures and videos: odd files through every entry point, and what it refuses."""

import base64
import json
from pathlib import Path

import numpy as np
import odd_files
import page_client
import pytest
import torch
from PIL import Image, ImageFile

from libra import media
from llava.mm_utils import process_images
from llava.serve.asked import Reader
from llava.serve.session import Loaded, Session
from llava.serve.speakers import LlavaSpeaker
from llava.video import process_video

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "mini/checkpoint")


# --- every kind of file, through every entry point ---


def as_shown_by_the_page(loaded, path):
    read = Reader(LlavaSpeaker(Loaded(*loaded, "mini")), {}, [], 1)
    return read(json.dumps(page_client.fields(path.read_bytes(), name=path.name)).encode()).questions[0].image


def test_every_odd_file_gives_the_right_pixels_at_every_entry_point(odd, loaded, monkeypatch):
    """The commands, the page, training and the evaluation; the figures open with the same call as the
    commands."""
    from libra.lmms.lmms_libra import open_visual

    tokenizer, model, processor, _ = loaded
    folder = next(iter(odd.values()))[0].parent
    monkeypatch.chdir(folder)
    chat = Session(tokenizer, model, processor, 1024, "mini")
    training = odd_files.training_on(loaded, folder, *(path.name for path, _ in odd.values()))
    assert len(odd) >= 40
    for number, (name, (path, pixels)) in enumerate(odd.items()):
        image = media.open_image(path)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels), name
        assert np.array_equal(as_shown_by_the_page(loaded, path), pixels), name
        if media.is_picture(name):
            assert np.array_equal(open_visual(str(path), 8), pixels), name
        want = process_images([Image.fromarray(pixels)], processor, model.config)[0]
        assert torch.equal(chat.show(path.name).pixels, want), name
        sample = training[number]
        assert not sample["unreadable"] and torch.equal(sample["images"][0], want), name
        assert torch.equal(process_images([image], processor, model.config)[0], want), name


def test_names_in_a_list(odd, tmp_path, monkeypatch):
    monkeypatch.chdir(next(iter(odd.values()))[0].parent)
    assert media.split_names("a, b,c.jpg,rgb.png, grey.png") == ["a, b,c.jpg", "rgb.png", "grey.png"]
    assert media.split_names("missing.png,rgb.png,") == ["missing.png", "rgb.png"]
    assert media.split_names("http://h/a,b.png?x=1,2,https://h/c.png,rgb.png") == [
        "http://h/a,b.png?x=1,2",
        "https://h/c.png",
        "rgb.png",
    ]
    assert media.split_names("data:image/png;base64,AAAA,rgb.png") == [
        "data:image/png;base64,AAAA",
        "rgb.png",
    ]
    assert (
        media.split_names("rgb.png;a, b,c.jpg", ";") == ["rgb.png", "a, b,c.jpg"]
        and media.split_names("") == []
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.png").write_bytes(Path("rgb.png").read_bytes())
    assert media.open_image("~/mine.png").size == odd_files.SIZE


def test_remarks_are_one_line(odd, capsys):
    for name in odd:
        media.open_image(odd[name][0])
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: the image ") for line in lines)
    said = {name for name in odd if any(f"/{name} " in line for line in lines)}
    assert said == {
        "see through.png",
        "palette, a clear colour.png",
        "palette, clear colours.png",
        "grey and clear.png",
        "pages.tif",
        "moving.png",
        "moving.webp",
        "moving.gif",
    }


def test_what_is_no_picture_is_one_sentence(tmp_path):
    for name, sentence in odd_files.write_bad(tmp_path).items():
        with pytest.raises(ValueError) as refused:
            media.open_image(tmp_path / name)
        assert (
            sentence in str(refused.value) and name in str(refused.value) and "\n" not in str(refused.value)
        )


# --- arrays, tensors, PIL images, bytes and data URIs ---


def test_arrays_and_tensors_of_any_layout():
    array = odd_files.scene()
    floats, tensor = array / 255, torch.from_numpy(array.copy()).permute(2, 0, 1)
    alike = [
        array,
        array[None],
        np.ascontiguousarray(array.transpose(2, 0, 1)),
        array.astype(np.int64),
        array.astype(">i2"),
        array.astype(np.uint16) * 257,
        array.astype(np.uint32) * 256,
        array.astype(np.float32),
        floats,
        floats.astype(np.float32),
        floats - 1e-4 * (floats == 0),
        tensor,
        tensor[None],
        tensor.permute(1, 2, 0),
        tensor.float() / 255,
        (tensor.double() / 255)[None, None],
        tensor.to(torch.bfloat16),
        tensor.float().requires_grad_(),
        np.dstack([array, np.full((16, 24), 255, np.uint8)]),
        array.tolist(),
        np.asfortranarray(array),
        array[::-1][::-1],
    ]
    for number, given in enumerate(alike):
        assert np.array_equal(media.open_image(given), array), number
    for level in (array[:, :, 0], array[:, :, :1], tensor[:1], tensor[0]):
        assert np.array_equal(media.open_image(level), odd_files.grey(array[:, :, 0]))
    assert np.array_equal(
        media.open_image(array[:, :, 0] > 100), odd_files.grey((array[:, :, 0] > 100) * np.uint8(255))
    )
    # Where both are possible, a tensor's channels come first and an array's last.
    assert media.open_image(torch.zeros(3, 5, 4)).size == (4, 5) and media.open_image(
        np.zeros((4, 5, 3))
    ).size == (5, 4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "given as NoneType is not a picture"),
        ({"bytes": b""}, "given as dict is not a picture"),
        (7, r"has the shape \(\)"),
        (np.zeros((2, 8, 8, 3)), r"has the shape \(2, 8, 8, 3\); give \(height, width\)"),
        (np.zeros((8, 8, 5)), "has the shape"),
        (np.zeros((0, 8, 3)), r"has no pixels \(8 × 0\)"),
        (torch.randn(3, 8, 8), "has values from -"),
        (np.full((8, 8), 1.5), "has values from 1.5 to 1.5"),
        (np.full((8, 8), np.inf), "has values from inf"),
        (np.full((8, 8), 70000), "has values from 70000"),
        (np.full((8, 8), 1j), "is not a picture"),
        (np.zeros((1, 300, 3)), r"is too narrow \(300 × 1 pixels"),
        (Image.new("L", (1, 20000)), "is too narrow"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (b"GIF89a", "damaged|no known format"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_other_things_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        media.open_image(given)


def test_pil_images_bytes_and_data_uris(odd):
    path, pixels = odd["turned 6.jpg"]
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[start : start + 70] for start in range(0, len(text), 70))
    for given in (
        Image.open(path),
        Image.open(path).convert("RGB"),
        data,
        bytearray(data),
        f"data:image/jpeg;base64,{text}",
        f"DATA:;base64,{wrapped}",
        f"data:,{''.join(f'%{byte:02x}' for byte in data)}",
    ):
        assert np.array_equal(media.open_image(given), pixels)
    upright = media.open_image(path)
    assert media.open_image(upright) is upright
    for broken in (
        "data:image/png;base64",
        "data:;base64,AAA",
        "data:;base64,*",
        f"data:image/jpeg;base64,{text[:200]}",
    ):
        with pytest.raises(ValueError, match="the image in the data URI is (damaged|in no known format)"):
            media.open_image(broken)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        media.open_image(f"data:image/jpeg;base64,{text}", media.Limits(bytes=100))
    with pytest.raises(ValueError, match="files of this machine are not read here"):
        media.open_image(str(path), media.SERVED)


# --- videos ---


def test_frames_given_in_any_form(loaded):
    frames = [odd_files.scene(), 255 - odd_files.scene()]
    want = process_video([Image.fromarray(frame) for frame in frames], loaded[2], num_frames=2)
    stacked = np.stack(frames)
    channels_first = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    for given in (stacked, channels_first, stacked / 255, [stacked[0], Image.fromarray(frames[1])]):
        assert torch.equal(process_video(given, loaded[2], num_frames=2), want)


def test_a_cut_file_is_refused_beside_a_library_that_lets_it_pass(tmp_path, monkeypatch):
    """lmms-eval tells Pillow so for its whole process; training and evaluation would then see other
    pictures."""
    odd_files.write_bad(tmp_path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("cut.png", "cut.jpg"):
        with pytest.raises(ValueError, match="is damaged"):
            media.open_image(tmp_path / name)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
