"""With ``compensation: reserved`` a decoder's prefill is one graph: no length depends on a number."""

import families
import pytest
import tiny
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import libra
from libra import Compression
from libra.engine.prefill import prefill_of
from libra.engine.tokens import Prefill

LAYERS, COLUMNS = 4, 24
RESERVED = Compression(method="libra", layers=(0, 2), tau=0.6, compensation="reserved")
# Of each row its first column, its first visual token and how many of them there are.
ONE, TWO, PADDED = [(0, 4, 12)], [(0, 4, 12), (0, 4, 12)], [(0, 4, 12), (5, 9, 8)]


def qwen():
    """A token has three position numbers there."""
    config = families.qwen2_5_vl(None)
    text = config.text_config
    text.num_hidden_layers, text.layer_types = LAYERS, text.layer_types[:LAYERS]
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


MODELS = {
    "llava": lambda: tiny.llava_model(LAYERS),
    "Hugging Face's LLaVA": lambda: tiny.hf_model(LAYERS),
    "Qwen2.5-VL": qwen,
}


def decoder_of(model):
    return getattr(model.model, "language_model", model.model)


def given(model, spots) -> dict:
    """What a prefill is given: embeddings, places and, where a row is padded, a mask; Qwen's visual tokens
    stand six to a picture's row."""
    torch.manual_seed(len(spots))
    embeds = torch.randn(len(spots), COLUMNS, decoder_of(model).config.hidden_size)
    visual = torch.zeros(len(spots), COLUMNS, dtype=torch.bool)
    mask = torch.ones(len(spots), COLUMNS, dtype=torch.long)
    for b, (first, start, count) in enumerate(spots):
        visual[b, start : start + count], mask[b, :first] = True, 0
    found = {"inputs_embeds": embeds, "prefill": Prefill(visual).surveyed(mask)}
    if not mask.all():
        found["padding_mask"] = mask
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        place = torch.arange(COLUMNS).expand(len(spots), -1)
        found["position_ids"] = torch.stack([place, place.where(~visual, place // 6), place])
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_loop_that_is_compiled_is_what_the_doors_compute(name):
    model = MODELS[name]()
    arguments = given(model, TWO)
    prefill, plain = arguments["prefill"], {**arguments, "use_cache": False}
    del plain["prefill"]
    got = prefill_of(decoder_of(model), RESERVED)(**arguments)
    if name == "llava":
        model.set_compression(RESERVED)
        want = model.model(**plain, prefill=prefill).last_hidden_state
    else:
        with libra.attach(model, RESERVED) as handle:
            handle.mark_visual_tokens(prefill.visual)
            want = model.model(**plain).last_hidden_state
    assert got.shape[:2] == (2, 12 + 3 + 2)  # text, a quarter of the visual tokens, compensation tokens
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name, spots", [
    *((name, spots) for name in MODELS for spots in (ONE, TWO)), ("llava", PADDED),
])  # fmt: skip
@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_is_one_graph(name, spots):
    torch.compiler.reset()
    model = MODELS[name]()
    arguments, run = given(model, spots), prefill_of(decoder_of(model), RESERVED)
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="inductor")
    torch.testing.assert_close(compiled(**arguments), run(**arguments), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ragged_compensation_breaks_the_graph():
    """Whether a row has a compensation token is asked of the device."""
    torch.compiler.reset()
    model = tiny.llava_model(1)
    ragged = Compression(method="libra", layers=(0,), tau=0.6)
    compiled = torch.compile(prefill_of(model.model, ragged), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(**given(model, ONE))
