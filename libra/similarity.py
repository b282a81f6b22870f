"""Cosine similarity of many tokens to many others, a piece at a time: what eq. 5 and Turbo's redundancy ask for."""

import torch
import torch.nn.functional as F

from .fuse import fused

PIECE = 1 << 24  # similarities held at a time: 64 MB


@fused
def most_similar(
    tokens: torch.Tensor,
    others: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    itself: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the one of the others that is most similar to it; the first of several.

    Args:
        tokens: (B, Q, D).
        others: (B, K, D).
        groups: (B, Q) and (B, K) integers; a token is compared with those of its own group only. None compares all.
        itself: False where both are the same tokens and none is to be compared with itself.

    Returns:
        the similarities (B, Q) float32, -inf where a token has nobody to be compared with, and the places (B, Q).
    """
    batch, count, _ = tokens.shape
    # The tokens' own lengths change nothing in whom they are most similar to.
    keys = F.normalize(others.float(), dim=-1).transpose(1, 2)  # (B, D, K)
    best = torch.empty(batch, count, device=tokens.device)
    place = torch.empty(batch, count, dtype=torch.long, device=tokens.device)
    step = max(1, PIECE // max(1, batch * others.shape[1]))
    for start in range(0, count, step):
        piece = tokens[:, start : start + step].float()
        scores = piece @ keys  # (B, q, K)
        if groups is not None:
            apart = groups[0][:, start : start + step, None] != groups[1][:, None]
            scores = scores.masked_fill_(apart, -torch.inf)
        if not itself:
            scores.diagonal(start, 1, 2).fill_(-torch.inf)
        found = scores.argmax(-1, keepdim=True)
        lengths = torch.linalg.vector_norm(piece, dim=-1).clamp(min=1e-12)
        best[:, start : start + step] = scores.gather(-1, found)[..., 0] / lengths
        place[:, start : start + step] = found[..., 0]
    return best, place
