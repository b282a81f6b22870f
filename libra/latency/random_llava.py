"""A LLaVA-1.5 of random weights, written in the original's format."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM

from ..rows import EMBEDDED, ModelSpec
from ..utils import numbers as units
from ..utils.files import new_folder, write_text
from .random_weights import HEAD, RandomWeights

VOCABULARY = 32000
SHARD = 2_000_000_000  # bytes
TOKENIZER = EMBEDDED  # any will do: the prompt is made of ids
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
    shards: list[list] = [[]]
    used = 0
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
