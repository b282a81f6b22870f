"""Attention for training many short texts on one image: all see the image, none sees another.

A row is ``[prefix | slot 1 | slot 2 | …]`` with slots of one fixed length, each of one text or of several.
The prefix is causal; a text attends to the whole prefix and, causally, to itself, exactly as if it stood
by itself after the prefix. Cheaper than the equal block mask over the whole row, because scores between two
slots are never computed.
"""

import torch

from libra.engine.transformers_api import AttentionInterface, AttentionMaskInterface

NAME = "shared_prefix"


def shared_prefix_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    text_length: int,
    prefix_length: int,
    text_ids=None,
    **kwargs,
):
    """Query, key and value (B, H, prefix_length + n · text_length, D) to the output (B, same length, H, D).

    ``text_ids`` (B, n, text_length): where several texts share a slot, which of them a token belongs to.
    """
    batch, heads, length, width = query.shape
    texts = (length - prefix_length) // text_length

    def split(x):
        prefix, rest = x.split([prefix_length, length - prefix_length], 2)
        return prefix, rest.reshape(batch, heads, texts, text_length, width)

    (q0, q1), (k0, k1), (v0, v1) = split(query * scaling), split(key), split(value)

    half = prefix_length // 2  # the first half of the prefix never needs the second half's keys
    parts = []
    for start, stop in ((0, half), (half, prefix_length)):
        scores = q0[:, :, start:stop] @ k0[:, :, :stop].transpose(-1, -2)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).triu(start + 1)
        parts.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v0[:, :, :stop])

    to_prefix = (q1.flatten(2, 3) @ k0.transpose(-1, -2)).view(
        batch, heads, texts, text_length, prefix_length
    )
    future = torch.ones(text_length, text_length, dtype=torch.bool, device=query.device).triu(1)
    if text_ids is not None:
        future = (future | (text_ids[..., :, None] != text_ids[..., None, :]))[:, None]
    to_self = (q1 @ k1.transpose(-1, -2)).masked_fill(future, float("-inf"))
    weights = torch.cat([to_prefix, to_self], -1).softmax(-1)
    w0, w1 = weights.split([prefix_length, text_length], -1)
    parts.append((w0.flatten(2, 3) @ v0) + (w1 @ v1).flatten(2, 3))
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the function above holds the whole mask
