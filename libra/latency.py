"""Prefill with compression against the plain model, measured in turns: python -m libra.latency --config FILE --random-weights

What is timed is a stock Hugging Face LLaVA, from token ids to the last token's logits, as it is and under :func:`libra.attach`.
The image's features are given: vision tower and projector, which compression does not touch, are left out.

Conventions. Operations are multiply-accumulates, as in the paper: torch's FlopCounterMode counts two for each, so its figure is
halved. Attention counts as 2n²d for its scores and its sum over the values, without the causal mask's saving, in both. The
formula (§4.1) is taken over all tokens of a layer, visual and text; "all tokens" leaves out compensation tokens and padding,
which the counted operations contain. Seconds are the wall clock's; on a machine that others use too, the process's own CPU
time beside them says more. Bytes are of the KV cache of the whole batch after the prefill.
"""

import argparse
import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import ModelOutput

from . import schedule, units
from .attach import attach
from .cli import Parser
from .config import Compression, ConfigError, Row
from .flops import model_flops
from .provenance import commit, machine, versions, write_text
from .random_weights import random_model, weight_bytes
from .registry import ModelSpec, get_model, spec_of
from .timing import Moment, free_memory, in_turns, median_interval, now, peak_memory

EXAMPLES = """examples:
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8
  python -m libra.latency --config configs/llava7b_fastv.yaml --random-weights --layers 8 --visual-tokens 2880 --decode 16
  python -m libra.latency --config configs/llava7b_r67.yaml --checkpoint path/to/llava-1.5-7b-hf --json latency.json"""

DTYPES = ("float32", "float16", "bfloat16")
PACKAGES = ("torch", "transformers", "numpy")
GAP_RUNS = 3  # runs that watch the time between the layers


def scale_layers(c: Compression, of: int, layers: int) -> Compression:
    """A compression of a model of ``of`` layers for a slice of ``layers``, each step at the same fraction of the depth.

    A step behind layer L leaves (L+1)/of of the depth on the longer sequence: 7, 15, 23 of 32 become 1, 3, 5 of 8.

    Raises:
        ConfigError: where two steps would fall on one layer, or one before the first.
    """
    scaled = [round((layer + 1) * layers / of) - 1 for layer in c.layers]
    if len(set(scaled)) < len(scaled) or min(scaled, default=0) < 0:
        raise ConfigError(
            f"layers: {list(c.layers)} of {of} have no places of their own in {layers} layers;"
            " take more --layers, or name them with --compression-layers"
        )
    return replace(c, layers=tuple(scaled))


@dataclass(frozen=True)
class Prompt:
    """``batch`` rows of one length: half of the text, one image of ``visual`` tokens, the other half of the text."""

    visual: int
    text: int = 64
    batch: int = 1

    def places(self) -> torch.Tensor:
        """(B, S) bool, True at the visual tokens."""
        places = torch.zeros(self.batch, self.text + self.visual, dtype=torch.bool)
        places[:, self.text // 2 : self.text // 2 + self.visual] = True
        return places


class Bench:
    """A Hugging Face LLaVA, plain and compressed, on random text with random features in the image's place.

    Args:
        model: what :func:`libra.attach` supports, in evaluation mode.
        compression: for this very model, with layers.
    """

    def __init__(self, model, compression: Compression, prompt: Prompt):
        self.model, self.compression, self.prompt = model, compression, prompt
        self.text = model.config.get_text_config()
        embed, draw = model.get_input_embeddings(), torch.Generator().manual_seed(0)
        self.device = embed.weight.device
        self.places = prompt.places().to(self.device)
        ids = torch.randint(1, self.text.vocab_size, self.places.shape, generator=draw)
        features = torch.randn(prompt.batch * prompt.visual, embed.weight.shape[1], generator=draw)
        with torch.no_grad():
            self.embeds = embed(ids.to(self.device))  # (B, S, D)
            self.embeds[self.places] = features.to(embed.weight) * embed.weight.std()
        self.stats: dict | None = None  # of the last compressed prefill

    @contextmanager
    def mode(self, compressed: bool):
        """A block in which the model is the compressed one, or the plain one."""
        if not compressed:
            yield
            return
        with attach(self.model, self.compression) as handle:
            handle.mark_visual_tokens(self.places)
            yield
            self.stats = handle.stats

    @torch.inference_mode()
    def prefill(self) -> tuple[ModelOutput, Moment]:
        """One prefill, the only one of a :meth:`mode` block: its output and its seconds."""
        start = now(self.device)
        output = self._call(DynamicCache(config=self.text), inputs_embeds=self.embeds)
        return output, now(self.device).since(start)

    def _call(self, cache, **given):
        return self.model(past_key_values=cache, use_cache=True, logits_to_keep=1, **given)

    @torch.inference_mode()
    def decode(self, output, steps: int) -> float:
        """Seconds a decoding step, greedy, after a prefill."""
        start = now(self.device)
        for _ in range(steps):
            output = self._call(output.past_key_values, input_ids=output.logits[:, -1:].argmax(-1))
        return now(self.device).since(start).wall / steps

    def run(self, compressed: bool, steps: int = 0) -> tuple[Moment, float | None]:
        """Seconds of one prefill, and of a decoding step behind it (None without any)."""
        with self.mode(compressed):
            output, seconds = self.prefill()
            return seconds, self.decode(output, steps) if steps else None

    def count(self, compressed: bool) -> tuple[int, int]:
        """Multiply-accumulates of one prefill's decoder stack, counted operation by operation, and its KV cache's bytes."""
        counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops} if _CPU_ATTENTION else {})
        with self.mode(compressed), counter:
            output, _ = self.prefill()
        head = 2 * output.logits.shape[0] * self.text.hidden_size * self.text.vocab_size
        tables = [table for layer in output.past_key_values.layers for table in (layer.keys, layer.values)]
        return (counter.get_total_flops() - head) // 2, sum(table.nbytes for table in tables)

    def between_layers(self) -> float:
        """Seconds from the end of each compression layer to the start of the next layer, summed; the median of a few runs."""

        def note(times: dict[int, float], layer: int):
            def hook(*_):
                times[layer] = now(self.device).wall

            return hook

        layers, runs = self.model.get_decoder().layers, []
        inner = [layer for layer in self.compression.layers if layer + 1 < len(layers)]
        for _ in range(GAP_RUNS):
            starts, ends = {}, {}
            hooks = [layers[layer].register_forward_hook(note(ends, layer)) for layer in inner]
            hooks += [layers[layer + 1].register_forward_pre_hook(note(starts, layer)) for layer in inner]
            try:
                with self.mode(True):
                    self.prefill()
            finally:
                for hook in hooks:
                    hook.remove()
            runs.append(sum(starts[layer] - ends[layer] for layer in inner))
        return median(runs)


# Not every version of torch counts the attention that runs on a CPU.
_CPU_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Of scores and values, for every query, seen by the causal mask or not; the arguments are shapes (B, H, N, D)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def measure(bench: Bench, spec: ModelSpec, pairs: int, steps: int = 0, progress: bool = True) -> dict:
    """All figures, see the module's conventions; ``steps``: decoding steps to time behind each prefill, 0 for none."""
    prompt, c, layers = bench.prompt, bench.compression, bench.text.num_hidden_layers
    with tqdm(total=2 * pairs + 4 + GAP_RUNS, unit=" prefills", disable=not progress) as bar:
        memory = {}
        bar.set_description("warming up")
        for name, compressed in (("vanilla", False), ("compressed", True)):
            memory[name] = peak_memory(lambda compressed=compressed: bench.run(compressed), bench.device)
            bar.update()
        times = [[None, None] for _ in range(pairs)]  # of each pair, vanilla and compressed
        bar.set_description("timing")
        for pair, compressed in in_turns(pairs):
            times[pair][compressed] = bench.run(compressed, steps)
            bar.update()
        bar.set_description("counting")
        counted, held = zip(*(bench.count(compressed) for compressed in (False, True)))
        bar.update(2)
        gaps = bench.between_layers()
        bar.update(GAP_RUNS)

    stats = bench.stats
    tokens = schedule.actual(c, layers, [prompt.visual])
    sizes = replace(spec, layers=layers)
    formula = [
        prompt.batch * model_flops(sizes, [prompt.text + n for n in counts])
        for counts in ([prompt.visual] * layers, tokens)
    ]
    prefills, decoding = [[[run[i] for run in pair] for pair in times] for i in (0, 1)]
    interval, cpu = (median_interval([after[i] / before[i] for before, after in prefills]) for i in (0, 1))
    ratio, one_token = formula[1] / formula[0], 2 * spec.kv_size * bench.embeds.element_size()
    result = {
        "prefill": {
            "pairs": [{"vanilla": before._asdict(), "compressed": after._asdict()} for before, after in prefills],
            **_medians([(before.wall, after.wall) for before, after in prefills]),
            "ratio": asdict(interval),
            "cpu_time": {**_medians([(before.cpu, after.cpu) for before, after in prefills]), "ratio": asdict(cpu)},
            "ratio_over_flops_ratio": interval.median / ratio,
            "between_layers_seconds": gaps,
        },
        "flops": {
            "formula": {"vanilla": formula[0], "compressed": formula[1], "ratio": ratio},
            "counted": {"vanilla": counted[0], "compressed": counted[1], "ratio": counted[1] / counted[0]},
            "counted_over_formula": {"vanilla": counted[0] / formula[0], "compressed": counted[1] / formula[1]},
        },
        "cache": {
            "vanilla": held[0], "compressed": held[1],
            "schedule": one_token * prompt.batch * sum(prompt.text + n for n in tokens),
            "compensation": stats["cache"]["compensation"], "padding": stats["cache"]["padding"],
        },
        "tokens_per_layer": {"visual": tokens, "measured": stats["visual_tokens"], "text": prompt.text,
                             "compensation_added_behind": stats["compensation_tokens"]},
        "peak_memory": memory,
    }
    if steps:
        ratios = median_interval([after / before for before, after in decoding])
        result["decode"] = {"steps": steps, **_medians(decoding), "ratio": asdict(ratios)}
    return result


def _medians(pairs: list) -> dict[str, float]:
    return {f"{mode}_seconds": median(values) for mode, values in zip(("vanilla", "compressed"), zip(*pairs))}


def table(data: dict) -> str:
    """The readable form of :func:`report`'s dictionary."""
    prefill, flops, cache, memory = data["prefill"], data["flops"], data["cache"], data["peak_memory"]
    interval, prompt, ratio = prefill["ratio"], data["prompt"], flops["formula"]["ratio"]
    c = data["compression"]
    stages = [n for i, n in enumerate(data["tokens_per_layer"]["visual"])
              if i == 0 or n != data["tokens_per_layer"]["visual"][i - 1]]
    device = data["machine"]
    lines = [
        f"row            {data['row']}  ({data['config']})",
        f"model          {data['model']}, {data['layers']} of {data['of_layers']} layers, {data['weights']}",
        f"compression    {c.get('method', c['select'] + ' + ' + c['merge'])}, ratio {c['ratio']:.4g}, after layers"
        f" {', '.join(map(str, c['layers']))} (the row's: {', '.join(map(str, data['row_layers']))} of {data['of_layers']})",
        f"prompt         {prompt['visual']} visual + {prompt['text']} text tokens, batch {prompt['batch']};"
        f" visual tokens {' → '.join(map(str, stages))}",
        f"run            {data['dtype']}, {data['attention']}, {device['device']}, {device['threads']} thread(s);"
        f" {len(prefill['pairs'])} pairs in turns",
        "",
        f"{'':28}{'vanilla':>12}{'compressed':>12}{'ratio':>9}",
    ]

    def line(name: str, values: dict, show, quotient: float | None = None, note: str = "") -> None:
        quotient = values["compressed"] / values["vanilla"] if quotient is None else quotient
        lines.append(f"{name:<28}{show(values['vanilla']):>12}{show(values['compressed']):>12}{quotient:>9.3f}{note}")

    def seconds(part: dict) -> dict:
        return {mode: part[f"{mode}_seconds"] for mode in ("vanilla", "compressed")}

    bounds = f"   [{interval['low']:.3f}, {interval['high']:.3f}], {interval['coverage']:.0%} order-statistic interval"
    line("prefill, median", seconds(prefill), units.seconds, interval["median"], bounds)
    cpu = prefill["cpu_time"]
    bounds = f"   [{cpu['ratio']['low']:.3f}, {cpu['ratio']['high']:.3f}]"
    line("  its CPU time", seconds(cpu), units.seconds, cpu["ratio"]["median"], bounds)
    line("operations, formula", flops["formula"], units.operations)
    line("operations, counted", flops["counted"], units.operations)
    line("KV cache", cache, units.size)
    line("peak memory", memory, units.size)
    if "decode" in data:
        part = data["decode"]
        bounds = f"   [{part['ratio']['low']:.3f}, {part['ratio']['high']:.3f}]"
        line(f"decoding, a token ({part['steps']})", seconds(part), units.seconds, part["ratio"]["median"], bounds)
    counted, over, gaps = flops["counted_over_formula"], prefill["ratio_over_flops_ratio"], prefill["between_layers_seconds"]
    return "\n".join([
        *lines, "",
        f"prefill ratio over FLOPs ratio   {over:.3f}   ({interval['median']:.3f} over {ratio:.3f})",
        f"counted over formula             {counted['vanilla']:.4f} vanilla, {counted['compressed']:.4f} compressed",
        f"compressed KV cache              {units.size(cache['compressed'])} = schedule {units.size(cache['schedule'])}"
        f" + compensation tokens {units.size(cache['compensation'])} + padding {units.size(cache['padding'])}",
        f"compression between the layers   {units.seconds(gaps)}, {gaps / prefill['compressed_seconds']:.2%} of its prefill"
        " (the score rows are inside the layers)",
    ])


def whole_from(least: int):
    """An argparse type: whole numbers from ``least`` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} up")
        return int(text)

    return parse


def _layer_list(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of layers; write for example 1,3,5")
    return tuple(int(part) for part in parts)


def parser() -> Parser:
    parser = Parser(
        prog="python -m libra.latency", epilog=EXAMPLES,
        description="Prefill of the decoder, compressed against plain, in turns, beside what the FLOPs promise.",
    )
    add, whole = parser.add_argument, whole_from(1)
    add("--config", required=True, metavar="FILE", help="a row's YAML file, from configs/")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--random-weights", action="store_true", help="the row's model at its true width with random weights")
    weights.add_argument("--checkpoint", metavar="DIR", help="a model in Hugging Face's format that libra.attach supports")
    add("--layers", type=whole, metavar="N",
        help="with --random-weights: only N layers; the row's compression layers move to the same fraction of the depth")
    add("--compression-layers", type=_layer_list, metavar="A,B", help="compress after these layers instead of the row's")
    add("--visual-tokens", type=whole, metavar="N", help="tokens of the image (default: the model's own number)")
    add("--text-tokens", type=whole_from(2), default=64, metavar="N",
        help="half before, half behind the image (default %(default)s)")
    add("--batch", type=whole, default=1, metavar="N", help="equal rows (default %(default)s)")
    add("--pairs", type=whole, default=9, metavar="N", help="vanilla and compressed, in turns (default %(default)s)")
    add("--decode", type=whole_from(0), default=0, metavar="N", help="also time N decoding steps behind every prefill")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default %(default)s)")
    add("--attn", default="sdpa", help="attention: sdpa, eager, flash_attention_2 (default %(default)s)")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--threads", type=whole, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    return parser


def build(args, row: Row, spec: ModelSpec, device: torch.device) -> tuple[Bench, ModelSpec]:
    """The bench of the command's arguments, and the sizes of the model in it. Raises ValueError."""
    dtype = getattr(torch, args.dtype)
    if not row.compression.layers:
        raise ConfigError(f"{row.path}: this row compresses nothing; give a row with compression layers")
    if args.layers and not args.random_weights:
        raise ConfigError("--layers cuts a model of random weights; leave it out, or use --random-weights")
    if args.random_weights:
        layers = args.layers or spec.layers
    else:
        model, spec = _load(args.checkpoint, dtype, device, args.attn)
        layers = spec.layers
    visual = args.visual_tokens or sum(get_model(row.model).visual_tokens)
    if not visual:
        raise ConfigError(f"{spec.name} has as many visual tokens as its image asks for; give a number with --visual-tokens")
    if args.compression_layers:
        c = replace(row.compression, layers=args.compression_layers)
    else:
        c = scale_layers(row.compression, get_model(row.model).layers, layers)
    c.check_layers(layers)
    if args.random_weights:
        needed, free = weight_bytes(spec, layers, dtype), free_memory(device)
        if free is not None and needed > 0.9 * free:
            raise ConfigError(f"{layers} layers take {units.size(needed)} and {units.size(free)} are free; take fewer --layers")
        model = random_model(spec, layers, dtype, device, args.attn)
    return Bench(model, c, Prompt(visual, args.text_tokens, args.batch)), spec


def _load(path: str, dtype, device, attention: str):
    """A checkpoint's model and its sizes. Raises ValueError where it cannot be loaded."""
    if not Path(path).is_dir():
        raise ValueError(f"the checkpoint {path} is no folder; give a model's folder in Hugging Face's format")
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention).to(device).eval()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, spec_of(model.config.get_text_config(), type(model).__name__)


def report(args) -> dict:
    """Measure what the command's arguments ask for. Raises ValueError with one sentence."""
    row = Row.from_yaml(args.config)
    registered = get_model(row.model, row.path)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: {args.device} is no device; write cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    bench, spec = build(args, row, registered, device)
    computer = {**machine(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads()}
    return {
        "row": row.name, "config": row.path, "model": registered.name, "layers": bench.text.num_hidden_layers,
        "of_layers": registered.layers, "row_layers": list(row.compression.layers),
        "weights": "random weights" if args.random_weights else "weights of a checkpoint",
        "compression": bench.compression.to_dict(), "prompt": asdict(bench.prompt), "dtype": args.dtype,
        "attention": args.attn, **measure(bench, spec, args.pairs, args.decode),
        "machine": computer, "versions": versions(PACKAGES), "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        if args.json and args.json.is_dir():
            raise ValueError(f"--json: {args.json} is a folder; give a file's name")
        data = report(args)
        if args.json:
            write_text(args.json, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    except torch.OutOfMemoryError:
        options.error("the device has not enough memory; take fewer --layers, tokens or rows")
    except (ValueError, OSError) as error:
        options.error(str(error))
    print(table(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
