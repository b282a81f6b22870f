"""Pure torch in place of the flash-attention package, for the tests of models that attend with it."""

from dataclasses import dataclass

import pytest
import torch


@dataclass
class Flash:
    """Pure torch in place of the flash-attention package, and what it was asked."""

    asked: list[tuple[str, dict]]

    def attend(self, query, key, value, softmax_scale, causal, window):
        """(S, H, D) of one sequence; the last query belongs to the last key."""
        sharing = query.shape[1] // key.shape[1]
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        key, value = key.repeat_interleave(sharing, 0), value.repeat_interleave(sharing, 0)
        at = torch.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1]
        place = torch.arange(key.shape[1])[None]
        seen = place <= at if causal else torch.ones(len(at), key.shape[1], dtype=torch.bool)
        if window[0] >= 0:
            seen = seen & (place >= at - window[0])
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=softmax_scale
        )
        return out.transpose(0, 1)

    def whole(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        self.asked.append(("whole", {"queries": q.shape[1], "keys": k.shape[1]}))
        return torch.stack([self.attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v)])

    def packed(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        self.asked.append(
            ("packed", {"queries": cu_seqlens_q.diff().tolist(), "keys": cu_seqlens_k.diff().tolist()})
        )
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        parts = [
            self.attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal, window_size)
            for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])
        ]
        return torch.cat(parts)


@pytest.fixture
def flash_reference(monkeypatch) -> Flash:
    import transformers.modeling_flash_attention_utils as flash  # only where it is needed

    reference = Flash([])
    functions = (reference.whole, reference.packed, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    return reference
