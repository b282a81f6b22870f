"""Training: ids, labels and batches against the published code's, runs of the command, what it saves, what it
refuses."""

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_llava_model import arrays, prompt
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from libra import Compression
from libra.flops import layer_flops
from libra.mini.scenes import draw_scene
from llava.model.builder import load_pretrained_model
from llava.train import arguments, recipe, train
from llava.train.data import Collator, LazySupervisedDataset, ModalityLengthSampler, VisualTokens
from llava.train.labels import encode, place_images, training_template
from llava.train.outcomes import Outcome, Tally
from llava.train.samples import Data, read_samples
from llava.train.trainer import LlavaTrainer
from mini import finetuning, step_cost
from mini.questions import ask

GOLDEN = Path(__file__).parent / "golden"
TEXTS = GOLDEN / "text_and_image_processing"
TINY = GOLDEN / "llava15" / "checkpoint"
ROOT = Path(__file__).parents[1]
MINI = ROOT / "mini" / "checkpoint"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[INST] ' if m.role == 'user' else ' ' }}{{ m.content }}"
    "{{ ' [/INST]' if m.role == 'user' else eos_token }}{% endfor %}"
)
LIBRA = "{method: libra, layers: [1, 3], ratio: 0.5, tau: 0.3}"


@pytest.fixture(scope="module")
def golden():
    return json.loads((TEXTS / "train_preprocess.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizers():
    folders = {folder.name: folder for folder in (TEXTS / "tokenizers").iterdir()} | {
        "sp320_legacyFalse": TINY
    }
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def dataset(
    samples, tokenizer, version="v1", limit=2048, aspect="pad", pinpoints=None, **kwargs
) -> LazySupervisedDataset:
    processor = CLIPImageProcessor.from_pretrained(TEXTS / "image_processor")
    pictures = SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=pinpoints)
    template = training_template(version)
    return LazySupervisedDataset(
        samples, tokenizer, template, processor, pictures, str(TEXTS), str(TEXTS), limit, **kwargs
    )


def labels_of(ids: list[int], supervised) -> list[int]:
    shown = {i for start, stop in supervised for i in range(start, stop)}
    return [token if i in shown else -100 for i, token in enumerate(ids)]


def test_ids_and_labels_are_the_published_codes(golden, tokenizers):
    for want in golden["samples"]:
        data = dataset(
            [golden["conversations"][want["conversation"]]],
            tokenizers[want["tokenizer"]],
            want["template"],
            want["model_max_length"],
            start_end=want["mm_use_im_start_end"],
        )
        got = data[0]
        where = (want["template"], want["tokenizer"], want["conversation"])
        assert got["input_ids"].tolist() == want["input_ids"], where
        assert got["labels"].tolist() == labels_of(want["input_ids"], want["supervised"]), where
        assert (got["mismatched"], got["unreadable"]) == (want["mismatch"], ""), where
        assert [list(image.shape) for image in got["images"]] == [want["image_shape"]]
        assert bool((got["images"][0] == 0).all()) == want["image_is_zeros"]
        assert data.modality_lengths == [want["modality_length"]]


def test_batches_are_the_published_codes(golden, tokenizers):
    for want in golden["batches"]:
        tokenizer, limit = tokenizers[want["tokenizer"]], want["model_max_length"]
        data = dataset(
            [golden["conversations"][name] for name in want["conversations"]], tokenizer, want["template"]
        )
        batch = Collator(tokenizer.pad_token_id, limit, (-200,))([data[i] for i in range(len(data))])
        assert batch["input_ids"].tolist() == want["input_ids"]
        assert batch["labels"].tolist() == [
            labels_of(*row) for row in zip(want["input_ids"], want["supervised"])
        ]
        assert (
            batch["attention_mask"].dtype == torch.bool
            and batch["attention_mask"].sum(1).tolist() == want["lengths"]
        )
        assert list(batch["images"].shape) == want["images_shape"]
        assert batch["image_sizes"] == list(map(tuple, want["image_sizes"]))


def test_rounds_of_the_embedded_models_tokenizer():
    """It has no token for the space in front of an answer, which the published code takes for granted."""
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    turns = [
        ("human", "<image>\nhow many digits are there ?"),
        ("gpt", "2"),
        ("human", "is it red ?"),
        ("gpt", "no"),
    ]
    got = encode(turns, training_template("mini"), tokenizer, True, 1024)
    assert not got.mismatch and tokenizer.decode(got.labels[got.labels >= 0]) == "2 </s> no </s>"


def test_chat_template_as_version():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "videollama2" / "checkpoint")
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [("human", "what ? <video>"), ("gpt", "a boat"), ("human", "where ?"), ("gpt", "on the lake")]
    placed = place_images(turns, None, False, False)
    assert placed[0][1] == "<video>\nwhat ?"
    got = encode(placed, None, tokenizer, True, 512)
    assert got.input_ids.tolist().count(-201) == 1
    assert tokenizer.decode(got.labels[got.labels >= 0]) == "a boat</s> on the lake</s>"


def test_several_images_stay_where_they_are(tokenizers):
    turns = [
        {"from": "human", "value": "Is <image> or <image> a map?"},
        {"from": "gpt", "value": "The second."},
        {"from": "human", "value": "And this?\n<image>"},
        {"from": "gpt", "value": "A boat."},
    ]
    data = dataset(
        [{"image": [f"image{k}.png" for k in range(3)], "conversations": turns}],
        tokenizers["sp700_legacyFalse"],
    )
    sample = data[0]
    places = (sample["input_ids"] == -200).nonzero().flatten().tolist()
    assert len(places) == len(sample["images"]) == 3 and places[1] > places[0] + 1
    collator = Collator(0, places[2], (-200,))  # the last image is cut off with its place
    assert len(collator([sample])["images"]) == 2


def test_what_the_model_would_cut_is_cut_before_it_is_counted(loaded, tokenizers, monkeypatch):
    model = loaded[1]
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A red boat on the lake. " * 5},
    ]
    sample = dataset([{"image": "image0.png", "conversations": turns}], tokenizers["sp320_legacyFalse"])[0]
    whole = len(sample["input_ids"]) + 15
    place = sample["input_ids"].tolist().index(-200)
    tower = model.get_vision_tower()
    collator = Collator(0, 0, (-200,), VisualTokens(tower.num_patches, 56))
    for limit in (whole, whole - 7, place + 8):  # all, a part of the answer, a part of the image
        collator.limit = limit
        monkeypatch.setattr(model.config, "tokenizer_model_max_length", limit)
        cut = collator([sample])
        plain = Collator(0, 4096, (-200,))([sample])
        names = ("input_ids", "attention_mask", "labels", "images")
        spliced, again = (model.splice(*(given[name] for name in names)) for given in (cut, plain))
        assert torch.equal(spliced.labels, again.labels) and torch.equal(spliced.embeds, again.embeds)
        assert (cut["labels"] != -100).sum() == (spliced.labels != -100).sum()


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_visual_tokens_are_counted_as_the_model_counts_them(loaded, tokenizers, merge, monkeypatch):
    model, pinpoints = loaded[1], [[56, 112], [112, 56], [112, 112]]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
    samples = [{"image": f"image{k}.png", "conversations": turns} for k in range(3)] + [
        {"conversations": turns}
    ]
    data = dataset(samples, tokenizers["sp320_legacyFalse"], aspect="anyres", pinpoints=pinpoints)
    for name, value in (
        ("mm_patch_merge_type", merge),
        ("image_aspect_ratio", "anyres"),
        ("image_grid_pinpoints", pinpoints),
    ):
        monkeypatch.setattr(model.config, name, value, raising=False)
    monkeypatch.setattr(model.model, "image_newline", torch.zeros(64), raising=False)
    batch = Collator(0, 512, (-200,))([data[i] for i in range(4)])
    count = VisualTokens(16, 56, merge, pinpoints)
    mine = [count(pixels, size) for pixels, size in zip(batch["images"], batch["image_sizes"])]
    assert mine == model.visual_tokens(batch["images"], batch["image_sizes"]) and len(set(mine)) > 1


def test_worker_processes_can_be_started_in_any_way(tokenizers):
    """Where they are not forked, dataset and collator travel to them."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
    data = dataset([{"image": "image0.png", "conversations": turns}], tokenizers["sp320_legacyFalse"])
    collator = Collator(0, 512, (-200,), VisualTokens(16, 56))
    one, other = (
        collate([given[0]])
        for collate, given in ((collator, data), pickle.loads(pickle.dumps((collator, data))))
    )
    assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["images"], other["images"])


def test_samples_one_a_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\n')
    assert read_samples(str(path)) == [{"id": 1}, {"id": 2}]
    path.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(ValueError, match="data.jsonl, line 2: no valid JSON"):
        read_samples(str(path))


def test_steps_of_the_sampler_are_of_one_kind():
    lengths = [n if n % 3 else -n for n in range(1, 51)]
    sampler = ModalityLengthSampler(lengths, 4, seed=5)
    order = list(sampler)
    assert sorted(order) == list(range(50)) and order == list(sampler)
    steps = [order[i : i + 4] for i in range(0, 48, 4)]
    assert sum(len({lengths[i] > 0 for i in step}) == 1 for step in steps) >= 12 - 1
    assert all(
        [abs(lengths[i]) for i in step] == sorted((abs(lengths[i]) for i in step), reverse=True)
        for step in steps
    )
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(TINY), None, "llava", device="cpu")


@pytest.fixture(scope="module")
def data():
    return arrays("llava15")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_loss_and_gradients_as_the_trainer_takes_them(data, tmp_path, checkpointing):
    """Case b, in two halves of an accumulated step: divided by the labels of both, they sum up to the
    original's mean."""
    model = load_pretrained_model(str(TINY), None, "llava", device="cpu")[1].train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    args = arguments.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", gradient_accumulation_steps=2
    )
    tally = Tally(Data("data.json", [{}, {}, {}]), torch.device("cpu"))
    trainer = LlavaTrainer(model=model, args=args, train_dataset=[0], run=None, tally=tally)
    given = prompt(data, "b", labels=True)
    halves = [{name: value[rows] for name, value in given.items()} for rows in (slice(0, 1), slice(1, 3))]
    _, items = trainer.get_batch_samples(iter(halves), 2, torch.device("cpu"))
    seen = [[(0, Outcome.UNREADABLE, "it is torn")], [(1, Outcome.USED, ""), (2, Outcome.CUT, "")]]
    halves = [{**half, "outcomes": told} for half, told in zip(halves, seen)]
    losses = [trainer.compute_loss(model, half, num_items_in_batch=items) for half in halves]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), data["b.loss"].reshape(()), atol=1e-4, rtol=1e-4)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for name in [key.removeprefix("b.grad.") for key in data if key.startswith("b.grad.")]:
        torch.testing.assert_close(gradients[name], data[f"b.grad.{name}"], atol=1e-5, rtol=1e-3)
    assert tally.counts() == {
        "samples_used": 2,
        "samples_cut": 1,
        "samples_skipped": 1,
        "samples_skipped/unreadable": 1,
    }


@pytest.mark.parametrize("importance", ["last", "mean"])
def test_answers_do_not_change_which_tokens_stay(loaded, tokenizers, importance):
    """Several images in several turns, each scored by the question before the first answer after it."""
    _, model, _, _ = loaded
    model.set_compression(
        Compression(method="libra", layers=(1, 3), ratio=0.5, tau=0.3, importance=importance)
    )
    asked = [("one", "<image>\nWhat is it?"), ("two", "Compare.\n<image>"), ("three", "Where?")]
    chosen = []
    for answers in (
        ("A red boat.", "Yes.", "No."),
        ("No, by no means, never.", "The map of a town.", "There are two."),
    ):
        turns = [
            part
            for (_, question), answer in zip(asked, answers)
            for part in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        # Each answer can only be of influence on the images after it.
        first = [{"image": ["image0.png"], "conversations": turns[:2]}]
        whole = [{"image": ["image0.png", "image1.png"], "conversations": [*turns[:1], turns[1], *turns[2:]]}]
        data = dataset(first + whole, tokenizers["sp320_legacyFalse"])
        batch = Collator(0, 2048, (-200,), VisualTokens(16, 56))([data[0], data[1]])
        with tiny.watched() as steps, torch.no_grad():
            loss = model(
                **{name: batch[name] for name in ("input_ids", "labels", "attention_mask", "images")}
            ).loss
        assert len(steps) == 2 and torch.isfinite(loss)
        first_image = [
            [t for t in step.targets(row) if t < 16 // 2**k] for k, step in enumerate(steps) for row in (0, 1)
        ]
        chosen.append(first_image)
    model.set_compression(None)
    assert chosen[0] == chosen[1] and any(map(len, chosen[0]))


def scenes(folder: Path, count: int, texts=(), broken=(), rounds: int = 2) -> list[str]:
    """Write samples about fresh scenes and return the flags that name them; some without an image, some with
    a damaged one."""
    rng, samples = np.random.default_rng(3), []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        scene = draw_scene(rng, "train")
        turns = []
        for question, answer in ask(rng, scene.digits, rounds):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        sample = {"id": i, "conversations": turns}
        if i not in texts:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            sample["image"] = f"{i}.png"
            Image.fromarray(scene.image).save(folder / "images" / f"{i}.png")
        if i in broken:
            (folder / "images" / f"{i}.png").write_bytes(b"no picture")
        samples.append(sample)
    (folder / "data.json").write_text(json.dumps(samples))
    return ["--data_path", str(folder / "data.json"), "--image_folder", str(folder / "images")]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"), 12, texts=(1, 5), broken=(3,))


@pytest.fixture
def compression(tmp_path):
    path = tmp_path / "libra.yaml"
    path.write_text(LIBRA)
    return ["--compression", str(path)]


def run(output: Path, *flags, model=MINI, version="mini") -> list[dict]:
    """Train in this process; returns the log."""
    train.main(
        [
            "--model_name_or_path",
            str(model),
            "--version",
            version,
            "--output_dir",
            str(output),
            "--report_to",
            "none",
            "--per_device_train_batch_size",
            "2",
            "--learning_rate",
            "1e-4",
            "--logging_steps",
            "1",
            "--model_max_length",
            "1024",
            "--disable_tqdm",
            "True",
            *map(str, itertools.chain.from_iterable(f if isinstance(f, list) else [f] for f in flags)),
        ]
    )
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def losses(log) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_three_steps_resume_and_load(few, compression, tmp_path, capsys):
    """A killed run goes on from its last whole checkpoint and ends where an unbroken one does."""
    flags = [*few, *compression, "--group_by_modality_length", "True", "--gradient_checkpointing", "True"]
    flags += ["--dataloader_num_workers", "1", "--tf32", str(not torch.cuda.is_available())]
    whole = run(tmp_path / "whole", flags, "--max_steps", 6, "--save_steps", 3)
    assert "It learned from 11 of 12 samples; 1 were skipped (1 unreadable)." in capsys.readouterr().out
    assert whole[-1]["samples_skipped"] == 1 and len(losses(whole)) == 6
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", half / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "run.json", half)
    (half / "checkpoint-4").mkdir()  # the kill came while it was being written
    again = run(half, flags, "--max_steps", 6, "--save_steps", 3)
    assert losses(again) == losses(whole)

    trained, model = (
        load_pretrained_model(str(tmp_path / name), None, "mini", device="cpu") for name in ("whole", "half")
    )
    assert (
        trained[1].config.trained_with_compression["layers"] == [1, 3]
        and trained[1].config.conversation == "mini"
    )
    assert (tmp_path / "whole/config.json").read_text().count(
        '"vision_tower"'
    ) == 1  # relative: the folder may move
    start = load_pretrained_model(str(MINI), None, "mini", device="cpu")[1].state_dict()
    changed = []
    for name, value in trained[1].state_dict().items():
        assert torch.equal(value, model[1].state_dict()[name]), name
        changed += [name] if not torch.equal(value, start[name]) else []
    assert any("layers.11" in name for name in changed) and any("mm_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_training_compares_with_the_question_by_the_towers_own_clip(few, tmp_path):
    """One step; with a tower that has lost its text tower the choice, and so the loss, is another one."""
    file, bare = tmp_path / "cdpruner.yaml", tmp_path / "bare"
    file.write_text("{method: cdpruner, keep: 28}")
    shutil.copytree(MINI, bare)
    (bare / "vision_tower" / "model.safetensors").unlink()
    CLIPVisionModel.from_pretrained(MINI / "vision_tower").save_pretrained(bare / "vision_tower")
    flags = [*few, "--compression", file, "--max_steps", 1, "--save_strategy", "no"]
    whole = run(tmp_path / "whole", flags)
    with pytest.warns(UserWarning, match="text embeddings instead of CLIP's: .* is not a whole CLIP"):
        other = run(tmp_path / "other", flags, model=bare)
    assert losses(whole) != losses(other)


def test_accumulated_steps_are_one_large_step(few, compression, tmp_path):
    flags = [*few, *compression, "--max_steps", 2, "--save_strategy", "no"]
    whole = run(tmp_path / "whole", flags, "--per_device_train_batch_size", 4)
    parts = run(
        tmp_path / "parts", flags, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4
    )
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-4)
    np.testing.assert_allclose(
        *([e["grad_norm"] for e in log if "grad_norm" in e] for log in (parts, whole)), rtol=1e-3
    )


@pytest.fixture
def base(tmp_path):
    """A plain Llama."""
    torch.manual_seed(0)
    base, tokenizer = tmp_path / "base", AutoTokenizer.from_pretrained(MINI)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.slow
def test_first_stage_then_adapters_on_a_plain_language_model(few, compression, base, tmp_path):
    """The projector alone on a Llama with a tower; LoRA on top of it; each is loaded as the published
    checkpoints are."""
    flags = [
        *few,
        *compression,
        "--vision_tower",
        MINI / "vision_tower",
        "--mm_projector_type",
        "mlp2x_gelu",
        "--max_steps",
        2,
        "--image_aspect_ratio",
        "pad",
        "--bf16",
        "True",
    ]
    first = tmp_path / "llava-pretrain"
    run(first, flags, "--tune_mm_mlp_adapter", "True", "--save_steps", 1, model=base)
    stored = torch.load(first / "mm_projector.bin", weights_only=True)
    assert set(stored) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    shutil.rmtree(first / "checkpoint-2")
    (first / "mm_projector.bin").unlink()
    run(first, flags, "--tune_mm_mlp_adapter", "True", "--save_steps", 1, model=base)  # resumed
    for name, value in torch.load(first / "mm_projector.bin", weights_only=True).items():
        assert torch.equal(value, stored[name])
    load_pretrained_model(str(first), str(base), "llava-pretrain", device="cpu")

    second = tmp_path / "llava-lora"
    adapters = [
        "--lora_enable",
        "True",
        "--lora_r",
        4,
        "--lora_alpha",
        8,
        "--save_steps",
        1,
        "--mm_projector_lr",
        2e-5,
        "--pretrain_mm_mlp_adapter",
        first / "mm_projector.bin",
        "--gradient_checkpointing",
        "True",
    ]
    log = run(second, flags, adapters, model=base)
    config = json.loads((second / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(
        f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
    )
    shutil.rmtree(second / "checkpoint-2")
    (second / "adapter_model.safetensors").unlink()
    assert losses(run(second, flags, adapters, model=base)) == losses(log)
    merged = load_pretrained_model(str(second), str(base), "llava-lora", device="cpu")[1]
    plain = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert not torch.equal(
        merged.state_dict()["model.layers.3.mlp.up_proj.weight"], plain["model.layers.3.mlp.up_proj.weight"]
    )
    other = torch.load(second / "non_lora_trainables.bin", weights_only=True)
    assert torch.equal(
        other["base_model.model.model.mm_projector.0.weight"], merged.model.mm_projector[0].weight
    )
    assert not torch.equal(merged.model.mm_projector[0].weight, stored["model.mm_projector.0.weight"])


def test_tuned_tower_and_new_tokens(few, tmp_path):
    shutil.copytree(MINI, tmp_path / "start")
    log = run(
        tmp_path / "out",
        [
            *few,
            "--max_steps",
            2,
            "--save_strategy",
            "no",
            "--unfreeze_mm_vision_tower",
            "True",
            "--mm_vision_tower_lr",
            1e-5,
            "--mm_use_im_start_end",
            "True",
        ],
        model=tmp_path / "start",
    )
    assert len(losses(log)) == 2
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "out"), None, "mini", device="cpu")
    start = load_pretrained_model(str(MINI), None, "mini", device="cpu")[1]
    name = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    towers = [dict(m.get_vision_tower().named_parameters()) for m in (model, start)]
    name = next(key for key in towers[0] if key.endswith("layers.0.mlp.fc1.weight"))
    assert not torch.equal(towers[0][name], towers[1][name])
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 78


def test_videos_images_and_text_in_one_batch(compression, tmp_path):
    """A Mistral becomes a VideoLLaMA-2, with the tokenizer's chat template."""
    pytest.importorskip("timm")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "videollama2" / "checkpoint")
    tokenizer.chat_template = CHAT_TEMPLATE
    base = tmp_path / "base"
    MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=None,
        )
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    frames = tmp_path / "frames" / "one"
    frames.mkdir(parents=True)
    for k in range(3):
        shutil.copy(TEXTS / f"image{k}.png", frames)
    answer = {"from": "gpt", "value": "A boat."}
    samples = [
        {"video": "one", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, answer]},
        {"image": "one/image1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, answer]},
        {"conversations": [{"from": "human", "value": "What?"}, answer]},
        {"video": "none", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, answer]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    log = run(
        tmp_path / "out",
        compression,
        "--data_path",
        tmp_path / "data.json",
        "--image_folder",
        tmp_path / "frames",
        "--vision_tower",
        GOLDEN / "llava15" / "vision_tower",
        "--mm_projector_type",
        "stc_connector",
        "--num_frames",
        4,
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        4,
        "--save_strategy",
        "no",
        model=base,
        version="chat",
    )
    assert losses(log)[1] > 0 and (log[-1]["samples_used"], log[-1]["samples_skipped"]) == (3, 1)
    saved = load_pretrained_model(str(tmp_path / "out"), None, "videollama2", device="cpu")[1]
    assert saved.config.model_type == "videollama2_mistral" and saved.config.num_frames == 4


@pytest.fixture
def scripts(tmp_path):
    """Call a script of scripts/ with `exec` replaced, so that it says what it would start, and no check;
    gives its words."""
    (tmp_path / "env.sh").write_text("""
        exec() { if [ "$1" = bash ]; then "$@"; else printf '%s\\n' "$@"; fi; }
        python() { if [ "$2" != llava.train.train ]; then command python "$@"; fi; }
    """)

    def call(name: str, *flags: str, **variables: str) -> list[str]:
        env = {
            **os.environ,
            "VIRTUAL_ENV": sys.prefix,
            "BASH_ENV": str(tmp_path / "env.sh"),
            "GPUS": "1",
            **variables,
        }
        command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
        return subprocess.run(
            command, env=env, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    return call


@pytest.mark.slow
def test_scripts_give_the_published_settings(scripts, tmp_path):
    for name, rate in {"pretrain": 1e-3, "finetune": 2e-5, "finetune_lora": 2e-4}.items():
        words = scripts(name, "--max_steps", "7", COMPRESSION="configs/llava7b_r50.yaml", BATCH="3")
        assert words[:5] == ["python", f"{ROOT}/scripts/launch.py", "--standalone", "--nproc_per_node", "1"]
        flags = [arguments.RENAMED.get(word, word) for word in words[words.index("llava.train.train") + 1 :]]
        given = arguments.make_parser().parse_args(flags)  # an unknown flag ends it
        assert (given.learning_rate, given.max_steps, given.per_device_train_batch_size) == (rate, 7, 3)
        assert given.compression == "configs/llava7b_r50.yaml" and given.lora_enable == (
            name == "finetune_lora"
        )
        assert (
            given.tune_mm_mlp_adapter == (name == "pretrain") and name.partition("_")[2] in given.output_dir
        )
    hosts = tmp_path / "hosts"
    hosts.write_text("machine slots=8\n")
    words = scripts("finetune", HOSTFILE=str(hosts), ZERO="2")
    assert words[:3] == ["deepspeed", "--hostfile", str(hosts)] and f"{ROOT}/scripts/zero2.json" in words
    for wrong, sentence in (
        ({"HOSTFILE": "nowhere"}, "there is no file nowhere"),
        ({"NNODES": "2"}, "needs NODE_RANK"),
    ):
        with pytest.raises(subprocess.CalledProcessError) as stop:
            scripts("finetune", **wrong)
        assert (
            stop.value.returncode == 2
            and stop.value.stderr.startswith("error: ")
            and sentence in stop.value.stderr
        )
    for name in ("zero2", "zero3", "zero3_offload"):
        assert json.loads((ROOT / "scripts" / f"{name}.json").read_text())["zero_optimization"][
            "stage"
        ] == int(name[4])


def test_help_shows_an_example(capsys):
    train.main(["--help"])
    short = capsys.readouterr().out
    assert (
        "--compression configs/mini/r50.yaml" in short
        and "--lora_enable" in short
        and "--adam_beta2" not in short
    )
    with pytest.raises(SystemExit) as stop:
        train.main(["--help-all"])
    long = capsys.readouterr().out
    assert stop.value.code == 0 and "--compression configs/mini/r50.yaml" in long and "--adam_beta2" in long
    assert all(re.search(rf"--{name}\s", long) for name in re.findall(r"^  --([\w-]+)", short, re.MULTILINE))


def test_fine_tuning_of_table_e_draws_its_data_once_and_measures_a_step(tmp_path):
    finetuning.write_data(tmp_path, 6, seed=1)
    first = (tmp_path / "data.json").read_text()
    finetuning.write_data(tmp_path, 6, seed=1)
    assert (tmp_path / "data.json").read_text() == first and len(json.loads(first)) == 6
    sizes = step_cost.Sizes("tiny", 32, 48, 4, 2, 64, 8, 2, (1,))
    cost = step_cost.in_turns(sizes, Compression(method="libra", layers=(2,), ratio=0.5), pairs=1)
    half = layer_flops(72, 32, 48, 32), layer_flops(40, 32, 48, 32)
    assert cost["flops_ratio"] == pytest.approx((2 * half[0] + 2 * half[1]) / (4 * half[0]))
    assert len(cost["cpu_seconds"]) == 2 and cost["ratio"]["median"] > 0


WRONG = {
    "no data": (["--data_path", "nowhere.json"], "the data nowhere.json cannot be read"),
    "malformed": ('[\n {"conversations": []},\n {"conv', "data.json, line 3: no valid JSON"),
    "no list": ("{}", "holds no list of samples"),
    "no conversations": (
        '[{"id": "x", "text": 1}]',
        r"sample 0 \(id 'x'\): it has no list \"conversations\"",
    ),
    "no answer": (
        '[{"conversations": [{"from": "human", "value": "q"}]}]',
        "sample 0: the conversation has no answer",
    ),
    "no turns": (
        '[{"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"},'
        ' {"from": "gpt", "value": "a"}]}]',
        "do not take turns",
    ),
    "no images": (
        '[{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nq"},'
        ' {"from": "gpt", "value": "a"}]}]',
        "there is no folder nowhere",
    ),
    "too few images": (
        '[{"image": ["a.png"], "conversations": [{"from": "human", "value": "<image><image>q"},'
        ' {"from": "gpt", "value": "a"}]}]',
        "1 images and 2 <image>",
    ),
    "video": (
        '[{"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nq"},'
        ' {"from": "gpt", "value": "a"}]}]',
        "this model takes images only",
    ),
    "version": (["--version", "v9"], "there is no training version 'v9'"),
    "flag": (["--lora_enabled", "True"], "the flag --lora_enabled is unknown; did you mean --lora_enable"),
    "value": (["--lora_r", "many"], "invalid int value: 'many'"),
    "bits": (["--bits", "4", "--lora_enable", "True"], "--bits 4 needs a CUDA GPU"),
    "model": (["--model_name_or_path", "no-such-folder"], "no-such-folder is not a folder here"),
    "layer": ("{method: libra, layers: [40]}", "layers: 40 is out of range: the model has layers 0 to 11"),
    "method": ("{method: fastw, layers: [1]}", "fastv"),
    "tower": (["--vision_tower", str(GOLDEN / "llava15" / "vision_tower")], "has a vision tower already"),
    "no image": (
        ["--image_folder", str(TEXTS)],
        "none of the images that .* names first lies in .*, 0.png for one",
    ),
    "pinpoints": (
        ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "wide"],
        "'wide' is not a list",
    ),
    "tiles": (["--image_aspect_ratio", "anyres"], "not made of the vision tower's tiles of 96 pixels"),
    "tower's layer": (
        ["--mm_vision_select_layer", "-9"],
        "-9 is out of range: the vision tower has 5 layers",
    ),
    "attention": (["--attn_implementation", "flash"], "invalid choice: 'flash'"),
    "flash": (["--attn_implementation", "flash_attention_2"], "flash_attention_2 needs a CUDA GPU"),
    "half": (["--fp16", "True", "--use_cpu", "True"], "on a CPU use --bf16 True"),
    "evaluation": (["--eval_strategy", "steps"], "nothing is evaluated while training"),
    "resume": (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint is not needed"),
    "reports": (["--report_to", "nobody"], "--report_to nobody names no package"),
    "fsdp": (["--fsdp", "--use_cpu", "True"], "--fsdp shards over the GPUs of a distributed run"),
    "fsdp's file": (["--fsdp", "--fsdp_config", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    "output": (
        ["--output_dir", str(MINI / "config.json")],
        "config.json is not a folder that can be written to",
    ),
    "nothing": (
        ["--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"],
        "leave nothing to train",
    ),
    "reentrant": (
        ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
        "use_reentrant gives wrong gradients",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    case, few, compression, tmp_path, capsys, monkeypatch
):
    given, sentence = WRONG[case]
    flags = [*few, *compression, "--max_steps", "1"]
    if isinstance(given, list):
        flags += given
    elif given.startswith("{method"):
        Path(compression[1]).write_text(given)
    else:
        (tmp_path / "data.json").write_text(given)
        flags += ["--data_path", str(tmp_path / "data.json"), "--image_folder", "nowhere"]
        flags += ["--video_folder", str(tmp_path)]
        (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(recipe, "build_model", lambda *args: pytest.fail("a model was loaded"))
    if "needs a CUDA GPU" in sentence:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    assert re.search(sentence, error), error
    assert not (tmp_path / "out").exists()


def test_parts_of_a_plain_model_that_do_not_fit(few, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "build_model", lambda *args: pytest.fail("a model was loaded"))
    projector = tmp_path / "mm_projector.bin"
    torch.save(
        {"model.mm_projector.weight": torch.zeros(3, 128), "model.mm_projector.bias": torch.zeros(32)},
        projector,
    )
    tower = ["--vision_tower", MINI / "vision_tower", "--max_steps", 1]
    for flags, sentence in (
        (["--mm_projector_type", "mlp2"], "mm_projector_type 'mlp2' is unknown"),
        (
            ["--pretrain_mm_mlp_adapter", projector],
            "mm_projector.bin does not fit this model: 'model.mm_projector.weight'",
        ),
        (
            ["--mm_projector_type", "mlp2x_gelu", "--pretrain_mm_mlp_adapter", projector],
            "mm_projector.weight' is missing",
        ),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path / "out", [*few, *tower, *flags], model=base)
        assert sentence in capsys.readouterr().err


def test_embeddings_of_other_tokens_are_refused(few, base, tmp_path, capsys):
    tower = ["--vision_tower", MINI / "vision_tower", "--mm_use_im_start_end", "True", "--max_steps", 1]
    run(
        tmp_path / "first",
        [*few, *tower, "--tune_mm_mlp_adapter", "True", "--save_strategy", "no"],
        model=base,
    )
    with pytest.raises(SystemExit):
        projector = ["--pretrain_mm_mlp_adapter", tmp_path / "first" / "mm_projector.bin"]
        run(tmp_path / "out", [*few, *tower, *projector, "--mm_use_im_start_end", "False"], model=base)
    assert "error: the first stage had other new tokens" in capsys.readouterr().err


def test_the_first_process_of_a_machine_speaks(monkeypatch, capsys):
    """The others wait: a launcher ends everybody when one has ended."""
    waited = []
    monkeypatch.setattr(
        arguments.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err))
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            arguments.exit_with("it is wrong")
        assert capsys.readouterr().err == "error: it is wrong\n"
    assert [said for _, said in waited] == [""]
