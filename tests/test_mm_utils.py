"""Image and prompt processing against the golden data of the published code."""

import base64
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from web_server import serving

from llava import mm_utils

GOLDEN = Path(__file__).parent / "golden/text_and_image_processing"
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def golden_json(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizers():
    return {
        folder.name: AutoTokenizer.from_pretrained(folder) for folder in (GOLDEN / "tokenizers").iterdir()
    }


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "images.npz")


@pytest.fixture(scope="module")
def images():
    return [Image.open(GOLDEN / f"image{k}.png") for k in range(4)]


@pytest.fixture
def web_server():
    with serving() as server:
        yield server


@pytest.fixture(
    scope="module", params=[CLIPImageProcessor, CLIPImageProcessorPil], ids=["torchvision", "pillow"]
)
def processor(request):
    return request.param.from_pretrained(GOLDEN / "image_processor")


def test_resolutions():
    table = golden_json("resolution_tables")
    assert len(table["rows"]) == 85
    for row in table["rows"]:
        pinpoints, size, patch = (
            table["pinpoints"][row["pinpoints"]],
            tuple(row["image_size"]),
            row["patch_size"],
        )
        assert mm_utils.select_best_resolution(size, [tuple(p) for p in pinpoints]) == tuple(
            row["best_resolution"]
        )
        for form in (pinpoints, str(pinpoints)):
            assert mm_utils.get_anyres_image_grid_shape(size, form, patch) == tuple(row["grid_w_h"])
        feature_map = torch.zeros(1, *row["feature_map_hw"])
        assert list(mm_utils.unpad_image(feature_map, size).shape[1:]) == row["unpadded_hw"]


def test_unpad_takes_the_middle():
    feature_map = torch.arange(36.0).view(1, 6, 6)
    assert torch.equal(mm_utils.unpad_image(feature_map, (60, 20)), feature_map[:, 2:4])
    assert torch.equal(mm_utils.unpad_image(feature_map, (20, 60)), feature_map[:, :, 2:4])


@pytest.mark.parametrize("pinpoints", ["[[336, 672]", "[336, 672]", [], None])
def test_bad_pinpoints(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        mm_utils.get_anyres_image_grid_shape((640, 480), pinpoints, 336)


def test_intermediate_images(images, arrays):
    background = tuple(int(mean * 255) for mean in CLIPImageProcessor.image_mean)
    assert np.array_equal(mm_utils.resize_and_pad_image(images[0], (112, 112)), arrays["resize_and_pad0"])
    assert np.array_equal(mm_utils.resize_and_pad_image(images[3], (112, 112)), arrays["resize_and_pad3"])
    assert np.array_equal(mm_utils.expand2square(images[1], background), arrays["expand2square1"])
    assert mm_utils.expand2square(images[2], background) is images[2]


def test_tiles_come_row_by_row():
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    tiles = [np.asarray(tile)[0, 0] for tile in mm_utils.divide_to_patches(image, 2)]
    assert tiles == [0, 2, 4, 12, 14, 16]


@pytest.mark.parametrize(
    "aspect,name", [("pad", "pad"), (None, "default_centercrop"), ("square", "default_centercrop")]
)
def test_pixels(images, arrays, processor, aspect, name):
    pixels = mm_utils.process_images(images, processor, SimpleNamespace(image_aspect_ratio=aspect))
    np.testing.assert_allclose(pixels, arrays[name], rtol=0, atol=1e-5)


def test_anyres_pixels(images, arrays, processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    one, two, three, four = mm_utils.process_images(images, processor, config)
    # Before version 13 Pillow enlarged this image a little differently: by up to three grey levels of about
    # 0.015.
    close = 1e-5 if int(PIL.__version__.split(".")[0]) >= 13 else 0.05
    np.testing.assert_allclose(two, arrays["anyres1"], rtol=0, atol=close)
    assert [len(tiles) for tiles in (one, two, three, four)] == [5, 4, 5, 5]
    assert mm_utils.process_images([images[0], images[2]], processor, config).shape == (2, 5, 3, 56, 56)


def test_images_in_other_modes(images, processor):
    config = SimpleNamespace(image_aspect_ratio="pad")
    for mode in ("L", "RGBA", "P"):
        image = images[1].convert(mode)
        pixels = mm_utils.process_images([image, image.convert("RGB")], processor, config)
        assert torch.equal(pixels[0], pixels[1])


def test_unknown_aspect_ratio(images, processor):
    with pytest.raises(ValueError, match="'anyres_max_9' is unknown"):
        mm_utils.process_images(images, processor, SimpleNamespace(image_aspect_ratio="anyres_max_9"))


def test_image_tokens(tokenizers):
    cases = golden_json("tokenizer_image_token")
    assert {case["tokenizer"] for case in cases} == set(tokenizers)
    for case in cases:
        ids = mm_utils.tokenizer_image_token(case["prompt"], tokenizers[case["tokenizer"]])
        assert ids == case["input_ids"], case


def test_image_tokens_as_a_tensor(tokenizers):
    tokenizer = tokenizers["sp700_legacyFalse"]
    ids = mm_utils.tokenizer_image_token("a <image> b", tokenizer, image_token_index=-7, return_tensors="pt")
    assert ids.dtype == torch.int64 and ids.tolist() == mm_utils.tokenizer_image_token(
        "a <image> b", tokenizer, -7
    )
    assert -7 in ids
    with pytest.raises(ValueError, match="'np' is unknown"):
        mm_utils.tokenizer_image_token("a", tokenizer, return_tensors="np")


def test_model_names():
    for path, name in golden_json("misc")["get_model_name_from_path"].items():
        assert mm_utils.get_model_name_from_path(path) == name


def test_keywords(tokenizers):
    for case in golden_json("misc")["stopping_criteria"]:
        output = torch.tensor(case["output_ids"])
        prompt = output[:, : case["start_len"]]
        criteria = mm_utils.KeywordsStoppingCriteria(
            case["keywords"], tokenizers["sp700_legacyFalse"], prompt
        )
        assert [ids.tolist() for ids in criteria.keyword_ids] == case["keyword_ids"]
        assert (criteria.max_keyword_len, criteria.start_len) == (case["max_keyword_len"], case["start_len"])
        assert criteria(output, None).tolist() == [case["result"]], case


def test_keywords_row_by_row_and_without_the_prompt(tokenizers):
    tokenizer = tokenizers["sp700_legacyFalse"]
    prompt = torch.tensor(
        [[1, -200, 649], [1, -200, 649]]
    )  # generation from embeddings does not give it back
    criteria = mm_utils.KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)
    assert criteria(torch.tensor([[369, 2], [369, 369]]), None).tolist() == [True, False]
    assert criteria(torch.zeros(2, 0, dtype=torch.long), None).tolist() == [False, False]


def test_load_image(tmp_path, images):
    assert np.array_equal(mm_utils.load_image(GOLDEN / "image0.png"), images[0])
    data = (GOLDEN / "image0.png").read_bytes()
    assert np.array_equal(mm_utils.load_image_from_base64(base64.b64encode(data).decode()), images[0])
    with pytest.raises(ValueError, match="base64"):
        mm_utils.load_image_from_base64("no")

    whole = BytesIO()
    images[0].save(whole, "JPEG")
    for name, content, message in (
        ("cut.png", data[: len(data) // 2], "damaged"),
        ("cut.jpg", whole.getvalue()[:700], "damaged"),
        ("text.png", b"no image", "no known format"),
        ("empty.png", b"", "no known format"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*{message}"):
            mm_utils.load_image(tmp_path / name)
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match="cannot be opened"):
            mm_utils.load_image(path)


def test_load_image_from_an_address(images, web_server):
    web_server.bodies["/image1.png"] = (GOLDEN / "image1.png").read_bytes()
    assert np.array_equal(mm_utils.load_image(f"{web_server.address}/image1.png"), images[1])
    with pytest.raises(ValueError, match="/none.png cannot be fetched: the server answers 404"):
        mm_utils.load_image(f"{web_server.address}/none.png")
    with pytest.raises(ValueError, match="image.png cannot be fetched: there is no connection"):
        mm_utils.load_image("http://127.0.0.1:9/image.png")
