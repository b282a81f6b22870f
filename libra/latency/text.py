"""The readable form of a measurement."""

from ..config import Compression
from ..places import BEFORE
from ..utils import numbers as units
from ..utils.timing import BUSY
from .parts import PARTS

PEERS = {"eager": "FastV, eager everywhere", "mixed": "FastV, eager at its layer"}


def bounds(interval: dict) -> str:
    return f"[{interval['low']:.3f}, {interval['high']:.3f}]"


def _seconds(part: dict) -> dict:
    return {mode: part[f"{mode}_seconds"] for mode in ("vanilla", "compressed")}


def _line(name: str, values: dict, show, quotient: float | None = None, note: str = "") -> str:
    quotient = values["compressed"] / values["vanilla"] if quotient is None else quotient
    return f"{name:<28}{show(values['vanilla']):>12}{show(values['compressed']):>12}{quotient:>9.3f}{note}"


def _timed(name: str, part: dict, note: str = "") -> str:
    return _line(
        name, _seconds(part), units.seconds, part["ratio"]["median"], f"   {bounds(part['ratio'])}{note}"
    )


def heading(data: dict) -> list[str]:
    """What was measured, with what and on what, but for the prompt."""
    c, device = Compression.from_dict(data["compression"]), data["machine"]
    whole = [layer for layer in data["row_layers"] if layer != BEFORE]
    row = f" (the row's: {', '.join(map(str, whole))} of {data['of_layers']})" if whole else ""
    return [
        f"row            {data['row']}  ({data['config']})",
        f"model          {data['model']}, {data['layers']} of {data['of_layers']} layers, {data['weights']}",
        f"compression    {c.name.replace('method ', '')}, {c.amount}, {c.where}{row}",
        f"run            {data['dtype']}, {data['attention']}, {device['device']}, {device['threads']}"
        " thread(s)",
    ]


def table(data: dict) -> str:
    """A command's dictionary as lines."""
    prefill, flops, cache = data["prefill"], data["flops"], data["cache"]
    interval, prompt, ratio = prefill["ratio"], data["prompt"], flops["formula"]["ratio"]
    given = prompt["visual"] * max(prompt["images"][: prompt["batch"]])
    stages = units.stages([given, *data["tokens_per_layer"]["visual"]])
    *head, run = heading(data)
    mixed = f" × {', '.join(map(str, prompt['images']))} …" if prompt["images"] != (1,) else ""
    lines = [
        *head,
        f"prompt         {prompt['visual']}{mixed} visual + {prompt['text']} text tokens, batch "
        f"{prompt['batch']}; visual tokens {' → '.join(map(str, stages))}",
        f"{run}; {len(prefill['pairs'])} pairs in turns",
        "",
        f"{'':28}{'vanilla':>12}{'compressed':>12}{'ratio':>9}",
        *_times(data),
        _line("operations, all tokens", flops["formula"], units.operations),
        _line("operations, visual tokens", flops["visual"], units.operations),
        _line("operations, counted", flops["counted"], units.operations),
        _line("KV cache", cache, units.size),
        _line("peak memory", data["peak_memory"], units.size),
        "",
        *_peers(data),
        *_parts(data["parts"]),
        "",
        f"prefill ratio over FLOPs ratio   {prefill['ratio_over_flops_ratio']:.3f}"
        f"   ({interval['median']:.3f} over {ratio:.3f}, all tokens)",
        f"  over that of visual tokens     {prefill['ratio_over_visual_flops_ratio']:.3f}"
        f"   ({interval['median']:.3f} over {flops['visual']['ratio']:.3f})",
        *_plain_layers(data),
        f"counted over formula             {flops['counted_over_formula']['vanilla']:.4f} vanilla,"
        f" {flops['counted_over_formula']['compressed']:.4f} compressed",
        f"compressed KV cache              {units.size(cache['compressed'])} = schedule "
        f"{units.size(cache['schedule'])} + compensation tokens {units.size(cache['compensation'])} + "
        f"padding {units.size(cache['padding'])}",
        f"padding                          {cache['padding_share']['vanilla']:.1%} of vanilla's columns,"
        f" {cache['padding_share']['compressed']:.1%} of the compressed ones",
        f"extra memory of compression      {units.size(data['extra_memory']['compression'])} ="
        f" {data['extra_memory']['ratio']:.2f} × one layer's activations,"
        f" {units.size(data['extra_memory']['one_layer'])}",
    ]
    if prefill.get("busy"):
        lines += ["", BUSY]
    return "\n".join(lines)


def _times(data: dict) -> list[str]:
    """Tower, prefill and the selection in it, first token, decoding: those that were measured."""
    prefill, lines = data["prefill"], []
    if "vision" in data:
        lines.append(_timed(f"vision, {data['vision']['views']} picture(s)", data["vision"]))
    lines += [
        _timed("prefill, median", prefill, f", {prefill['ratio']['coverage']:.0%} order-statistic interval"),
        _timed("  its CPU time", prefill["cpu_time"]),
        f"{'  the selection in it':<28}{'–':>12}{units.seconds(data['parts']['sum']):>12}"
        f"{data['parts']['share']:>9.2%}   of the compressed prefill, all parts below",
    ]
    if "plain_layers" in data:
        plain, whole = data["plain_layers"]["ratio"], prefill["vanilla_seconds"]
        times = {"vanilla": whole, "compressed": plain * whole}
        lines.append(_line("  plain layers, same lengths", times, units.seconds))
    if "vision_and_prefill" in data:
        lines.append(_timed("time to first token", data["vision_and_prefill"], ", vision and prefill"))
    if "decode" in data:
        lines.append(_timed(f"decoding, a token ({data['decode']['steps']})", data["decode"]))
    return lines


def _plain_layers(data: dict) -> list[str]:
    """What plain layers take at the lengths of the stages, where they were measured."""
    if "plain_layers" not in data:
        return []
    plain, measured = data["plain_layers"], data["prefill"]["ratio"]["median"]
    return [
        f"plain layers at these lengths    {plain['ratio']:.3f} of vanilla; compressed over that"
        f" {measured / plain['ratio']:.3f}",
    ]


def _peers(data: dict) -> list[str]:
    if "peer" not in data:
        return []
    lines = [
        f"{'FastV in plain transformers':<28}{'seconds':>12}{'peak memory':>14}{'over vanilla':>14}"
        f"   {'this package over it':<22}   by CPU time"
    ]
    for variant, peer in data["peer"].items():
        wall, cpu = peer["compressed_over_peer"], peer["compressed_over_peer_cpu_time"]
        lines.append(
            f"{PEERS[variant]:<28}{units.seconds(peer['seconds']):>12}{units.size(peer['peak_memory']):>14}"
            f"{peer['peer_over_vanilla']['median']:>14.3f}   {wall['median']:.3f} {bounds(wall)}"
            f"   {cpu['median']:.3f} {bounds(cpu)}"
        )
    return [*lines, ""]


def _parts(parts: dict) -> list[str]:
    lines = [
        f"{'compression, by part':28}{'seconds':>12}{'of its prefill':>16}   ({parts['runs']} profiled"
        " prefills, median)"
    ]
    for part, name in PARTS.items():
        if part in parts["seconds"]:
            lines.append(
                f"  {name:<26}{units.seconds(parts['seconds'][part]):>12}{parts['shares'][part]:>16.2%}"
            )
    return [*lines, f"{'together':<28}{units.seconds(parts['sum']):>12}{parts['share']:>16.2%}"]
