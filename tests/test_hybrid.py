"""The score row beside the model's own attention: it equals eager attention's row, and nothing else
changes."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from libra import Compression
from libra.engine import score
from libra.engine.transformers_api import cache_argument, cache_of

LAYER = 2
ROWS = [tiny.row("t3 v12 t4 v8 t3", 1), tiny.row("t2 v20 t6", 2), tiny.row("v5 t2 v7 t9", 3)]


def same_weights(attention: str, **sizes):
    """A model and its twin with eager attention, which returns its attention matrices."""
    model, twin = tiny.llava_model(attention=attention, **sizes), tiny.llava_model(attention="eager", **sizes)
    twin.load_state_dict(model.state_dict())
    return model, twin


def asked(step: tiny.Step, attentions: torch.Tensor) -> torch.Tensor:
    """Of attentions (B, H, S, S) the rows that a step's probe asked for, averaged over the heads: (B, R,
    S)."""
    mean = attentions.mean(1)
    return mean.gather(1, step.queries[..., None].expand(-1, -1, mean.shape[-1]))


def arguments(padding):
    return tiny.alone(ROWS[0]) if padding is None else tiny.collate(ROWS, padding)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_score_row_is_eager_attentions_row(attention, kv_heads, padding):
    model, twin = same_weights(attention, num_key_value_heads=kv_heads)
    given = arguments(padding)
    attentions = twin(**given, output_attentions=True).attentions
    for score_layer, layer in (("same", LAYER), ("next", LAYER + 1)):
        model.set_compression(
            Compression(select="topk", merge="drop", layers=(LAYER,), score_layer=score_layer)
        )
        with tiny.watched() as steps:
            model(**given)
        want = asked(steps[0], attentions[layer])
        assert steps[0].attention.dtype == torch.float32
        torch.testing.assert_close(steps[0].attention, want, atol=1e-5, rtol=0)
        if padding is not None:  # padding gets nothing, and no row is undefined
            padded = ~given["attention_mask"].bool()
            assert (steps[0].attention[:, 0][padded] == 0).all()


@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_every_text_token_behind_the_image_can_be_asked(padding):
    model, twin = same_weights("sdpa")
    given = arguments(padding)
    attentions = twin(**given, output_attentions=True).attentions
    model.set_compression(Compression(select="topk", merge="drop", layers=(LAYER,), importance="mean"))
    with tiny.watched() as steps:
        model(**given)
    assert steps[0].queries.shape[1] == (3 if padding is None else 9)
    torch.testing.assert_close(steps[0].attention, asked(steps[0], attentions[LAYER]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_in_bfloat16(attention):
    model, twin = same_weights(attention)
    model, twin, given = model.bfloat16(), twin.bfloat16(), arguments("left")
    given["inputs_embeds"] = given["inputs_embeds"].bfloat16()
    attentions = twin(**given, output_attentions=True).attentions
    model.set_compression(Compression(method="libra", layers=(LAYER,)))
    with tiny.watched() as steps:
        out = model(**given)
    torch.testing.assert_close(
        steps[0].attention, asked(steps[0], attentions[LAYER]).float(), atol=1e-2, rtol=0
    )
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()


@torch.no_grad()
def test_compressed_logits_do_not_depend_on_the_attention_implementation():
    logits = []
    for model in same_weights("sdpa"):
        model.set_compression(Compression(method="libra", layers=(1, 3)))
        logits.append(model(**arguments("left")).logits)
    valid = torch.arange(logits[0].shape[1]) >= logits[0].shape[1] - 12
    torch.testing.assert_close(logits[0][:, valid], logits[1][:, valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sdpa", score.HYBRID_EAGER])
@torch.no_grad()
def test_a_probe_changes_nothing_but_itself(name):
    model = tiny.llava_model(attention="eager" if name == score.HYBRID_EAGER else name)
    for _ in range(2):
        score.enable(model.config)
        attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    assert model.config._attn_implementation == name
    assert not getattr(attend.__wrapped__, "takes_probe", False)  # wrapped once, however often it is enabled
    module, draw = model.model.layers[0].self_attn, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, generator=draw) for heads in (4, 2, 2))
    rows = torch.tensor([[6], [3]])
    probe = score.Probe(rows, None)
    options = dict(scaling=8**-0.5, dropout=0.0)
    plain = attend.__wrapped__(module, query, key, value, None, **options)[0]
    assert torch.equal(attend(module, query, key, value, None, **options)[0], plain)
    assert torch.equal(attend(module, query, key, value, None, score_probe=probe, **options)[0], plain)
    assert probe.attention.shape == (2, 1, 7) and not probe.attention[1, 0, 4:].any()
    torch.testing.assert_close(probe.attention.sum(-1), torch.ones(2, 1))


@torch.no_grad()
def test_a_later_turn_is_scored_on_all_keys_and_reads_its_own_columns():
    """The row of a second prefill sums to less than 1: the rest of its attention lies on the first turn."""
    model, twin = same_weights("sdpa")
    first, second = ROWS[1], ROWS[0]
    model.set_compression(Compression(select="topk", merge="drop", layers=(LAYER,), ratio=0.0))
    cache = cache_of(model(**tiny.alone(first), use_cache=True))
    with tiny.watched() as steps:
        model(**tiny.alone(second), **cache_argument(cache))
    joined = tiny.Row(
        torch.cat([first.embeds, second.embeds]), torch.cat([first.visual, second.visual]), first.labels
    )
    attentions = twin(**tiny.alone(joined), output_attentions=True).attentions[LAYER].mean(1)
    torch.testing.assert_close(steps[0].attention[0, 0], attentions[0, -1, len(first) :], atol=1e-5, rtol=0)
    assert steps[0].attention.sum() < 0.99


def attention_by_hand(query, key, mask, scaling: float, cap=None, bias=None) -> torch.Tensor:
    """(B, S, K): the mean over the heads of softmax attention, mask (B, 1, S, K) bool."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)


@pytest.mark.parametrize("form", ["bool", "float", "flash", "none", "flex"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.5}, {"position_bias": True}, {"sliding_window": 3}], ids=str
)
@torch.no_grad()
def test_the_score_row_is_that_of_the_layers_own_mask(form, options):
    """Attention that is not just causal: chunks where the mask tells them, caps, biases, windows, padding."""
    draw = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, heads, n, 8, generator=draw) for heads, n in ((4, 6), (2, 9)))
    options, rows = dict(options, scaling=0.3), torch.tensor([[5, 2], [4, 5]])
    if "position_bias" in options:
        options["position_bias"] = torch.randn(2, 4, 6, 9, generator=draw)
    place, at = torch.arange(9), torch.arange(6)[:, None] + 3
    valid = torch.ones(2, 9, dtype=torch.bool)
    if form != "none":
        valid[1, :2] = False
    mask = (place <= at)[None, None] & valid[:, None, None]
    if (window := options.get("sliding_window")) is not None:
        mask = mask & (place > at - window)
    if form in ("bool", "float", "flex"):
        mask = mask & (place // 4 == at // 4)
    handed = {
        "bool": mask,
        "float": torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        "flash": valid,
        "none": None,
        "flex": SimpleNamespace(mask_mod=lambda b, h, q, kv: mask[b, h, q, kv]),
    }[form]
    probe = score.Probe(rows, None if form == "none" else valid)
    probe.by_mask = True
    probe.read(query, key, handed, options)
    whole = attention_by_hand(query, key, mask, 0.3, options.get("softcap"), options.get("position_bias"))
    want = whole.gather(1, rows[:, :, None].expand(-1, -1, 9))
    torch.testing.assert_close(probe.attention, want, atol=1e-6, rtol=1e-5)
