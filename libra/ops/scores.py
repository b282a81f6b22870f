"""Eq. 4: the attention of a few query tokens on all keys, beside whatever attention the model itself runs."""

import torch

from .dispatch import fused


@fused
def score_row(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    scaling: float,
    key_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of the chosen query tokens, averaged over the heads; N × N is never built.

    Args:
        query: (B, H, S, D) after rotary embedding.
        key: (B, H_kv, K, D) with H a multiple of H_kv and K ≥ S; the last S keys belong to the queries.
        rows: (B, R) which of the S queries.
        scaling: factor on the scores, 1/√D as a rule.
        key_mask: (B, K or more) bool, False for padding; its last K columns are the keys'. None if there is
            none.
        sliding_window: how many keys back a query sees, itself included; None for all.

    Returns:
        (B, R, K) float32; each row sums to 1.
    """
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    picked = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)).float() * scaling
    grouped = picked.reshape(batch, kv_heads, -1, width)  # the queries that share a key head, side by side
    scores = (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows.shape[1], keys)
    place = torch.arange(keys, device=key.device)
    newest = (rows + keys - length)[:, :, None]
    visible = place <= newest
    if sliding_window is not None:
        visible = visible & (place > newest - sliding_window)
    if key_mask is not None:
        visible = visible & key_mask.bool()[:, None, -keys:]
    return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
