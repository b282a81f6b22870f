"""Attention masks of a stage: what a layer's queries see among the keys that its own stage holds.

Four things are called a mask elsewhere; here each has its own name:

* *padding mask* (B, past + S): what the caller gives, 0 for padding;
* *visual mask* (B, S) bool: True at visual tokens;
* *valid* (B, S) bool: the columns of this call that are not padding; a later stage has fewer of them;
* *key mask* (B, K) bool: the same for all keys that a stage's layers hold, those of earlier calls first.

An *attention mask* is what a layer takes, (B, 1, S, K) or whatever its attention implementation wants.
"""

import torch

from .transformers_api import MASKS_OF_LAYER_TYPES, cache_argument

# Layers whose state runs along the sequence, and layers that look at no other token: neither has scores.
RECURRENT, POINTWISE = ("linear_attention", "conv"), ("mlp", "moe")
WITHOUT_SCORES = {*RECURRENT, *POINTWISE}
# Layers that have both an attention and a short convolution, and the kind of their attention.
BOTH = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
# By the kind of attention, transformers' own function that makes its mask.
MASKS = {
    kind: MASKS_OF_LAYER_TYPES[kind] for kind in ("full_attention", "sliding_attention", "chunked_attention")
}

# By the kind of attention, the key of a configuration that says how many columns back it sees.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def attention_kinds(config) -> list[str]:
    """Which keys each decoder layer sees, by the names of transformers' ``layer_types``."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [BOTH.get(kind, kind) for kind in kinds]
    window = getattr(config, "sliding_window", None)
    return ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers


def attention_masks(config, layers: range, hidden, key_mask, position_ids, cache) -> dict:
    """The attention mask of each kind of attention among ``layers``, sized against those layers' keys.

    A mask is sized by the first layer that takes it: layers of one stage hold the same number of keys.
    """
    if isinstance(key_mask, dict):
        return key_mask
    first: dict[str, int] = {}
    kinds = attention_kinds(config)
    for layer in layers:
        first.setdefault(kinds[layer], layer)
    return {
        kind: mask_of(config, kind, layer, hidden, key_mask, position_ids, cache)
        for kind, layer in first.items()
    }


def mask_of(config, kind: str, layer: int, hidden, key_mask, position_ids, cache):
    """The attention mask of a kind of attention, sized against the keys of ``layer``; transformers' own, but
    for the commonest, whose function asks the device whether any row is padded: here that is known, and one
    new token that sees every key needs no mask."""
    plain = kind == "full_attention" and config._attn_implementation == "sdpa" and position_ids is None
    if plain and getattr(config, "is_causal", True):
        if key_mask is None and hidden.shape[1] == 1:
            return None
        if isinstance(key_mask, torch.Tensor) and key_mask.dtype == torch.bool:
            return causal_mask(key_mask, hidden.shape[1])
    return MASKS[kind](
        config=config,
        inputs_embeds=hidden,
        attention_mask=key_mask,
        position_ids=position_ids,
        layer_idx=layer,
        **cache_argument(cache),
    )


def why_gaps_count(config, layers: range) -> str:
    """Why padding between a row's earlier columns and its new ones changes what these layers compute, or an
    empty string: a recurrent state decays there, a convolution sees it, and a window is full earlier."""
    named = getattr(config, "layer_types", None) or attention_kinds(config)
    kinds = {named[i] for i in layers}
    if kinds & {*RECURRENT, *BOTH}:
        return "its layers with a state (linear attention, convolution) would carry"
    sizes = [getattr(config, WINDOWS[kind], None) for kind in kinds & {*WINDOWS}]
    longest = getattr(config, "max_position_embeddings", None)
    if any(size is not None and (longest is None or size < longest) for size in sizes):
        return "the windows of its attention would count"
    return ""


def check_padding_mask(mask, rows: int, past: int, columns: int) -> None:
    """Raise ValueError for a padding mask that is not (rows, past + columns).

    transformers' own masks fill a short one with padding and cut a long one, without a word.
    """
    if isinstance(mask, dict) or mask.ndim != 2:
        found = "one for each kind of attention" if isinstance(mask, dict) else tuple(mask.shape)
        raise ValueError(
            f"compression needs a 2D attention mask (batch, tokens), but got {found}: a ready mask cannot be"
            " shortened; for continuous batching, which makes such masks, detach first"
        )
    wanted = rows, past + columns
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"the attention mask is {tuple(mask.shape)} but must be {wanted}: a column for each token of this"
            f" call ({columns}) and of those before it on the same cache ({past})"
        )


def causal_mask(key_mask: torch.Tensor, queries: int) -> torch.Tensor:
    """(B, 1, S, K) bool: what the newest ``queries`` columns see of the keys that a ``key_mask`` (B, K) says
    are there."""
    keys = key_mask.shape[1]
    before = key_mask.new_ones(queries, keys).tril_(keys - queries)
    return before & key_mask[:, None, None]


def joined(
    past: torch.Tensor | None, new: torch.Tensor | None, lengths: tuple[int, int], like: torch.Tensor
) -> torch.Tensor | None:
    """(B, K) key mask from that of earlier calls and the valid columns of this one; None without padding.

    ``lengths``: how many columns each of them stands for; ``like`` (B, …) gives batch and device.
    """
    if past is None and new is None:
        return None

    def whole(mask, columns: int) -> torch.Tensor:
        return like.new_ones(len(like), columns, dtype=torch.bool) if mask is None else mask

    return torch.cat([whole(mask, columns) for mask, columns in zip((past, new), lengths)], 1)


def step_mask(key_mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mask (B, 1, 1, K) of one new token, which sees every valid key, of the kind of ``like``: bool, or 0
    and a very low number. (With minus infinity a row without any would have no attention at all.)"""
    mask = key_mask.view(len(key_mask), 1, 1, -1)
    if like.dtype == torch.bool:
        return mask
    lowest = max(torch.finfo(like.dtype).min, torch.finfo(torch.float32).min)
    return (~mask * lowest).to(like.dtype)


def shortened_mask(
    whole: torch.Tensor,
    source: torch.Tensor | None,
    valid: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    past: int,
    window: int | None,
) -> torch.Tensor:
    """A mask that the model made itself, say of images that see all of themselves, for fewer columns.

    Args:
        whole: (B or 1, 1, S, K), bool, or 0 and a large negative number; its last S keys are this call's.
        source: (B, S'), the column of this call that each column left comes from; None for all.
        valid: (B, S') bool, False for padding; None without.
        key_mask: (B, past + S') bool, or None; which keys of earlier calls are valid.
        past: how many keys of earlier calls there are: all columns see the valid ones.
        window: how many of the columns left a column sees back, itself included; None for all. Columns that
            see ahead, as images do, also see as far back.

    Returns:
        (B or 1, 1, S', past + S') of the dtype of ``whole``.
    """
    seen = whole if whole.dtype == torch.bool else whole == 0
    length = seen.shape[2]
    seen = seen[..., -length:]
    if source is not None:
        seen = _gathered_block(seen.expand(len(source), -1, -1, -1), source)
    if valid is not None:
        seen = seen & valid[:, None, None]
    earlier = seen.new_ones(*seen.shape[:3], past)
    if key_mask is not None and past:
        earlier = earlier & key_mask[:, None, None, :past]
    if window is not None:
        place = torch.arange(seen.shape[2], device=seen.device)
        ahead = seen & (place > place[:, None])
        block = ahead | ahead.transpose(2, 3) & seen
        near = (place <= place[:, None]) & (place[:, None] - place < window)
        near = near if valid is None else near & valid[:, None, None]
        seen = near | block
        back = place[:, None] + past - torch.arange(past, device=seen.device)
        earlier = earlier & (back < window)
    seen = torch.cat([earlier, seen], -1)
    if whole.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=whole.dtype).masked_fill(~seen, torch.finfo(whole.dtype).min)


def _gathered_block(seen: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """(B, 1, S', S') of the columns ``source`` (B, S') out of (B, 1, S, S)."""
    batch, length = len(source), seen.shape[3]
    rows = seen.gather(2, source[:, None, :, None].expand(-1, 1, -1, length))
    block = rows.gather(3, source[:, None, None].expand(-1, 1, source.shape[1], -1))
    # A compensation token and the last visual token come from the same column. The earlier of the two sees
    # the later one only where the column before that one does.
    same = (source[:, :, None] == source[:, None]).triu(1)[:, None]
    row = torch.arange(batch, device=source.device)[:, None]
    before = seen[row, 0, (source - 1).clamp(min=0), source]
    return torch.where(same, before[:, None, :, None], block)
