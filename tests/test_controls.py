"""The controls that know no content, by hand: pooling, and the picture that goes smaller into the tower."""

import pytest
import tiny
import torch
import zoo
from transformers import CLIPVisionModel

import libra
from libra import Compression, Context, compress
from libra.engine.shrunk import Shrunk, covering
from libra.methods.downsample import middles, shrunk_grid
from libra.rows import EMBEDDED
from llava.model.builder import load_pretrained_model

CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def mini():
    return load_pretrained_model(str(EMBEDDED), None, "mini", device="cpu")[1]


@pytest.mark.parametrize(
    "count, grid", [(192, (14, 14)), (128, (11, 12)), (64, (8, 8)), (575, (24, 24)), (1, (1, 1))]
)
def test_the_grid_of_the_field_s_cuts(count, grid):
    assert shrunk_grid(24, 24, count) == grid


@pytest.mark.parametrize("h, w", [(24, 24), (16, 16), (3, 7), (9, 2), (1, 5)])
def test_every_count_has_its_places_each_under_a_feature_of_its_own(h, w):
    for count in range(1, h * w + 1):
        down, across = shrunk_grid(h, w, count)
        assert down <= h and across <= w and count <= down * across <= max(count + across - 1, h * across)
        places = middles(h, w, count)
        assert len(places) == count and list(places) == sorted(set(places))
        assert len({covering(h, w, down, across)[place] for place in places}) == count


def by_hand(model, pixels, count: int):
    """(count, C): what the tower says of the picture scaled by Pillow's rule, feature after feature."""
    tower = CLIPVisionModel.from_pretrained(EMBEDDED / "vision_tower", dtype=torch.float32)
    down, across = shrunk_grid(16, 16, count)
    small = torch.nn.functional.interpolate(pixels, (6 * down, 6 * across), mode="bicubic", antialias=True)
    states = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    numbers = [(2 * i + 1) * down * across // (2 * count) for i in range(count)]
    return states[0, 1:][numbers]


@torch.no_grad()
@pytest.mark.parametrize("at", ["tower", "input"])
@pytest.mark.parametrize("count", [28, 57])
def test_the_tokens_are_those_of_the_shrunk_picture(mini, at, count):
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(count))
    ids = torch.tensor([[1, 5, -200, 6, 7, 8]])
    wanted = mini.get_model().mm_projector(by_hand(mini, pixels, count))
    places = torch.tensor(middles(16, 16, count))
    mini.set_compression(Compression(method="downsample", at=at, keep=count))
    try:
        tokens = mini.pictures(pixels)[0].tokens
        torch.testing.assert_close(tokens[places], wanted, **CLOSE)
        whole = mini(ids, images=pixels).logits
        assert mini.compression_stats["visual_tokens"] == [[count]] * 12
    finally:
        mini.set_compression(None)
    # The same as these embeddings at these places without any compression.
    text = mini.get_input_embeddings()(ids.clamp(min=0))
    embeds = torch.cat([text[:, :2], wanted[None], text[:, 3:]], 1)
    positions = torch.cat([torch.arange(2), 2 + places, 258 + torch.arange(3)])[None]
    alone = mini(inputs_embeds=embeds, position_ids=positions).logits
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
def test_pooling_to_a_ninth_is_the_mean_of_windows_where_their_middles_stood(mini, positions):
    """The same logits without any compression from 28 means made here, at positions written out here."""
    draw = torch.Generator().manual_seed(5)
    pixels, ids = torch.randn(1, 3, 96, 96, generator=draw), torch.tensor([[1, 5, -200, 6, 7, 8]])
    mini.set_compression(Compression(method="pool", keep=28, positions=positions))
    try:
        pooled = mini(ids, images=pixels).logits
    finally:
        mini.set_compression(None)
    square = mini.encode_images(pixels)[0].unflatten(0, (16, 16))
    means, middles_ = [], []
    six, five = (
        ((0, 3), (3, 6), (6, 8), (8, 11), (11, 14), (14, 16)),
        ((0, 4), (4, 7), (7, 10), (10, 13), (13, 16)),
    )
    for (top, bottom), columns in zip(
        ((0, 4), (4, 7), (7, 10), (10, 13), (13, 16)), (five, six, five, six, six)
    ):
        for left, right in columns:
            means.append(square[top:bottom, left:right].mean((0, 1)))
            middles_.append(16 * ((top + bottom) // 2) + (left + right) // 2)
    assert len(means) == 28
    text = mini.get_input_embeddings()(ids.clamp(min=0))
    embeds = torch.cat([text[:, :2], torch.stack(means)[None], text[:, 3:]], 1)
    of_tokens = {
        "original": 2 + torch.tensor(middles_).float(),
        "compact": 2 + torch.arange(28).float(),
        "centre": 2 + (torch.arange(28) + 0.5) * 256 / 28 - 0.5,
    }[positions]
    after = (30 if positions == "compact" else 258) + torch.arange(3).float()
    where = torch.cat([torch.arange(2).float(), of_tokens, after])[None]
    alone = mini(inputs_embeds=embeds, position_ids=where).logits
    torch.testing.assert_close(pooled, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_ratio_0_is_the_plain_model(mini):
    pixels, ids = torch.randn(1, 3, 96, 96), torch.tensor([[1, -200, 6]])
    plain = mini(ids, images=pixels).logits
    mini.set_compression(Compression(method="downsample", ratio=0.0))
    assert torch.equal(mini(ids, images=pixels).logits, plain)
    mini.set_compression(None)
    assert Shrunk.of(Compression(method="downsample", ratio=0.0), 12, 16) is None


def test_what_cannot_be_shrunk_is_refused():
    with pytest.raises(ValueError, match="shrinks the picture before the vision tower; write at: tower"):
        Compression(method="downsample", layers=(3,))
    with pytest.raises(ValueError, match="has parts of 2×2 and 2×3 patches; make the picture smaller"):
        context = Context(grid=[[((2, 2), (2, 3))]])
        compress(torch.zeros(1, 10, 4), None, Compression(method="downsample", keep=3), context=context)
    for name in ("LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"):
        with pytest.raises(ValueError, match=f"a {name} takes them in parts or at their own size"):
            libra.attach(zoo.model(name), "downsample", ratio=0.5)
    steps = [{"method": "downsample", "ratio": 0.5}, {"method": "fastervlm", "ratio": 0.5}]
    with pytest.raises(ValueError, match="no other step can read the tower"):
        libra.attach(tiny.hf_model(), Compression(steps=steps, positions="original"))
