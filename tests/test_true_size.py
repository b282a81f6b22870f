"""The script that writes, loads and times a LLaVA-1.5 of true size, here with a narrow decoder and a small
tower."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from libra.config import Compression
from libra.flops import model_flops
from libra.latency import random_llava, true_size
from libra.latency.arguments import main
from libra.rows import ModelSpec, Row
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parent.parent
SPEC = ModelSpec(
    name="narrow",
    layers=8,
    hidden_size=256,
    intermediate_size=512,
    kv_size=256,
    visual_tokens=(),
    checkpoint="",
)
TOWER = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
    projection_dim=32,
)
ROW = Row("llava-1.5-7b", Compression(method="libra", layers=(1, 3), ratio=0.5), name="r50")


def test_a_checkpoint_is_written_in_shards_and_loads_as_it_is(tmp_path, capsys):
    folder = tmp_path / "new" / "llava-v1.5-random"
    size = random_llava.write_checkpoint(folder, SPEC, 3, TOWER, shard=8_000_000, progress=False)
    assert "writing" in capsys.readouterr().out and [path.name for path in folder.parent.iterdir()] == [
        folder.name
    ]
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(places.values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) == 3
    assert not [name for name in places if "vision_tower" in name] and "model.mm_projector.2.weight" in places
    _, model, processor, _ = load_pretrained_model(
        str(folder), None, folder.name, device="cpu", device_map="cpu", torch_dtype=torch.bfloat16
    )
    weights = model.state_dict()
    for name, file in places.items():
        with safe_open(folder / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), weights[name])
    assert weights["lm_head.weight"].shape == (32000, 256) and processor.crop_size["height"] == 56
    assert size == sum(weight.numel() * 2 for weight in weights.values())
    assert str(tmp_path) not in (folder / "config.json").read_text()


def test_the_report_says_what_ran(tmp_path):
    answers = true_size.Answers(pairs=2, new=4, text=10)
    row = replace(ROW, compression=replace(ROW.compression, layers=(2, 6)))  # of 8 layers, so 1 and 3 of 5
    data = true_size.report(tmp_path / "checkpoint", row, SPEC, 5, answers, TOWER, torch.device("cpu"))
    assert (
        data["compression"]["layers"] == [1, 3]
        and data["tokens_per_layer"] == [16, 16, 8, 8, 4]
        and data["text_tokens"] == 10
    )
    flops = data["flops"]
    sizes = ModelSpec(**{**vars(SPEC), "layers": 5})
    assert flops["vanilla"] == model_flops(sizes, [26] * 5) and flops["compressed"] == model_flops(
        sizes, [26, 26, 18, 18, 14]
    )
    assert len(data["pairs"]) == 2 and all(
        seconds > 0 for pair in data["pairs"] for seconds in pair["compressed"].values()
    )
    assert data["ratio_over_flops_ratio"] == data["prefill_ratio"]["median"] / flops["ratio"]
    text = true_size.table(data)
    assert (
        "5 of 8 layers" in text
        and "visual tokens 16 → 8 → 4" in text
        and f"{data['ratio_over_flops_ratio']:.3f}" in text
    )


def test_a_full_disk_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(ValueError, match=r"takes 3\d\.\d\d MB and .* has 10.00 MB; take fewer --layers"):
        random_llava.write_checkpoint(tmp_path / "checkpoint", SPEC, 3, TOWER, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "configs/next8b_r50.yaml"], "llava-next-8b is not a LLaVA-1.5"),
        (["--config", "configs/llava7b_vanilla.yaml"], "compresses nothing"),
        (["--layers", "2"], "take more --layers"),
        (["--new-tokens", "1"], "1 is not a whole number from 2 up"),
        (["--keep", "configs"], "configs exists already"),
        (["--peer"], "--peer does not go with --true-size"),
        (["--dtype", "float32"], "--dtype does not go with --true-size"),
    ],
)
def test_what_cannot_run_is_one_sentence(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(["--true-size", "--device", "cpu", *arguments])
    out, error = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and out == ""
        and error.startswith("error: ")
        and words in error
        and error.count("\n") == 1
    )


def test_too_little_memory_is_refused(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(true_size, "free_memory", lambda device: 8_000_000_000)
    with pytest.raises(SystemExit):
        main(["--true-size", "--device", "cpu"])
    assert "memory and 8.00 GB are free; take fewer --layers" in capsys.readouterr().err
