"""The places `input` and `tower` in attached models: every method on six classes whose towers and projectors
differ."""

import copy

import families
import pytest
import torch
import zoo

import libra
from libra import Compression
from libra.budget import actual
from libra.engine import score
from libra.engine.arrangement import Joined, Windows
from libra.flops import model_flops
from libra.methods import METHODS, SELECTORS
from libra.rows import spec_of

CLOSE = dict(atol=5e-5, rtol=1e-4)
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "next": "LlavaNextForConditionalGeneration",
    "onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen": "Qwen2_5_VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
EARLY = [name for name, method in METHODS.items() if method.place != "layers"] + ["random"]
MATRIX = [
    (name, method, at)
    for name in CLASSES
    for method in EARLY
    for at in ("input", "tower")
    if not (at == "tower" and method in ("cdpruner", "mmtok", "libra-input"))
    and (name == "llava" or method != "downsample")
]
# Every class and every method with each place at least once; the others are slow.
FAST = {(n, m, a) for i, (n, m, a) in enumerate(MATRIX) if i % 4 == 0 or m == "visionzip" and a == "tower"}


def cases(fast=FAST):
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in MATRIX]


def talks(name: str) -> list[families.Talk]:
    return [zoo.talk(name, pattern, seed) for seed, pattern in enumerate(("t4 i t5", "t3 i t2 i t4", "t6"))]


def one_of(name: str, talk: families.Talk, side: str = "left") -> dict:
    return zoo.collate(name, [talk], side)


@torch.no_grad()
@pytest.mark.parametrize("name, method, at", cases())
def test_a_batch_is_its_rows_alone_in_exact_numbers_and_cached_like_without_a_cache(name, method, at):
    name, side = CLASSES[name], ("left", "right")[len(method) % 2]
    model, said = zoo.model(name), talks(name)
    c = Compression(method=method, at=at, ratio=0.6)
    with libra.attach(model, c) as handle:
        given = zoo.collate(name, said, side)
        whole = model(**given).logits
        stats = handle.stats
        assert torch.equal(model(**given).logits, whole)
        spec = spec_of(model.config.get_text_config(), name)
        for b, talk in enumerate(said[:2]):
            alone = model(**one_of(name, talk, side)).logits[0]
            columns = stats["columns"][b]
            own = whole[b][-columns:] if side == "left" else whole[b][:columns]
            torch.testing.assert_close(own, alone, **CLOSE)
            pictures = 1 + b
            counted = actual(c, 6, [int(talk.visual.sum()) // pictures] * pictures)
            counts = [layer[b] for layer in stats["visual_tokens"]]
            assert counts == counted and stats["flops"][b] == model_flops(spec, counted)
            plain = model_flops(spec, [stats["given"][b]] * len(counts))
            assert stats["flops_ratio"][b] == pytest.approx(stats["flops"][b] / plain)
        if method in ("cdpruner", "mmtok", "random"):
            return  # the text has a part in the choice, so a prompt that goes on is another one
        given = zoo.collate(name, said[1:2])
        output = model.generate(
            **given, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **families.SAID
        )
        prompt = given["input_ids"].shape[1]
        for step, logits in enumerate(output.logits):
            ids = output.sequences[:, : prompt + step]
            longer = families.batch_of(zoo.KINDS[name], [_with_ids(said[1], ids[0])])
            torch.testing.assert_close(model(**longer, use_cache=False).logits[:, -1], logits, **CLOSE)


def _with_ids(talk: families.Talk, ids: torch.Tensor) -> families.Talk:
    return families.Talk(ids, torch.full_like(ids, -100), talk.given)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_ratio_0_is_the_plain_model_bit_by_bit_and_detach_leaves_nothing(name):
    name = CLASSES[name]
    model = zoo.model(name)
    given = zoo.collate(name, talks(name))
    plain = model(**given).logits
    for method, at in (("visionzip", "tower"), ("hiprune", "input"), ("divprune", "tower")):
        with libra.attach(model, Compression(method=method, at=at, ratio=0.0)):
            assert torch.equal(model(**given).logits, plain)
    body = model.model
    assert not {"get_image_features", "get_video_features"} & vars(body).keys()
    assert not any(hasattr(module, score.MARK) for module in model.modules())
    assert torch.equal(model(**given).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_beams_two_stages_a_trace_and_a_copy(name):
    name = CLASSES[name]
    model = zoo.own_model(name)
    steps = [{"method": "visionzip", "ratio": 0.5}, {"at": 3, "method": "libra", "ratio": 0.5}]
    handle = libra.attach(model, Compression(steps=steps), trace=True)
    given = zoo.collate(name, talks(name)[:2])
    beams = model.generate(**given, max_new_tokens=2, num_beams=2, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 4
    counts = [sum(trace.spans) for trace in handle.trace]
    assert counts == [counts[0]] * 2 + [counts[2]] * 2 and counts[2] == 2 * counts[0]
    for trace in handle.trace:
        first, second = trace.stages
        assert (first.layer, second.layer) == (-1, 3) and set(trace.kept(1)) <= set(trace.kept(0))
    logits = model(**given).logits
    other, its_handle = copy.deepcopy((model, handle))
    handle.detach()
    assert torch.equal(other(**given).logits, logits)
    its_handle.detach()


@torch.no_grad()
@pytest.mark.parametrize("name", ["onevision", "qwen"])
def test_images_and_videos_in_one_prompt(name):
    name = CLASSES[name]
    model = zoo.model(name)
    said = [zoo.talk(name, "t4 v t2 i t5", 1), zoo.talk(name, "t3 i t2 v t4", 2)]
    for method in ("hiprune", "visionzip"):
        with libra.attach(model, Compression(method=method, at="input", ratio=0.6)) as handle:
            whole, columns = model(**zoo.collate(name, said)).logits, handle.stats["columns"]
            for b, talk in enumerate(said):
                alone = model(**one_of(name, talk)).logits[0]
                torch.testing.assert_close(whole[b][-columns[b] :], alone, **CLOSE)


def test_joined_patches_are_the_neighbours_of_a_square():
    """What is said of a visual token is the mean over the patches that it is made of, row by row."""
    for name in ("internvl", "smolvlm"):
        body = zoo.model(CLASSES[name]).model
        arranger = Joined(body, "get_image_features", {}, [torch.zeros(1, 1)] if name == "internvl" else [])
        side = arranger.side
        place = torch.arange(side * side)
        patches = torch.stack([place // side, place % side], 1).float()[None]
        coarse = arranger(0, patches)
        half = side // 2
        place = torch.arange(half * half)
        centres = torch.stack([2 * (place // half), 2 * (place % half)], 1) + 0.5
        torch.testing.assert_close(coarse, centres)


@torch.no_grad()
def test_the_order_of_windows_is_that_of_the_visual_tokens():
    """Qwen2.5-VL's merger runs in the order of the windows; its rows are found again in what the tower
    returns."""
    name = CLASSES["qwen"]
    model = zoo.own_model(name)
    visual, given = model.model.visual, one_of(name, talks(name)[1])
    merged = []
    hook = visual.merger.register_forward_hook(lambda module, args, output: merged.append(output))
    features = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
    hook.remove()
    numbers = torch.arange(len(merged[0])).float().repeat_interleave(4)[None, :, None]
    arranger = Windows(
        model.model, "get_image_features", {"image_grid_thw": given["image_grid_thw"]}, features
    )
    found = torch.cat([arranger(i, numbers) for i in range(len(features))])[:, 0].long()
    assert torch.equal(merged[0][found], torch.cat(list(features)))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "qwen"])
def test_what_is_read_is_the_attention_of_the_tower(name, attention):
    """The received attention of the layer whose features are used, against the eager weights that it
    returns."""
    name = CLASSES[name]
    model = zoo.own_model(name, attention)
    given = one_of(name, talks(name)[0])
    eager = zoo.own_model(name, "eager")
    tower = getattr(eager.model, "vision_tower", None) or eager.model.vision_model
    weights, used = [], getattr(model.config, "vision_feature_layer", -1)
    layers = max((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for module in layers[used % (len(layers) + 1) - 1].modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    eager(**given)
    first = int(getattr(model.config, "vision_feature_select_strategy", "full") == "default")
    wanted = weights[0].mean((1, 2))[:, first:]
    found = _received(model, given)
    assert found.shape[-1] == int(given["input_ids"].eq(families.IMAGE).sum())
    if name == CLASSES["llava"]:
        torch.testing.assert_close(found[-1], wanted, atol=1e-6, rtol=1e-5)
    else:  # tiles, and means over neighbours: the base picture comes first, in order
        patches = wanted.shape[1]
        if name in (CLASSES["next"], CLASSES["onevision"]):
            torch.testing.assert_close(found[-1][0, :patches], wanted[0], atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(found[-1].mean(), wanted.mean(), atol=1e-6, rtol=1e-5)


def _received(model, given) -> torch.Tensor:
    """The attention received that an attached model's tower tells a method, (L, B, N)."""
    caught = []

    def select(candidates, c):
        caught.append(candidates.context.tower_received)
        return candidates.top(caught[0][-1])

    libra.register_select("caught", reads=(), needs=("tower_received",))(select)
    try:
        with libra.attach(model, Compression(select="caught", merge="drop", at="input")):
            model(**given)
    finally:
        del SELECTORS["caught"]
    return caught[0]


@torch.no_grad()
def test_the_layer_that_reads_the_features_is_no_score_of_another_method():
    """Two methods that look at different layers of the tower in one call: each sees its own."""
    model, given = zoo.model(CLASSES["llava"]), one_of(CLASSES["llava"], talks(CLASSES["llava"])[0])
    caught = []

    def select(candidates, c):
        caught.append((candidates.context.tower_cls, candidates.context.tower_next))
        return candidates.top(candidates.context.tower_cls[-1])

    for needs in (("tower_cls",), ("tower_next",), ("tower_cls", "tower_next")):
        libra.register_select("caught", reads=(), needs=needs)(
            select if "tower_cls" in needs else lambda candidates, c: _note(caught, candidates)
        )
        try:
            with libra.attach(model, Compression(select="caught", merge="drop", at="input")):
                model(**given)
        finally:
            del SELECTORS["caught"]
    (cls, nothing), (none, following), both = caught
    assert nothing is None and none is None and len(cls) == 1
    assert torch.equal(both[0], cls) and torch.equal(both[1], following)


def _note(caught, candidates):
    caught.append((candidates.context.tower_cls, candidates.context.tower_next))
    return candidates.top(candidates.context.tower_next)


@torch.no_grad()
def test_what_a_model_cannot_give_is_said():
    video_llava = zoo.model("VideoLlavaForConditionalGeneration")
    with pytest.raises(ValueError, match="method fastervlm needs what the vision tower says, and nobody"):
        libra.attach(video_llava, Compression(method="fastervlm"))
    with libra.attach(video_llava, Compression(method="divprune", keep=4)) as handle:
        video_llava(
            **one_of("VideoLlavaForConditionalGeneration", talks("VideoLlavaForConditionalGeneration")[0])
        )
        assert handle.stats["visual_tokens"][0] == [4]
    assert handle.compression.place == "input"
    model = zoo.model(CLASSES["qwen"])
    with libra.attach(model, Compression(method="visionzip")) as handle:
        assert handle.compression.place == "input"  # its projector joins patches
    both = [{"at": "tower", "method": "tome"}, {"at": "input", "method": "divprune"}]
    for c in (Compression(method="prumerge", keep="adaptive"), Compression(steps=both)):
        with pytest.raises(ValueError, match="at: a Qwen2_5_VL.* joins patches .* so that tower is input"):
            libra.attach(model, c)
