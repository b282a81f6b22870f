"""FastV as its users run it, against our own FastV: the same tokens, the same answer."""

import json

import pytest
import torch
from test_latency import ROOT, command
from tiny import hf_model

import libra
from libra.config import Compression, ConfigError
from libra.engine.transformers_api import cache_argument, cache_of
from libra.latency import Bench, Prompt, main, measure
from libra.latency.peer import EAGER, MIXED, Peer, check_peer
from libra.rows import spec_of


def bench(layer: int, ratio, batch: int = 1, text: str = "llama", attention: str = "sdpa", **keys) -> Bench:
    model = hf_model(4, text, attention)
    compression = Compression(method="fastv", layers=(layer,), ratio=ratio, **keys)
    return Bench(model, compression, Prompt(visual=40, text=13, batch=batch))


@pytest.mark.parametrize("variant", [EAGER, MIXED])
@pytest.mark.parametrize(
    "layer, ratio, batch, text, attention",
    [
        (0, 0.5, 1, "llama", "sdpa"),
        (2, "2/3", 3, "llama", "sdpa"),
        (3, 0.8, 1, "llama", "sdpa"),
        (1, 0.0, 2, "llama", "eager"),
        (1, 0.75, 2, "qwen2", "sdpa"),
        (2, 0.5, 1, "mistral", "eager"),
    ],
)
def test_it_keeps_what_our_fastv_keeps_and_answers_the_same(
    variant, layer, ratio, batch, text, attention, monkeypatch
):
    made = bench(layer, ratio, batch, text, attention, positions="original")
    kept, keep = [], Peer.kept_columns
    monkeypatch.setattr(
        Peer, "kept_columns", lambda self, weights: kept.append(keep(self, weights)) or kept[-1]
    )
    output, _ = Peer(made, variant).prefill()
    with libra.attach(made.model, made.compression, trace=True) as handle, torch.inference_mode():
        handle.mark_visual_tokens(made.places)
        ours = made.model(
            inputs_embeds=made.embeds, **cache_argument(made.new_cache()), use_cache=True, logits_to_keep=1
        )
        traces = handle.trace
    (columns,) = kept
    for row, trace in zip(columns.tolist(), traces, strict=True):
        places = [6 + n for n in sorted(int(n) for n in trace.kept(0))]
        assert row == [*range(6), *places, *range(46, 53)] and len(places) == round(
            40 * (1 - made.compression.ratio)
        )
    torch.testing.assert_close(output.logits, ours.logits, atol=1e-5, rtol=1e-5)
    for theirs, own in zip(cache_of(output).layers, cache_of(ours).layers, strict=True):
        torch.testing.assert_close(theirs.keys, own.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.values, own.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant, fast", [(EAGER, 0), (MIXED, 3)])
def test_the_scoring_layer_hands_out_its_whole_attention(variant, fast, monkeypatch):
    made = bench(1, 0.5, batch=2)
    shapes, calls, keep = [], [], Peer.kept_columns
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        Peer, "kept_columns", lambda self, weights: shapes.append(weights.shape) or keep(self, weights)
    )
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    Peer(made, variant).prefill()
    assert shapes == [(2, 4, 53, 53)] and len(calls) == fast
    config = made.model.get_decoder().config
    assert (
        config._attn_implementation == "sdpa"
        and not made.model.get_decoder().layers[1].self_attn._forward_hooks
    )


def test_it_is_timed_in_the_same_turns():
    made = bench(1, 0.5)
    data = measure(made, spec_of(made.text, "tiny"), pairs=3, peer=True, progress=False)
    for variant in (EAGER, MIXED):
        peer = data["peer"][variant]
        ratios = sorted(
            pair["compressed"]["wall"] / pair[variant]["wall"] for pair in data["prefill"]["pairs"]
        )
        interval = peer["compressed_over_peer"]
        assert [interval["low"], interval["median"], interval["high"]] == ratios and interval[
            "coverage"
        ] == 0.75
        assert peer["seconds"] == sorted(pair[variant]["wall"] for pair in data["prefill"]["pairs"])[1]


def test_what_fastv_is_no_match_for():
    decoder = hf_model(4).get_decoder()
    with pytest.raises(ConfigError, match="this compression has 2; name one with --compression-layers"):
        check_peer(decoder, Compression(method="libra", layers=(0, 2)), Prompt(20))
    check_peer(decoder, Compression(method="libra", layers=(2,)), Prompt(20))
    decoder.config.sliding_window = 16
    with pytest.raises(
        ConfigError, match="needs plain positions and full attention, and LlamaModel has others"
    ):
        check_peer(decoder, Compression(method="fastv", layers=(2,)), Prompt(20))


def test_command_compares_at_the_same_flops(capsys, tmp_path):
    file = tmp_path / "peer.json"
    options = [
        "--random-weights",
        "--layers",
        "4",
        "--compression-layers",
        "1",
        "--visual-tokens",
        "40",
        "--pairs",
        "1",
    ]
    assert main(command(*options, "--peer", "--json", str(file), "--plot", str(tmp_path / "peer.png"))) == 0
    out, data = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert data["compression"]["method"] == "libra" and list(data["peer"]) == [EAGER, MIXED]
    assert (
        "FastV, eager everywhere" in out
        and "FastV, eager at its layer" in out
        and str(ROOT) not in out.split("(")[0]
    )
    assert (tmp_path / "peer.png").stat().st_size > 10_000
