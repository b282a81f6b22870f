"""With ``compensation: reserved`` a decoder's prefill is one graph: no length depends on a number."""

import pytest
import tiny
import torch

from libra import Compression
from libra.engine import score
from libra.engine.forward import CompressedForward
from libra.engine.tokens import Prefill
from libra.places import BEFORE

RESERVED = Compression(method="libra", layers=(0, 2), tau=0.6, compensation="reserved")


def prefill_of(decoder, c: Compression):
    """The decoder's loop, from embeddings and a surveyed prefill to the last hidden states."""

    def run(embeds, prefill):
        forward = CompressedForward(decoder, c, embeds, prefill=prefill)
        hidden = forward.compress(BEFORE, embeds)
        for i, layer in enumerate(decoder.layers):
            hidden = forward.compress(i, layer(hidden, **forward.inputs(i)))
        return decoder.norm(hidden)

    return run


@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_is_one_graph():
    """The graph itself; what a backend makes of it is not looked at."""
    decoder = tiny.llava_model(layers=4).model
    score.enable(decoder.config)
    torch.manual_seed(1)
    embeds, visual = torch.randn(1, 24, tiny.WIDTH), torch.zeros(1, 24, dtype=torch.bool)
    visual[:, 4:16] = True
    prefill, run = Prefill(visual).surveyed(), prefill_of(decoder, RESERVED)
    want = run(embeds, prefill)
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(embeds, prefill), want)
    assert want.shape[1] == 12 + 3 + 2
