"""llava's model on random weights against what the original code, FastV and PyramidDrop answered on them
(tests/golden)."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from libra import Compression
from libra.engine.transformers_api import cache_of
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.memory import FeatureMemory

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(atol=1e-4, rtol=1e-4)
FIRST_VISUAL = {"v144": 12, "v576": 35}


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name / "data.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(GOLDEN / "llava15" / "checkpoint"), None, "llava", device="cpu")


@pytest.fixture
def model(loaded):
    model = loaded[1]
    settings = dict(vars(model.config))
    yield model
    model.set_compression(None)
    model.zero_grad()
    for name in ("tokenizer_padding_side", "tokenizer_model_max_length"):
        setattr(model.config, name, settings[name])


@pytest.fixture(scope="module")
def data():
    return arrays("llava15")


@pytest.fixture(scope="module")
def fastv():
    return arrays("fastv")


@pytest.fixture(scope="module")
def pyramiddrop():
    return arrays("pyramiddrop")


def prompt(data, case, labels=False):
    names = ("input_ids", "attention_mask", "images", *(["labels"] if labels else []))
    return {name: data[f"{case}.{name}"] for name in names if f"{case}.{name}" in data}


def embedded(fastv, case):
    embeds = fastv[f"{case}.inputs_embeds"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, FIRST_VISUAL[case] : FIRST_VISUAL[case] + int(case[1:])] = True
    return {"inputs_embeds": embeds, "visual_mask": visual}


@pytest.mark.parametrize("case", ["a", "b", "e"])
@torch.no_grad()
def test_logits_and_loss(model, data, case):
    out = model(**prompt(data, case, labels=True))
    valid = data.get(f"{case}.prep.attention_mask", torch.ones(out.logits.shape[:2])).bool()
    torch.testing.assert_close(out.logits[valid], data[f"{case}.logits"][valid], **CLOSE)
    if case != "e":
        torch.testing.assert_close(out.loss, data[f"{case}.loss"].reshape(()), **CLOSE)


@torch.no_grad()
def test_hidden_states(model, data):
    """The embeddings, what leaves layers 0 to 6, and what leaves the norm after layer 7."""
    states = model(**prompt(data, "a"), output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.stack(states), data["a.hidden_states"], **CLOSE)


@torch.no_grad()
def test_vision_tower_and_image_features(model, data):
    tower = model.get_vision_tower()
    torch.testing.assert_close(tower(data["a.images"]), data["a.vision_tower_features"], **CLOSE)
    torch.testing.assert_close(model.encode_images(data["a.images"]), data["a.image_features"], **CLOSE)
    assert (tower.num_patches, tower.hidden_size) == (16, 32)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2, -3])
@torch.no_grad()
def test_vision_tower_selects_its_layer(model, data, monkeypatch, layer):
    tower = model.get_vision_tower()
    monkeypatch.setattr(tower, "select_layer", layer)
    monkeypatch.setattr(tower, "select_feature", "cls_patch")
    torch.testing.assert_close(tower(data["a.images"]), data["a.clip_hidden_states"][layer], **CLOSE)


def test_a_tower_with_a_memory_runs_once_for_pictures_that_come_again(model, data):
    tower, calls = model.get_vision_tower(), []
    hook = tower.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    pictures = data["a.images"]
    try:
        with torch.inference_mode():
            plain = tower(pictures)
            size = plain.nbytes
            tower.memory = FeatureMemory(limit=2 * size)
            for number in range(3):  # the third picture pushes the first out
                assert torch.equal(tower(pictures + number), plain) is (number == 0)
            assert tower.memory.held == 2 * size
            calls.clear()
            tower(pictures + 2), tower(pictures + 1)
            assert not calls
            assert torch.equal(tower(pictures), plain) and len(calls) == 1
            tower(pictures.double()), tower(pictures.flatten(0, 1)[None, :3])  # other numbers, another shape
            assert len(calls) == 3
        calls.clear()
        tower(pictures), tower(pictures)  # with gradients on, as in training
        assert len(calls) == 2
    finally:
        hook.remove()
        tower.memory = None


@pytest.mark.parametrize("record", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_recording_the_decoder_leaves_the_vision_tower_alone(model, data, record):
    """transformers puts its recording hooks on nested models again when the outer one records for the first
    time."""
    model(**prompt(data, "a"), **{record: True})
    torch.testing.assert_close(model.encode_images(data["a.images"]), data["a.image_features"], **CLOSE)


@pytest.mark.parametrize("case", ["a", "b", "b_trunc24"])
@torch.no_grad()
def test_prepare_inputs_labels_for_multimodal(model, data, case):
    given = prompt(data, case[0], labels=True)
    if case == "b_trunc24":
        model.config.tokenizer_model_max_length = 24
    ids, positions, mask, past, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], None, given["attention_mask"], None, given["labels"], given["images"]
    )
    assert ids is None and positions is None and past is None and mask.dtype == given["attention_mask"].dtype
    assert torch.equal(mask, data[f"{case}.prep.attention_mask"]) and torch.equal(
        labels, data[f"{case}.prep.labels"]
    )
    torch.testing.assert_close(embeds, data[f"{case}.prep.inputs_embeds"], **CLOSE)


@torch.no_grad()
def test_prepare_inputs_returns_none_for_none(model, data):
    given = prompt(data, "a")
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], torch.zeros(1, 1), None, None, None, given["images"]
    )
    assert mask is None and labels is None and positions.tolist() == [list(range(embeds.shape[1]))]
    same = model.prepare_inputs_labels_for_multimodal(given["input_ids"], None, None, None, None, None)
    assert same[0] is given["input_ids"] and same[4] is None


@pytest.mark.parametrize("case", ["a", "e"])
def test_greedy_ids(model, data, case):
    given = prompt(data, case)
    out = model.generate(
        **given, do_sample=False, max_new_tokens=16, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(out.sequences, data[f"{case}.generated"][:, 1:])
    if case == "a":
        torch.testing.assert_close(torch.stack(out.logits, 1), data["a.generate_scores"], **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_ids_of_a_batch_are_those_of_each_row_alone(model, data, side):
    """Rows of different lengths, one of them text only; prompts may come padded on either side."""
    given = prompt(data, "b")
    if side == "left":
        lengths = given["attention_mask"].sum(1).tolist()
        for name in ("input_ids", "attention_mask"):
            given[name] = torch.stack(
                [torch.roll(r, len(r) - n) for r, n in zip(given[name], lengths, strict=True)]
            )
    got = model.generate(**given, do_sample=False, max_new_tokens=16)
    want = torch.cat([data[f"b.generated_sample{b}_alone"][:, 1:] for b in range(3)])
    assert torch.equal(got, want)


def test_gradients(model, data):
    """Of the loss of case b; the vision tower is frozen."""
    model.train()
    model(**prompt(data, "b", labels=True)).loss.backward()
    model.eval()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = [key.removeprefix("b.grad.") for key in data if key.startswith("b.grad.")]
    assert len(checked) == 5
    for name in checked:
        torch.testing.assert_close(gradients[name], data[f"b.grad.{name}"], atol=1e-5, rtol=1e-3)
    assert not any("vision_tower" in name for name in gradients)
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(total, data["b.grad_norm_total"].reshape(()), atol=0, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("case", ["v144", pytest.param("v576", marks=pytest.mark.slow)])
def test_fastv(model, fastv, case, k):
    """FastV's K is the layer that gets fewer tokens: our compression layer is the one before."""
    want = {key.split(".", 2)[2]: value for key, value in fastv.items() if key.startswith(f"{case}.K{k}_R0.")}
    want = {key.removeprefix("5."): value for key, value in want.items()}
    model.set_compression(Compression(method="fastv", layers=(k - 1,), ratio=0.5))
    given = embedded(fastv, case)
    with torch.no_grad(), tiny.watched() as steps:
        out = model(**given, use_cache=True)
    assert len(steps) == 1
    torch.testing.assert_close(steps[0].scores(), want["scores"].float(), atol=1e-6, rtol=1e-4)
    assert steps[0].targets() == want["kept_visual"].tolist()
    assert steps[0].shortened.source[0].tolist() == want["position_ids_after"].tolist()
    torch.testing.assert_close(out.logits[:, -1], want["last_logits"], **CLOSE)
    if "logits" in want:
        torch.testing.assert_close(out.logits, want["logits"], **CLOSE)
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    full = given["inputs_embeds"].shape[1]
    assert lengths == [full if n == 2 * full else n for n in want["cache_lengths_prefill"].tolist()]

    answer = tiny.generate(model, given, tokens=16, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(answer.sequences, want["generated"].reshape(1, -1))
    logits = torch.cat(answer.logits)[: len(want["generate_scores"])]
    torch.testing.assert_close(logits, want["generate_scores"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "layers", "ratio"),
    [("L2_4_6__R0.5_0.25_0.125", (1, 3, 5), 0.5), ("L3__R0.5", (2,), 0.5), ("L2__R0.25", (1,), 0.75)],
)
def test_pyramiddrop(model, fastv, pyramiddrop, name, layers, ratio):
    want = {
        key.removeprefix(f"{name}."): value
        for key, value in pyramiddrop.items()
        if key.startswith(f"{name}.")
    }
    model.set_compression(Compression(method="pyramiddrop", layers=layers, ratio=ratio))
    given = embedded(fastv, "v144")
    with torch.no_grad(), tiny.watched() as steps:
        out = model(**given, use_cache=True)
    assert len(steps) == len(layers)
    for stage, (step, kept) in enumerate(zip(steps, tiny.kept_of_original(steps), strict=True)):
        torch.testing.assert_close(step.scores(), want[f"stage{stage}.scores"].float(), atol=1e-6, rtol=1e-4)
        assert kept == want[f"stage{stage}.kept_original"].tolist()
    torch.testing.assert_close(out.logits, want["logits"], **CLOSE)
    assert [layer.keys.shape[2] for layer in cache_of(out).layers] == want["cache_lengths"].tolist()

    answer = tiny.generate(model, given, tokens=16, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(answer.sequences, want["generated"].reshape(1, -1))
    torch.testing.assert_close(torch.cat(answer.logits), want["generate_scores"], **CLOSE)


@pytest.mark.parametrize("method", ["libra", "fastv", "turbo", "windowed-fastv", "random", "pyramiddrop"])
def test_ratio_zero_changes_no_bit(model, data, method):
    """With images, a text-only row, labels and generation: the engine runs at every layer and W is the
    identity."""
    given, asked = prompt(data, "b", labels=True), prompt(data, "b")
    layers = tuple(range(7 if method == "pyramiddrop" else 8))
    with torch.no_grad():
        plain = model(**given)
        answer = model.generate(
            **asked, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        model.set_compression(Compression(method=method, layers=layers, ratio=0.0))
        with tiny.watched() as steps:
            out = model(**given)
        again = model.generate(
            **asked, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
    assert len(steps) == len(layers)
    valid = data["b.prep.attention_mask"].bool()
    assert torch.equal(out.logits[valid], plain.logits[valid]) and torch.equal(out.loss, plain.loss)
    assert torch.equal(again.sequences, answer.sequences) and torch.equal(
        torch.stack(again.logits), torch.stack(answer.logits)
    )


@pytest.mark.parametrize("method", ["libra", "fastv", "turbo", "random"])
def test_compressed_batch_generates_what_each_row_does_alone(model, data, method):
    given = prompt(data, "b")
    tau = {"tau": 0.3} if method == "libra" else {}
    model.set_compression(Compression(method=method, layers=(1, 3, 5), ratio=0.5, **tau))
    batched = model.generate(**given, do_sample=False, max_new_tokens=8)
    assert model.compression_stats["visual_tokens"][-1] == [2, 0, 2]
    for b, mask in enumerate(given["attention_mask"].bool()):
        ids, image = given["input_ids"][b : b + 1, mask], given["images"][b : b + 1]
        single = model.generate(ids, images=image, do_sample=False, max_new_tokens=8)
        assert torch.equal(single[0], batched[b])


def test_pictures_as_list_or_five_dimensions(model, data):
    """An entry of several pictures puts all their tokens at its one placeholder."""
    images = data["b.images"][:2]
    single = model.image_features(images)
    for given in (images[None], [images]):
        (joined,) = model.image_features(given)
        torch.testing.assert_close(joined, torch.cat(single), **CLOSE)
    torch.testing.assert_close(torch.stack(model.image_features(list(images))), torch.stack(single), **CLOSE)


def test_what_cannot_work_is_refused_in_a_sentence(model, data, tmp_path):
    given = prompt(data, "b")
    with pytest.raises(ValueError, match="need 3 images .* but 2 were given"):
        model(given["input_ids"], attention_mask=given["attention_mask"], images=given["images"][:2])
    with pytest.raises(ValueError, match="has an image token but no image was given"):
        model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=2)
    with pytest.raises(ValueError, match="needs token ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=2)
    with pytest.raises(ValueError, match="99 is out of range: the model has layers 0 to 7"):
        model.set_compression(Compression(method="libra", layers=(99,)))
    with pytest.raises(ValueError, match="there is no folder .*nothing"):
        load_pretrained_model(str(tmp_path / "nothing"), None, "llava", device="cpu")
