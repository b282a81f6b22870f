"""LLaVA-NeXT: tiles, newlines, grouped-query heads and the tuned vision tower, against the original's
answers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, MistralForCausalLM

from libra import Compression
from llava.mm_utils import process_images
from llava.model import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.anyres import arrange_tiles
from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).parent / "golden" / "llava_next_llama3"
CLOSE = dict(atol=1e-4, rtol=1e-4)
LIBRA = Compression(method="libra", layers=(1, 3, 5), ratio=0.5, tau=0.3)


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(GOLDEN / "checkpoint"), None, "open-llava-next-llama3-8b", device="cpu")


@pytest.fixture
def model(loaded):
    model = loaded[1]
    yield model
    model.set_compression(None)
    model.config.mm_patch_merge_type, model.config.image_aspect_ratio = "spatial_unpad", "anyres"


@pytest.fixture(scope="module")
def data():
    with np.load(GOLDEN / "data.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@pytest.fixture(scope="module")
def cases(data, loaded):
    """The model's arguments of each case. The pixels come from our own image processing, but for the second
    image's: it is enlarged, which Pillow did a little differently before version 13."""
    sizes = [tuple(size) for size in data["image_sizes_wh"].tolist()]
    images = [Image.fromarray(data[f"image{k}"].numpy()) for k in range(3)]
    pixels = [process_images([image], loaded[2], loaded[1].config)[0] for image in images]
    pixels[1] = data["pixels1"]
    shown = {
        "a_wide": ([pixels[0]], [sizes[0]]),
        "c_square": (pixels[2][None], [sizes[2]]),
        "d_batch": ([pixels[0], torch.zeros(3, 56, 56), pixels[1]], [sizes[0], (56, 56), sizes[1]]),
        "f_single_tile": ([pixels[0][:1]], [sizes[0]]),
        "g_template": ([pixels[0]], [sizes[0]]),
    }
    return {
        case: {
            "images": images,
            "image_sizes": sizes,
            **{
                name: data[f"{case}.{name}"]
                for name in ("input_ids", "attention_mask", "labels")
                if f"{case}.{name}" in data
            },
        }
        for case, (images, sizes) in shown.items()
    }


def asked(case: dict) -> dict:
    return {name: value for name, value in case.items() if name != "labels"}


@pytest.mark.parametrize(
    ("case", "columns"),
    [
        ("a_wide", slice(None, None, 2)),
        ("c_square", slice(-16, None)),
        ("d_batch", slice(None, None, 8)),
        ("f_single_tile", slice(None, None, 2)),
        ("g_template", slice(-16, None)),
    ],
)
@torch.no_grad()
def test_logits_and_loss(model, data, cases, case, columns):
    out = model(**cases[case])
    want = data.get(f"{case}.logits", data.get(f"{case}.logits_last16"))
    valid = data.get(f"{case}.prep.attention_mask", torch.ones(out.logits.shape[:2])).bool()[:, columns]
    torch.testing.assert_close(out.logits[:, columns][valid], want[valid], **CLOSE)
    if f"{case}.loss" in data:
        torch.testing.assert_close(out.loss, data[f"{case}.loss"], **CLOSE)


@pytest.mark.parametrize("case", ["a_wide", "c_square", "f_single_tile", "g_template"])
def test_greedy_ids(model, data, cases, case):
    options = dict(do_sample=False, max_new_tokens=16, return_dict_in_generate=True, output_logits=True)
    out = model.generate(**asked(cases[case]), **options)
    assert torch.equal(out.sequences, data[f"{case}.generated"])
    if case == "a_wide":
        torch.testing.assert_close(torch.stack(out.logits, 1), data["a_wide.generate_scores"], **CLOSE)


@pytest.mark.parametrize("case", ["a_wide", "d_batch", "f_single_tile"])
@torch.no_grad()
def test_prepare_inputs_labels_for_multimodal(model, data, cases, case):
    given = cases[case]
    _, _, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        given["input_ids"],
        None,
        given["attention_mask"],
        None,
        given["labels"],
        given["images"],
        given["image_sizes"],
    )
    assert torch.equal(mask, data[f"{case}.prep.attention_mask"]) and torch.equal(
        labels, data[f"{case}.prep.labels"]
    )
    if f"{case}.prep.inputs_embeds" in data:
        torch.testing.assert_close(embeds, data[f"{case}.prep.inputs_embeds"], **CLOSE)


@pytest.mark.parametrize("merge", ["flat", "spatial"])
@torch.no_grad()
def test_other_ways_of_merging(model, data, cases, merge):
    model.config.mm_patch_merge_type = merge
    given = cases["a_wide"]
    spliced = model.splice(given["input_ids"], images=given["images"], image_sizes=given["image_sizes"])
    torch.testing.assert_close(spliced.embeds, data[f"a_wide.merge_{merge}.inputs_embeds"], **CLOSE)


def test_tiles_lie_as_in_the_image():
    """Each token tells its place in the plane of 2 x 1 tiles; the image is wide, with padding above and
    below."""
    side, rows, columns = 4, 1, 2
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    plane = torch.stack([y, x], -1).float()
    tiles = plane.view(rows, side, columns, side, 2).transpose(1, 2).reshape(rows * columns, side**2, 2)
    base, newline = torch.full((1, side**2, 2), -1.0), torch.full((2,), -2.0)
    tokens = arrange_tiles(
        torch.cat([base, tiles]), "spatial_unpad", (112, 28), [[112, 56], [56, 112]], 56, newline
    )
    rows_kept = torch.cat(
        [plane[1:3], newline.expand(2, 1, 2)], 1
    )  # a quarter of 4 rows is padding, on each side
    assert torch.equal(tokens, torch.cat([base[0], rows_kept.flatten(0, 1)]))


def test_newlines_belong_to_the_span(model, cases):
    """One span of 16 + 4 * 9 tokens; halving it thrice leaves 26, 13, 6 (half to even) and the rest is
    text."""
    model.set_compression(LIBRA)
    given = asked(cases["a_wide"])
    with torch.no_grad(), tiny.watched() as steps:
        model(**given)
    assert [step.outcome.layout.spans for step in steps] == [((52,),), ((26,),), ((13,),)]
    counts = [row[0] for row in model.compression_stats["visual_tokens"]]
    assert counts == [52, 52, 26, 26, 13, 13, 6, 6]


@pytest.mark.parametrize(
    "compression", [LIBRA, Compression(method="fastv", layers=(2,), ratio=0.5)], ids=["libra", "fastv"]
)
def test_compressed_batch_generates_what_each_row_does_alone(model, cases, compression):
    given = asked(cases["d_batch"])
    model.set_compression(compression)
    batched = model.generate(**given, do_sample=False, max_new_tokens=8)
    for b, mask in enumerate(given["attention_mask"].bool()):
        single = model.generate(
            given["input_ids"][b : b + 1, mask],
            images=given["images"][b : b + 1],
            image_sizes=given["image_sizes"][b : b + 1],
            do_sample=False,
            max_new_tokens=8,
        )
        assert torch.equal(single[0], batched[b, : single.shape[1]])


@pytest.mark.parametrize(
    "compression", [LIBRA, Compression(method="fastv", layers=(2,), ratio=0.5)], ids=["libra", "fastv"]
)
@torch.no_grad()
def test_cached_decoding_equals_a_replay(model, cases, compression):
    replay(model, asked(cases["a_wide"]), compression)


def replay(model, given, compression, tokens=4):
    """Greedy decoding with the cache, then one forward over prompt and answer that scores from the prompt's
    last column."""
    model.set_compression(compression)
    out = model.generate(
        **given, do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True
    )
    ids = torch.cat([given["input_ids"], out.sequences[:, :-1]], 1)
    given = {**given, "input_ids": ids}
    given.pop("attention_mask", None)
    spliced = model.splice(ids, images=given["images"], image_sizes=given.get("image_sizes"))
    last = spliced.embeds.shape[1] - tokens
    again = model(**given, score_columns=torch.tensor([last]))
    torch.testing.assert_close(again.logits[:, -tokens:], torch.stack(out.logits, 1), **CLOSE)


def test_ratio_zero_changes_no_bit(model, cases):
    with torch.no_grad():
        plain = model(**cases["d_batch"])
        model.set_compression(Compression(method="libra", layers=tuple(range(8)), ratio=0.0))
        out = model(**cases["d_batch"])
    assert torch.equal(out.logits, plain.logits) and torch.equal(out.loss, plain.loss)


def test_gradient_reaches_projector_and_newline(model, cases):
    model.train()
    model.set_compression(LIBRA)
    model(**cases["d_batch"]).loss.backward()
    model.eval()
    gradients = {
        name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())
    }
    model.zero_grad()
    assert {"model.image_newline", "model.mm_projector.0.weight"} <= gradients
    assert not any("vision_tower" in name for name in gradients)


def test_the_checkpoint_fills_the_tuned_tower_and_is_written_back(model, loaded, tmp_path):
    published = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    mine = model.state_dict()
    for name, value in published.items():
        assert torch.equal(mine[name.replace("vision_tower.vision_model.", "vision_tower.")], value), name
    model.save_pretrained(tmp_path)
    loaded[0].save_pretrained(tmp_path)
    again = load_pretrained_model(str(tmp_path), None, "llava", device="cpu")[1].state_dict()
    assert again.keys() == mine.keys() and all(torch.equal(again[name], mine[name]) for name in mine)
    assert load_file(tmp_path / "model.safetensors").keys() == published.keys()


def test_a_tower_that_the_checkpoint_lacks(model, loaded, tmp_path):
    """It brings its own weights; a tower that is there in part is refused."""
    weights = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    tower = [name for name in weights if "vision_tower" in name]
    CLIPVisionModel(model.get_vision_tower().config).save_pretrained(tmp_path / "vision_tower")
    for folder in ("checkpoint", "vision_tower"):
        shutil.copytree(GOLDEN / folder, tmp_path / folder, dirs_exist_ok=True)
    save_file(
        {name: weights[name] for name in weights if name not in tower},
        tmp_path / "checkpoint" / "model.safetensors",
    )
    given = (
        load_pretrained_model(str(tmp_path / "checkpoint"), None, "llava", device="cpu")[1]
        .get_vision_tower()
        .state_dict()
    )
    own = CLIPVisionModel.from_pretrained(tmp_path / "vision_tower").state_dict()
    assert all(torch.equal(given[f"vision_tower.{name}"], own[name]) for name in own)
    save_file(
        {name: weights[name] for name in weights if name != tower[0]},
        tmp_path / "checkpoint" / "model.safetensors",
    )
    with pytest.raises(ValueError, match="lacks 1 weights, 'model.vision_tower"):
        load_pretrained_model(str(tmp_path / "checkpoint"), None, "llava", device="cpu")


def test_what_cannot_work_is_refused_in_a_sentence(model, cases):
    given = cases["a_wide"]
    with pytest.raises(ValueError, match="1 images cut into tiles need as many image_sizes, .* none given"):
        model(given["input_ids"], images=given["images"])
    with pytest.raises(ValueError, match="100 x 20 pixels has 2 x 1 tiles and 4 were given"):
        model(given["input_ids"], images=given["images"], image_sizes=[(100, 20)])
    with pytest.raises(ValueError, match=r"negative ids other than this model's placeholders \[-200\]"):
        model(torch.tensor([[1, -201, 5]]), images=given["images"], image_sizes=given["image_sizes"])
    model.config.image_aspect_ratio = "pad"
    with pytest.raises(ValueError, match="need image_aspect_ratio 'anyres' .* not 'pad'"):
        model(given["input_ids"], images=given["images"], image_sizes=given["image_sizes"])
    model.config.mm_patch_merge_type = "pooled"
    with pytest.raises(ValueError, match="mm_patch_merge_type 'pooled' is unknown"):
        model(given["input_ids"], images=given["images"], image_sizes=given["image_sizes"])


def mistral(**options) -> LlavaMistralForCausalLM:
    torch.manual_seed(0)
    config = LlavaMistralConfig(
        **{**tiny.SIZES, "num_hidden_layers": 6, "rope_theta": 5e4, "sliding_window": None, **options}
    )
    return LlavaMistralForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def test_mistral_without_compression_is_transformers_mistral():
    ours = mistral()
    stock = MistralForCausalLM._from_config(ours.config, attn_implementation="sdpa").eval()
    stock.load_state_dict(ours.state_dict())
    batch = tiny.collate([tiny.row("t3 v16 t5", 0), tiny.row("t4", 1), tiny.row("t2 v9 t2 v5 t3", 2)], "left")
    plain = {name: value for name, value in batch.items() if name != "visual_mask"}
    assert torch.equal(ours(**batch).logits, stock(**plain).logits)
    assert torch.equal(tiny.generate(ours, batch), tiny.generate(stock, plain))
    assert ours.model.rotary_emb.inv_freq[1].item() == pytest.approx(5e4 ** (-2 / 8))


@torch.no_grad()
def test_mistral_compressed_batch_is_each_row_alone():
    model, rows = mistral(), [tiny.row("t3 v16 t5", 0), tiny.row("t4", 1), tiny.row("t2 v9 t2 v5 t3", 2)]
    model.set_compression(Compression(method="libra", layers=(1, 3), ratio=0.5, tau=0.3))
    batched = tiny.generate(model, tiny.collate(rows, "left"))
    assert model.compression_stats["visual_tokens"][-1] == [4, 0, 3]
    for b, row in enumerate(rows):
        assert torch.equal(tiny.generate(model, tiny.alone(row))[0], batched[b])


def test_mistral_with_a_sliding_window_is_refused():
    with pytest.raises(ValueError, match="sliding_window is 4096, .* set it to null"):
        mistral(sliding_window=4096)
