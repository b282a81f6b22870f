"""FastV as its users run it in plain transformers: stock decoder layers, one of which hands out its whole
attention.

Nothing of this package's engine is used, so that it can be timed against it. The scoring layer attends
eagerly, for only so does transformers give the N × N attention that ``output_attentions=True`` asks for;
FastV's code then takes its mean over the heads, the last row of it, the top k visual tokens, and goes on with
hidden states, positions and mask indexed by what is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..budget import kept
from ..config import Compression, ConfigError
from ..engine.masks import attention_kinds
from ..engine.structure import final_norm, position_axes
from ..engine.transformers_api import CausalLMOutputWithPast, cache_argument, create_causal_mask
from ..utils.timing import Moment, now
from .bench import Bench, Prompt, Run

EAGER, MIXED = (
    "eager",
    "mixed",
)  # eager attention in every layer, as FastV's repository; in the scoring layer only


@contextmanager
def attending(config, name: str) -> Iterator[None]:
    """The layers of a configuration attend by another implementation inside the block."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def output_attentions(layer) -> Iterator[list[torch.Tensor]]:
    """What a layer's attention hands out next to its output, (B, H, S, S), as transformers records it."""
    found = []
    hook = layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[1]))
    try:
        yield found
    finally:
        hook.remove()


def check_peer(decoder, c: Compression, prompt: Prompt) -> None:
    """Raises ConfigError where FastV does not match: several layers or pictures, or a decoder that is not a
    plain loop."""
    if len(c.layers) != 1:
        raise ConfigError(
            f"--peer: FastV prunes at one layer and this compression has {len(c.layers)};"
            " name one with --compression-layers, or take configs/llava7b_fastv.yaml"
        )
    if set(prompt.pictures) != {1}:
        raise ConfigError("--peer: FastV knows one picture a row; leave --images out")
    kinds = set(attention_kinds(decoder.config))
    if position_axes(decoder) > 1 or kinds != {"full_attention"}:
        raise ConfigError(
            f"--peer: FastV needs plain positions and full attention, and {type(decoder).__name__} has others"
        )


@dataclass(frozen=True)
class Peer:
    """FastV on a bench's model and prompt, with its compression's one layer, ratio and rounding.

    ``variant``: :data:`EAGER` or :data:`MIXED`.
    """

    bench: Bench
    variant: str

    def prefill(self) -> tuple[CausalLMOutputWithPast, Moment]:
        """The last token's logits (B, 1, V) and the cache, and the seconds."""
        bench, config = self.bench, self.bench.model.get_decoder().config
        elsewhere = "eager" if self.variant == EAGER else config._attn_implementation
        with torch.inference_mode(), attending(config, elsewhere):
            start = now(bench.device)
            output = self._prefill(bench.new_cache())
            return output, now(bench.device).since(start)

    def run(self) -> Run:
        return Run(self.prefill()[1])

    def _prefill(self, cache) -> CausalLMOutputWithPast:
        model = self.bench.model
        decoder, hidden = model.get_decoder(), self.bench.embeds
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask, rotary = self._mask(hidden, cache, 0), decoder.rotary_emb(hidden, positions)

        def through(layer: int) -> torch.Tensor:
            return decoder.layers[layer](
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                **cache_argument(cache),
                use_cache=True,
            )

        (scoring,) = self.bench.compression.layers
        for layer in range(scoring):
            hidden = through(layer)
        with attending(decoder.config, "eager"), output_attentions(decoder.layers[scoring]) as attentions:
            mask = self._mask(hidden, cache, scoring)
            hidden = through(scoring)
        columns = self.kept_columns(attentions.pop())
        hidden = hidden[torch.arange(len(hidden), device=hidden.device)[:, None], columns]
        mask, rotary = self._mask(hidden, cache, scoring + 1), decoder.rotary_emb(hidden, columns)
        for layer in range(scoring + 1, len(decoder.layers)):
            hidden = through(layer)
        logits = model.get_output_embeddings()(final_norm(decoder)(hidden[:, -1:]))
        return CausalLMOutputWithPast(logits=logits, **cache_argument(cache))

    def kept_columns(self, attention: torch.Tensor) -> torch.Tensor:
        """The columns that stay (B, S'), ascending: all text and the top k of the visual tokens, by (B, H, S,
        S)."""
        c, prompt = self.bench.compression, self.bench.prompt
        first, count = prompt.text // 2, prompt.visual
        scores = attention.mean(1)[:, -1]  # (B, S)
        left = kept(count, c.ratio, c.rounding)  # type: ignore[arg-type]  # check_peer wants one number
        best = first + scores[:, first : first + count].topk(left).indices
        columns = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        return torch.cat([columns[:, :first], best, columns[:, first + count :]], 1).sort(1).values

    def _mask(self, hidden: torch.Tensor, cache, layer: int):
        """What the current attention implementation takes for a causal mask."""
        # No position ids: transformers takes the gaps between kept tokens for packed sequences.
        return create_causal_mask(
            config=self.bench.model.get_decoder().config,
            inputs_embeds=hidden,
            attention_mask=None,
            position_ids=None,
            layer_idx=layer,
            **cache_argument(cache),
        )
