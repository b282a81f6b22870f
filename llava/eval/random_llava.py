"""A LLaVA-1.5 of random weights: written in the original's format, loaded as any other, compressed, timed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from libra import Compression, budget
from libra.config import ConfigError
from libra.flops import model_flops
from libra.latency import scale_layers
from libra.latency.random_weights import CLIP_L_336, HEAD, RandomWeights, weight_bytes
from libra.rows import ModelSpec, Row, get_model
from libra.utils import numbers as units
from libra.utils.files import new_folder, write_text
from libra.utils.provenance import REPOSITORY, commit, machine, versions
from libra.utils.timing import Moment, free_memory, in_turns, median_interval, now, peak_memory

from ..constants import IMAGE_TOKEN_INDEX
from ..mm_utils import process_images
from ..model import LlavaConfig, LlavaLlamaForCausalLM
from ..model.builder import load_pretrained_model

MODELS = ("llava-1.5-7b", "llava-1.5-13b")
VOCABULARY = 32000
SHARD = 2_000_000_000  # bytes
TOKENIZER = REPOSITORY / "mini" / "checkpoint"  # any will do: the prompt is made of ids
DTYPE = torch.bfloat16


def model_config(spec: ModelSpec, layers: int, vision: dict, tower: str) -> LlavaConfig:
    """The configuration of a published LLaVA-1.5, cut to ``layers`` layers."""
    config = LlavaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=spec.hidden_size // HEAD,
        num_key_value_heads=spec.kv_size // HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.architectures, config.dtype = ["LlavaLlamaForCausalLM"], DTYPE
    for name, value in dict(
        mm_vision_tower=tower,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio="pad",
        tokenizer_model_max_length=2048,
        tokenizer_padding_side="right",
        use_mm_proj=True,
    ).items():
        setattr(config, name, value)
    return config


def write_checkpoint(
    folder: Path, spec: ModelSpec, layers: int, vision: dict, shard: int = SHARD, progress=True
) -> int:
    """Write a checkpoint of random weights in the original's format into a new folder, shard by shard;
    returns its bytes.

    vision: the sizes of the CLIP tower, which lies in the folder's ``vision_tower``; shard: most bytes of one
        file.

    Raises:
        ValueError: if the disk has not enough room; nothing is left behind then or after an interruption.
    """
    with new_folder(folder) as work:
        weights = RandomWeights(DTYPE)
        with torch.device("meta"):
            tower = CLIPVisionModel._from_config(CLIPVisionConfig(**vision), dtype=DTYPE)
        tower.config.save_pretrained(work / "vision_tower")
        config = model_config(spec, layers, vision, str(work / "vision_tower"))
        with torch.device("meta"):
            model = LlavaLlamaForCausalLM._from_config(config, dtype=DTYPE)
        tensors = model.state_dict()
        total = sum(
            tensor.numel() * DTYPE.itemsize
            for part in (tensors, tower.state_dict())
            for tensor in part.values()
        )
        free = shutil.disk_usage(work).free
        if total > 0.95 * free:
            raise ValueError(
                f"the checkpoint takes {units.size(total)} and {folder.parent} has {units.size(free)};"
                " take fewer --layers, or a --keep on another disk"
            )
        print(f"writing {units.size(total)} ({units.size(free)} free)")
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
            tower.to_empty(device="cpu")
            weights.fill_all(tower.named_parameters())
            tower.save_pretrained(work / "vision_tower")
            bar.update(sum(parameter.numel() * DTYPE.itemsize for parameter in tower.parameters()))
            del tower
            _write_shards(work, tensors, weights, shard, bar)
        size = vision["image_size"]
        CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ).save_pretrained(work / "vision_tower")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, work)
        config.mm_vision_tower = "vision_tower"
        config.save_pretrained(work)
    return total


def _write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], weights: RandomWeights, limit: int, bar
) -> None:
    """Fill and write tensors of at most ``limit`` bytes a file, then the index."""
    shards, used = [[]], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * DTYPE.itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        filled = {name: weights.fill(name, torch.empty(tensors[name].shape, dtype=DTYPE)) for name in names}
        save_file(filled, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
        bar.update(sum(tensor.numel() * DTYPE.itemsize for tensor in filled.values()))
    total = sum(tensor.numel() * DTYPE.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


@dataclass(frozen=True)
class Times:
    """Seconds of one answer: the vision tower, the language model's prefill and its CPU time, a decoding step
    (the median)."""

    vision: float
    prefill: float
    prefill_cpu: float
    token: float


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
        _watched(model.get_vision_tower(), model.device) as vision,
        _watched(model, model.device) as language,
    ):
        new = model.generate(
            ids, images=pixels, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
    if new.shape[1] != tokens or len(language) != tokens:
        raise ValueError(
            f"{tokens} tokens were asked for and {new.shape[1]} came in {len(language)} calls of the model"
        )
    return Times(vision[0].wall, *language[0], median(step.wall for step in language[1:]))


def measure(
    model, image_processor, spec: ModelSpec, c: Compression, pairs: int, tokens: int, text: int, progress=True
) -> dict:
    """One image and ``text`` text tokens, vanilla and compressed in turns after a warm-up of each."""
    draw = np.random.default_rng(0)
    edge = image_processor.crop_size["width"]
    image = Image.fromarray(draw.integers(0, 256, (edge, edge, 3), np.uint8))
    pixels = process_images([image], image_processor, model.config).to(model.device, model.dtype)
    words = torch.from_numpy(draw.integers(3, model.config.vocab_size, text))
    ids = torch.cat([words[: text // 2], torch.tensor([IMAGE_TOKEN_INDEX]), words[text // 2 :]])[None].to(
        model.device
    )
    layers = model.config.num_hidden_layers
    visual = model.get_vision_tower().num_patches
    modes = {"vanilla": None, "compressed": c}
    memory, times = {}, [[None, None] for _ in range(pairs)]
    with tqdm(total=2 + 2 * pairs, unit=" answers", desc="warming up", disable=not progress) as bar:
        for name, compression in modes.items():
            memory[name] = peak_memory(
                lambda given=compression: answer(model, ids, pixels, given, tokens), model.device
            )
            bar.update()
        bar.set_description("timing")
        for pair, compressed in in_turns(pairs):
            times[pair][compressed] = answer(model, ids, pixels, c if compressed else None, tokens)
            if compressed:
                stats = model.compression_stats
            bar.update()
    counts = budget.actual(c, layers, [visual])
    seen = [row[0] for row in stats["visual_tokens"]]
    if seen != counts:
        raise ValueError(f"the layers saw {seen} visual tokens and the schedule says {counts}")
    sizes = replace(spec, layers=layers)
    flops = {
        name: model_flops(sizes, [text + n for n in tokens])
        for name, tokens in (("vanilla", [visual] * layers), ("compressed", counts))
    }
    ratio = median_interval([second.prefill / first.prefill for first, second in times])
    flops_ratio = flops["compressed"] / flops["vanilla"]
    return {
        "visual_tokens": visual,
        "text_tokens": text,
        "new_tokens": tokens,
        "tokens_per_layer": counts,
        "pairs": [{"vanilla": asdict(first), "compressed": asdict(second)} for first, second in times],
        **{
            f"{part}_seconds": {
                name: median(getattr(pair[i], part) for pair in times) for i, name in enumerate(modes)
            }
            for part in ("vision", "prefill", "prefill_cpu", "token")
        },
        "flops": {**flops, "ratio": flops_ratio},
        "prefill_ratio": asdict(ratio),
        "ratio_over_flops_ratio": ratio.median / flops_ratio,
        "peak_memory": memory,
    }


def table(data: dict) -> str:
    """The readable form of :func:`report`'s dictionary."""
    ratio, flops = data["prefill_ratio"], data["flops"]
    stages = [
        n for i, n in enumerate(data["tokens_per_layer"]) if i == 0 or n != data["tokens_per_layer"][i - 1]
    ]
    place = data["machine"]
    lines = [
        f"model          {data['model']}, {data['layers']} of {data['of_layers']} layers, random weights, bfloat16;"
        f" {units.size(data['checkpoint_bytes'])} on disk, loaded in {units.seconds(data['load_seconds'])}",
        f"compression    {data['row']}, after layers {', '.join(map(str, data['compression']['layers']))};"
        f" visual tokens {' → '.join(map(str, stages))}",
        f"prompt         {data['visual_tokens']} visual + {data['text_tokens']} text tokens, {data['new_tokens']} new ones",
        f"run            {place['device']}, {place['threads']} thread(s); {len(data['pairs'])} pairs in turns",
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
            f" [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            f"over FLOPs ratio {data['ratio_over_flops_ratio']:.3f} ({flops['ratio']:.3f}, all tokens of the language model)",
        ]
    )


def report(
    folder: Path,
    spec: ModelSpec,
    row: Row,
    c: Compression,
    layers: int,
    vision: dict,
    pairs: int,
    tokens: int,
    text: int,
    device: str,
    progress: bool = True,
) -> dict:
    """Write the checkpoint, load it as any other, and measure. Raises ValueError with one sentence."""
    size = write_checkpoint(folder, spec, layers, vision, progress=progress)
    start = now(torch.device(device))
    _, model, image_processor, _ = load_pretrained_model(
        str(folder), None, folder.name, device=device, torch_dtype=DTYPE
    )
    loaded = now(torch.device(device)).since(start).wall
    return {
        "model": spec.name,
        "layers": layers,
        "of_layers": spec.layers,
        "row": row.name,
        "compression": c.to_dict(),
        "checkpoint_bytes": size,
        "load_seconds": loaded,
        **measure(model, image_processor, spec, c, pairs, tokens, text, progress),
        "machine": {
            **machine(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
        "versions": versions(("torch", "transformers", "numpy")),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run(args) -> dict:
    """What the command's arguments ask for: :func:`report`'s dictionary. Raises ValueError with one
    sentence."""
    row = Row.from_yaml(args.config)
    spec = get_model(row.model, row.path)
    if spec.name not in MODELS:
        raise ConfigError(
            f"{row.path}: model: {spec.name} is no LLaVA-1.5; take a row of {' or '.join(MODELS)}"
        )
    if not row.compression.layers:
        raise ConfigError(f"{row.path}: this row compresses nothing; give a row with compression layers")
    layers = args.layers or spec.layers
    c = scale_layers(row.compression, spec.layers, layers)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    if args.keep and args.keep.exists():
        raise ValueError(f"--keep: {args.keep} exists already; give a new folder")
    needed, free = _memory(spec, layers), free_memory(torch.device(device))
    if free is not None and needed > free:
        raise ValueError(
            f"the model takes {units.size(needed)} of memory and {units.size(free)} are free; take fewer --layers"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="true-size-") as temporary:
        folder = args.keep or Path(temporary) / "llava-v1.5-random"
        data = report(
            folder,
            spec,
            row,
            c,
            layers,
            CLIP_L_336,
            args.pairs,
            args.new_tokens,
            args.text_tokens,
            device,
        )
    if args.json:
        write_text(args.json, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return data


def _memory(spec: ModelSpec, layers: int) -> int:
    """Bytes of the weights, the vision tower and a gigabyte to work in."""
    return (
        weight_bytes(spec, layers, DTYPE) + 2 * VOCABULARY * spec.hidden_size * DTYPE.itemsize + 1_700_000_000
    )
