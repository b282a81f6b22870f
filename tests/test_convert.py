"""``python -m llava.convert``: LLaVA's own format and llava-hf folders, one into the other and back."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import libra
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.convert import convert
from llava.convert.__main__ import main
from llava.convert.text import chat_template, with_image_token
from llava.convert.weights import read_folder
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.settings import is_original

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = GOLDEN / "text_and_image_processing/tokenizers"
CLOSE = dict(atol=1e-5, rtol=1e-5)
SOURCES = {
    "llava15": GOLDEN / "llava15/checkpoint",
    "next": GOLDEN / "llava_next_llama3/checkpoint",
    "mini": ROOT / "mini/checkpoint",
}
TEMPLATES = {"llava15": "vicuna_v1", "next": "llava_llama_3", "mini": "mini"}
QUESTION = {"llava15": "Is it?", "next": "Is it?", "mini": "how many digits are there ?"}


class Converted:
    """A checkpoint of ours, the llava-hf folder made of it, and both models in float32."""

    def __init__(self, name: str, folder: Path):
        self.name, self.source, self.folder = name, SOURCES[name], folder
        convert(str(self.source), str(folder), conversation=TEMPLATES[name])
        self.tokenizer, self.ours, self.image_processor, _ = load_pretrained_model(
            str(self.source), None, name, device="cpu"
        )
        self.theirs, self.info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        self.theirs.eval()
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.vocabulary = self.ours.config.vocab_size
        with Image.open(GOLDEN / "text_and_image_processing/image0.png") as image:
            self.image = image.convert("RGB")
        conversation = conv_templates[TEMPLATES[name]].copy()
        conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION[name]}")
        conversation.append_message(conversation.roles[1], None)
        self.prompt = conversation.get_prompt()

    def our_inputs(self) -> dict:
        ids = tokenizer_image_token(self.prompt, self.tokenizer, return_tensors="pt")[None]
        pixels = process_images([self.image], self.image_processor, self.ours.config)
        return {"images": pixels, "image_sizes": [self.image.size], "input_ids": ids}

    def their_inputs(self) -> dict:
        return self.processor(images=self.image, text=self.prompt, return_tensors="pt")

    def same_inputs(self) -> tuple[dict, dict]:
        """The prompt for our model and for transformers', with the very same pixels."""
        ours, theirs = self.our_inputs(), self.their_inputs()
        return ours, {**theirs, "pixel_values": ours["images"]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Each of the three checkpoints, converted and loaded once."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def get(name: str) -> Converted:
        if name not in made:
            made[name] = Converted(name, folder / f"{name}-hf")
        return made[name]

    return get


@pytest.fixture(params=list(SOURCES))
def pair(request, converted):
    return converted(request.param)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def with_tower(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with its vision tower in it."""
    shutil.copytree(source, target)
    if not (target / "vision_tower").exists():
        shutil.copytree(source.parent / "vision_tower", target / "vision_tower")
    return target


@pytest.fixture
def checkpoint(tmp_path):
    return with_tower(SOURCES["llava15"], tmp_path / "llava-v1.5-tiny")


def change_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def shard(folder: Path, count: int, kind: str = "safetensors", metadata: dict | None = None) -> None:
    """Cut a checkpoint's weights into shards, keys in no particular order."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, places = {"safetensors": "model", "bin": "pytorch_model"}[kind], {}
    for k in range(count):
        name = f"{stem}-{k + 1:05}-of-{count:05}.{kind}"
        part = {key: tensors[key] for key in sorted(tensors, key=lambda key: key[::-1])[k::count]}
        places |= dict.fromkeys(part, name)
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{single}.index.json").write_text(json.dumps(index))


# --- the same model ---


def test_transformers_finds_every_weight_and_no_other(pair):
    assert (
        not pair.info["missing_keys"]
        and not pair.info["unexpected_keys"]
        and not pair.info["mismatched_keys"]
    )
    stored = load_file(pair.folder / "model.safetensors")
    own = load_file(pair.source / "model.safetensors")
    assert stored["language_model.model.norm.weight"].dtype == own["model.norm.weight"].dtype
    assert (
        json.loads((pair.folder / "config.json").read_text())["dtype"]
        == str(own["model.norm.weight"].dtype)[6:]
    )


def test_processor_gives_our_ids_and_pixels(pair):
    ours, theirs = pair.our_inputs(), pair.their_inputs()
    image_token, held = pair.theirs.config.image_token_id, pair.ours.splice(**ours).visual[0]
    expected = torch.full(held.shape, image_token)
    expected[~held] = ours["input_ids"][ours["input_ids"] != IMAGE_TOKEN_INDEX]
    assert torch.equal(theirs.input_ids[0], expected)
    torch.testing.assert_close(theirs.pixel_values, ours["images"], atol=1e-6, rtol=0)
    torchvision = AutoProcessor.from_pretrained(pair.folder)(
        images=pair.image, text="<image>", return_tensors="pt"
    )
    assert (torchvision.pixel_values - ours["images"]).abs().max() < 0.05  # two grey levels


@torch.no_grad()
def test_same_logits_and_answer(pair):
    ours, theirs = pair.same_inputs()
    got, want = pair.theirs(**theirs).logits, pair.ours(**ours).logits
    torch.testing.assert_close(got[..., : pair.vocabulary], want, **CLOSE)
    assert got.shape[-1] == pair.vocabulary + 1
    torch.testing.assert_close(
        got[..., -1], want.mean(-1), atol=2e-3, rtol=0
    )  # as float16 rounds: never the largest
    options = dict(do_sample=False, max_new_tokens=12)
    answer = pair.theirs.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    assert torch.equal(answer, pair.ours.generate(**ours, **options))


@torch.no_grad()
def test_same_logits_of_text(pair):
    ids = torch.tensor([tokenizer_image_token(pair.prompt.replace("<image>", ""), pair.tokenizer)])
    torch.testing.assert_close(
        pair.theirs(input_ids=ids).logits[..., : pair.vocabulary], pair.ours(ids).logits, **CLOSE
    )


@pytest.mark.parametrize("case", ["a_wide", "c_square"])
@torch.no_grad()
def test_tiles_of_other_images(converted, case):
    """The order of width and height in sizes and grids: transformers has it the other way round."""
    pair = converted("next")
    with np.load(GOLDEN / "llava_next_llama3/data.npz") as data:
        image = Image.fromarray(data["image0" if case == "a_wide" else "image2"])
        ids, logits = (
            torch.from_numpy(data[f"{case}.input_ids"]),
            torch.from_numpy(data[f"{case}.logits" if case == "a_wide" else f"{case}.logits_last16"]),
        )
    pixels = process_images([image], pair.image_processor, pair.ours.config)
    theirs = pair.processor(images=image, text="<image>", return_tensors="pt")
    torch.testing.assert_close(theirs.pixel_values, pixels, atol=1e-6, rtol=0)
    place = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero())
    tokens = (theirs.input_ids[0] == pair.theirs.config.image_token_id).sum()
    images = torch.full((1, tokens), pair.theirs.config.image_token_id)
    full = torch.cat([ids[:, :place], images, ids[:, place + 1 :]], 1)
    got = pair.theirs(
        input_ids=full, pixel_values=pixels, image_sizes=torch.tensor([image.size[::-1]])
    ).logits
    columns = slice(None, None, 2) if case == "a_wide" else slice(-16, None)
    torch.testing.assert_close(got[:, columns, : pair.vocabulary], logits, atol=1e-4, rtol=1e-4)


def check_both_doors(pair: Converted, compression: libra.Compression) -> None:
    """The same logits and counts from llava's own model and from the attached one."""
    ours, theirs = pair.same_inputs()
    pair.ours.set_compression(compression)
    try:
        want = pair.ours(**ours).logits
        counts = pair.ours.compression_stats["visual_tokens"]
    finally:
        pair.ours.set_compression(None)
    # What llava found next to its vision tower: the embedded model's has a whole CLIP.
    with libra.attach(pair.theirs, compression, clip=pair.ours.clip) as handle:
        got = pair.theirs(**theirs).logits
        assert handle.stats["visual_tokens"] == counts
    torch.testing.assert_close(got[..., : pair.vocabulary], want, **CLOSE)


@pytest.mark.parametrize("name", ["llava15", "mini"])
@pytest.mark.parametrize("method", ["libra", "fastv"])
@torch.no_grad()
def test_same_compressed_logits_with_the_plug_in(converted, name, method):
    tau = {"tau": 0.3} if method == "libra" else {}
    check_both_doors(converted(name), libra.Compression(method=method, layers=(1, 3, 5), ratio=0.5, **tau))


EARLY = [
    ("visionzip", "tower"),
    ("hiprune", "input"),
    ("cdpruner", "input"),
    ("tome", "tower"),
    ("downsample", "tower"),
]


@pytest.mark.parametrize("name", ["llava15", "mini"])
@pytest.mark.parametrize("method, at", EARLY)
@torch.no_grad()
def test_same_logits_with_the_plug_in_before_the_language_model(converted, name, method, at):
    """The vision tower is read by two codes: llava's own tower, and listeners at an attached model's
    attention."""
    check_both_doors(converted(name), libra.Compression(method=method, at=at, ratio=0.6, positions="centre"))


# --- prompts ---


@pytest.mark.parametrize("name", [name for name in conv_templates if chat_template(name)])
def test_chat_template_gives_the_prompt(converted, name):
    conversation, messages = conv_templates[name].copy(), []
    for i, text in enumerate(["<image>\n<image>\nWhat is {{ it }}?", ' A "cat".\n', "Sure?", None]):
        conversation.append_message(conversation.roles[i % 2], text)
        if text is not None:
            messages.append(
                {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
            )
    messages[0]["content"] = [
        {"type": "text", "text": "What is {{ it }}?"},
        {"type": "image"},
        {"type": "image"},
    ]
    messages[2]["content"] = "Sure?"
    processor = converted("mini").processor
    options = dict(chat_template=chat_template(name), add_generation_prompt=True)
    assert processor.apply_chat_template(messages, **options) == conversation.get_prompt()


def test_folder_has_its_template(pair):
    assert pair.processor.chat_template == chat_template(TEMPLATES[pair.name])
    with pytest.raises(Exception, match="its system text is its own"):
        pair.processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize("name", ["sp700_legacyFalse", "sp700_legacyTrue", "llama3_bpe320", "chatml_bpe320"])
def test_tokenizer_encodes_what_follows_an_image_as_a_text_of_its_own(name, tmp_path):
    plain = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    with_image_token(AutoTokenizer.from_pretrained(TOKENIZERS / name)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image == len(plain) and tokenizer.padding_side == "left"
    for text in (
        "USER: <image>\nWhat is it? ASSISTANT:",
        "<image>\nhi",
        "a<image><image> b <image>",
        "<image>",
        "x<image>  two 日本",
        "q</s>USER: hi<image>\nq</s>USER: a",
        "<|begin_of_text|>a<|eot_id|>b<|im_end|>c<image>d<|im_start|>e",
    ):
        assert tokenizer(text).input_ids == tokenizer_image_token(text, plain, image_token_index=image), text


def test_end_of_turn_ends_generation(tmp_path):
    source = with_tower(SOURCES["next"], tmp_path / "source")
    stop = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|eot_id|>")
    change_config(source, eos_token_id=2)
    (source / "generation_config.json").unlink()
    convert(str(source), str(tmp_path / "hf"), conversation="llava_llama_3")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [2, stop]


# --- there and back ---


def test_back_again_is_byte_identical(pair, tmp_path):
    convert(str(pair.folder), str(tmp_path / "back"))
    expected = files(pair.source)
    if pair.name != "mini":  # its tower lies next to the checkpoint and moves into it
        expected |= {
            f"vision_tower/{name}": data for name, data in files(pair.source.parent / "vision_tower").items()
        }
    assert files(tmp_path / "back") == expected


def test_shards_buffers_and_a_second_tower_come_back_byte_by_byte(checkpoint, tmp_path):
    """bfloat16 in three shards with metadata, an old table, and inside an unused tower other than the one
    beside."""
    tensors = {name: value.bfloat16() for name, value in load_file(checkpoint / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    assert any("vision_tower" in name for name in tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    shard(checkpoint, 3, metadata={"format": "pt", "note": "ü"})
    convert(str(checkpoint), str(tmp_path / "hf"), max_shard_size=300_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    held = {key: file.name for file in read_folder(tmp_path / "hf") for key in file.tensors}
    assert index == held and len(set(held.values())) >= 4
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert files(tmp_path / "back") == files(checkpoint)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_shards_come_back_as_safetensors_with_the_same_bits(checkpoint, tmp_path, legacy):
    tensors = load_file(checkpoint / "model.safetensors")
    shard(checkpoint, 2, "bin")
    if legacy:
        for path in checkpoint.glob("*.bin"):
            torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    convert(str(checkpoint), str(tmp_path / "hf"))
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    names = {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    small = {name: data for name, data in files(checkpoint).items() if ".bin" not in name}
    assert {name: data for name, data in files(tmp_path / "back").items() if name not in names} == small
    back = {
        name: value
        for file in sorted(names)[:2]
        for name, value in load_file(tmp_path / "back" / file).items()
    }
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys() and set(index.values()) == set(sorted(names)[:2])


@pytest.mark.parametrize("size, comes_back", [(2, True), (17 << 20, False)])
def test_a_tower_from_elsewhere_moves_in(checkpoint, tmp_path, size, comes_back):
    """A whole CLIP at an absolute path: the configuration names it in the checkpoint, and its text model
    comes back where it is small."""
    clip = load_file(checkpoint / "vision_tower/model.safetensors")
    shutil.move(checkpoint / "vision_tower", tmp_path / "clip")
    text = {"text_model.final_layer_norm.bias": torch.ones(size), "logit_scale": torch.tensor(1.0)}
    save_file({**clip, **text}, tmp_path / "clip/model.safetensors")
    change_config(checkpoint, mm_vision_tower=str(tmp_path / "clip"))
    convert(str(checkpoint), str(tmp_path / "hf"))
    shutil.rmtree(tmp_path / "clip")
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == {
        **json.loads((checkpoint / "config.json").read_text()),
        "mm_vision_tower": "vision_tower",
    }
    back = load_file(tmp_path / "back/vision_tower/model.safetensors")
    expected = {**clip, **text} if comes_back else clip
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    load_pretrained_model(str(tmp_path / "back"), None, "llava", device="cpu")


def test_what_was_trained_in_between_comes_back(checkpoint, tmp_path):
    """Weights changed in the llava-hf folder go into the original's files; another configuration makes it
    another model."""
    convert(str(checkpoint), str(tmp_path / "hf"))
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "back"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.norm.weight"]

    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    convert(str(tmp_path / "hf"), str(tmp_path / "other"))
    settings = json.loads((tmp_path / "other/config.json").read_text())
    assert (
        settings["rms_norm_eps"] == 0.5
        and settings["vocab_size"] == 321
        and settings["conversation"] == "llava_v1"
    )


@pytest.fixture(params=["llama", "mistral", "next"])
def foreign(request, tmp_path, converted):
    """A llava-hf folder that we did not make: transformers saved it, or it has the names of the published
    ones."""
    folder = tmp_path / "llava-hf"
    if request.param == "next":
        shutil.copytree(converted("next").folder, folder, ignore=shutil.ignore_patterns("original"))
        return folder
    model = tiny.hf_model(3, request.param)
    model.save_pretrained(folder)
    if request.param == "llama":
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model."): value
            for name, value in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(converted("mini").folder / name, folder)
    shutil.copy(GOLDEN / "text_and_image_processing/image_processor/preprocessor_config.json", folder)
    change_config(folder, image_token_index=71)
    return folder


@torch.no_grad()
def test_llava_hf_to_original_and_back(foreign, tmp_path):
    convert(str(foreign), str(tmp_path / "ours"))
    _, ours, image_processor, _ = load_pretrained_model(str(tmp_path / "ours"), None, "llava", device="cpu")
    theirs = AutoModelForImageTextToText.from_pretrained(foreign, dtype=torch.float32).eval()
    following = theirs.config.model_type == "llava_next"
    assert ours.config.image_aspect_ratio == ("anyres" if following else "square")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    pixels = process_images([image], image_processor, ours.config)
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 8]])
    want = ours(ids, images=pixels, image_sizes=[image.size]).logits
    tokens = want.shape[1] - 4
    expanded = torch.cat([ids[:, :2], torch.full((1, tokens), theirs.config.image_token_id), ids[:, 3:]], 1)
    extra = {"image_sizes": torch.tensor([image.size[::-1]])} if following else {}
    torch.testing.assert_close(theirs(input_ids=expanded, pixel_values=pixels, **extra).logits, want, **CLOSE)

    convert(str(tmp_path / "ours"), str(tmp_path / "again"))
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "again", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.text_config.to_dict() == theirs.config.text_config.to_dict()


# --- refusals ---


def refused(source: Path, destination: Path, match: str, **options) -> None:
    """The sentence, and that nothing was left behind."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(ValueError, match=match):
        convert(str(source), str(destination), **options)
    assert sorted(destination.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"model_type": "videollama2_mistral"},
            "VideoLLaMA-2 checkpoint, for which transformers has no class",
        ),
        ({"model_type": "llava_mpt"}, "is a 'llava_mpt' checkpoint; the types that convert"),
        ({"model_type": "gpt2", "mm_vision_tower": None}, "is a 'gpt2' checkpoint"),
        ({"mm_projector_type": "linear"}, "projector 'linear'; transformers' classes have only mlp2x_gelu"),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector 'mlp3x_gelu'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' with mm_patch_merge_type 'flat'"),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "mm_vision_select_feature": "cls_patch",
            },
            "'spatial_unpad' and features 'cls_patch'",
        ),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"mm_vision_tower": "nowhere/to-be-found"}, "vision tower nowhere/to-be-found"),
        ({"hidden_size": 32, "mm_vision_tower": "vision_tower"}, "in the shape .*config.json asks for"),
    ],
)
def test_original_that_cannot_be_expressed(checkpoint, tmp_path, settings, match):
    change_config(checkpoint, **settings)
    refused(checkpoint, tmp_path / "hf", match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"model_type": "llava_onevision"},
            "is a 'llava_onevision' model; the types that convert are llava, llava_next",
        ),
        ({"projector_hidden_act": "relu"}, "not two layers with biases and gelu"),
        ({"vision_feature_layer": [-2, -3]}, "the vision layers"),
        ({"text_config": {"model_type": "qwen2"}}, "language model of .* is of type 'qwen2'"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "vision tower of .* is of type 'siglip_vision_model'",
        ),
    ],
)
def test_llava_hf_that_cannot_be_expressed(converted, tmp_path, settings, match):
    shutil.copytree(converted("llava15").folder, tmp_path / "hf")
    change_config(tmp_path / "hf", **settings)
    refused(tmp_path / "hf", tmp_path / "original", match)


def test_class_token_among_the_features(checkpoint, tmp_path):
    change_config(checkpoint, mm_vision_select_feature="cls_patch")
    convert(str(checkpoint), str(tmp_path / "hf"))
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image = Image.new("RGB", (30, 20))
    assert processor(images=image, text="<image>", return_tensors="pt").input_ids.shape == (1, 1 + 17)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert theirs.config.image_seq_length == 17 and theirs.config.vision_feature_select_strategy == "full"


def test_a_token_that_the_vocabulary_has_room_for_adds_no_row(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(8, 64)])
    save_file(tensors, checkpoint / "model.safetensors")
    change_config(checkpoint, vocab_size=328)
    lines = convert(str(checkpoint), str(tmp_path / "hf"))
    assert any("<image> is token 320; to embeddings and head no row was added" in line for line in lines)
    assert load_file(tmp_path / "hf/model.safetensors")["language_model.lm_head.weight"].shape == (328, 64)


def test_tensors_are_read_in_pieces(converted, tmp_path, monkeypatch):
    """Pieces that end in the middle of a row: the added row, and the cut on the way back."""
    monkeypatch.setattr("llava.convert.weights._PIECE", 1000)
    convert(str(SOURCES["mini"]), str(tmp_path / "hf"), conversation="mini")
    assert files(tmp_path / "hf") == files(converted("mini").folder)
    convert(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert files(tmp_path / "back") == files(SOURCES["mini"])


class Bomb:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_damaged_sources(checkpoint, tmp_path):
    hf = tmp_path / "hf"
    weights = checkpoint / "model.safetensors"
    tensors, data = load_file(weights), weights.read_bytes()
    weights.write_bytes(data[:-100])
    refused(checkpoint, hf, "model.safetensors is damaged")
    save_file(
        {name: value for name, value in tensors.items() if name != "model.mm_projector.0.bias"}, weights
    )
    refused(checkpoint, hf, "lacks 1 weights, 'model.mm_projector.0.bias'")
    save_file({**tensors, "model.vision_resampler.query": torch.ones(1)}, weights)
    with pytest.warns(UserWarning, match="vision_resampler"):
        refused(checkpoint, hf, "no place for 1 weights of .*'model.vision_resampler.query'")
    weights.write_bytes(data)
    shard(checkpoint, 2)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    refused(checkpoint, hf, "lacks model-00002-of-00002.safetensors")
    for path in checkpoint.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": Bomb()}, checkpoint / "pytorch_model.bin")
    refused(checkpoint, hf, "pytorch_model.bin is not opened: it asks for .*system")
    (checkpoint / "pytorch_model.bin").rename(checkpoint / "mm_projector.bin")
    refused(checkpoint, hf, "is a part of a model")
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, hf, "config.json is not valid JSON")


def test_damaged_llava_hf(converted, tmp_path):
    shutil.copytree(converted("llava15").folder, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    refused(
        tmp_path / "hf", tmp_path / "original", "lacks 1 weights, 'model.multi_modal_projector.linear_2.bias'"
    )
    change_config(tmp_path / "hf", text_config={"model_type": "llama", "hidden_size": "wide"})
    refused(tmp_path / "hf", tmp_path / "original", "config.json cannot be used: hidden_size is wide")
    shutil.copytree(converted("mini").folder, tmp_path / "mini")
    (tmp_path / "mini/original/layout.json").write_text("{}")
    refused(
        tmp_path / "mini",
        tmp_path / "original",
        "layout.json is damaged .*remove .*original to convert without it",
    )
    data = (tmp_path / "mini/model.safetensors").read_bytes()
    (tmp_path / "mini/model.safetensors").write_bytes(
        data.replace(b'"shape":[77,128]', b'"shape":[76,128]', 1)
    )
    refused(tmp_path / "mini", tmp_path / "original", "model.safetensors is damaged .*contradicts itself")


def test_destinations(checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    refused(checkpoint, tmp_path / "there", "there exists; give the name of a folder that does not")
    with pytest.raises(ValueError, match="there is no folder .*missing to write to"):
        convert(str(checkpoint), str(tmp_path / "missing/hf"))
    refused(checkpoint, tmp_path / "new", "already is in the format 'original'", to="original")


@contextmanager
def largest_file(nbytes: int):
    """Writing more than that into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [500, 10**6])  # the first file fails, or the weights
def test_a_disk_that_fills_up_leaves_nothing_behind(checkpoint, tmp_path, limit):
    with largest_file(limit):
        refused(checkpoint, tmp_path / "hf", "failed .*File too large.*nothing was left behind")


def test_command(tmp_path, capsys):
    """In a process of its own there, in this one back."""
    command = [
        sys.executable,
        "-m",
        "llava.convert",
        "mini/checkpoint",
        str(tmp_path / "hf"),
        "--max-shard-size",
        "2MB",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<image> is token 76" in done.stdout and "weights: 100%" in done.stderr
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= 3
    main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "original"])
    assert files(tmp_path / "back") == files(ROOT / "mini/checkpoint")
    assert "the original's own files" in capsys.readouterr().out
    for arguments, sentence in (
        (["mini/checkpoint", str(tmp_path / "hf")], "exists"),
        (["no/where/at-all", str(tmp_path / "x")], "no/where/at-all"),
        (
            ["mini/checkpoint", str(tmp_path / "x"), "--max-shard-size", "many"],
            "many is not a size such as 500MB",
        ),
        (["configs", str(tmp_path / "x")], "config.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and error.startswith("error: ")
            and sentence in error
            and error.count("\n") == 1
        )


@pytest.mark.parametrize(
    "config, own",
    [
        ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, True),  # before transformers had a LLaVA
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, False),
        ({"model_type": "llava_next", "text_config": {}, "vision_config": {}}, False),
        ({"model_type": "llava_mistral"}, True),
        ({"model_type": "videollama2_mistral"}, True),
        ({"model_type": "qwen2_vl", "vision_config": {}}, False),
        ({}, False),
    ],
)
def test_which_configuration_is_of_llavas_own_format(config, own):
    assert is_original(config) is own
