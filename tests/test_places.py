"""Compression before the language model: the place `input` in llava's door, on embeddings and on pictures."""

import pytest
import tiny
import torch
from transformers import DynamicCache

from libra import Compression
from libra.budget import actual
from libra.places import BEFORE

CLOSE = dict(atol=2e-5, rtol=1e-4)
PATTERNS = ("t3 v16 t5", "t2 v9 t1 v16 t4", "v20 t6")
STEPS = [{"at": "input", "method": "divprune", "keep": 8}, {"at": 2, "method": "fastv", "ratio": 0.5}]
COMPRESSIONS = {
    "random": {"method": "random", "at": "input"},
    "divprune": {"method": "divprune", "keep": 6},
    "tome": {"method": "tome", "ratio": 0.6},
    "cdpruner": {"method": "cdpruner", "keep": 5},
    "twice": {"method": "random", "layers": (-1, 2)},
    "steps": {"steps": STEPS},
}


def rows() -> list[tiny.Row]:
    return [tiny.row(pattern, seed) for seed, pattern in enumerate(PATTERNS)]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_batch_is_its_rows_alone_and_the_counts_are_exact(name, side, positions):
    model = tiny.llava_model(layers=4)
    c = Compression(**COMPRESSIONS[name], positions=positions)
    model.set_compression(c)
    whole = model(**tiny.collate(rows(), side)).logits
    stats = model.compression_stats
    columns = stats["columns"]
    for b, row in enumerate(rows()):
        alone = model(**tiny.alone(row)).logits[0]
        torch.testing.assert_close(tiny.own(whole[b], columns[b], side), alone, **CLOSE)
        spans = [int(part[1:]) for part in PATTERNS[b].split() if part[0] == "v"]
        counted = actual(c, 4, spans)
        assert [layer[b] for layer in stats["visual_tokens"]] == counted and stats["given"][b] == sum(spans)
        assert [layer[0] for layer in model.compression_stats["visual_tokens"]] == counted
        assert len(alone) == len(row) - sum(spans) + counted[-1]


def kept_columns(steps: list[tiny.Step], row: tiny.Row) -> torch.Tensor:
    visual = row.visual.nonzero().flatten()
    gone = set(visual.tolist()) - set(visual[steps[0].targets()].tolist())
    return torch.tensor([i for i in range(len(row)) if i not in gone])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
@pytest.mark.parametrize("method", ["random", "divprune"])
def test_the_plain_model_on_what_is_left_says_the_same(method, positions):
    """Cached answers against the plain model without a cache, on the embeddings and positions that remain."""
    model, row = tiny.llava_model(layers=4), tiny.row("t3 v16 t5", 4)
    model.set_compression(Compression(method=method, at="input", keep=4, positions=positions))
    with tiny.watched() as steps:
        output = tiny.generate(
            model, tiny.alone(row), tokens=4, return_dict_in_generate=True, output_logits=True
        )
    left = kept_columns(steps, row)
    places = {"original": left, "compact": torch.arange(len(left))}.get(positions, left.float())
    if positions == "centre":
        places[3:7] = 3 + (torch.arange(4) + 0.5) * 4 - 0.5
    model.set_compression(None)
    embeds, ids = row.embeds[left][None], output.sequences[0]
    for number, logits in enumerate(output.logits):
        plain = model(
            inputs_embeds=embeds, position_ids=places[None], attention_mask=torch.ones(1, len(places))
        ).logits
        torch.testing.assert_close(plain[:, -1], logits, **CLOSE)
        embeds = torch.cat([embeds, model.get_input_embeddings()(ids[None, number : number + 1])], 1)
        after = len(row) + number if positions != "compact" else len(left) + number
        places = torch.cat([places, torch.tensor([after], dtype=places.dtype)])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
@pytest.mark.parametrize("layers", [(BEFORE,), (BEFORE, 1, 3)])
def test_ratio_0_is_the_plain_model_bit_by_bit(layers, positions):
    model, batch = tiny.llava_model(layers=4), tiny.collate(rows(), "left")
    plain, said = model(**batch).logits, tiny.generate(model, batch)
    for method in ("random", "divprune", "tome"):
        model.set_compression(Compression(method=method, layers=layers, ratio=0.0, positions=positions))
        assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(tiny.generate(model, batch), said)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
def test_the_cache_tells_the_length_that_came_in_through_turns_and_takes_guesses_back(positions):
    """A second turn on the cache of the first is one prompt of both, each turn's picture chosen by itself."""
    model = tiny.llava_model(layers=4)
    first, second = tiny.row("t3 v16 t5", 1), tiny.row("t2 v12 t4", 2)
    model.set_compression(Compression(method="divprune", keep=5, positions=positions))
    cache = DynamicCache(config=model.config)
    model(**tiny.alone(first), cache=cache)
    assert cache.get_seq_length() == 24 and cache.get_seq_length(layer_idx=0) == 13 and cache.lag == 11
    cache.crop(-2)
    model(inputs_embeds=first.embeds[None, -2:], cache=cache)
    logits = model(**tiny.alone(second), cache=cache).logits
    assert cache.get_seq_length() == 42 and [layer.get_seq_length() for layer in cache.layers] == [24] * 4
    both = {
        name: torch.cat([tiny.alone(first)[name], tiny.alone(second)[name]], 1) for name in tiny.alone(first)
    }
    whole = model(**both).logits
    torch.testing.assert_close(logits, whole[:, -logits.shape[1] :], **CLOSE)
    with pytest.raises(ValueError, match="crop keeps at least the 38 columns"):
        cache.crop(-5)
    model.set_compression(None)
    with pytest.raises(ValueError, match="filled with compression after layers .*without it"):
        model(inputs_embeds=second.embeds[None], cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_labels_shorten_with_the_input_and_gradients_flow():
    model = tiny.llava_model(layers=3)
    model.set_compression(Compression(method="tome", keep=4))
    batch = tiny.collate([tiny.row("t3 v16 t5 a3", 1), tiny.row("t2 v9 t2 a2", 2)], "right", labels=True)
    batch["inputs_embeds"].requires_grad_()
    output = model(**batch)
    output.loss.backward()
    assert output.logits.shape[1] == 3 + 4 + 5 + 3
    grads = batch["inputs_embeds"].grad[batch["visual_mask"]]
    assert grads.abs().sum(-1).gt(0).all()  # every merged token has a part in the loss
    alone = [
        model(**{k: v[None] if k != "visual_mask" else v[None] for k, v in
                 {"inputs_embeds": r.embeds, "visual_mask": r.visual, "labels": r.labels}.items()}).loss
        for r in (tiny.row("t3 v16 t5 a3", 1), tiny.row("t2 v9 t2 a2", 2))
    ]  # fmt: skip
    torch.testing.assert_close(output.loss, (3 * alone[0] + 2 * alone[1]) / 5)


@torch.no_grad()
def test_beams_repeat_the_input_and_traces_tell_of_it():
    model, batch = tiny.llava_model(layers=4), tiny.collate(rows(), "left")
    model.set_compression(Compression(**COMPRESSIONS["steps"]), trace=True)
    beams = tiny.generate(model, batch, num_beams=2, num_return_sequences=2)
    assert beams.shape == (6, 5)
    tiny.generate(model, batch, num_return_sequences=1)
    for b, trace in enumerate(model.compression_trace):
        assert [stage.layer for stage in trace.stages] == [BEFORE, 2]
        assert len(trace.kept(0)) == model.compression_stats["visual_tokens"][0][b]
        assert set(trace.kept(1)) <= set(trace.kept(0))


@torch.no_grad()
def test_what_an_embedding_cannot_tell_is_said():
    model, batch = tiny.llava_model(layers=4), tiny.collate(rows(), "left")
    for method in ("fastervlm", "vispruner", "hiprune", "libra-input"):
        model.set_compression(Compression(method=method))
        with pytest.raises(
            ValueError, match=f"method {method} needs tower_.* of the vision tower, which this"
        ):
            model(**batch)
    model.set_compression(Compression(method="visionzip"))
    with pytest.raises(ValueError, match="a compression in the vision tower needs pictures"):
        model(**batch)
