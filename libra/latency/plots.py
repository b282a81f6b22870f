"""Pictures of what was measured next to what was promised."""

from collections.abc import Mapping
from pathlib import Path

from ..utils.plotting import MARKERS, new_figure, save
from .parts import PARTS
from .text import PEERS


def bars(data: dict) -> dict[str, tuple[float, float, dict | None]]:
    """Of each bar its measured ratio, the promised one and the measured one's interval, None for what is
    counted."""
    flops, cache, prefill = data["flops"], data["cache"], data["prefill"]
    promised = flops["formula"]["ratio"]
    found = {
        "prefill": (prefill["ratio"]["median"], promised, prefill["ratio"]),
        "its CPU time": (prefill["cpu_time"]["ratio"]["median"], promised, prefill["cpu_time"]["ratio"]),
        "operations": (flops["counted"]["ratio"], promised, None),
        "KV cache": (cache["compressed"] / cache["vanilla"], cache["schedule"] / cache["vanilla"], None),
    }
    for variant, peer in data.get("peer", {}).items():
        found[PEERS[variant].replace(", ", ",\n")] = (
            peer["peer_over_vanilla"]["median"],
            promised,
            peer["peer_over_vanilla"],
        )
    return found


def picture(data: dict, path: Path) -> None:
    """Measured against promised ratios, and the compression's parts. Raises ValueError if matplotlib is
    missing."""
    found, parts = bars(data), data["parts"]
    figure = new_figure(6 + 1.2 * len(found), 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(len(found), 3.5))
    _draw_ratios(left, found, data["flops"]["visual"]["ratio"])
    _draw_parts(right, parts)
    prompt = data["prompt"]
    figure.suptitle(
        f"{data['row']}: {data['model']}, {data['layers']} of {data['of_layers']} layers, "
        f"{prompt['visual']} visual + {prompt['text']} text tokens, batch {prompt['batch']}, "
        f"{data['dtype']}, {data['machine']['device']}",
        fontsize=10,
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    save(figure, path)


def _draw_ratios(axes, found: dict[str, tuple[float, float, dict | None]], visual: float) -> None:
    """Two bars each of :func:`bars`, and a line at the ratio of the visual tokens' FLOPs."""
    places, width = range(len(found)), 0.38
    axes.bar(
        [x - width / 2 for x in places],
        [promise for _, promise, _ in found.values()],
        width,
        color="0.75",
        label="promised: FLOPs of all tokens, schedule",
    )
    axes.bar(
        [x + width / 2 for x in places],
        [value for value, _, _ in found.values()],
        width,
        color="C0",
        label="measured",
    )
    for x, (value, _, interval) in zip(places, found.values()):
        top = interval["high"] if interval else value
        axes.annotate(
            f"{value:.3f}", (x + width / 2, top), (0, 3), textcoords="offset points", ha="center", fontsize=7
        )
        if interval:
            errors = [[value - interval["low"]], [interval["high"] - value]]
            axes.errorbar(x + width / 2, value, yerr=errors, color="black", capsize=3)
    axes.axhline(
        visual,
        color="0.4",
        linewidth=1,
        linestyle=":",
        label=f"FLOPs of the visual tokens only, {visual:.3f}",
    )
    axes.set_xticks(list(places), list(found), fontsize=8)
    axes.set_ylabel("compressed over vanilla")
    axes.margins(y=0.3)
    axes.legend(fontsize=7, loc="upper right")


def _draw_parts(axes, parts: dict) -> None:
    """A bar for the share of each part of the compression."""
    names = [part for part in PARTS if part in parts["shares"]][::-1]
    shares = axes.barh(
        [PARTS[part] for part in names], [100 * parts["shares"][part] for part in names], color="C1"
    )
    axes.bar_label(shares, fmt="%.2f", fontsize=7, padding=2)
    axes.margins(x=0.2)
    axes.set(
        xlabel="% of the compressed prefill", title=f"compression by part, together {parts['share']:.2%}"
    )
    axes.title.set_fontsize(9)


def growth_picture(cells: Mapping[tuple[int, int], dict], path: Path) -> None:
    """Measured over predicted ratio and compression's share against the visual tokens, a line for each batch
    size.

    ``cells``: of each (visual tokens, batch) what was measured. Raises ValueError if matplotlib is missing.
    """
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    sizes = sorted({visual for visual, _ in cells})
    for number, batch in enumerate(sorted({batch for _, batch in cells})):
        own = [cells[visual, batch] for visual in sizes if (visual, batch) in cells]
        tokens = [cell["prompt"]["visual"] for cell in own]
        style = dict(color=f"C{number % 10}", marker=MARKERS[number % len(MARKERS)], markersize=5)
        ratios = [cell["prefill"]["ratio"] for cell in own]
        promised = [cell["flops"]["formula"]["ratio"] for cell in own]
        over = [ratio["median"] / flops for ratio, flops in zip(ratios, promised)]
        errors = [
            [(ratio["median"] - ratio["low"]) / flops for ratio, flops in zip(ratios, promised)],
            [(ratio["high"] - ratio["median"]) / flops for ratio, flops in zip(ratios, promised)],
        ]
        left.errorbar(tokens, over, yerr=errors, capsize=2, linewidth=1, label=f"batch {batch}", **style)
        right.plot(
            tokens,
            [100 * cell["parts"]["share"] for cell in own],
            linewidth=1,
            label=f"batch {batch}",
            **style,
        )
        similarity = [100 * cell["parts"]["shares"].get("similarity", 0.0) for cell in own]
        right.plot(tokens, similarity, linestyle=":", linewidth=1, **style)
    left.axhline(1, color="0.7", linewidth=1, linestyle="--", zorder=0)
    left.set(ylabel="prefill ratio, measured over promised", title="What the FLOPs of all tokens promise")
    right.plot([], [], ":", color="0.4", label="similarity only")
    right.set(ylabel="% of the compressed prefill", title="Compression's own time", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel("visual tokens of a row")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, path)
