"""The command line: what to measure, on which model, and where the figures go."""

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .. import units
from ..cli import Parser, whole_from, wholes_from
from ..config import Compression, ConfigError, Row
from ..drawing import figure_class
from ..files import write_text
from ..provenance import commit, machine, versions
from ..random_weights import random_model, weight_bytes
from ..registry import ModelSpec, get_model, spec_of
from ..timing import free_memory
from .bench import Bench, Prompt, scale_layers
from .check import check
from .growth import BATCHES, MAX_TOKENS, VISUAL, Growth
from .paired import measure
from .peer import check_peer
from .plots import picture
from .text import table
from .vision import tower_of, views_of

EXAMPLES = """examples:
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8
  python -m libra.latency --config configs/llava7b_fastv.yaml --random-weights --layers 8 --peer --plot fastv.png
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8 --vision --decode 16
  python -m libra.latency --config configs/llava7b_r67.yaml --checkpoint path/to/llava-1.5-7b-hf --json latency.json
  python -m libra.latency --config configs/llava7b_r50.yaml --random-weights --layers 8 --grow --output growth
  python -m libra.latency --check"""

DTYPES = ("float32", "float16", "bfloat16")
PACKAGES = ("torch", "transformers", "numpy")


def parser() -> Parser:
    parser = Parser(
        prog="python -m libra.latency", epilog=EXAMPLES,
        description="Prefill of the decoder, compressed against plain, in turns, beside what the FLOPs promise.",
    )
    add, whole, wholes = parser.add_argument, whole_from(1), wholes_from(1)
    add("--config", metavar="FILE", help="a row's YAML file, from configs/")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--random-weights", action="store_true", help="the row's model at its true width with random weights")
    weights.add_argument("--checkpoint", metavar="DIR", help="a model in Hugging Face's format that libra.attach supports")
    add("--layers", type=whole, metavar="N",
        help="with --random-weights: only N layers; the row's compression layers move to the same fraction of the depth")
    add("--compression-layers", type=wholes_from(0), metavar="A,B", help="compress after these layers instead of the row's")
    add("--visual-tokens", type=wholes, metavar="N",
        help="tokens of the image (default: the model's own number); with --grow a list")
    add("--text-tokens", type=whole_from(2), default=64, metavar="N",
        help="half before, half behind the image (default %(default)s)")
    add("--batch", type=wholes, metavar="N", help="rows (default 1); with --grow a list")
    add("--images", type=wholes_from(0), default=(1,), metavar="A,B",
        help="pictures of each row, over and over, such as 0,1,2; shorter rows are padded (default 1)")
    add("--pairs", type=whole, default=9, metavar="N", help="vanilla and compressed, in turns (default %(default)s)")
    add("--decode", type=whole_from(0), default=0, metavar="N", help="also time N decoding steps behind every prefill")
    add("--vision", action="store_true", help="also time the vision tower and the projector, at true size")
    add("--peer", action="store_true",
        help="also time FastV as plain transformers runs it, with output_attentions, at the row's one layer and ratio")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default %(default)s)")
    add("--attn", default="sdpa", help="attention: sdpa, eager, flash_attention_2 (default %(default)s)")
    add("--device", help="such as cpu or cuda:0 (default: the GPU where there is one)")
    add("--threads", type=whole, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--json", type=Path, metavar="FILE", help="also write everything there")
    add("--plot", type=Path, metavar="FILE", help="also draw it, as PNG")
    grow = parser.add_argument_group("how cost grows")
    grow.add_argument("--grow", action="store_true",
                      help=f"visual tokens {', '.join(map(str, VISUAL))} × batch {', '.join(map(str, BATCHES))}, one file"
                      " a cell; a run that was stopped goes on")
    grow.add_argument("--output", type=Path, metavar="DIR", help="with --grow: where cells, growth.md and growth.png go")
    grow.add_argument("--max-tokens", type=whole, default=MAX_TOKENS, metavar="N",
                      help="with --grow: leave cells with more visual tokens in all their rows empty (default %(default)s)")
    guard = parser.add_argument_group("regression guard")
    guard.add_argument("--check", action="store_true",
                       help="compare a small slice's operations, bytes and time ratios with the committed ones; exit status 1"
                       " if they deviate")
    guard.add_argument("--update", action="store_true", help="with --check: write this machine's figures instead")
    return parser


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, its sizes, a compression for it, and the visual tokens of its own prompts."""

    model: PreTrainedModel
    spec: ModelSpec
    compression: Compression
    registered: ModelSpec

    def bench(self, prompt: Prompt, vision: bool = False) -> Bench:
        views = views_of(self.registered, self.model.config.vision_config, prompt.visual) if vision else 0
        return Bench(self.model, self.compression, prompt, views)


def check_arguments(args) -> None:
    """Raises ValueError for what does not go together."""
    if args.update and not args.check:
        raise ValueError("--update rewrites the figures of --check; give both")
    if args.check:
        return
    if not args.config:
        raise ValueError("the argument --config is required")
    if not args.random_weights and not args.checkpoint:
        raise ValueError("one of the arguments --random-weights --checkpoint is required")
    if args.layers and not args.random_weights:
        raise ConfigError("--layers cuts a model of random weights; leave it out, or use --random-weights")
    if args.grow:
        if not args.output:
            raise ValueError("--grow writes a file a cell; name a folder with --output")
        figure_class()  # before anything long: a picture comes in the end
        for name in ("json", "plot", "peer", "vision", "decode", "images"):
            if getattr(args, name) != parser().get_default(name):
                raise ValueError(f"--{name} does not go with --grow, which measures the prefill; leave it out")
        return
    if args.output:
        raise ValueError("--output is the folder of --grow; give both, or --json for one file")
    for name in ("visual_tokens", "batch"):
        if len(getattr(args, name) or ()) > 1:
            raise ValueError(f"--{name.replace('_', '-')} takes one number, and a list only with --grow")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json: {args.json} is a folder; give a file's name")
    if args.plot:
        figure_class()
        if args.plot.suffix.lower() != ".png" or args.plot.is_dir():
            raise ValueError(f"--plot: {args.plot} is no picture's name; give a file that ends in .png")


def build(args, row: Row, registered: ModelSpec, prompt: Prompt, device: torch.device) -> Subject:
    """The model and its compression, from the command's arguments. Raises ValueError."""
    dtype = getattr(torch, args.dtype)
    if not row.compression.layers:
        raise ConfigError(f"{row.path}: this row compresses nothing; give a row with compression layers")
    model, spec = None, registered
    if args.checkpoint:
        model, spec = _load(args.checkpoint, dtype, device, args.attn)
        if args.vision and spec.name != "LlavaForConditionalGeneration":
            raise ConfigError(f"--vision: how {spec.name} takes its pictures is not known here; leave --vision out")
    layers = args.layers or spec.layers
    c = replace(row.compression, layers=args.compression_layers) if args.compression_layers else scale_layers(
        row.compression, registered.layers, layers
    )
    c.check_layers(layers)
    if args.random_weights:
        tower = tower_of(spec) if args.vision else None
        needed, free = weight_bytes(spec, layers, dtype), free_memory(device)
        if free is not None and needed > 0.9 * free:
            raise ConfigError(f"{layers} layers take {units.size(needed)} and {units.size(free)} are free; take fewer --layers")
        model = random_model(spec, layers, dtype, device, args.attn, tower)
    if args.peer:
        check_peer(model.get_decoder(), c, prompt)
    return Subject(model, spec, c, registered)


def _load(path: str, dtype, device, attention: str):
    """A checkpoint's model and its sizes. Raises ValueError where it cannot be loaded."""
    if not Path(path).is_dir():
        raise ValueError(f"the checkpoint {path} is no folder; give a model's folder in Hugging Face's format")
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention).to(device).eval()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, spec_of(model.config.get_text_config(), type(model).__name__)


def _device(args) -> torch.device:
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: {args.device} is no device; write cpu or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    return device


def describe(args, row: Row, subject: Subject, device: torch.device) -> dict:
    """What is measured, but for the prompt."""
    computer = {**machine(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads()}
    return {
        "row": row.name, "config": row.path, "model": subject.registered.name,
        "layers": subject.model.config.get_text_config().num_hidden_layers,
        "of_layers": subject.registered.layers, "row_layers": list(row.compression.layers),
        "weights": "random weights" if args.random_weights else "weights of a checkpoint",
        "compression": subject.compression.to_dict(), "dtype": args.dtype, "attention": args.attn, "machine": computer,
    }


def provenance() -> dict:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions(PACKAGES), "commit": commit(), "date": now}


def report(args, row: Row, subject: Subject, prompt: Prompt, device: torch.device) -> dict:
    """Measure one prompt. Raises ValueError with one sentence."""
    bench = subject.bench(prompt, args.vision)
    return {
        **describe(args, row, subject, device), "prompt": asdict(prompt),
        **measure(bench, subject.spec, args.pairs, args.decode, args.peer), **provenance(),
    }


def run(args) -> int:
    """What the arguments ask for; 0, or 1 where a check deviates. Raises ValueError with one sentence."""
    check_arguments(args)
    if args.check:
        return check(args.update)
    row = Row.from_yaml(args.config)
    registered = get_model(row.model, row.path)
    if not (registered.visual_tokens or args.visual_tokens or args.grow):
        raise ConfigError(f"{row.model} has as many visual tokens as its image asks for; give a number with --visual-tokens")
    device = _device(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    visual = args.visual_tokens[0] if args.visual_tokens else sum(registered.visual_tokens)
    prompt = Prompt(visual, args.text_tokens, args.batch[0] if args.batch else 1, args.images).check()
    subject = build(args, row, registered, prompt, device)
    if args.grow:
        growth = Growth(
            args.output, args.visual_tokens or VISUAL, args.batch or BATCHES, args.max_tokens, args.text_tokens, args.pairs,
            describe(args, row, subject, device),
        )
        growth.run(subject.bench, subject.spec, provenance)
        print((args.output / "growth.md").read_text(encoding="utf-8"), end="")
        return 0
    data = report(args, row, subject, prompt, device)
    if args.json:
        write_text(args.json, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    if args.plot:
        picture(data, args.plot)
    print(table(data))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 on success, 1 where --check deviates, SystemExit with status 2 after one `error: …` line."""
    options = parser()
    args = options.parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        options.error("stopped" + ("; the finished cells are kept, and the same command goes on" if args.grow else ""))
    except torch.OutOfMemoryError:
        options.error("the device has not enough memory; take fewer --layers, tokens or rows")
    except (ValueError, OSError) as error:
        options.error(str(error))
