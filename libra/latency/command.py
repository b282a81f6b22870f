"""What the command's arguments ask for: what to measure, on which model, and where the figures go."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from llava.model import huggingface

from ..checkpoints import find_checkpoint
from ..config import Compression, ConfigError
from ..rows import ModelSpec, Row, get_model, spec_of
from ..utils import numbers as units
from ..utils.devices import device_name, find_device
from ..utils.files import write_json
from ..utils.provenance import commit, machine, versions
from ..utils.timing import free_memory
from . import true_size
from .arguments import BATCHES, VISUAL
from .bench import Bench, Prompt, scale_layers
from .check import check
from .growth import Grid, Growth
from .paired import measure, plain_layers
from .peer import check_peer
from .plots import picture
from .random_weights import random_model, weight_bytes
from .text import table
from .vision import reads_tower, tower_of, views_of

PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, its sizes, a compression for it, and the visual tokens of its own
    prompts."""

    model: PreTrainedModel
    spec: ModelSpec
    compression: Compression
    registered: ModelSpec

    def bench(self, prompt: Prompt, vision: bool = False) -> Bench:
        views = views_of(self.registered, self.model.config.vision_config, prompt.visual) if vision else 0
        return Bench(self.model, self.compression, prompt, views)


def build(args, row: Row, registered: ModelSpec, prompt: Prompt, device: torch.device) -> Subject:
    """The model and its compression, from the command's arguments. Raises ValueError."""
    dtype = getattr(torch, args.dtype)
    model, spec = None, registered
    if args.checkpoint:
        model, spec = _load(args.checkpoint, dtype, device, args.attn)
        if args.vision and spec.name != "LlavaForConditionalGeneration":
            raise ConfigError(
                f"--vision: how {spec.name} takes its pictures is not known here; leave --vision out"
            )
    layers = args.layers or spec.layers
    c = scale_layers(row.compression, registered.layers, layers)
    if args.compression_layers:
        if row.compression.steps is not None or row.compression.at is not None:
            raise ConfigError(
                f"--compression-layers: {row.compression.name} compresses {row.compression.where}; leave it"
                " out"
            )
        c = replace(row.compression, layers=args.compression_layers)
    c.check_layers(layers)
    if args.random_weights:
        tower = tower_of(spec) if args.vision or reads_tower(c) else None
        needed, free = weight_bytes(spec, layers, dtype), free_memory(device)
        if free is not None and needed > 0.9 * free:
            raise ConfigError(
                f"{layers} layers take {units.size(needed)} and {units.size(free)} are free; take fewer"
                " --layers"
            )
        model = random_model(spec, layers, dtype, device, args.attn, tower)
    if args.peer:
        check_peer(model.get_decoder(), c, prompt)
    return Subject(model, spec, c, registered)


def _load(path: str, dtype, device, attention: str):
    """A checkpoint's model and its sizes. Raises ValueError where it cannot be loaded."""
    path = find_checkpoint(path)
    if not Path(path).is_dir():
        raise ValueError(
            f"the checkpoint {path} is not a folder; give a model's folder in Hugging Face's format"
        )
    model = (
        huggingface.load(AutoModelForImageTextToText, path, dtype=dtype, attn_implementation=attention)
        .to(device)
        .eval()
    )
    return model, spec_of(model.config.get_text_config(), type(model).__name__)


def describe(args, row: Row, subject: Subject, device: torch.device) -> dict:
    """What is measured, but for the prompt."""
    computer = {
        **machine(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    return {
        "row": row.name,
        "config": row.path,
        "model": subject.registered.name,
        "layers": subject.model.config.get_text_config().num_hidden_layers,
        "of_layers": subject.registered.layers,
        "row_layers": list(row.compression.at_depth(subject.registered.layers).layers),
        "weights": "random weights" if args.random_weights else "weights of a checkpoint",
        "compression": subject.compression.to_dict(),
        "dtype": args.dtype,
        "attention": args.attn,
        "machine": computer,
    }


def provenance() -> dict:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": versions(PACKAGES), "commit": commit(), "date": now}


def report(args, row: Row, subject: Subject, prompt: Prompt, device: torch.device) -> dict:
    """Measure one prompt. Raises ValueError with one sentence."""
    bench = subject.bench(prompt, args.vision)
    return {
        **describe(args, row, subject, device),
        "prompt": asdict(prompt),
        **measure(bench, subject.spec, args.pairs, args.decode, args.peer),
        "plain_layers": plain_layers(bench, args.pairs),
        **provenance(),
    }


def run(args) -> int:
    """Do what the arguments ask for; 0, or 1 where a check deviates. Raises ValueError with one sentence."""
    try:
        return _run(args)
    except torch.OutOfMemoryError:
        raise ValueError("the device has not enough memory; take fewer --layers, tokens or rows") from None


def _run(args) -> int:
    if args.check:
        return check(args.update)
    row = Row.from_yaml(args.config)
    registered = get_model(row.model, row.path)
    if not row.compression.compresses:
        raise ConfigError(f"{row.path}: this row compresses nothing; give a row with compression layers")
    device = find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.true_size:
        _show({**true_size.run(args, row, registered, device), **provenance()}, true_size.table, args)
        return 0
    if not (registered.visual_tokens or args.visual_tokens or args.grow):
        raise ConfigError(
            f"{row.model} has as many visual tokens as its image asks for; give a number with --visual-tokens"
        )
    visual = args.visual_tokens[0] if args.visual_tokens else sum(registered.visual_tokens)
    prompt = Prompt(visual, args.text_tokens, args.batch[0] if args.batch else 1, args.images).check()
    subject = build(args, row, registered, prompt, device)
    if args.grow:
        grid = Grid(args.visual_tokens or VISUAL, args.batch or BATCHES, args.max_tokens, args.text_tokens)
        growth = Growth(args.output, grid, args.pairs, describe(args, row, subject, device))
        growth.run(subject.bench, subject.spec, provenance)
        print((args.output / "growth.md").read_text(encoding="utf-8"), end="")
        return 0
    data = report(args, row, subject, prompt, device)
    if args.plot:
        picture(data, args.plot)
    _show(data, table, args)
    return 0


def _show(data: dict, readable: Callable[[dict], str], args) -> None:
    if args.json:
        write_json(args.json, data)
    print(readable(data))
