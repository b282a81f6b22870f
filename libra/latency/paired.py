"""All figures of one bench: vanilla, compressed and peers in turns, then what is counted, then compression's
parts."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import median

from tqdm import tqdm

from .. import budget
from ..config import Compression
from ..flops import model_flops
from ..rows import ModelSpec
from ..utils.timing import paired_ratio, peak_memory, run_in_turns, run_warm_in_turns, was_busy
from .bench import Bench, Counted, Run
from .parts import profile_parts
from .peer import EAGER, MIXED, Peer, check_peer

PROFILED = 3  # compressed prefills that are seen part by part
MODES = ("vanilla", "compressed")


def measure(
    bench: Bench,
    spec: ModelSpec,
    pairs: int,
    steps: int = 0,
    peer: bool = False,
    progress: bool = True,
    bar: tqdm | None = None,
) -> dict:
    """All figures, see the package's conventions.

    Args:
        steps: decoding steps to time after each prefill, 0 for none.
        peer: also time FastV as plain transformers runs it, in both variants.
        bar: counts the prefills, :func:`prefills` of them; None for one of its own.

    Raises:
        ConfigError: with ``peer``, where it does not match the bench's compression or model.
    """
    ways = {
        "vanilla": lambda: bench.run(False, steps),
        "compressed": lambda: bench.run(True, steps),
    }
    if peer:
        check_peer(bench.model.get_decoder(), bench.compression, bench.prompt)
        ways |= {variant: Peer(bench, variant).run for variant in (EAGER, MIXED)}
    with (
        nullcontext(bar)
        if bar is not None
        else tqdm(total=prefills(pairs, len(ways)), unit=" prefills", disable=not progress) as bar
    ):
        memory = {}
        for name, run in ways.items():
            bar.set_postfix_str("warming up")
            memory[name] = peak_memory(run, bench.device)
            bar.update()
        bar.set_postfix_str("timing")
        runs = run_in_turns(ways, pairs, lambda _: bar.update())
        counted = {}
        for name in MODES:
            bar.set_postfix_str("counting")
            counted[name] = bench.count(name == "compressed")
            bar.update()
        bar.set_postfix_str("profiling")
        parts = profile_parts(bench, _profiled(pairs))
        bar.update(_profiled(pairs))
    result = {
        **_counted(bench, spec, runs, counted),
        "parts": parts,
        "peak_memory": {name: memory[name] for name in MODES},
        **_timed(bench, runs, steps),
    }
    if peer:
        result["peer"] = {variant: _peer(runs, variant, memory) for variant in (EAGER, MIXED)}
    return result


def _counted(bench: Bench, spec: ModelSpec, runs: list[dict], counted: dict) -> dict:
    """The prefill's times against the FLOPs, the cache, the extra memory and the tokens."""
    prompt = bench.prompt
    tokens = [
        budget.actual(bench.compression, bench.text.num_hidden_layers, [prompt.visual] * count)
        for count in prompt.pictures
    ]
    flops = _flops(bench, spec, counted, tokens)
    return {
        "prefill": _prefill(runs, flops, bench.device.type == "cpu"),
        "flops": flops,
        "cache": _cache(bench, spec, counted, tokens),
        "extra_memory": _extra_memory(counted),
        "tokens_per_layer": {
            "visual": [max(row) for row in zip(*tokens)],
            "measured": bench.stats["visual_tokens"],
            "text": prompt.text,
            "compensation_added_behind": bench.stats["compensation_tokens"],
        },
    }


def _timed(bench: Bench, runs: list[dict], steps: int) -> dict:
    """The vision tower's and the decoding steps' times, where there are any."""

    def compare(seconds: Callable) -> dict:
        return _compare([{name: seconds(run[name]) for name in MODES} for run in runs])

    found: dict = {}
    if bench.views:
        views = sum(bench.prompt.pictures) * bench.views
        found["vision"] = {"views": views, **compare(lambda run: run.vision.wall)}
        found["vision_and_prefill"] = compare(lambda run: run.vision.wall + run.prefill.wall)
    if steps:
        found["decode"] = {"steps": steps, **compare(lambda run: run.token)}
    return found


def prefills(pairs: int, ways: int = 2) -> int:
    """How many prefills :func:`measure` runs."""
    return ways * (pairs + 1) + len(MODES) + _profiled(pairs)


def _profiled(pairs: int) -> int:
    return min(PROFILED, pairs)


def _interval(runs: Sequence[dict[str, float]], name: str, base: str) -> dict:
    return asdict(paired_ratio(runs, name, base))


def _compare(runs: Sequence[dict[str, float]]) -> dict:
    """Medians of seconds, and their paired ratio."""
    return {
        **{f"{name}_seconds": median(run[name] for run in runs) for name in MODES},
        "ratio": _interval(runs, "compressed", "vanilla"),
    }


def plain_layers(bench: Bench, pairs: int) -> dict:
    """What the machine itself makes of shorter sequences: plain prefills at the length of every stage.

    Returns ``lengths``, the visual tokens of each stage; ``seconds`` of a plain prefill at each, the median;
    ``ratio``: what the compressed prefill would take of the plain one if each layer took what a plain layer
    takes at its length, the median over rounds.
    """
    layers, prompt = bench.text.num_hidden_layers, bench.prompt
    counts = budget.actual(bench.compression, layers, [prompt.visual])
    lengths = list(dict.fromkeys([prompt.visual, *counts]))  # the first is the plain model's
    idle = Compression(layers=(0,))  # of benches that only run the plain model
    made = {n: Bench(bench.model, idle, replace(prompt, visual=n)) for n in lengths}
    ways = {n: (lambda one=one: one.run(False).prefill.wall) for n, one in made.items()}
    rounds = run_warm_in_turns(ways, pairs)
    ratios = [sum(one[n] for n in counts) / (layers * one[prompt.visual]) for one in rounds]
    return {
        "lengths": lengths,
        "seconds": [median(one[n] for one in rounds) for n in lengths],
        "ratio": median(ratios),
    }


def _prefill(runs: list[dict[str, Run]], flops: dict, on_cpu: bool) -> dict:
    wall, cpu = ([{name: run[name].prefill[i] for name in run} for run in runs] for i in (0, 1))
    compared = _compare(wall)
    measured = compared["ratio"]["median"]
    return {
        "pairs": [{name: run[name].prefill._asdict() for name in run} for run in runs],
        "busy": on_cpu and any(was_busy([run[name].prefill for run in runs]) for name in MODES),
        **compared,
        "cpu_time": _compare(cpu),
        "ratio_over_flops_ratio": measured / flops["formula"]["ratio"],
        "ratio_over_visual_flops_ratio": measured / flops["visual"]["ratio"],
    }


def _peer(runs: list[dict[str, Run]], variant: str, memory: dict[str, int]) -> dict:
    """One way of FastV, in the same runs: its seconds, this package's over them, and them over the plain
    model's."""
    wall, cpu = ([{name: run[name].prefill[i] for name in run} for run in runs] for i in (0, 1))
    return {
        "seconds": median(run[variant] for run in wall),
        "cpu_seconds": median(run[variant] for run in cpu),
        "compressed_over_peer": _interval(wall, "compressed", variant),
        "compressed_over_peer_cpu_time": _interval(cpu, "compressed", variant),
        "peer_over_vanilla": _interval(wall, variant, "vanilla"),
        "peak_memory": memory[variant],
    }


def _flops(bench: Bench, spec: ModelSpec, counted: dict[str, Counted], tokens: list[list[int]]) -> dict:
    """Operations by the formula, over all tokens and over the visual ones only, and counted. ``tokens``:
    [row][layer]."""
    prompt, sizes = bench.prompt, replace(spec, layers=bench.text.num_hidden_layers)
    plain = [[prompt.visual * count] * sizes.layers for count in prompt.pictures]
    visual = {"vanilla": plain, "compressed": tokens}

    def cost(text: int) -> dict:
        costs = {
            name: sum(model_flops(sizes, [text + n for n in row]) for row in visual[name]) for name in MODES
        }
        return {**costs, "ratio": costs["compressed"] / costs["vanilla"]}

    formula, operations = cost(prompt.text), {name: counted[name].operations for name in MODES}
    return {
        "formula": formula,
        "visual": cost(0),
        "counted": {**operations, "ratio": operations["compressed"] / operations["vanilla"]},
        "counted_over_formula": {name: operations[name] / formula[name] for name in MODES},
    }


def _cache(bench: Bench, spec: ModelSpec, counted: dict[str, Counted], tokens: list[list[int]]) -> dict:
    """Bytes. ``padding_share`` is the share of padding among the columns that the layers compute on and
    hold."""
    prompt, stats = bench.prompt, bench.stats["cache"]
    one_token = 2 * spec.kv_size * bench.embeds.element_size()
    held = {name: counted[name].cache for name in MODES}
    real = sum(prompt.text + count * prompt.visual for count in prompt.pictures)
    return {
        **held,
        "schedule": one_token * sum(prompt.text + n for row in tokens for n in row),
        "compensation": stats["compensation"],
        "padding": stats["padding"],
        "padding_share": {
            "vanilla": 1 - real / (prompt.batch * prompt.length),
            "compressed": stats["padding"] / held["compressed"],
        },
    }


def _extra_memory(counted: dict[str, Counted]) -> dict:
    """The peaks of :mod:`libra.latency.memory`: compression's, the largest of its steps, against one plain
    layer's."""
    steps, layer = counted["compressed"].steps, counted["vanilla"].layer
    peak = counted["compressed"].peak
    names = dict.fromkeys(name for step in steps for name in step.parts)
    return {
        "compression": peak,
        "one_layer": layer,
        "ratio": peak / layer,
        "steps": [step.whole.peak for step in steps],
        "parts": {name: max(step.parts[name].peak for step in steps if name in step.parts) for name in names},
    }
