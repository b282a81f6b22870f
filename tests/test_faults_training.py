"""Faults of docs/reliability.md, section "Training and loading", an entry a test."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import GOLDEN, load, put, rewrite, settings, shard

from llava.convert import convert
from llava.model.builder import load_pretrained_model

# Loading


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A tiny LLaVA in three shards, with its vision tower in a folder next to it."""
    shutil.copytree(GOLDEN / "llava15" / "vision_tower", tmp_path / "vision_tower")
    weights = load_file(GOLDEN / "llava15" / "checkpoint" / "model.safetensors")
    folder = put(tmp_path / "llava", settings(tokenizer_model_max_length=48))
    shard(folder, {name: value for name, value in weights.items() if "vision_tower" not in name})
    return folder


def refused(call, sentence: str) -> None:
    """The call ends within 10 s in one line that matches."""
    start = time.process_time()
    with pytest.raises(ValueError, match=sentence) as stop:
        call()
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 600
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["../outside.safetensors", "{root}/outside.safetensors", "inner/x.safetensors", ".."])
def test_a4_an_index_names_files_of_its_own_folder_only(checkpoint, name, tmp_path):
    second = checkpoint / "model-00002-of-00003.safetensors"
    shutil.copy(second, tmp_path / "outside.safetensors")
    (checkpoint / "inner").mkdir()
    shutil.copy(second, checkpoint / "inner" / "x.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    wrong = name.format(root=tmp_path)
    rewrite(index, weight_map={key: wrong if place == second.name else place for key, place in places.items()})
    for call in (lambda: load(checkpoint), lambda: convert(str(checkpoint), str(tmp_path / "hf"))):
        refused(call, "index.json names .* which is not a file of its own folder")
    assert not (tmp_path / "hf").exists()


def nest(path: Path, depth: int) -> None:
    """Give a file's first object a value of that many lists in one another."""
    path.write_text(path.read_text().replace("{", '{"deep": ' + "[" * depth + "]" * depth + ", ", 1))


CONFIG, PIXELS = "llava/config.json", "vision_tower/preprocessor_config.json"
ODD = {
    "no heads": (CONFIG, dict(num_attention_heads=0), "num_attention_heads is 0, which is not a size"),
    "fewer than no layers": (CONFIG, dict(num_hidden_layers=-3), "num_hidden_layers is -3"),
    "layers without end": (CONFIG, dict(num_hidden_layers=10**5), "num_hidden_layers is 100000"),
    "layers that nobody stored": (CONFIG, dict(num_hidden_layers=900), "is 900 and the weights have 8 layers"),
    "no positions": (CONFIG, dict(max_position_embeddings=0), "max_position_embeddings is 0"),
    "a limit of no tokens": (CONFIG, dict(tokenizer_model_max_length=-1), "tokenizer_model_max_length is -1"),
    "unknown activation": (CONFIG, dict(hidden_act="zelu"), "describes no model that can be built .*zelu"),
    "unknown rotation": (CONFIG, dict(rope_scaling={"rope_type": "zzz", "factor": 2.0}), "config.json .*zzz"),
    "no rotation": (CONFIG, dict(rope_theta=0), "rope_theta is 0, not a number from"),
    "a tower that is a number": (CONFIG, dict(mm_vision_tower=5), "mm_vision_tower is 5, not the name"),
    "a layer that is a word": (CONFIG, dict(mm_vision_select_layer="x"), "mm_vision_select_layer is x, not"),
    "a layer that is not there": (CONFIG, dict(mm_vision_select_layer=9), "mm_vision_select_layer 9 is out of range"),
    "a projector without end": (CONFIG, dict(mm_projector_type="mlp99999x_gelu"), "mm_projector_type is mlp99999x"),
    "an unknown shape": (CONFIG, dict(image_aspect_ratio="wide"), "image_aspect_ratio is wide; it is one of square"),
    "tiles without end": (
        CONFIG, dict(image_aspect_ratio="anyres", image_grid_pinpoints=[[5600, 5600]]), "more than 64 tiles"),
    "labels without end": (CONFIG, dict(num_labels=10**12), None),
    "other weights": (CONFIG, dict(transformers_weights="../x.safetensors"), None),
    "a list as type": (CONFIG, dict(model_type=["llava"]), "is a .* checkpoint; the types that load"),
    "a list as template": (CONFIG, dict(conversation=["v1"]), "conversation is .*, not the name of a template"),
    "an end that is a word": ("llava/generation_config.json", dict(eos_token_id="x"), "eos_token_id is x, not the id"),
    "a length that is a word": ("llava/tokenizer_config.json", dict(model_max_length="x"), "the tokenizer in .* cannot"),
    "an index without metadata": ("llava/model.safetensors.index.json", dict(metadata=None), 'has no metadata.*add "metadata"'),
    "a tower without end": ("vision_tower/config.json", dict(num_hidden_layers=10**5), "num_hidden_layers is 100000"),
    "a tower of no type": ("vision_tower/config.json", dict(torch_dtype=7), "torch_dtype is 7, not the name of a type"),
    "a tower's labels": ("vision_tower/config.json", dict(num_labels=10**12), None),
    "a tower's activation": ("vision_tower/config.json", dict(hidden_act="zelu"), "describes no model that can be built"),
    "huge pixels": (
        PIXELS, dict(size={"shortest_edge": 10**9}), "scales images to 1000000000 pixels"),
    "other pixels": (
        PIXELS, dict(crop_size={"height": 48, "width": 48}), r"crops images to \(48, 48\)"),
    "pixels divided by nothing": (PIXELS, dict(image_std=[0, 0, 0]), "preprocessor_config.json"),
}


@pytest.mark.parametrize("case", ODD)
def test_d2_e1_odd_values_in_settings(checkpoint, case):
    file, change, sentence = ODD[case]
    path = checkpoint.parent / file
    if not path.exists():
        path.write_text("{}")
    rewrite(path, **change)
    if sentence is None:  # of no account for this model, and so not followed
        load(checkpoint)
    else:
        refused(lambda: load(checkpoint), sentence)


@pytest.mark.parametrize("depth", [200, 100_000])
def test_e1_nested_settings(checkpoint, depth):
    nest(checkpoint / "config.json", depth)
    refused(lambda: load(checkpoint), "config.json is nested more than 32 levels deep")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_e1_weights_of_another_type(checkpoint, dtype, kind):
    weights = load_file(GOLDEN / "llava15" / "checkpoint" / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(64, dtype=dtype)
    for file in checkpoint.glob("model*"):
        file.unlink()
    shard(checkpoint, weights, kind)
    refused(lambda: load(checkpoint), "holds 'model.norm.weight' as .*, and weights are floating-point numbers")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["llava/model-00003-of-00003.safetensors", "vision_tower/model.safetensors"])
def test_e1_weights_that_are_not_numbers(checkpoint, value, where):
    file = checkpoint.parent / where
    weights = load_file(file)
    name = next(name for name in weights if "norm" in name)
    weights[name][3] = value
    save_file(weights, file, {"format": "pt"})
    refused(lambda: load(checkpoint), "holds values in .*norm.* that are not numbers or infinite")


def test_b7_a_prompt_that_would_be_cut_is_refused(checkpoint):
    """The limit is the checkpoint's own, 48; an image has 16 tokens."""
    _, model, _, limit = load_pretrained_model(str(checkpoint), None, "llava", device="cpu")
    assert limit == model.context_length == 48
    images = torch.zeros(3, 3, 56, 56)

    def ask(words: int, count: int):
        ids = torch.tensor([[5] * words + [-200] * count])
        return model.generate(ids, images=images[:count], do_sample=False, max_new_tokens=1, pad_token_id=0)

    assert ask(16, 2).shape == (1, 1)
    refused(lambda: ask(17, 2), "row 0 of the prompt has 49 tokens with its visual tokens and the model takes 48")
    refused(lambda: ask(1, 3), "row 0 of the prompt has 49 tokens")
    padded = torch.tensor([[0] * 20 + [5] * 16 + [-200] * 2, [5] * 22 + [-200] + [5] * 15])
    mask = torch.ones_like(padded)
    mask[0, :20] = 0  # padding does not count
    refused(lambda: model.generate(padded, images=images, attention_mask=mask), "row 1 of the prompt has 53 tokens")


# Hugging Face's folders


@pytest.fixture
def converted(checkpoint, tmp_path) -> Path:
    convert(str(checkpoint), str(tmp_path / "hf"), conversation="v1")
    return tmp_path / "hf"


def spoil(file: Path, name: str, change) -> None:
    weights = load_file(file)
    weights[name] = change(weights[name])
    save_file({key: value for key, value in weights.items() if value is not None}, file, {"format": "pt"})


NORM = "language_model.model.norm.weight"
SPOILT = {
    "an index": (
        lambda f: (f / "model.safetensors").rename(f / "x.safetensors") and (f / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {NORM: "../x.safetensors"}})), "not a file of its own folder"),
    "layers": (
        lambda f: rewrite(f / "config.json", text_config={"model_type": "llama", "num_hidden_layers": 900}), "is 900 and the"),
    "a type": (lambda f: spoil(f / "model.safetensors", NORM, torch.Tensor.bool), f"holds '{NORM}' as BOOL, and weights are"),
    "infinite": (lambda f: spoil(f / "model.safetensors", NORM, lambda norm: norm / 0), "not numbers or infinite"),
    "a weight less": (lambda f: spoil(f / "model.safetensors", NORM, lambda norm: None), "lacks 1 weights, .*norm.weight'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a4_d2_e1_hugging_face_folders(converted, case):
    """By figures' way of loading, which evaluation and latency share."""
    from libra.figures.prefill import load as load_for_figures

    change, sentence = SPOILT[case]
    change(converted)
    refused(lambda: load_for_figures(str(converted)), sentence)


def test_d6_a_folder_in_the_other_format_is_told_how_to_convert_it(converted, checkpoint):
    from libra.figures.prefill import load as load_for_figures

    refused(lambda: load(converted), rf"python -m llava.convert {converted} hf-original")
    refused(lambda: load_for_figures(str(checkpoint)), rf"python -m llava.convert {checkpoint} llava-hf")
