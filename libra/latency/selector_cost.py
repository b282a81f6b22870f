"""What choosing tokens before the language model costs, against the prefill that remains: the measurement of
:mod:`libra.latency.selectors`."""

from collections.abc import Callable
from functools import partial

import torch

from ..config import Compression
from ..methods import METHODS, Context
from ..places import LAYERS
from ..rows import ModelSpec
from ..step import compress
from ..utils.timing import median_interval, now, run_warm_in_turns
from .random_weights import random_model
from .selectors import TEXT

KEYS_WIDTH, FEATURES_WIDTH = 64, 1024  # of CLIP ViT-L/14, the tower of the LLaVA models
QUESTION = 16  # text tokens that a method compares the picture with


def context_of(hidden: torch.Tensor, side: tuple[int, int]) -> Context:
    """Random numbers in place of what a tower says about one picture with the embeddings (1, N, D)."""
    draw, (_, tokens, width) = torch.Generator().manual_seed(0), hidden.shape
    dtype, device = hidden.dtype, hidden.device

    def random(*shape):
        return torch.rand(*shape, generator=draw).to(device)

    return Context(
        tower_cls=random(1, tokens),
        tower_received=random(2, 1, tokens),
        tower_keys=random(1, tokens, KEYS_WIDTH),
        tower_hidden=random(1, tokens, FEATURES_WIDTH).to(dtype),
        tower_next=random(1, tokens),
        tower_next_keys=random(1, tokens, FEATURES_WIDTH).to(dtype),
        relevance=random(1, tokens),
        text=[random(QUESTION, width).to(dtype)],
        grid=[[side]],
    )


def grid_of(tokens: int) -> tuple[int, int]:
    """The most square grid of so many places."""
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return height, tokens // height


@torch.inference_mode()
def shares(
    spec: ModelSpec, tokens: int, keep: int, dtype: torch.dtype, device, pairs: int, layers: int = 1
) -> dict[str, dict[str, float]]:
    """For each method that works before the language model: ``step`` and ``prefill``, median CPU milliseconds
    (of the clock on a GPU), and ``share``, the median of their quotients.

    The prefill is that of ``keep`` visual and some text tokens through ``spec.layers`` layers, scaled from a
    slice of ``layers``; a first round is left out.
    """
    hidden = torch.randn(1, tokens, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(device, dtype)
    context = context_of(hidden, grid_of(tokens))
    decoder = random_model(spec, layers, dtype, device).model.language_model
    rest = hidden[:, : keep + TEXT] if keep + TEXT <= tokens else hidden

    def timed(run: Callable[[], object]) -> float:
        start = now(hidden.device)
        run()
        spent = now(hidden.device).since(start)
        return 1000 * (spent.wall if hidden.is_cuda else spent.cpu)

    ways: dict[str, Callable[[], float]] = {
        "": partial(timed, lambda: decoder(inputs_embeds=rest, use_cache=False))
    }
    for name, method in METHODS.items():
        if method.place != LAYERS:
            c = Compression(method=name, keep=keep)
            ways[name] = partial(timed, partial(compress, hidden, None, c, context=context))
    rounds = run_warm_in_turns(ways, pairs)
    scale = spec.layers / layers
    return {
        name: {
            "step": median_interval([one[name] for one in rounds]).median,
            "prefill": scale * median_interval([one[""] for one in rounds]).median,
            "share": median_interval([one[name] / (scale * one[""]) for one in rounds]).median,
        }
        for name in ways
        if name
    }
