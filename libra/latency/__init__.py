"""Prefill with compression against the plain model, measured in turns: python -m libra.latency --config FILE
--random-weights

What is timed is a stock Hugging Face LLaVA, from token ids to the last token's logits, as it is and under
:func:`libra.attach`. The image's features are given; vision tower and projector, which compression does not
touch, are timed next to it on demand.

Conventions. Operations are multiply-accumulates, as in the paper: torch's FlopCounterMode counts two for
each, so its figure is halved. Attention counts as 2n²d for its scores and its sum over the values, without
the causal mask's saving, in both. The formula (§4.1) is taken over all tokens of a layer, visual and text;
"all tokens" leaves out compensation tokens and padding, which the counted operations contain. Seconds are the
wall clock's; on a machine that others use too, the process's own CPU time next to them says more. Bytes are
of the KV cache of the whole batch after the prefill.
"""

from ..utils.lazy import lazily

__all__ = ["Bench", "Prompt", "main", "measure", "scale_layers"]

__getattr__ = lazily(
    __name__,
    {
        "Bench": "bench",
        "Prompt": "bench",
        "main": "arguments",
        "measure": "paired",
        "scale_layers": "bench",
    },
)
