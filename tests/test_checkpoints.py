"""Checkpoints in every layout of the original, each with the logits of the golden one; and checkpoints that
are refused."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModel, MistralConfig, MistralForCausalLM

from libra import Compression
from llava.eval import run_llava
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

GOLDEN = Path(__file__).parent / "golden"
IMAGE = str(GOLDEN / "text_and_image_processing" / "image0.png")
CLOSE = dict(atol=1e-4, rtol=1e-4)
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
LAYERS = 8
RANK, ALPHA = 4, 16
FASTV = Compression(method="fastv", layers=(1, 3), ratio=0.5)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "llava15" / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN / "llava15" / "data.npz") as data:
        return {
            name: torch.from_numpy(data[f"a.{name}"])
            for name in ("input_ids", "attention_mask", "images", "logits")
        }


def load(path, base=None, **options):
    return load_pretrained_model(str(path), base and str(base), "llava", **{"device": "cpu", **options})[1]


def given(case):
    return {name: case[name] for name in ("input_ids", "attention_mask", "images")}


@torch.no_grad()
def assert_golden(model, case):
    torch.testing.assert_close(model(**given(case)).logits, case["logits"], **CLOSE)


def generate(model, case):
    return model.generate(**given(case), do_sample=False, max_new_tokens=6, pad_token_id=0)


def settings(**changes) -> dict:
    """The golden config.json with changes; None takes a key out."""
    values = json.loads((GOLDEN / "llava15" / "checkpoint" / "config.json").read_text()) | changes
    return {name: value for name, value in values.items() if name not in changes or value is not None}


def put(folder: Path, config: dict, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER if tokenizer else ():
        shutil.copy(GOLDEN / "llava15" / "checkpoint" / name, folder)
    return folder


def shard(folder: Path, weights: dict, kind: str = "safetensors", count: int = 3) -> list[Path]:
    """Write weights as shards with an index, or as a single file where ``count`` is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = (
        [f"{stem}-{i + 1:05}-of-{count:05}{suffix}" for i in range(count)] if count > 1 else [stem + suffix]
    )
    places = {name: names[i * count // len(weights)] for i, name in enumerate(weights)}
    for file in names:
        part = {name: weights[name].clone() for name in weights if places[name] == file}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    if count > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


def language(golden) -> dict:
    return {
        name: value
        for name, value in golden.items()
        if "mm_projector" not in name and "vision_tower" not in name
    }


def projector(golden, prefix: str = "") -> dict:
    return {prefix + name: value.clone() for name, value in golden.items() if "mm_projector" in name}


def put_base(folder: Path, weights: dict, kind: str = "bin") -> Path:
    """A plain Llama with the golden tokenizer, as sharded .bin unless told otherwise."""
    plain = {
        name: value
        for name, value in settings().items()
        if not name.startswith(("mm_", "image_", "tokenizer_"))
    }
    put(folder, plain | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    shard(folder, weights, kind)
    return folder


@pytest.fixture
def home(tmp_path):
    """A folder with the vision tower, next to which checkpoints are put."""
    shutil.copytree(GOLDEN / "llava15" / "vision_tower", tmp_path / "vision_tower")
    return tmp_path


# Layouts


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tower", ["inside", "next to it"])
def test_a_whole_model_as_one_file_or_in_shards(home, golden, case, kind, count, tower):
    """Inside: the tower's folder has no weights of its own. Older versions' inverse frequencies are left
    aside in silence."""
    folder = put(home / "llava", settings(unfreeze_mm_vision_tower=tower == "inside"))
    weights = (
        golden
        if tower == "inside"
        else {name: value for name, value in golden.items() if "vision_tower" not in name}
    )
    shard(folder, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, kind, count)
    if tower == "inside":
        (home / "vision_tower" / "model.safetensors").unlink()
    model = load(folder)
    assert_golden(model, case)
    assert not any(p.requires_grad for p in model.get_vision_tower().parameters()) and not model.training


def test_the_name_llava_of_older_checkpoints(home, golden, case):
    shard(put(home / "llava", settings(model_type="llava")), golden)
    model = load(home / "llava", torch_dtype=torch.bfloat16)
    assert model.config.model_type == "llava_llama" and isinstance(model, LlavaLlamaForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_device_map_and_arguments_of_later_versions(home, golden, case):
    shard(put(home / "llava", settings()), golden)
    for place in ({"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        model = load(home / "llava", device="cuda", device_map=place, torch_dtype="float32", multimodal=True)
        assert_golden(model, case)


def test_a_tower_that_is_one_half_of_a_whole_clip(home, golden, case):
    """As OpenAI published them: text and vision in one .bin file. The tower among the model's weights is not
    the one in use."""
    folder = home / "vision_tower"
    vision = json.loads((folder / "config.json").read_text())
    values = load_file(folder / "model.safetensors")
    values |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}})
    )
    shard(folder, values | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, "bin", 1)
    shard(put(home / "llava", settings()), {name: v + ("vision_tower" in name) for name, v in golden.items()})
    assert_golden(load(home / "llava"), case)


def test_a_tower_alone_makes_no_weight_up(home):
    drop(home / "vision_tower" / "model.safetensors", "vision_model.post_layernorm.bias")
    with pytest.raises(ValueError, match="vision_tower lacks 1 weights, 'post_layernorm.bias' among them"):
        CLIPVisionTower(str(home / "vision_tower"), SimpleNamespace(mm_vision_select_layer=-2))


def test_names_on_the_hub_come_from_its_cache(home, golden, case):
    """Of two formats one is enough. The tower's name, not the place of the cache, goes into copies of the
    model."""
    cache, revision = home / "cache", "0" * 40

    def publish(name):
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        return folder / "snapshots" / revision

    shutil.copytree(home / "vision_tower", publish("open/clip"))
    shard(put(publish("open/llava"), settings(mm_vision_tower="open/clip")), golden, "bin")
    model = load("open/llava", cache_dir=cache)
    assert_golden(model, case)
    assert model.config.mm_vision_tower == "open/clip"
    with pytest.raises(ValueError, match="open/other is not a folder here, and the hub does not give it"):
        load("open/other", cache_dir=cache)


# Base models


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_projector_on_its_base_model(home, golden, case, prefix):
    folder = put(home / "projector", settings(), tokenizer=False)
    torch.save(projector(golden, prefix), folder / "mm_projector.bin")
    model = load(folder, put_base(home / "vicuna", language(golden)), compression=FASTV)
    model.set_compression(None)
    assert_golden(model, case)


def put_adapter(folder: Path, golden: dict, **changes) -> dict[str, torch.Tensor]:
    """A LoRA folder as the original's training writes it; returns the base weights on which it makes the
    golden ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlavaConfig.from_dict(
        settings(mm_vision_tower=str(GOLDEN / "llava15" / "vision_tower"), **changes)
    )
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        LlavaLlamaForCausalLM(config),
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=linear,
            exclude_modules=".*vision_tower.*",
            task_type="CAUSAL_LM",
        ),
    )
    factors = {name: torch.randn_like(p) * 0.05 for name, p in model.named_parameters() if "lora_" in name}
    model.save_pretrained(folder, state_dict=factors)
    put(folder, settings(**changes), tokenizer=False)
    torch.save(projector(golden, "base_model.model."), folder / "non_lora_trainables.bin")
    base = language(golden)
    for name in [name for name in factors if ".lora_A." in name]:
        delta = factors[name.replace(".lora_A.", ".lora_B.")] @ factors[name] * ALPHA / RANK
        weight = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        base[weight] = base[weight] - delta
    assert len(factors) == 2 * len(linear) * LAYERS
    return base


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_merged_adapter_is_base_plus_its_scaled_product(home, golden, case, kind):
    base = put_adapter(home / "llava-lora", golden)
    model = load(home / "llava-lora", put_base(home / "vicuna", base, kind))
    assert type(model) is LlavaLlamaForCausalLM
    state = model.state_dict()
    assert not torch.allclose(
        base["model.layers.3.mlp.up_proj.weight"], golden["model.layers.3.mlp.up_proj.weight"], atol=1e-2
    )
    for name, value in language(golden).items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=0)
    assert_golden(model, case)


def test_an_adapter_left_beside_the_weights(home, golden, case):
    from peft import PeftModel

    base = put_base(home / "vicuna", put_adapter(home / "llava-lora", golden))
    merged = load(home / "llava-lora", base, compression=FASTV)
    model = load(home / "llava-lora", base, compression=FASTV, merge_lora=False)
    assert isinstance(model, PeftModel)
    assert torch.equal(generate(model, case), generate(merged, case))
    assert model.compression_stats == merged.compression_stats
    assert model.compression_stats["visual_tokens"][-1] == [4]
    model.set_compression(None)
    assert_golden(model, case)
    with model.disable_adapter(), torch.no_grad():
        assert (model(**given(case)).logits - case["logits"]).abs().max() > 0.1


def test_an_adapter_with_a_tuned_tower_and_a_larger_vocabulary(home, golden, case):
    """Both come from non_lora_trainables.bin; the base's shorter tables give way, and the tower gets no
    adapter."""
    base = put_adapter(home / "llava-lora", golden, unfreeze_mm_vision_tower=True)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    full = {
        name: golden[name]
        for name in golden
        if name in tables or "mm_projector" in name or "vision_tower" in name
    }
    torch.save(
        {f"base_model.model.{name}": value for name, value in full.items()},
        home / "llava-lora/non_lora_trainables.bin",
    )
    for name in tables:
        base[name] = base[name][:300].clone()
    (home / "vision_tower" / "model.safetensors").unlink()
    model = load(home / "llava-lora", put_base(home / "vicuna", base), merge_lora=False)
    assert not any("lora_" in name and "vision_tower" in name for name, _ in model.named_parameters())
    assert_golden(model, case)


def test_an_adapter_on_a_llava_model(home, golden, case):
    base = put_adapter(home / "llava-lora", golden) | projector(golden)
    shard(
        put(home / "llava", settings()),
        {name: value + ("mm_projector" in name) for name, value in base.items()},
    )
    assert_golden(load(home / "llava-lora", home / "llava"), case)


def test_a_video_projector_on_mistral(tmp_path):
    pytest.importorskip("timm")
    source = GOLDEN / "videollama2"
    side = load_file(source / "checkpoint" / "model.safetensors")
    config = json.loads((source / "checkpoint" / "config.json").read_text()) | {
        "mm_vision_tower": str(tmp_path / "tower")
    }
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig.from_dict({**config, "model_type": "mistral"}))
    base.save_pretrained(tmp_path / "mistral")
    for name in TOKENIZER:
        shutil.copy(source / "checkpoint" / name, tmp_path / "mistral")
    CLIPVisionModel.from_pretrained(GOLDEN / "llava15" / "vision_tower").save_pretrained(tmp_path / "tower")
    CLIPImageProcessor.from_pretrained(source / "clip_tower").save_pretrained(tmp_path / "tower")
    put(tmp_path / "projector", config, tokenizer=False)
    torch.save(
        {name: value for name, value in side.items() if "mm_projector" in name},
        tmp_path / "projector/mm_projector.bin",
    )
    state = load(tmp_path / "projector", tmp_path / "mistral").state_dict()
    for name, value in (base.state_dict() | {n: v for n, v in side.items() if "mm_projector" in n}).items():
        assert torch.equal(state[name], value), name


# Refusals. Everything here is told before any weight is read.


@pytest.fixture
def unread(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", read)


def rewrite(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(path: Path, name: str, *shape: int) -> None:
    weights = load_file(path)
    assert name in weights
    save_file(weights | {name: torch.zeros(*shape)}, path)


def drop(path: Path, name: str) -> None:
    weights = load_file(path)
    del weights[name]
    save_file(weights, path)


SECOND = "model-00002-of-00003.safetensors"
WHOLE = {
    "missing shard": (
        lambda f: (f / SECOND).unlink(),
        f"lacks {SECOND}, one of the 3 shards that .*index.json names",
    ),
    "cut shard": (lambda f: cut(f / SECOND), rf"{SECOND} is damaged \(.*\); download it again"),
    "note of Git LFS": (
        lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "fetch them with git lfs pull",
    ),
    "index without a map": (
        lambda f: rewrite(f / "model.safetensors.index.json", weight_map=None),
        "has no weight_map",
    ),
    "broken index": (lambda f: cut(f / "model.safetensors.index.json"), "index.json is not valid JSON"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("model*")], "holds no weights"),
    "another shape": (
        lambda f: reshape(f / "model-00003-of-00003.safetensors", "model.norm.weight", 65),
        r"00003-of-00003.safetensors holds 'model.norm.weight' in the shape \(65,\), and config.json asks "
        r"for \(64,\)",
    ),
    "a shape of the configuration's": (
        lambda f: rewrite(f / "config.json", vocab_size=400),
        r"'(lm_head|model.embed_tokens).weight' in the shape \(320, 64\), .* \(400, 64\)",
    ),
    "a weight less": (
        lambda f: drop(f / "model-00003-of-00003.safetensors", "model.norm.weight"),
        "lacks 1 weights, 'model.norm.weight' among",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json cannot be read: No such file"),
    "broken configuration": (lambda f: cut(f / "config.json"), "config.json is not valid JSON"),
    "list as configuration": (
        lambda f: (f / "config.json").write_text("[1]"),
        "config.json holds no JSON object",
    ),
    "word for a number": (
        lambda f: rewrite(f / "config.json", hidden_size="wide"),
        "config.json cannot be used: .*hidden_size",
    ),
    "plain language model": (
        lambda f: rewrite(f / "config.json", model_type="llama"),
        "is a 'llama' checkpoint; the types that load are llava_",
    ),
    "Hugging Face's format": (
        lambda f: rewrite(
            f / "config.json", model_type="llava", mm_vision_tower=None, text_config={}, vision_config={}
        ),
        "convert it with python -m llava.convert",
    ),
    "no tower named": (
        lambda f: rewrite(f / "config.json", mm_vision_tower=None),
        "names no mm_vision_tower",
    ),
    "unknown projector": (
        lambda f: rewrite(f / "config.json", mm_projector_type="qformer"),
        "llava: mm_projector_type 'qformer' is unknown",
    ),
    "no tower": (
        lambda f: shutil.rmtree(f.parent / "vision_tower"),
        "the vision tower vision_tower, which .*config.json names as mm_vision_tower, is neither in this"
        " folder nor next to it",
    ),
    "no image processor": (
        lambda f: (f.parent / "vision_tower" / "preprocessor_config.json").unlink(),
        "preprocessor_config.json cannot be read",
    ),
    "tower without weights": (
        lambda f: (f.parent / "vision_tower" / "model.safetensors").unlink(),
        "vision_tower holds no weights",
    ),
    "cut tower": (
        lambda f: cut(f.parent / "vision_tower" / "model.safetensors"),
        "vision_tower/model.safetensors is damaged",
    ),
    "tower with a weight less": (
        lambda f: drop(f.parent / "vision_tower" / "model.safetensors", "vision_model.post_layernorm.bias"),
        "the vision tower .* lacks 1 weights, 'post_layernorm.bias' among",
    ),
    "tower of another width": (
        lambda f: rewrite(f.parent / "vision_tower" / "config.json", hidden_size=48),
        "has width 48, and mm_hidden_size .* is 32",
    ),
    "tower of another kind": (
        lambda f: rewrite(f.parent / "vision_tower" / "config.json", model_type="siglip"),
        "is a 'siglip' model; only CLIP",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.model"), "the tokenizer in .* cannot be read"),
    "tokens without embeddings": (
        lambda f: rewrite(f / "config.json", mm_use_im_start_end=True),
        "needs an embedding for token 321, and the vocabulary ends at 319",
    ),
    "adapter in the way": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna"}'),
        r"holds a LoRA adapter: give its language model as model_base \(it was made for lmsys/vicuna\)",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_refused(home, golden, unread, name):
    folder = put(home / "llava", settings())
    shard(folder, {name: value for name, value in golden.items() if "vision_tower" not in name})
    spoil, sentence = WHOLE[name]
    spoil(folder)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_layer_that_is_not_there_is_told_first(home, golden, unread):
    shard(put(home / "llava", settings()), golden)
    with pytest.raises(ValueError, match="9 is out of range: the model has layers 0 to 7"):
        load(home / "llava", compression=Compression(method="fastv", layers=(9,), ratio=0.5))


@pytest.mark.filterwarnings("error")
def test_weights_that_are_left_over_are_told(home, golden):
    shard(put(home / "llava", settings()), golden | {"model.layers.8.mlp.up_proj.weight": torch.zeros(1)})
    with pytest.raises(
        UserWarning,
        match="has 1 weights that its model lacks, 'model.layers.8.mlp.up_proj.weight' among them",
    ):
        load(home / "llava")


class Harmful:
    """Unpickled by plain pickle, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_the_harmful_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Harmful(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize(
    "where", ["shard", "mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin", "tower"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_does_not(home, golden, unread, where, zipped):
    made, base = home / "made", None
    if where in ("shard", "tower"):
        folder = put(home / "llava", settings())
        file = shard(folder, {name: v for name, v in golden.items() if "vision_tower" not in name}, "bin")[1]
        if where == "tower":
            (home / "vision_tower" / "model.safetensors").unlink()
            file = home / "vision_tower" / "pytorch_model.bin"
    else:
        folder, base = home / "llava-lora", put_base(home / "vicuna", language(golden))
        if where == "mm_projector.bin":
            put(folder, settings(), tokenizer=False)
        else:
            put_adapter(folder, golden)
        if where == "adapter_model.bin":
            (folder / "adapter_model.safetensors").unlink()
        file = folder / where
    weights = torch.load(file) if file.is_file() else {}
    torch.save(
        weights | {"model.mm_projector.0.weight": Harmful(made)}, file, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        ValueError, match=rf"{file.name} is not opened: it asks for \w+.mkdir, which could run code"
    ):
        load(folder, base)
    assert not made.exists()


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "list"])
def test_a_damaged_bin_file_is_refused(home, golden, unread, kind):
    file = shard(put(home / "llava", settings()), golden, "bin")[2]
    if kind == "cut":
        cut(file)
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_text("" if kind == "empty" else "404: not found")
    sentence = (
        "holds something other than tensors" if kind == "list" else r"is damaged \(.*\); download it again"
    )
    with pytest.raises(ValueError, match=f"pytorch_model-00003-of-00003.bin {sentence}"):
        load(home / "llava")


def spoil_adapter(folder: Path, change) -> None:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


UP = "base_model.model.model.layers.7.mlp.up_proj"
ADDED = {
    "no additions": (
        lambda f, b: (f / "adapter_config.json").unlink(),
        "so nothing in it goes on a base model; leave model_base out",
    ),
    "no projector": (
        lambda f, b: (f / "non_lora_trainables.bin").unlink(),
        "lacks non_lora_trainables.bin, the projector",
    ),
    "part of the projector": (
        lambda f, b: torch.save(
            {"model.mm_projector.0.weight": torch.zeros(64, 32)}, f / "non_lora_trainables.bin"
        ),
        "llava-lora on .*vicuna lacks 3 weights, 'model.mm_projector.0.bias' among them",
    ),
    "no adapter weights": (
        lambda f, b: (f / "adapter_model.safetensors").unlink(),
        "lacks the adapter's weights",
    ),
    "cut adapter": (
        lambda f, b: cut(f / "adapter_model.safetensors"),
        "adapter_model.safetensors is damaged",
    ),
    "no LoRA": (
        lambda f, b: rewrite(f / "adapter_config.json", peft_type="IA3"),
        "describes a 'IA3' adapter; only LORA",
    ),
    "other names": (lambda f, b: spoil_adapter(f, lambda w: {"x": torch.zeros(1)}), "holds no LoRA weights"),
    "layer too many": (
        lambda f, b: spoil_adapter(
            f, lambda w: w | {UP.replace("7", "8") + ".lora_A.weight": torch.zeros(4, 64)}
        ),
        "adapts 'model.layers.8.mlp.up_proj', which this model does not have",
    ),
    "another base's width": (
        lambda f, b: spoil_adapter(f, lambda w: w | {UP + ".lora_A.weight": torch.zeros(4, 65)}),
        r"up_proj.lora_A.weight' in the shape \(4, 65\), which does not fit a weight of 160 x 64",
    ),
    "another vocabulary": (
        lambda f, b: rewrite(f / "config.json", vocab_size=321),
        r"vicuna/.*.bin holds '(lm_head|model.embed_tokens).weight' in the shape \(320, 64\), .* asks for "
        r"\(321, 64\)",
    ),
    "another family": (
        lambda f, b: rewrite(b / "config.json", model_type="qwen2"),
        "vicuna is a 'qwen2' model, and .* llama or llava_llama",
    ),
    "adapter as base": (
        lambda f, b: (b / "adapter_config.json").write_text("{}"),
        "vicuna is a LoRA adapter, and",
    ),
    "no tokenizer in the base": (lambda f, b: (b / "tokenizer.model").unlink(), "vicuna has no tokenizer"),
    "no base": (lambda f, b: shutil.rmtree(b), "there is no folder .*vicuna"),
}


@pytest.mark.parametrize("name", ADDED)
def test_an_adapter_is_refused(home, golden, unread, name):
    folder = home / "llava-lora"
    base = put_base(home / "vicuna", put_adapter(folder, golden))
    spoil, sentence = ADDED[name]
    spoil(folder, base)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load(folder, base)
    assert "\n" not in str(refusal.value)


def test_an_adapter_without_peft_is_refused(home, golden, unread, monkeypatch):
    base = put_base(home / "vicuna", put_adapter(home / "llava-lora", golden))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="a LoRA checkpoint needs peft .* pip install peft"):
        load(home / "llava-lora", base)


def test_an_adapter_that_lacks_a_factor_is_refused(home, golden):
    """peft would leave this layer as it is and say so in a warning."""
    base = put_base(home / "vicuna", put_adapter(home / "llava-lora", golden))
    spoil_adapter(
        home / "llava-lora",
        lambda w: {name: value for name, value in w.items() if UP + ".lora_B" not in name},
    )
    with pytest.raises(
        ValueError, match=f"the adapter in .* lacks 1 weights, '{UP}.lora_B.weight' among them"
    ):
        load(home / "llava-lora", base)


def test_a_projector_without_its_base_is_refused(home, golden):
    torch.save(projector(golden), put(home / "projector", settings()) / "mm_projector.bin")
    with pytest.raises(ValueError, match="holds only a projector: give its language model as model_base"):
        load(home / "projector")


def test_weights_away_from_memory_take_no_projector(home, golden, monkeypatch):
    torch.save(projector(golden), put(home / "projector", settings()) / "mm_projector.bin")
    base, read = put_base(home / "vicuna", language(golden)), LlavaLlamaForCausalLM.from_pretrained

    def offloaded(*args, **kwargs):
        model, info = read(*args, **kwargs)
        model.model.mm_projector.to("meta")
        return model, info

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(
        ValueError, match=r"'model.mm_projector.0\.\w+' is not in memory .* choose another device_map"
    ):
        load(home / "projector", base)


# Through the command


def ask(capsys, folder, *more) -> tuple[int, str, str]:
    argv = [
        "--model-path",
        str(folder),
        "--image-file",
        IMAGE,
        "--query",
        "What?",
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
    ]
    with pytest.raises(SystemExit) as stop:
        run_llava.main([*argv, *more])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_command_says_it_in_one_line(home, golden, capsys):
    files = shard(put(home / "llava", settings()), golden, "bin")
    torch.save({"x": Harmful(home / "made")}, files[1])
    code, out, err = ask(capsys, home / "llava", "--conv-mode", "vicuna_v1")
    assert code == 2 and out == "" and not (home / "made").exists()
    assert err.startswith("error: ") and f"{files[1].name} is not opened" in err and err.count("\n") == 1
    files[1].unlink()
    code, out, err = ask(capsys, home / "llava", "--conv-mode", "vicuna_v1")
    assert (
        code == 2
        and out == ""
        and err.startswith("error: ")
        and f"lacks {files[1].name}" in err
        and err.count("\n") == 1
    )


def test_the_command_takes_an_adapter_and_its_base(home, golden, capsys):
    base = put_base(home / "vicuna", put_adapter(home / "llava-lora", golden))
    argv = [
        "--model-path",
        str(home / "llava-lora"),
        "--model-base",
        str(base),
        "--image-file",
        IMAGE,
        "--query",
        "What?",
    ]
    run_llava.main([*argv, "--device", "cpu", "--max-new-tokens", "4", "--conv-mode", "vicuna_v1"])
    adapted = capsys.readouterr().out
    shard(put(home / "llava", settings()), golden)
    argv[1:4] = [str(home / "llava")]
    run_llava.main([*argv, "--device", "cpu", "--max-new-tokens", "4", "--conv-mode", "vicuna_v1"])
    assert adapted.strip() and capsys.readouterr().out == adapted
