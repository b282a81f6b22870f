"""Attention masks of a stage: what a layer's queries see among the keys that its own stage holds.

Four things are called a mask elsewhere; here each has its own name:

* *padding mask* (B, past + S): what the caller gives, 0 for padding;
* *visual mask* (B, S) bool: True at visual tokens;
* *valid* (B, S) bool: the columns of this call that are not padding; a later stage has fewer of them;
* *key mask* (B, K) bool: the same for all keys that a stage's layers hold, those of earlier calls first.

An *attention mask* is what a layer takes, (B, 1, S, K) or whatever its attention implementation wants.
"""

import torch

from .transformers_api import cache_argument, create_causal_mask, create_sliding_window_causal_mask

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def attention_kind(config, layer: int) -> str:
    """Which keys a decoder layer sees, by the names of transformers' ``layer_types``."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def attention_masks(config, layers: range, hidden, key_mask, position_ids, cache) -> dict:
    """The attention mask of each kind of attention among ``layers``, sized against those layers' keys.

    A mask is sized by the first layer that takes it: layers of one stage hold the same number of keys.
    """
    if isinstance(key_mask, dict):
        return key_mask
    first = {}
    for layer in layers:
        first.setdefault(attention_kind(config, layer), layer)
    return {
        kind: MASKS[kind](
            config=config,
            inputs_embeds=hidden,
            attention_mask=key_mask,
            position_ids=position_ids,
            layer_idx=layer,
            **cache_argument(cache),
        )
        for kind, layer in first.items()
    }


def joined(
    past: torch.Tensor | None, new: torch.Tensor | None, lengths: tuple[int, int], like: torch.Tensor
) -> torch.Tensor | None:
    """(B, K) key mask from that of earlier calls and the valid columns of this one; None without padding.

    ``lengths``: how many columns each of them stands for; ``like`` (B, …) gives batch and device.
    """
    if past is None and new is None:
        return None
    whole = [torch.ones(len(like), n, dtype=torch.bool, device=like.device) for n in lengths]
    return torch.cat([ones if mask is None else mask for ones, mask in zip(whole, (past, new))], 1)
