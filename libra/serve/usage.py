"""What a compression did to one request, in figures for ``usage.compression``."""

from ..config import Compression


def figures(compression: Compression, stats: dict | None, visual: int, prompt: int, layers: int) -> dict:
    """JSON values for a request's answer.

    Args:
        compression: with its layers, as it ran.
        stats: of the request's prefill, as ``handle.stats`` of :func:`libra.attach` gives them; None where
            there was nothing to compress.
        visual: the prompt's visual tokens.
        prompt: all tokens of the prompt.
        layers: of the decoder.

    Returns:
        ``settings`` (the compression's keys), ``visual_tokens``, ``tokens`` (a list of ``at``, "input" or the
        layer after which the number changed, ``visual`` and ``compensation`` tokens from there on),
        ``average_tokens`` of a layer, ``flops_saved`` (share of the visual tokens' multiply-accumulates,
        §4.1's formula; None for a decoder that it does not describe), ``cache_saved`` (share of the prompt's
        columns in the KV cache) and ``cache_saved_bytes`` (None where it is not known).
    """
    seen = [visual] * layers
    added = [0] * layers
    flops_saved, saved_bytes = 0.0, None
    if stats is not None:
        seen = [int(row[0]) for row in stats["visual_tokens"]]
        new = [sum(map(int, row[:1])) for row in stats["compensation_tokens"]]
        first = sum(stats.get("compensation_at_input", [])[:1])
        added = [first + sum(new[:layer]) for layer in range(layers)]
        ratio = stats["flops_ratio"]
        flops_saved = None if ratio is None else round(1 - float(ratio[0]), 4)
        cache = stats.get("cache")
        saved_bytes = stats["cache_plain"] - cache["total"] if cache else None
    held = [prompt - visual + own + extra for own, extra in zip(seen, added)]
    saved = sum(prompt - one for one in held)
    return {
        "settings": compression.to_dict(),
        "visual_tokens": visual,
        "tokens": _places(visual, seen, added),
        "average_tokens": round(sum(seen) / layers, 2),
        "flops_saved": flops_saved,
        "cache_saved": round(saved / (prompt * layers), 4),
        "cache_saved_bytes": saved_bytes,
    }


def _places(visual: int, seen: list[int], added: list[int]) -> list[dict]:
    """Where the number of tokens changed. What is compressed after the last layer shows nowhere."""
    places, before = [], (visual, 0)
    for layer, now in enumerate(zip(seen, added)):
        if now != before:
            at = "input" if layer == 0 else layer - 1
            places.append({"at": at, "visual": now[0], "compensation": now[1]})
        before = now
    return places
