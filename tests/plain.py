"""A compressed decoder by hand: one sample, no cache, no padding, whole attention matrices; slow, readable,
differentiable.

Who is a target and what the weights are comes from ``compress_spans``, which test_maths.py holds against the
equations.
Everything around it is done here a second time: who scores, which columns stay, positions, later turns of a
chat, labels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from libra import Compression
from libra.budget import keeps
from libra.ops.spans import Spans
from libra.step import compress_spans


@dataclass
class Prefill:
    """The visual tokens that one call brings: the columns of each span, and those whose mean attention scores
    it."""

    spans: list[list[int]]
    askers: list[list[int]]
    key: int = 0  # what pseudo-random selection draws from

    @classmethod
    def of(
        cls, visual: torch.Tensor, scorer: int | list[int], c: Compression, start: int = 0, key: int = 0
    ) -> "Prefill":
        """From a mask (S,) whose first column is column ``start`` of the whole; one scorer for all spans or
        one for each."""
        spans, before = [], None
        for j in visual.nonzero().flatten().tolist():
            if before is None or j > before + 1:
                spans.append([])
            spans[-1].append(start + j)
            before = j
        scorers = scorer if isinstance(scorer, list) else [scorer] * len(spans)
        askers = []
        for one in scorers:
            last = max(span[-1] for span, other in zip(spans, scorers, strict=True) if other == one)
            askers.append(list(range(last + 1, one + 1)) if c.importance == "mean" and one > last else [one])
        return cls(spans, askers, key)


@dataclass
class Outcome:
    """``logits`` (S', vocabulary) of the columns that are left; ``source``: which each was, None for a
    compensation token."""

    logits: torch.Tensor
    source: list[int | None]

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """The summed cross entropy of (S,) labels, each predicted by the column that is now before it."""
        goals = torch.tensor([-100 if s is None else labels[s] for s in self.source])
        return F.cross_entropy(self.logits[:-1], goals[1:], reduction="sum")


def attention(
    decoder, layer, hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention (H, S, S) of a layer on hidden states (S, D), and the values (H, S, d) of its heads."""
    heads, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).view(len(hidden), -1, heads.head_dim).transpose(0, 1)
        for project in (heads.q_proj, heads.k_proj, heads.v_proj)
    )
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], positions[None]))

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    sharing = len(query) // len(key)
    query, key, value = (
        rotate(query),
        rotate(key).repeat_interleave(sharing, 0),
        value.repeat_interleave(sharing, 0),
    )
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    scores = query @ key.transpose(1, 2) / heads.head_dim**0.5
    return scores.masked_fill(future, -torch.inf).softmax(-1), value


def decode(decoder, head, embeds: torch.Tensor, c: Compression, prefills: list[Prefill]) -> Outcome:
    """The logits of one sample (S, D) whose visual tokens came in ``prefills``."""
    hidden, source, positions = embeds, list(range(len(embeds))), torch.arange(len(embeds))
    for i, layer in enumerate(decoder.layers):
        weights, value = attention(decoder, layer, hidden, positions)
        hidden = hidden + layer.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if i in c.layers:
            alpha = weights.mean(0).detach()
            for turn in range(len(prefills)):
                if c.score_layer == "next":  # which holds what earlier turns left
                    alpha = attention(decoder, decoder.layers[i + 1], hidden, positions)[0].mean(0).detach()
                merging, kept, prefills = shorten(hidden.detach(), alpha, c, prefills, turn)
                old = [j for j, _ in kept]
                hidden, alpha = merging @ hidden, alpha[old][:, old]
                source = [None if extra else source[j] for j, extra in kept]
                positions = torch.arange(len(kept)) if c.positions == "compact" else positions[old]
    return Outcome(head(decoder.norm(hidden)), source)


def importance(alpha: torch.Tensor, prefill: Prefill) -> tuple[torch.Tensor, torch.Tensor]:
    """α of a prefill's visual tokens (N,) from the attention (S, S), and which of its score rows each token
    has (N,)."""
    rows = sorted(set(map(tuple, prefill.askers)))
    values = [alpha[askers].mean(0)[span] for span, askers in zip(prefill.spans, prefill.askers, strict=True)]
    owners = [
        rows.index(tuple(askers))
        for span, askers in zip(prefill.spans, prefill.askers, strict=True)
        for _ in span
    ]
    return torch.cat(values), torch.tensor(owners)


def shorten(hidden, alpha, c: Compression, prefills: list[Prefill], turn: int):
    """Compress one prefill: the matrix (S', S) that makes the new columns of the old ones; for each new
    column the old one whose position it takes and whether it is a compensation token; the prefills in new
    numbers."""
    length = len(hidden)
    rows = {j: F.one_hot(torch.tensor(j), length).float() for j in range(length)}
    behind = {}  # the compensation token's row, by the last visual column
    prefill = prefills[turn]
    if prefill.spans:
        visual = [j for span in prefill.spans for j in span]
        values, owners = importance(alpha, prefill)
        lengths = [[len(span) for span in prefill.spans]]
        layout = Spans.build(lengths, keeps(lengths, c), "cpu")
        step = compress_spans(
            hidden[visual][None], values[None], c, layout, owners[None], torch.tensor([prefill.key])
        )
        targets = [visual[t] for t in step.targets[0].tolist()]
        spread = torch.zeros(step.weights.shape[1], length)
        spread[:, visual] = step.weights[0]
        for j in visual:
            rows.pop(j)
        rows.update(zip(targets, spread))
        if step.compensated[0]:
            behind[visual[-1]] = spread[-1]
    matrix, kept, new = [], [], {}
    for j in range(length):
        if j in rows:
            new[j] = len(kept)
            matrix.append(rows[j])
            kept.append((j, False))
        if j in behind:
            matrix.append(behind[j])
            kept.append((j, True))
    shorter = [
        Prefill(
            [[new[j] for j in span if j in new] for span in prefill.spans],
            # An asker that is gone hands over to the column before it.
            [[new[max(j for j in new if j <= asker)] for asker in askers] for askers in prefill.askers],
            prefill.key,
        )
        for prefill in prefills
    ]
    return torch.stack(matrix), kept, shorter
