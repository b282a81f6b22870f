"""libra.attach on stock Hugging Face models: the same engine from outside, and the model given back as it
was."""

import copy

import plain
import pytest
import tiny
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, MistralModel, Qwen2Model

import libra
from libra import Compression
from libra.engine import score
from libra.engine.transformers_api import cache_argument, cache_of

CLOSE = dict(atol=1e-4, rtol=1e-4)
LIBRA = Compression(method="libra", layers=(1, 3), ratio=0.5, tau=0.9)
CHOICES = {
    "libra": LIBRA,
    "fastv": Compression(method="fastv", layers=(1,), ratio=0.75),
    "turbo": Compression(method="turbo", layers=(0, 2)),
    "random": Compression(method="random", layers=(1, 2)),
    "pyramiddrop": Compression(method="pyramiddrop", layers=(1, 3)),
    "mean": Compression(method="libra", layers=(1, 3), importance="mean"),
}
every_choice = pytest.mark.parametrize("name", CHOICES)


def talk(pattern: str, seed: int) -> dict[str, torch.Tensor]:
    """Ids, labels and pixels from a pattern such as "t4 i t5 a3": text, an image, an answer."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels, pixels = [], [], []
    for part in pattern.split():
        if part == "i":
            ids.append(torch.full((tiny.IMAGE_TOKENS,), tiny.IMAGE))
            pixels.append(torch.randn(3, 56, 56, generator=draw))
        else:
            ids.append(torch.randint(3, tiny.IMAGE, (int(part[1:]),), generator=draw))
        labels.append(ids[-1] if part[0] == "a" else torch.full_like(ids[-1], -100))
    return {"ids": torch.cat(ids), "labels": torch.cat(labels), "pixels": pixels}


TALKS = [talk("t4 i t5", 1), talk("t2 i t3 i t7", 2), talk("t9", 3)]
ANSWERED = [talk("t4 i t5 a3", 1), talk("t2 i t3 i t4 a2", 2), talk("t6 a3", 3)]
SCORERS = [[24], [40, 40], []]  # the column before the first answer, for each image of ANSWERED


def collate(talks, side="left", labels=False) -> dict[str, torch.Tensor]:
    def padded(parts, value):
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    batch = {
        "input_ids": padded([t["ids"] for t in talks], 0),
        "attention_mask": padded([torch.ones_like(t["ids"]) for t in talks], 0),
    }
    if pixels := [p for t in talks for p in t["pixels"]]:
        batch["pixel_values"] = torch.stack(pixels)
    if labels:
        batch["labels"] = padded([t["labels"] for t in talks], -100)
    return batch


def embeddings(model, talks) -> list[torch.Tensor]:
    """What the decoder is given for each talk (S, D), images included."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    for t in talks:
        model(**collate([t]))
    hook.remove()
    return [embeds.detach() for embeds in seen]


def by_hand(model, t, embeds, c, scorers=None) -> plain.Outcome:
    decoder = model.model.language_model
    prefill = plain.Prefill.of(t["ids"] == tiny.IMAGE, len(t["ids"]) - 1 if scorers is None else scorers, c)
    return plain.decode(decoder, model.lm_head, embeds, c, [prefill])


@pytest.fixture(scope="module")
def shared():
    return tiny.hf_model()


@pytest.fixture
def model(shared):
    yield shared
    assert_untouched(shared)
    shared.zero_grad()


def assert_untouched(model):
    decoder = model.model.language_model
    assert type(decoder) in (LlamaModel, MistralModel, Qwen2Model)
    assert (
        not model._forward_hooks
        and not model._forward_pre_hooks
        and "forward" not in vars(decoder) | vars(model)
    )
    assert not {"compression", "last_stats", "last_labels"} & vars(decoder).keys()
    assert decoder.config._attn_implementation in ("sdpa", "eager")


# --- the same numbers ---


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
@every_choice
@torch.no_grad()
def test_a_batch_is_each_sample_by_hand(name, side, text):
    """Several images a sample, one sample without; the loss too is that of the shorter sequence."""
    model, c = tiny.hf_model(text=text), CHOICES[name]
    embeds, answered = embeddings(model, TALKS), embeddings(model, ANSWERED)
    with libra.attach(model, c) as handle:
        logits = model(**collate(TALKS, side)).logits
        counts = handle.stats["visual_tokens"]
        loss = model(**collate(ANSWERED, side, labels=True)).loss
    assert counts[0] == [16, 32, 0] and counts[-1][2] == 0 and counts[-1][0] < 16
    if name == "random":  # drawn from each sample's own text: the engine alone is the reference
        want = []
        with libra.attach(model, c):
            want = [model(**collate([t])).logits[0] for t in TALKS]
    else:
        want = [by_hand(model, t, e, c).logits for t, e in zip(TALKS, embeds)]
        parts = [by_hand(model, t, e, c, s).loss(t["labels"]) for t, e, s in zip(ANSWERED, answered, SCORERS)]
        torch.testing.assert_close(loss, sum(parts) / 8, **CLOSE)
    for b in range(len(TALKS)):
        torch.testing.assert_close(tiny.own(logits[b], len(want[b]), side), want[b], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_ratio_zero_at_every_layer_changes_no_bit(attention):
    model = tiny.hf_model(attention=attention)
    for side in ("left", "right"):
        given = collate(ANSWERED, side, labels=True)
        plainly = model(**given)
        for method in ("libra", "fastv", "turbo", "random"):
            with libra.attach(model, Compression(method=method, layers=tuple(range(6)), ratio=0.0)):
                out = model(**given)
            valid = given["attention_mask"].bool()
            assert torch.equal(out.logits[valid], plainly.logits[valid]) and torch.equal(
                out.loss, plainly.loss
            )
    given = collate(TALKS)
    answer = model.generate(**given, max_new_tokens=4, do_sample=False)
    with libra.attach(model, Compression(method="libra", layers=tuple(range(6)), ratio=0.0)):
        assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), answer)
    assert_untouched(model)


@pytest.mark.parametrize("positions", ["original", "compact", "centre"])
@torch.no_grad()
def test_keys_that_are_compared_do_not_count_padding_where_positions_do(model, positions):
    """Nobody gives positions, so those of a row begin after its padding."""
    with libra.attach(model, Compression(method="dart", layers=(0, 2), ratio=0.5, positions=positions)):
        together = model(**collate(TALKS)).logits
        for b, t in enumerate(TALKS):
            alone = model(**collate([t])).logits[0]
            torch.testing.assert_close(together[b, -len(alone) :], alone, **CLOSE)


@torch.no_grad()
def test_two_compressions_that_ask_the_same_layer(model):
    """The first after layer 1, by the attention of layer 2, and then the one after layer 2."""
    ours, t = tiny.llava_model(), TALKS[1]
    ours.model.load_state_dict(model.model.language_model.state_dict())
    ours.lm_head.load_state_dict(model.lm_head.state_dict())
    part = dict(select="topk", merge="drop", ratio=0.5)
    c = Compression(steps=[{**part, "layers": [1], "score_layer": "next"}, {**part, "layers": [2]}])
    ours.set_compression(c)
    (embeds,) = embeddings(model, [t])
    want = ours(inputs_embeds=embeds[None], visual_mask=(t["ids"] == tiny.IMAGE)[None]).logits
    with libra.attach(model, c) as handle:
        torch.testing.assert_close(model(**collate([t])).logits, want, **CLOSE)
        assert handle.stats["visual_tokens"] == [[32], [32], [16], [8], [8], [8]]


@every_choice
@torch.no_grad()
def test_generate(model, name):
    """A batch padded on the left: each sample alone, and the cache-free decoder by hand; beams and sampling
    run too."""
    c, steps = CHOICES[name], 5
    embeds = embeddings(model, TALKS)
    options = dict(max_new_tokens=steps, do_sample=False)
    with libra.attach(model, c):
        out = model.generate(**collate(TALKS), **options, return_dict_in_generate=True, output_logits=True)
        single = [model.generate(**collate([t]), **options)[0, -steps:] for t in TALKS]
        beams = model.generate(**collate(TALKS), **options, num_beams=3)[:, -steps:]
        single_beams = [model.generate(**collate([t]), **options, num_beams=3)[0, -steps:] for t in TALKS]
        torch.manual_seed(0)
        drawn = model.generate(**collate(TALKS), max_new_tokens=steps, do_sample=True, num_return_sequences=2)
    ids = out.sequences[:, -steps:]
    assert torch.equal(ids, torch.stack(single)) and torch.equal(beams, torch.stack(single_beams))
    assert drawn.shape == (6, collate(TALKS)["input_ids"].shape[1] + steps)
    for b, t in enumerate(TALKS):
        if name == "random":
            continue
        longer = torch.cat([embeds[b], model.get_input_embeddings()(ids[b, :-1])])
        want = by_hand(model, t, longer, c).logits[-steps:]
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], want, **CLOSE)


@every_choice
def test_the_same_as_llavas_own_decoder(model, name):
    """Logits, loss and gradients, with labels and gradient checkpointing."""
    ours = tiny.llava_model()
    ours.model.load_state_dict(model.model.language_model.state_dict())
    ours.lm_head.load_state_dict(model.lm_head.state_dict())
    ours.set_compression(CHOICES[name])
    given = collate(ANSWERED, "right", labels=True)
    seen = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with libra.attach(model, CHOICES[name]):
        theirs = model(**given, use_cache=False)
        theirs.loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    hook.remove()
    visual, mask = given["input_ids"] == tiny.IMAGE, given["attention_mask"]
    out = ours(
        inputs_embeds=seen[0]["inputs_embeds"].detach(),
        attention_mask=mask,
        labels=given["labels"],
        visual_mask=visual,
        row_seeds=(given["input_ids"] * mask.cumsum(1) * mask * ~visual).sum(1),
    )
    out.loss.backward()
    torch.testing.assert_close(out.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    wanted = dict(ours.model.named_parameters())
    for key, p in decoder.named_parameters():
        if not key.startswith("embed_tokens"):
            torch.testing.assert_close(p.grad, wanted[key].grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_of_every_stage(model):
    with libra.attach(model, LIBRA) as handle:
        out = model(**collate(TALKS[:1]), output_hidden_states=True)
    extra = [sum(map(sum, handle.stats["compensation_tokens"][:layer])) for layer in range(6)]
    widths = [
        9 + visual[0] + more for visual, more in zip(handle.stats["visual_tokens"], extra)
    ]  # 9 text tokens
    assert [state.shape[1] for state in out.hidden_states] == [25, *widths[:-1], out.logits.shape[1]]
    assert out.logits.shape[1] == widths[-1] < widths[0]


@torch.no_grad()
def test_attentions_of_every_stage():
    """Which only eager attention gives."""
    model = tiny.hf_model(attention="eager")
    with libra.attach(model, CHOICES["fastv"]):
        out = model(**collate(TALKS), output_attentions=True)
    assert [a.shape[2:] for a in out.attentions] == [(44, 44)] * 2 + [(20, 20)] * 4


@torch.no_grad()
def test_stats(model):
    whole = cache_of(model(**collate(TALKS)))
    with libra.attach(model, Compression(method="libra", layers=(1, 3), ratio=0.5)) as handle:
        assert handle.stats is None
        model(**collate(TALKS[2:]))
        assert handle.stats is None  # no visual token yet
        model(**collate(TALKS), use_cache=False)
        stats = handle.stats
        assert stats["cache"] is None
        model.generate(**collate(TALKS), max_new_tokens=3, do_sample=False)
        held, uncompressed = handle.stats["cache"], handle.stats["cache_plain"]
        assert {
            **handle.stats,
            "cache": None,
            "cache_plain": None,
        } == stats  # decoding steps leave the prefill's figures alone
    assert held["total"] == sum(held.values()) - held["total"] and held["earlier"] == held["window"] == 0
    assert uncompressed == sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.layers)
    column = 2 * 16 * 4  # bytes of a token's key and value in a layer: two heads of 8 in float32
    assert held["visual"] == column * 2 * (48 + 24 + 12)
    assert held["compensation"] == column * sum(
        (5 - i) * sum(row) for i, row in enumerate(stats["compensation_tokens"])
    )
    assert stats["visual_tokens"] == [[16, 32, 0]] * 2 + [[8, 16, 0]] * 2 + [[4, 8, 0]] * 2
    d, m, d_kv = 32, 64, 16
    layer = [(2 * d * d + 2 * d * d_kv) * n + 2 * n * n * d + 3 * n * d * m for n in (16, 8, 4)]
    assert stats["flops"][0] == pytest.approx(2 * sum(layer))
    assert (
        stats["flops_ratio"][0] == pytest.approx(sum(layer) / (3 * layer[0]))
        and stats["flops_ratio"][2] == 1.0
    )


@torch.no_grad()
def test_a_second_turn_on_the_same_cache(model):
    first, second = TALKS[0], talk("t3 i t4", 9)
    ids = torch.cat([first["ids"], second["ids"]])
    (embeds,) = embeddings(model, [{"ids": ids, "pixels": first["pixels"] + second["pixels"]}])
    visual, start = ids == tiny.IMAGE, len(first["ids"])
    prefills = [
        plain.Prefill.of(visual[:start], start - 1, LIBRA),
        plain.Prefill.of(visual[start:], len(visual) - 1, LIBRA, start),
    ]
    want = plain.decode(model.model.language_model, model.lm_head, embeds, LIBRA, prefills).logits[-1]
    cache = DynamicCache()
    with libra.attach(model, LIBRA):
        for turn in (first, second):
            out = model(
                turn["ids"][None],
                pixel_values=torch.stack(turn["pixels"]),
                **cache_argument(cache),
                use_cache=True,
            )
    torch.testing.assert_close(out.logits[0, -1], want, **CLOSE)


# --- attaching and detaching ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_model_is_given_back_as_it_was(attention):
    model = tiny.hf_model(attention=attention)
    given = collate(TALKS)
    before = model(**given).logits
    handle = libra.attach(model, LIBRA)
    assert model(**given).logits.shape[1] < before.shape[1]
    handle.detach()
    handle.detach()
    assert_untouched(model)
    assert model.config.text_config._attn_implementation == attention
    assert torch.equal(model(**given).logits, before)

    with pytest.raises(RuntimeError, match="on the way"):
        with libra.attach(model, LIBRA):
            model(**given)
            raise RuntimeError("on the way")
    assert_untouched(model)
    assert model.config.text_config._attn_implementation == attention
    with libra.attach(model, LIBRA):
        with pytest.raises(ValueError, match="Image features|image"):
            model(**{**given, "pixel_values": given["pixel_values"][:1]}, labels=given["input_ids"])
        assert model(**given).loss is None  # labels of a call that failed are not kept
    assert torch.equal(model(**given).logits, before)


@torch.no_grad()
def test_a_deep_copy_of_an_attached_model_is_its_own(model):
    given = collate(TALKS)
    before = model(**given).logits
    with libra.attach(model, LIBRA) as handle:
        compressed = model(**given).logits
        other = copy.deepcopy(model)
    assert torch.equal(model(**given).logits, before)
    assert torch.equal(other(**given).logits, compressed)
    assert handle.stats["visual_tokens"][0] == [16, 32, 0]


@torch.no_grad()
def test_two_models_with_two_methods_at_once(model):
    other, given = tiny.hf_model(seed=1), collate(TALKS)
    choices = ((model, CHOICES["libra"]), (other, CHOICES["fastv"]))
    want = []
    for one, c in choices:
        with libra.attach(one, c):
            want.append(one(**given).logits)
    with libra.attach(model, CHOICES["libra"]) as first, libra.attach(other, CHOICES["fastv"]) as second:
        for (one, _), logits in zip(choices, want):
            assert torch.equal(one(**given).logits, logits)
        assert first.stats["visual_tokens"][-1] == [4, 8, 0] and second.stats["visual_tokens"][-1] == [
            4,
            8,
            0,
        ]
        first.detach()
        assert torch.equal(other(**given).logits, want[1])
    assert_untouched(other)


@torch.no_grad()
def test_attaching_twice_is_refused(model):
    given = collate(TALKS)
    with libra.attach(model, LIBRA):
        compressed = model(**given).logits
        with pytest.raises(ValueError, match="attached to this model already; detach it first"):
            libra.attach(model, CHOICES["fastv"])
        assert torch.equal(model(**given).logits, compressed)


@pytest.mark.parametrize(
    "given, keys, same",
    [
        (
            (),
            {"ratio": 0.3},
            Compression(method="libra", layers=(1, 2, 3), ratio=0.3),
        ),  # the quarter points of six layers
        (("fastv",), {"layers": (1,)}, Compression(method="fastv", layers=(1,))),
        (
            ({"method": "fastv", "layers": [1]},),
            {"ratio": 0.75},
            Compression(method="fastv", layers=(1,), ratio=0.75),
        ),
        (("mini/r50",), {"layers": (1, 3)}, Compression(method="libra", layers=(1, 3))),
    ],
)
def test_a_compression_can_be_named(model, given, keys, same):
    with libra.attach(model, *given, **keys) as handle:
        assert handle.compression == same


@torch.no_grad()
def test_history_and_summary(model):
    compression = Compression(method="fastv", layers=(1,), ratio=0.75)
    with libra.attach(model, compression) as handle:
        assert handle.history == [] and str(handle.summary()) == "no prefill with visual tokens yet"
        model(**collate(TALKS), use_cache=False)
        assert handle.summary().cache_bytes is None
        first = handle.stats
        model.generate(**collate(TALKS[:1]), max_new_tokens=3, do_sample=False)
        assert handle.history == [first, handle.stats]
        told = handle.summary()
        assert repr(handle) == f"<method fastv on LlavaForConditionalGeneration: {told}>"
    assert "detached" in repr(handle)
    assert (told.prefills, told.rows, told.visual_tokens, told.left) == (2, 4, 64, 16)
    assert told.average_tokens == (2 * 64 + 4 * 16) / 6
    spent, whole = (sum(sum(one[key]) for one in handle.history) for key in ("flops", "flops_plain"))
    assert told.flops_ratio == spent / whole < 1
    assert told.cache_bytes == first_bytes(handle) and told.cache_bytes_plain == 25 * 6 * 2 * 16 * 4
    assert "2 prefills of 4 rows: 64 visual tokens became 16 (32 in an average layer)" in str(told)


def first_bytes(handle) -> int:
    """What six layers of the short talk hold: two layers of 25 columns, four of 13, of 2 × 16 numbers."""
    assert handle.history[1]["columns"] == [13]
    return (2 * 25 + 4 * 13) * 2 * 16 * 4


def test_models_that_are_not_supported_are_refused(model):
    text = LlamaForCausalLM(model.config.text_config)
    with pytest.raises(
        ValueError,
        match="does not support LlamaForCausalLM: its configuration names no placeholder of visual",
    ):
        libra.attach(text, LIBRA)
    with pytest.raises(ValueError, match="wrapper of torch.compile; attach to the model in it first"):
        libra.attach(torch.compile(model), LIBRA)
    with pytest.raises(ValueError, match="lbira is neither a method nor a row .*; did you mean libra?"):
        libra.attach(model, "lbira")
    with pytest.raises(ValueError, match="layers: 8 is out of range: the model has layers 0 to 5"):
        libra.attach(model, "mini/r50")
    with pytest.raises(ValueError, match="99 is out of range: the model has layers 0 to 5"):
        libra.attach(model, Compression(method="libra", layers=(99,)))


def test_calls_that_cannot_work_are_refused(model):
    given = collate(TALKS, "right")
    embeds = model.get_input_embeddings()(given["input_ids"])
    with libra.attach(model, LIBRA):
        with pytest.raises(ValueError, match="give input_ids, or say it before the call"):
            model(inputs_embeds=embeds, attention_mask=given["attention_mask"])
        with pytest.raises(ValueError, match="give input_ids, or say it before the call"):
            model.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], max_new_tokens=2)
        with pytest.raises(ValueError, match="padded on the right; generate needs .*left"):
            model.generate(**given, max_new_tokens=2)
        with pytest.raises(ValueError, match="needs a DynamicCache"):
            model.generate(**collate(TALKS), max_new_tokens=2, cache_implementation="static")


@every_choice
@torch.no_grad()
def test_a_placeholder_that_the_model_says_itself_is_text(model, name):
    """A decoding step brings no visual tokens."""
    with libra.attach(model, CHOICES[name]) as handle:
        cache = cache_of(model(**collate(TALKS[:1]), use_cache=True))
        stats = handle.stats
        logits = model(input_ids=torch.tensor([[tiny.IMAGE]]), **cache_argument(cache), use_cache=True).logits
        assert logits.shape[1] == 1 and handle.stats == stats


@torch.no_grad()
def test_a_plain_model_is_not_disturbed_by_wrapped_attention(model):
    """The attention functions stay wrapped in the process; without a probe they are what they were."""
    score.enable(model.config.text_config)
    other = tiny.hf_model(seed=5)
    with libra.attach(model, LIBRA):
        want = other(**collate(TALKS)).logits
    assert torch.equal(other(**collate(TALKS)).logits, want)
