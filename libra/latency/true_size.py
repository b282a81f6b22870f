"""A LLaVA-1.5 of true size with random weights: written in the original's format, loaded as any other
checkpoint, one image answered with compression and without."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model

from .. import budget
from ..config import Compression, ConfigError
from ..flops import model_flops
from ..rows import ModelSpec, Row
from ..utils import numbers as units
from ..utils.devices import device_name
from ..utils.provenance import machine
from ..utils.timing import Moment, free_memory, now, paired_ratio, peak_memory, run_in_turns
from .bench import scale_layers
from .random_llava import DTYPE, VOCABULARY, write_checkpoint
from .random_weights import CLIP_L_336, weight_bytes
from .text import bounds

MODELS = ("llava-1.5-7b", "llava-1.5-13b")
SECONDS = ("vision", "prefill", "prefill_cpu", "token")  # of Times


@dataclass(frozen=True)
class Times:
    """Seconds of one answer: the vision tower, the language model's prefill and its CPU time, a decoding step
    (the median); and the visual tokens of each layer, [layer][batch row], where it was compressed."""

    vision: float
    prefill: float
    prefill_cpu: float
    token: float
    visual_tokens: tuple[list[int], ...] = ()

    def seconds(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in SECONDS}


@contextmanager
def _watched(module: torch.nn.Module, device: torch.device) -> Iterator[list[Moment]]:
    """Seconds of each call of a module inside the block."""
    calls, starts = [], []
    hooks = [
        module.register_forward_pre_hook(lambda *_: starts.append(now(device))),
        module.register_forward_hook(lambda *_: calls.append(now(device).since(starts.pop()))),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def answer(
    model, ids: torch.Tensor, pixels: torch.Tensor, compression: Compression | None, tokens: int
) -> Times:
    """Generate ``tokens`` tokens for one prompt with one image, greedily."""
    model.set_compression(compression)
    with (
        # The module in llava's, which runs also where a method reads the tower.
        _watched(model.get_vision_tower().vision_tower, model.device) as vision,
        _watched(model, model.device) as language,
    ):
        new = model.generate(
            ids, images=pixels, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
    if new.shape[1] != tokens or len(language) != tokens:
        raise ValueError(
            f"{tokens} tokens were asked for and {new.shape[1]} came in {len(language)} calls of the model"
        )
    stats = model.compression_stats if compression else {"visual_tokens": ()}
    step = median(call.wall for call in language[1:])
    return Times(vision[0].wall, *language[0], step, tuple(stats["visual_tokens"]))


@dataclass(frozen=True)
class Answers:
    """What is measured: ``pairs`` of answers of ``new`` tokens, to a prompt of one image and ``text`` text
    tokens."""

    pairs: int = 3
    new: int = 8
    text: int = 64


def _prompt(model, image_processor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (1, text + 1) with the image's placeholder in the middle, and the pixels of a random
    image."""
    draw = np.random.default_rng(0)
    edge = image_processor.crop_size["width"]
    image = Image.fromarray(draw.integers(0, 256, (edge, edge, 3), np.uint8))
    pixels = process_images([image], image_processor, model.config).to(model.device, model.dtype)
    words = torch.from_numpy(draw.integers(3, model.config.vocab_size, text))
    ids = torch.cat([words[: text // 2], torch.tensor([IMAGE_TOKEN_INDEX]), words[text // 2 :]])
    return ids[None].to(model.device), pixels


def measure(
    model, image_processor, spec: ModelSpec, c: Compression, answers: Answers, progress: bool = True
) -> dict:
    """All figures of a loaded model: vanilla and compressed in turns after a warm-up of each."""
    ids, pixels = _prompt(model, image_processor, answers.text)
    ways = {
        name: partial(answer, model, ids, pixels, compression, answers.new)
        for name, compression in {"vanilla": None, "compressed": c}.items()
    }
    with tqdm(total=2 + 2 * answers.pairs, unit=" answers", desc="warming up", disable=not progress) as bar:
        memory = {}
        for name, way in ways.items():
            memory[name] = peak_memory(way, model.device)
            bar.update()
        bar.set_description("timing")
        times = run_in_turns(ways, answers.pairs, lambda _: bar.update())
    layers, visual = model.config.num_hidden_layers, model.get_vision_tower().num_patches
    counts = budget.actual(c, layers, [visual])
    seen = [row[0] for row in times[0]["compressed"].visual_tokens]
    if seen != counts:
        raise ValueError(f"the layers saw {seen} visual tokens and the schedule says {counts}")
    sizes = replace(spec, layers=layers)
    flops = {
        name: model_flops(sizes, [answers.text + n for n in tokens])
        for name, tokens in (("vanilla", [visual] * layers), ("compressed", counts))
    }
    ratio = paired_ratio(
        [{name: run.prefill for name, run in pair.items()} for pair in times], "compressed", "vanilla"
    )
    flops_ratio = flops["compressed"] / flops["vanilla"]
    return {
        "visual_tokens": visual,
        "text_tokens": answers.text,
        "new_tokens": answers.new,
        "tokens_per_layer": counts,
        "pairs": [{name: run.seconds() for name, run in pair.items()} for pair in times],
        **{
            f"{part}_seconds": {name: median(getattr(pair[name], part) for pair in times) for name in ways}
            for part in SECONDS
        },
        "flops": {**flops, "ratio": flops_ratio},
        "prefill_ratio": asdict(ratio),
        "ratio_over_flops_ratio": ratio.median / flops_ratio,
        "peak_memory": memory,
    }


def table(data: dict) -> str:
    """The readable form of :func:`report`'s dictionary."""
    ratio, flops = data["prefill_ratio"], data["flops"]
    stages = units.stages(data["tokens_per_layer"])
    place = data["machine"]
    lines = [
        f"model          {data['model']}, {data['layers']} of {data['of_layers']} layers, random weights, "
        f"bfloat16; {units.size(data['checkpoint_bytes'])} on disk, loaded in "
        f"{units.seconds(data['load_seconds'])}",
        f"compression    {data['row']}, {Compression.from_dict(data['compression']).where};"
        f" visual tokens {' → '.join(map(str, stages))}",
        f"prompt         {data['visual_tokens']} visual + {data['text_tokens']} text tokens,"
        f" {data['new_tokens']} new ones",
        f"run            {place['device']}, {place['threads']} thread(s); {len(data['pairs'])} pairs in"
        " turns",
        "",
        f"{'median of':28}{'vanilla':>12}{'compressed':>12}{'ratio':>9}",
    ]
    parts = (
        ("vision tower", data["vision_seconds"], units.seconds),
        ("prefill, language model", data["prefill_seconds"], units.seconds),
        ("  its CPU time", data["prefill_cpu_seconds"], units.seconds),
        ("decoding, a token", data["token_seconds"], units.seconds),
        ("operations, formula", flops, units.operations),
        ("peak memory", data["peak_memory"], units.size),
    )
    for name, values, show in parts:
        first, second = values["vanilla"], values["compressed"]
        lines.append(f"{name:<28}{show(first):>12}{show(second):>12}{second / first:>9.3f}")
    return "\n".join(
        [
            *lines,
            "",
            f"prefill ratio    {ratio['median']:.3f}, paired; {ratio['coverage']:.0%} interval"
            f" {bounds(ratio)}",
            f"over FLOPs ratio {data['ratio_over_flops_ratio']:.3f} ({flops['ratio']:.3f}, all tokens of the"
            " language model)",
        ]
    )


def report(
    folder: Path, row: Row, spec: ModelSpec, layers: int, answers: Answers, vision: dict, device: torch.device
) -> dict:
    """Write a checkpoint of ``layers`` of a model's layers into ``folder``, load it as any other, and measure
    a row's compression on it. ``vision``: the sizes of its CLIP tower. Raises ValueError with one
    sentence."""
    c = scale_layers(row.compression, spec.layers, layers)
    size = write_checkpoint(folder, spec, layers, vision)
    start = now(device)
    _, model, image_processor, _ = load_pretrained_model(
        str(folder), None, folder.name, device=device.type, torch_dtype=DTYPE
    )
    loaded = now(device).since(start).wall
    return {
        "model": spec.name,
        "layers": layers,
        "of_layers": spec.layers,
        "row": row.name,
        "compression": c.to_dict(),
        "checkpoint_bytes": size,
        "load_seconds": loaded,
        **measure(model, image_processor, spec, c, answers),
        "machine": {**machine(), "device": device_name(device), "threads": torch.get_num_threads()},
    }


def run(args, row: Row, spec: ModelSpec, device: torch.device) -> dict:
    """What the command's arguments ask for: :func:`report`'s dictionary. Raises ValueError with one
    sentence."""
    if spec.name not in MODELS:
        raise ConfigError(
            f"{row.path}: model: {spec.name} is not a LLaVA-1.5; take a row of {' or '.join(MODELS)}"
        )
    layers = args.layers or spec.layers
    scale_layers(row.compression, spec.layers, layers)  # before anything long
    if args.keep and args.keep.exists():
        raise ValueError(f"--keep: {args.keep} exists already; give a new folder")
    needed, free = _memory(spec, layers), free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"the model takes {units.size(needed)} of memory and {units.size(free)} are free;"
            " take fewer --layers"
        )
    answers = Answers(args.pairs, args.new_tokens, args.text_tokens)
    with tempfile.TemporaryDirectory(prefix="true-size-") as temporary:
        folder = args.keep or Path(temporary) / "llava-v1.5-random"
        return report(folder, row, spec, layers, answers, CLIP_L_336, device)


def _memory(spec: ModelSpec, layers: int) -> int:
    """Bytes of the weights, the vision tower and a gigabyte to work in."""
    return (
        weight_bytes(spec, layers, DTYPE) + 2 * VOCABULARY * spec.hidden_size * DTYPE.itemsize + 1_700_000_000
    )
