"""Faults of docs/reliability.md, section "Training and loading", an entry a test."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import GOLDEN, load, put, rewrite, settings, shard
from test_train import MINI, losses, run, scenes

from llava.convert import convert
from llava.model.builder import load_pretrained_model
from llava.train import recipe
from llava.train.labels import training_template
from llava.train.runs import Run
from llava.train.samples import read_data, read_samples

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


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{root}/outside.safetensors", "inner/x.safetensors", ".."]
)
def test_a4_an_index_names_files_of_its_own_folder_only(checkpoint, name, tmp_path):
    second = checkpoint / "model-00002-of-00003.safetensors"
    shutil.copy(second, tmp_path / "outside.safetensors")
    (checkpoint / "inner").mkdir()
    shutil.copy(second, checkpoint / "inner" / "x.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    wrong = name.format(root=tmp_path)
    rewrite(
        index, weight_map={key: wrong if place == second.name else place for key, place in places.items()}
    )
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
    "layers that nobody stored": (
        CONFIG,
        dict(num_hidden_layers=900),
        "is 900 and the weights have 8 layers",
    ),
    "no positions": (CONFIG, dict(max_position_embeddings=0), "max_position_embeddings is 0"),
    "a limit of no tokens": (CONFIG, dict(tokenizer_model_max_length=-1), "tokenizer_model_max_length is -1"),
    "unknown activation": (CONFIG, dict(hidden_act="zelu"), "describes no model that can be built .*zelu"),
    "unknown rotation": (CONFIG, dict(rope_scaling={"rope_type": "zzz", "factor": 2.0}), "config.json .*zzz"),
    "no rotation": (CONFIG, dict(rope_theta=0), "rope_theta is 0, not a number from"),
    "a tower that is a number": (CONFIG, dict(mm_vision_tower=5), "mm_vision_tower is 5, not the name"),
    "a layer that is a word": (CONFIG, dict(mm_vision_select_layer="x"), "mm_vision_select_layer is x, not"),
    "a layer that is not there": (
        CONFIG,
        dict(mm_vision_select_layer=9),
        "mm_vision_select_layer 9 is out of range",
    ),
    "a projector without end": (
        CONFIG,
        dict(mm_projector_type="mlp99999x_gelu"),
        "mm_projector_type is mlp99999x",
    ),
    "an unknown shape": (
        CONFIG,
        dict(image_aspect_ratio="wide"),
        "image_aspect_ratio is wide; it is one of square",
    ),
    "tiles without end": (
        CONFIG,
        dict(image_aspect_ratio="anyres", image_grid_pinpoints=[[5600, 5600]]),
        "more than 64 tiles",
    ),
    "labels without end": (CONFIG, dict(num_labels=10**12), None),
    "other weights": (CONFIG, dict(transformers_weights="../x.safetensors"), None),
    "a list as type": (CONFIG, dict(model_type=["llava"]), "is a .* checkpoint; the types that load"),
    "a list as template": (
        CONFIG,
        dict(conversation=["v1"]),
        "conversation is .*, not the name of a template",
    ),
    "an end that is a word": (
        "llava/generation_config.json",
        dict(eos_token_id="x"),
        "eos_token_id is x, not the id",
    ),
    "a length that is a word": (
        "llava/tokenizer_config.json",
        dict(model_max_length="x"),
        "the tokenizer in .* cannot",
    ),
    "an index without metadata": (
        "llava/model.safetensors.index.json",
        dict(metadata=None),
        'has no metadata.*add "metadata"',
    ),
    "a tower without end": (
        "vision_tower/config.json",
        dict(num_hidden_layers=10**5),
        "num_hidden_layers is 100000",
    ),
    "a tower of no type": (
        "vision_tower/config.json",
        dict(torch_dtype=7),
        "torch_dtype is 7, not the name of a type",
    ),
    "a tower's labels": ("vision_tower/config.json", dict(num_labels=10**12), None),
    "a tower's activation": (
        "vision_tower/config.json",
        dict(hidden_act="zelu"),
        "describes no model that can be built",
    ),
    "huge pixels": (PIXELS, dict(size={"shortest_edge": 10**9}), "scales images to 1000000000 pixels"),
    "other pixels": (PIXELS, dict(crop_size={"height": 48, "width": 48}), r"crops images to \(48, 48\)"),
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
    refused(
        lambda: load(checkpoint), "holds 'model.norm.weight' as .*, and weights are floating-point numbers"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where", ["llava/model-00003-of-00003.safetensors", "vision_tower/model.safetensors"]
)
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
    refused(
        lambda: ask(17, 2), "row 0 of the prompt has 49 tokens with its visual tokens and the model takes 48"
    )
    refused(lambda: ask(1, 3), "row 0 of the prompt has 49 tokens")
    padded = torch.tensor([[0] * 20 + [5] * 16 + [-200] * 2, [5] * 22 + [-200] + [5] * 15])
    mask = torch.ones_like(padded)
    mask[0, :20] = 0  # padding does not count
    refused(
        lambda: model.generate(padded, images=images, attention_mask=mask),
        "row 1 of the prompt has 53 tokens",
    )


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
        lambda f: (
            (f / "model.safetensors").rename(f / "x.safetensors")
            and (f / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {NORM: "../x.safetensors"}})
            )
        ),
        "not a file of its own folder",
    ),
    "layers": (
        lambda f: rewrite(f / "config.json", text_config={"model_type": "llama", "num_hidden_layers": 900}),
        "is 900 and the",
    ),
    "a type": (
        lambda f: spoil(f / "model.safetensors", NORM, torch.Tensor.bool),
        f"holds '{NORM}' as BOOL, and weights are",
    ),
    "infinite": (
        lambda f: spoil(f / "model.safetensors", NORM, lambda norm: norm / 0),
        "not numbers or infinite",
    ),
    "a weight less": (
        lambda f: spoil(f / "model.safetensors", NORM, lambda norm: None),
        "lacks 1 weights, .*norm.weight'",
    ),
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


# Data


def turns(question: str = "<image>\nwhat ?", answer: str | None = "two") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def asked(question: str) -> dict:
    return {"conversations": turns(question)}


def pictured(question: str = "<image>\nwhat ?", **more) -> dict:
    return {"image": "0.png", **asked(question), **more}


# Forty samples that cannot be trained on as they were meant, and why each is left out.
FAULTY = [
    (7, "not an object"),
    ([], "not an object"),
    ({"id": "a", "text": "x"}, 'no list "conversations" or "messages"'),
    ({"conversations": "what ?"}, "its conversation is not a list"),
    ({"conversations": [1]}, 'a turn needs "from"'),
    ({"conversations": [{"from": "human", "value": 3}, *turns()[1:]]}, 'a turn needs "from"'),
    ({"conversations": [{"from": "alien", "value": "what ?"}, *turns()[1:]]}, 'a turn needs "from"'),
    ({"messages": [{"role": "tool", "content": "x"}]}, 'a turn needs "from"'),
    ({"conversations": turns(), "messages": [{"role": "user", "content": "x"}]}, "both"),
    ({"conversations": turns()[:1]}, "no answer"),
    ({"conversations": turns("what ?", "")}, "no answer"),
    ({"conversations": turns("what ?", " \n")}, "no answer"),
    ({"conversations": turns("", "two")}, "no round"),
    ({"conversations": turns("what ?", None)}, "no answer"),
    ({"conversations": [*turns("a"), *turns("b")[1:]]}, "take turns"),
    ({"conversations": [*turns("a")[:1], *turns("b")]}, "take turns"),
    ({"conversations": [{"from": "system", "value": "Be kind."}, *turns("what ?")]}, "system text"),
    ({**pictured(), "system": "Be kind."}, "system text"),
    ({**pictured(), "tools": "[{}]"}, "tools of its own"),
    ({"conversations": turns("what \ud800 ?")}, "half of a surrogate pair"),
    (asked("<image>\nwhat ?"), "it has <image> and no image"),
    (pictured("<Image>\nwhat ?"), "it writes <Image> where"),
    (pictured("<image_1> what ?"), "it writes <image_1> where"),
    (pictured("what is in [img] ?"), r"it writes \[img\] where"),
    ({"image": ["0.png"], **asked("<image> or <image> ?")}, "it has 1 images and 2 <image>"),
    ({"images": ["0.png", "2.png"], **asked("<image> ?")}, "it has 2 images and 1 <image>"),
    ({"image": "0.png", "conversations": turns() + turns()}, "<image> in several turns"),
    ({"image": 5, **asked("what ?")}, '"image" is 5'),
    ({"image": ["0.png", 5], **asked("<image>")}, "not a file name or a list"),
    ({"image": "0.png", "video": "a.mp4", **asked("<image>")}, "both image and video"),
    ({"video": "a.mp4", **asked("<video> what ?")}, "this model takes images only"),
    ({"image": "0.png", "images": ["2.png"], **asked("<image>")}, "name different files"),
    ({"image_path": "0.png", **asked("what ?")}, "its key image_path looks like media"),
    ({"Image": "0.png", **asked("what ?")}, "its key Image looks like media"),
    ({"audio": "a.wav", **asked("what ?")}, "its key audio looks like media"),
    ({"meta": {"source": "0.png"}, **asked("what ?")}, "its key meta looks like media"),
    ({"conversations": [{**turns("what ?")[0], "image": "0.png"}, *turns()[1:]]}, "a turn has the key image"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "0.png"}}]}]},
        "parts that are not",
    ),
    (pictured(image="x" * 5000 + ".png"), "name too long|cannot be opened"),
    (pictured(image="torn.png"), "torn.png"),
]


def test_b6_d3_forty_faulty_samples_are_named_and_left_out(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([pictured(), *(sample for sample, _ in FAULTY)]))
    data = read_data(str(path), path.read_bytes(), training_template("mini"))
    told = {number: str(fault) for number, fault in data.faults.items()}
    for number, (_, sentence) in enumerate(FAULTY[:-2], 1):
        if "images only" not in sentence:  # which the model decides
            with pytest.raises(AssertionError, match=sentence):
                raise AssertionError(told[number])
    assert len(FAULTY) == 40 and 0 not in told


@pytest.mark.slow
def test_b6_d3_forty_good_and_forty_faulty_samples(tmp_path, capfd):
    """It trains on exactly the forty, in the forms that are in use, and names the others."""
    flags = scenes(tmp_path, 40, texts=range(1, 40, 4), rounds=1)
    good = json.loads((tmp_path / "data.json").read_text())
    for number, sample in enumerate(good):
        said = sample.pop("conversations")
        if number % 3 == 0:  # LLaMA-Factory's
            names = {"human": "user", "gpt": "assistant"}
            sample["messages"] = [{"role": names[turn["from"]], "content": turn["value"]} for turn in said]
            sample |= {"images": [sample.pop("image")] if "image" in sample else []}
        else:
            sample["conversations"] = [*said, *turns("and \u2028 then ?", "")] if number % 3 == 1 else said
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:100])
    mixed = [sample for pair in zip(good, (sample for sample, _ in FAULTY)) for sample in pair]
    (tmp_path / "data.json").write_text("\ufeff" + json.dumps(mixed), encoding="utf-8")
    log = run(
        tmp_path / "out",
        flags,
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        6,
        "--save_strategy",
        "no",
    )
    out, err = capfd.readouterr()
    assert "It learned from 40 of 80 samples; 40 were skipped (" in out and "2 unreadable" in out
    assert (log[-1]["samples_used"], log[-1]["samples_skipped"]) == (40, 40) and "38 of the 80 samples" in err
    report = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert sorted(entry["sample"] for entry in report["skipped"]) == list(range(1, 80, 2))
    assert report["used"] == 40 and report["rounds_without_an_answer"] == 13


def test_b6_what_is_put_right_is_counted(tmp_path):
    path = tmp_path / "data.json"
    samples = [
        pictured("what ?"),
        {"image": ["0.png", "1.png"], "conversations": [*turns("<image> ?", ""), *turns("and <image> ?")]},
        {"image": "0.png", "conversations": [*turns("what ?"), *turns("<image> and ?", "")]},
        {"image": "", **asked("what ?")},
        {"images": None, **asked("what ?")},
        {"image": "0.png", "url": "https://a.example/0.png", "width": 3, **asked("<image>")},
        {"video": "a.mp4", **asked("<image> what ?")},
    ]
    path.write_text(json.dumps(samples))
    data = read_data(str(path), path.read_bytes(), training_template("v1"))
    assert not data.faults and (data.placed, data.lost_rounds) == (1, 2)
    texts = [[turn["value"] for turn in sample["conversations"]] for sample in data.samples]
    assert texts[0][0] == "<image>\nwhat ?" and texts[1] == ["<image>\nand <image> ?", "two"]
    assert "image" not in data.samples[2] and texts[6][0] == "<video> what ?"


def test_d3_files_of_samples(tmp_path):
    path = tmp_path / "data.JSONL"
    path.write_bytes(
        '\ufeff{"text": "a\u2028b\u2029c\u0085d\x0b"}\r\n\n{"text": "e"}'.encode().replace(
            b"\x0b", b"\\u000b"
        )
    )
    assert [sample["text"] for sample in read_samples(str(path))] == ["a\u2028b\u2029c\x85d\x0b", "e"]
    for content, sentence in (
        ("[" * 10**5, "nested too deeply"),
        ('{"a": 1}\n{"a"', "line 2: no valid JSON"),
        ("", "no list"),
    ):
        path.write_text(content)
        refused(lambda: read_samples(str(path)), sentence)
    refused(lambda: read_samples("x" * 5000), "cannot be read")
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}')
    refused(
        lambda: read_samples(str(tmp_path / "lines.json")), "name it .jsonl if it has one sample in each line"
    )


def stopped(output: Path, *flags, capsys) -> str:
    """The sentence with which a training is refused before weights are read."""
    with pytest.raises(SystemExit) as stop:
        run(output, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def few(tmp_path) -> list[str]:
    return scenes(tmp_path / "scenes", 4, rounds=1)


@pytest.mark.parametrize("case", ["length", "images", "template"])
def test_b5_d3_a_training_that_would_learn_nothing_is_refused(few, tmp_path, capsys, monkeypatch, case):
    monkeypatch.setattr(recipe, "build_model", lambda *args: pytest.fail("a model was loaded"))
    flags, sentence = {
        "length": (
            ["--model_max_length", 200],
            "in 4 every answer comes after --model_max_length 200; raise it",
        ),
        "images": ([], "in 4 the image .*png is in no known format"),
        "template": (
            ["--version", "chatml_direct"],
            "in 4 the tokens do not add up with --version chatml_direct",
        ),
    }[case]
    if case == "images":
        for path in Path(few[3]).iterdir():
            path.write_bytes(b"no picture")
    said = stopped(tmp_path / "out", few, *flags, "--max_steps", 1, capsys=capsys)
    with pytest.raises(
        AssertionError, match=f"nothing would be learned from .*data.json: of 4 samples {sentence}"
    ):
        raise AssertionError(said)
    assert not (tmp_path / "out").exists()


# Runs


STEPS = ["--max_steps", 4, "--save_steps", 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], Path]:
    """A finished run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*scenes(folder, 8, rounds=1), *map(str, STEPS)]
    run(folder / "out", flags)
    return flags, folder / "out"


@pytest.fixture
def again(trained, tmp_path) -> tuple[list[str], Path]:
    flags, folder = trained
    shutil.copytree(folder, tmp_path / "out")
    return flags, tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


OTHER = {
    "rate": (["--learning_rate", 3e-4], r"--learning_rate was 0.0001 and is 0.0003"),
    "compression": (["--compression", "mini/r50"], "--compression was not given and is .*"),
    "stage": (["--tune_mm_mlp_adapter", "True"], "--tune_mm_mlp_adapter was False and is True"),
    "adapters": (["--lora_enable", "True"], "--lora_enable was False and is True"),
    "steps": (["--max_steps", 9], "--max_steps was 4 and is 9"),
    "batch": (["--per_device_train_batch_size", 4], "samples of a step .* was 2 and is 4"),
    "data": (None, "what --data_path holds has changed"),
}


@pytest.mark.parametrize("case", OTHER)
def test_b4_another_run_in_the_folder_is_refused(again, capsys, monkeypatch, tmp_path, case):
    monkeypatch.setattr(recipe, "build_model", lambda *args: pytest.fail("a model was loaded"))
    (flags, folder), (change, sentence) = again, OTHER[case]
    if change is None:
        samples = json.loads(Path(flags[1]).read_text())
        samples[0]["conversations"][1]["value"] = "another answer"
        (tmp_path / "other.json").write_text(json.dumps(samples))
        change = ["--data_path", tmp_path / "other.json"]
    before = content(folder)
    said = stopped(folder, flags, *change, capsys=capsys)
    with pytest.raises(AssertionError, match=f"--output_dir .*out holds another run: .*{sentence}"):
        raise AssertionError(said)
    assert content(folder) == before


def test_b4_nothing_left_to_do_and_models_of_unknown_origin(again, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "build_model", lambda *args: pytest.fail("a model was loaded"))
    flags, folder = again
    before = content(folder)
    run(folder, flags, "--logging_steps", 3)  # of which no weight depends
    assert "nothing is left to do: the run in" in capsys.readouterr().err and content(folder) == before
    (folder / "run.json").unlink()
    assert "holds a model or checkpoints, and no run.json" in stopped(folder, flags, capsys=capsys)
    assert "is the model that the training begins with" in stopped(MINI, flags, capsys=capsys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TORN = {
    "empty state": lambda f: (f / "trainer_state.json").write_text(""),
    "cut optimizer": lambda f: truncate(f / "optimizer.pt"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no seal": lambda f: (f / "whole.json").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TORN)
def test_c2_a_torn_checkpoint_gives_way(again, trained, capsys, case):
    flags, folder = again
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "mine").write_text("kept")
    (folder / "checkpoint-12.old").mkdir()
    (folder / "model.safetensors").unlink()  # the kill came at the end
    TORN[case](folder / "checkpoint-4")
    log = run(folder, flags, "--save_total_limit", 1)
    err = capsys.readouterr().err
    assert (
        "checkpoint-4 was not written to its end and is removed" in err
        and "goes on from" in err
        and "checkpoint-2" in err
    )
    one, two = (load_file(place / "model.safetensors") for place in (folder, trained[1]))
    assert all(torch.equal(one[name], two[name]) for name in two) and len(losses(log)) == 4
    assert (folder / "checkpoint-best" / "mine").exists() and (folder / "checkpoint-12.old").exists()
    assert (
        not (folder / "checkpoint-2").exists()
        and Run(folder, json.loads((folder / "run.json").read_text())["run"]).newest()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            OSError(28, "No space left on device"),
            "cannot be written to .*the same command goes on from .*checkpoint-2",
        ),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file"
            ),
            "cannot be written",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "not enough memory for --per_device_train_batch_size 2",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "not enough memory .*the same command goes on from",
        ),
    ],
)
def test_e11_a_full_disk_and_too_little_memory_are_sentences(again, capsys, monkeypatch, error, sentence):
    flags, folder = again
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-4")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("llava.train.trainer.save_llava", fail)
    with pytest.raises(SystemExit) as stop:
        run(folder, flags)
    said = capsys.readouterr().err
    with pytest.raises(AssertionError, match=f"(?s)error: [^\\n]*{sentence}"):
        raise AssertionError(said)
    assert stop.value.code == 1 and "Traceback" not in said and not (folder / "checkpoint-4").exists()
