"""What methods read in a vision tower, against eager attention and the original codes (tests/golden/tower),
and the places `tower` and `input` in llava's door, on pictures."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPVisionModel, DynamicCache, SiglipVisionModel

from libra import Compression, compress
from libra.budget import actual
from libra.config import ConfigError
from libra.engine.tower import Look, View, Wants, compress_pictures, context_of, look, scores
from libra.methods import METHODS, SELECTORS, Select
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.memory import FeatureMemory

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(atol=3e-5, rtol=1e-4)
EVERYTHING = Wants(frozenset({"tower_cls", "tower_received", "tower_keys", "tower_hidden"}))
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "tower/data.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@torch.no_grad()
def view_of(golden, name: str, attention: str, wants: Wants, used: int = 2) -> View:
    kind = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[name]
    mean, std = CLIP if name == "clip" else ([0.5] * 3, [0.5] * 3)
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    pixels = (golden[f"{name}.image_uint8"].float() / 255 - mean) / std
    tower = kind.from_pretrained(GOLDEN / "tower" / name, attn_implementation=attention, dtype=torch.float32)
    states = tower(pixels, output_hidden_states=True).hidden_states
    inner = getattr(tower, "vision_model", tower)
    return look(inner.encoder.layers, states, used, wants, has_cls=name == "clip")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_and_keys_of_a_clip_tower(golden, attention):
    view = view_of(golden, "clip", attention, EVERYTHING)
    hidden, keys = golden["clip.hidden_minus2"], golden["clip.key_head_mean_minus2"]
    torch.testing.assert_close(view.hidden, hidden[:, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(view.cls_hidden, hidden[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(view.cls[0], golden["clip.cls_sum_all_layers"][2] / 4, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        view.received[0], golden["clip.received_mean_all_layers"][2], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.cat([view.cls_keys[:, None], view.keys], 1), keys, atol=1e-5, rtol=0)


def test_further_layers_come_before_the_one_whose_features_are_taken(golden):
    wants = Wants.of(Compression(method="hiprune"), has_cls=True)
    view = view_of(golden, "clip", "sdpa", wants)  # 9 of 24 is 2 of 4: the second layer
    wanted = golden["clip.received_mean_all_layers"][[1, 2]]
    torch.testing.assert_close(view.received, wanted, atol=1e-5, rtol=0)
    assert view.cls is None and view.keys is None


def test_a_tower_without_cls(golden):
    view = view_of(golden, "siglip", "sdpa", Wants(EVERYTHING.fields - {"tower_cls"}))
    torch.testing.assert_close(view.hidden, golden["siglip.hidden_minus2"], atol=1e-4, rtol=0)
    received = golden["siglip.received_mean_all_layers"][2]
    torch.testing.assert_close(view.received[0], received, atol=1e-5, rtol=0)
    torch.testing.assert_close(view.keys, golden["siglip.key_head_mean_minus2"], atol=1e-5, rtol=0)
    assert view.cls is None and view.cls_hidden is None


@pytest.mark.parametrize("method", ["fastervlm", "vispruner", "divprune"])
def test_what_is_kept_by_these_is_what_the_originals_keep(golden, method):
    view = view_of(golden, "clip", "sdpa", EVERYTHING)
    looks = view.looks([1, 1], lambda number, x: x[0], None)
    context = context_of([[one] for one in looks])
    name = "divprune_hidden" if method == "divprune" else method
    out = compress(view.hidden, None, Compression(method=method, keep=36), context=context)
    assert torch.equal(out.targets, golden[f"clip.{name}_t36.kept"].long())


def test_attention_in_blocks_is_attention_at_once():
    queries, keys = torch.randn(2, 2, 3, 13, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    attention = (queries @ keys.transpose(2, 3) * 0.5).softmax(-1)
    for piece in (1, 2 * 3 * 13 * 5, 10**6):
        row, received = scores(queries, keys, 0.5, True, True, piece)
        torch.testing.assert_close(row, attention.mean(1)[:, 0])
        torch.testing.assert_close(received, attention.mean((1, 2)))


def test_what_a_tower_cannot_give_is_said():
    assert Wants.of(Compression(method="fastervlm"), has_cls=False).fields == {"tower_received"}
    assert Wants.of(Compression(method="libra", layers=(1,)), has_cls=True) is None
    SELECTORS["cls-only"] = Select(lambda candidates, c: None, reads=frozenset(), needs=("tower_cls",))
    try:
        c = Compression(select="cls-only", merge="drop", at="input")
        with pytest.raises(
            ValueError, match=r"needs the attention of a \[CLS\] token, and this model's .* none"
        ):
            Wants.of(c, has_cls=False)
    finally:
        del SELECTORS["cls-only"]


@pytest.fixture(scope="module")
def llava15():
    return load_pretrained_model(str(GOLDEN / "llava15/checkpoint"), None, "llava", device="cpu")


@pytest.fixture(scope="module")
def llava_next():
    path = str(GOLDEN / "llava_next_llama3/checkpoint")
    return load_pretrained_model(path, None, "open-llava-next-llama3-8b", device="cpu")


@pytest.fixture
def model(llava15):
    model = llava15[1]
    tower = model.get_vision_tower()
    yield model
    model.model.vision_tower = tower
    model.set_compression(None)


@torch.no_grad()
@pytest.mark.parametrize("dominant, contextual", [(54, 10), (27, 5), (109, 20)])
def test_visionzip_is_the_original_up_to_the_answer(golden, model, dominant, contextual):
    """Features, order, embeddings, logits and ids. The original puts the contextual tokens last and numbers
    what is left anew."""
    tower = CLIPVisionTower(str(GOLDEN / "tower/clip_168"), args=model.config)
    model.model.vision_tower = tower.eval()
    case = f"visionzip.d{dominant}_c{contextual}"
    c = Compression(method="visionzip", keep=dominant + contextual, positions="compact", as_released=True)
    model.set_compression(c)
    ids, images = golden["visionzip.input_ids"], golden["visionzip.images1"]
    (picture,) = model.pictures(images)
    placeholder = int((ids[0] == -200).nonzero())
    embeds = golden[f"{case}.inputs_embeds"][0, placeholder : placeholder + dominant + contextual]
    torch.testing.assert_close(picture.tokens[picture.left.columns], embeds, atol=1e-4, rtol=0)
    logits = model(ids, images=images).logits
    torch.testing.assert_close(logits[:, -12:], golden[f"{case}.logits"], atol=5e-4, rtol=0)
    said = model.generate(ids, images=images, max_new_tokens=16, do_sample=False)
    assert torch.equal(said[:, : golden[f"{case}.generated"].shape[1]], golden[f"{case}.generated"])
    assert model.compression_stats["visual_tokens"] == [[dominant + contextual]] * 8


# --- pictures ---

ALL = [
    (name, place)
    for name, method in METHODS.items()
    if method.place != "layers"
    for place in ("tower", "input")
    if not (place == "tower" and name in ("cdpruner", "mmtok", "libra-input"))
] + [("random", "tower"), ("random", "input")]
# The text has no part in these choices, so a prompt that goes on with the answer gets the same.
BY_PICTURES = [number for number, (name, _) in enumerate(ALL) if name not in ("cdpruner", "mmtok", "random")]


def kinds(numbers) -> list[tuple[str, int]]:
    """With each model; pictures that are cut into tiles are not shrunk."""
    pairs = [(kind, number) for kind in ("llava15", "next") for number in numbers]
    return [(kind, number) for kind, number in pairs if (kind, ALL[number][0]) != ("next", "downsample")]


def shown(kind, counts: list[int], seed: int = 0):
    """Prompts (input_ids, mask) with so many pictures each, and their pixels; two pictures touch."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, count in enumerate(counts):
        text = torch.randint(5, 200, (4 + 2 * number,), generator=draw).tolist()
        rows.append([1, *text[:2], *[-200] * count, *text[2:]])
    tiles = [torch.randn(3, 56, 56, generator=draw) for count in counts for _ in range(max(1, count))]
    sizes = None
    if kind == "next":
        tiles = [torch.stack([one] + [one.flip(i) for i in (1, 2)]) for one in tiles]
        sizes = [(112, 50)] * len(tiles)
    return rows, tiles, sizes


def padded(rows, side: str) -> dict[str, torch.Tensor]:
    parts = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=0, padding_side=side)
    ones = [torch.ones(len(row)) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask.long()}


def small(name: str, at: str, **keys) -> Compression:
    return Compression(method=name, at=at, **({"ratio": 0.6} | keys))


@torch.no_grad()
@pytest.mark.parametrize("kind, number", kinds(range(len(ALL))))
def test_a_batch_is_its_rows_alone_and_the_counts_are_exact(request, kind, number):
    """Pictures that touch, and a row without any; positions and the side of the padding change in turns."""
    name, at = ALL[number]
    model = request.getfixturevalue({"llava15": "llava15", "next": "llava_next"}[kind])[1]
    positions = ("original", "compact", "centre")[number % 3]
    c = small(name, at, positions=positions)
    model.set_compression(c)
    side = ("left", "right")[(number + (kind == "next")) % 2]
    rows, tiles, sizes = shown(kind, [1, 0, 2])
    tokens = model.visual_tokens(tiles, sizes)
    before, model.config.tokenizer_padding_side = model.padding_side, side
    try:
        whole = model(**padded(rows, side), images=tiles, image_sizes=sizes).logits
        stats, first = model.compression_stats, 0
        again = model(**padded(rows, side), images=tiles, image_sizes=sizes).logits
        assert torch.equal(whole, again)
        for b, row in enumerate(rows):
            count = row.count(-200)
            own = slice(first, first + max(1, count))
            first = own.stop
            alone = model(
                torch.tensor([row]), images=tiles[own], image_sizes=None if sizes is None else sizes[own]
            ).logits[0]
            torch.testing.assert_close(tiny.own(whole[b], stats["columns"][b], side), alone, **CLOSE)
            spans = tokens[own] if count else []
            assert [layer[b] for layer in stats["visual_tokens"]] == actual(c, 8, spans)
            assert stats["given"][b] == sum(spans)
    finally:
        model.config.tokenizer_padding_side = before
        model.set_compression(None)


@torch.no_grad()
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("kind", ["llava15", "next"])
def test_each_picture_decides_how_many_tokens_are_kept(request, kind, alike):
    """The counts of a batch are those of its rows; nothing can be said of them beforehand."""
    model = request.getfixturevalue({"llava15": "llava15", "next": "llava_next"}[kind])[1]
    c = Compression(method="prumerge-plus", keep="adaptive")
    model.set_compression(c)
    rows, tiles, sizes = shown(kind, [1, 1] if alike else [1, 2], seed=3)
    rows = [rows[0], rows[0]] if alike else rows
    if alike:  # the same prompt about another picture, which keeps more
        tiles[1] = tiles[1] * torch.linspace(0, 3, tiles[1].shape[-1])
    logits = model(**padded(rows, "right"), images=tiles, image_sizes=sizes).logits
    stats, first = model.compression_stats, 0
    for b, row in enumerate(rows):
        own = slice(first, first + row.count(-200))
        first = own.stop
        pictures = {"images": tiles[own], "image_sizes": None if sizes is None else sizes[own]}
        alone = model(torch.tensor([row]), **pictures).logits[0]
        torch.testing.assert_close(tiny.own(logits[b], stats["columns"][b], "right"), alone, **CLOSE)
        counts = [layer[b] for layer in stats["visual_tokens"]]
        assert counts == [layer[0] for layer in model.compression_stats["visual_tokens"]]
        assert 0 < counts[0] <= stats["given"][b]
    assert len(set(stats["visual_tokens"][0])) == 2
    model.set_compression(None)
    with pytest.raises(ConfigError, match="keep: adaptive lets each picture decide"):
        actual(c, 8, [16])


@torch.no_grad()
@pytest.mark.parametrize("kind, number", kinds(BY_PICTURES))
def test_cached_answers_are_those_without_a_cache(request, kind, number):
    """What is chosen before layer 0 by the pictures does not change when the prompt goes on with the
    answer."""
    name, at = ALL[number]
    model = request.getfixturevalue({"llava15": "llava15", "next": "llava_next"}[kind])[1]
    model.set_compression(small(name, at, positions=("centre", "original", "compact")[number % 3]))
    rows, tiles, sizes = shown(kind, [2], seed=number)
    ids = torch.tensor(rows)
    output = model.generate(
        ids, images=tiles, image_sizes=sizes, max_new_tokens=3, min_new_tokens=3, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for step, logits in enumerate(output.logits):
        longer = torch.cat([ids, output.sequences[:, :step]], 1)
        torch.testing.assert_close(
            model(longer, images=tiles, image_sizes=sizes).logits[:, -1], logits, **CLOSE
        )
    model.set_compression(None)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava15", "next"])
@pytest.mark.parametrize("at", ["tower", "input"])
def test_ratio_0_is_the_plain_model_bit_by_bit(request, kind, at):
    model = request.getfixturevalue({"llava15": "llava15", "next": "llava_next"}[kind])[1]
    rows, tiles, sizes = shown(kind, [1, 0, 2])
    given = dict(**padded(rows, "left"), images=tiles, image_sizes=sizes)
    plain = model(**given).logits
    for name in ("visionzip", "divprune", "fastervlm", "hiprune", "vispruner", "tome"):
        model.set_compression(small(name, at, ratio=0.0))
        assert torch.equal(model(**given).logits, plain), name
    model.set_compression(None)


@torch.no_grad()
def test_two_stages_a_chat_beams_and_a_trace(model):
    steps = [{"at": "tower", "method": "visionzip", "keep": 8}, {"at": 3, "method": "libra", "ratio": 0.5}]
    model.set_compression(Compression(steps=steps), trace=True)
    rows, tiles, _ = shown("llava15", [1, 2])
    ids = padded(rows, "left")
    said = model.generate(ids["input_ids"], images=tiles, attention_mask=ids["attention_mask"], num_beams=2,
                          num_return_sequences=2, max_new_tokens=3, do_sample=False)  # fmt: skip
    assert said.shape[0] == 4
    for trace, count in zip(model.compression_trace, (1, 1, 2, 2)):
        assert [stage.layer for stage in trace.stages] == [-1, 3]
        assert [len(trace.kept(0)), len(trace.kept(1))] == [8 * count, 4 * count]
        first = trace.stages[0]
        assert float(first.weight.sum()) > 8 * count - 1e-4 and (first.slot >= 0).all()  # nothing is dropped
    cache = DynamicCache(config=model.config)
    first, second = torch.tensor(rows[:1]), torch.tensor([rows[0][1:]])
    model.generate(first, images=tiles[:1], cache=cache, max_new_tokens=2, do_sample=False)
    length = cache.get_seq_length()
    model.generate(second, images=tiles[1:2], cache=cache, max_new_tokens=2, do_sample=False)
    assert length == first.shape[1] - 1 + 16 + 1 and cache.lag == 2 * (16 - 8)
    assert cache.get_seq_length() == length + second.shape[1] - 1 + 16 + 1


def test_training_through_the_tower_reaches_the_projector(model):
    model.set_compression(Compression(method="visionzip", keep=5))
    rows, tiles, _ = shown("llava15", [1, 0])
    ids = padded(rows, "right")
    labels = torch.where(ids["input_ids"] > 0, ids["input_ids"], -100)
    output = model(**ids, images=tiles, labels=labels)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.mm_projector.parameters())
    model.zero_grad()
    assert output.logits.shape[1] == len(rows[0]) - 1 + 5


@torch.no_grad()
def test_what_a_tower_said_is_remembered_apart_from_its_features(model):
    rows, tiles, _ = shown("llava15", [1])
    tower = model.get_vision_tower()
    given = dict(input_ids=torch.tensor(rows), images=torch.stack(tiles))
    tower.memory = FeatureMemory(10**7)
    try:
        found = []
        for _ in range(2):
            for name in ("visionzip", "hiprune", "fastervlm"):
                model.set_compression(small(name, "input"))
                found.append(model(**given).logits)
        assert len(tower.memory._features) == 3
        assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:]))
    finally:
        tower.memory = None


@torch.no_grad()
def test_the_cls_token_takes_the_first_column():
    """Its feature goes to the first visual token's place, and a patch that stands there moves on."""
    features = torch.arange(1.0, 7.0)[:, None].expand(6, 2)
    one = Look(
        features, torch.zeros(6, dtype=torch.bool), cls=torch.tensor([[6.0, 5, 4, 0, 0, 0]]),
        keys=torch.eye(6), cls_hidden=torch.full((2,), 9.0), cls_keys=torch.zeros(6),
    )  # fmt: skip
    (step,) = Compression(method="visionzip", keep=3).schedule(4)
    (left,) = compress_pictures(step, [one])
    assert left.columns.tolist() == [0, 1, 2] and left.tokens[:2, 0].tolist() == [9.0, 1.0]
