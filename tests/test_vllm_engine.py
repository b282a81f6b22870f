"""The plug-in in vLLM itself: answers are those of libra.attach with the same row. Run by
scripts/test_vllm.sh."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "vLLM has an environment of its own: bash scripts/test_vllm.sh"
pytest.importorskip("vllm", reason=REASON)

import qwen_folder  # noqa: E402
import torch  # noqa: E402
from serve_client import Reference, questions  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from vllm_answers import run  # noqa: E402

import libra  # noqa: E402
from libra.budget import kept  # noqa: E402
from libra.rows import EMBEDDED  # noqa: E402
from libra.vllm import settings  # noqa: E402
from llava.convert import convert  # noqa: E402

RATIOS = (0.25, 0.5, 0.75)
N, MOST = 256, 12
THREE = ("libra-input", "divprune", "visionzip")  # the last one in the tower, with its keys and [CLS] token
# Without random: libra.attach draws by the prompt, and vLLM shares a picture's tokens among all questions.
QUALIFIED = {
    name: {"method": name, **keys}
    for name in libra.methods.METHODS
    if (keys := settings.added(name)) is not None and name not in ("vanilla", "random")
}
OF_LLAVA = {
    name: row
    for name, row in QUALIFIED.items()
    if not settings.reads_the_reader(libra.Compression.from_dict(row))
}
ROWS = {**OF_LLAVA, "compact": {"method": "divprune", "positions": "compact"}}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8}
LLAVA, QWEN = "LibraLlavaForConditionalGeneration", "LibraQwen2_5_VLForConditionalGeneration"


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """The embedded model in transformers' format."""
    folder = tmp_path_factory.mktemp("vllm") / "mini"
    convert(str(EMBEDDED), str(folder))
    return folder


@pytest.fixture(scope="module")
def reference(mini) -> Reference:
    model = AutoModelForImageTextToText.from_pretrained(mini, dtype=torch.float32).eval()
    return Reference(model, AutoProcessor.from_pretrained(mini))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(pictures, question, prompt without kwargs) of so many questions, with ``per`` pictures each."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(processor, count: int, per: int = 1) -> list:
        found = []
        drawn = questions(count * per)
        for i in range(count):
            images = [image for image, _ in drawn[i * per : (i + 1) * per]]
            text = drawn[i * per][1]
            files = [folder / f"{per}-{i}-{j}.png" for j in range(per)]
            for image, file in zip(images, files):
                image.save(file)
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            found.append((images, text, {"text": prompt, "files": [str(file) for file in files]}))
        return found

    return make


def call(asked: list, token: int, ratio: float | None = None, **more) -> dict:
    own = {} if ratio is None else {"kwargs": {"libra_ratio": ratio}}
    return {"prompts": [{**prompt, **own} for _, _, prompt in asked], "most": MOST, "token": token, **more}


def engine(model: Path, row: dict | None = None, **more) -> dict:
    """Of a job, with a row by --hf-overrides, or by the variable."""
    named = QWEN if "qwen" in model.name else LLAVA
    overrides = {} if row is None else {"hf_overrides": {"architectures": [named], "libra": row}}
    return {**ENGINE, "model": str(model), **overrides, **more}


def expected(reference: Reference, asked: list, keys: dict | None) -> list[str]:
    """Answers of the same row by libra.attach; of the plain model for None."""
    c = libra.Compression.from_dict(keys or {"method": "vanilla"})
    with libra.attach(reference.model, c):
        return [reference.answer(text, images, MOST)[0].strip() for images, text, _ in asked]


def answers(mini, reference, asked, folder: Path, rows: dict, count: int) -> dict:
    """Of each row what vLLM says to so many questions with all tokens, and at each ratio."""
    prompts, token = asked(reference.processor, count), reference.processor.image_token_id
    calls = [call(prompts, token, ratio) for ratio in (0, *RATIOS)]
    jobs = [{"engine": engine(mini, {**row, "ratio": 0.5}), "calls": calls} for row in rows.values()]
    return dict(zip(rows, run(folder, jobs)))


@pytest.fixture(scope="module")
def few(mini, reference, asked, tmp_path_factory) -> dict:
    return answers(mini, reference, asked, tmp_path_factory.mktemp("few"), ROWS, 24)


@pytest.fixture(scope="module")
def many(mini, reference, asked, tmp_path_factory) -> dict:
    return answers(
        mini, reference, asked, tmp_path_factory.mktemp("many"), {name: ROWS[name] for name in THREE}, 300
    )


@pytest.fixture(scope="module")
def plain(reference, asked) -> list[str]:
    """The plain model's answers to the most questions that are asked."""
    return expected(reference, asked(reference.processor, 300), None)


def check_answers(reference: Reference, prompts: list, keys: dict, plain: list[str], said: list) -> None:
    whole, *found = said
    assert whole["texts"] == plain and set(whole["pictures"]) == {N}
    different = 0
    for ratio, one in zip(RATIOS, found):
        assert set(one["pictures"]) == {kept(N, ratio) + (keys["method"] == "libra-input")}
        attached = expected(reference, prompts, {**keys, "ratio": ratio})
        wrong = [i for i, pair in enumerate(zip(one["texts"], attached)) if pair[0] != pair[1]]
        assert not wrong, (ratio, [(one["texts"][i], attached[i]) for i in wrong[:5]])
        different += attached != plain
    assert different  # so it matters which tokens are left


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_those_of_attach(name, few, reference, asked):
    prompts = asked(reference.processor, 24)
    check_answers(reference, prompts, ROWS[name], expected(reference, prompts, None), few[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_hundred_questions_have_the_answers_of_attach(name, many, plain, reference, asked):
    check_answers(reference, asked(reference.processor, 300), ROWS[name], plain, many[name])


def by_hand(reference: Reference, image, text: str, ratio: float) -> str:
    """What divprune's row with ``positions: centre`` says where positions are whole numbers: vLLM's. With
    libra.attach they may be halves."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    prompt = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = reference.processor(text=prompt, images=[image], return_tensors="pt")
    model, ids = reference.model, inputs["input_ids"][0]
    first = ids.tolist().index(reference.processor.image_token_id)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    c = libra.Compression(method="divprune", ratio=ratio)
    tokens = libra.compress(features[None], None, c).tokens[0]
    middles = (torch.arange(len(tokens)) + 0.5) * N / len(tokens)
    places = torch.cat(
        [torch.arange(first), first + middles.floor(), torch.arange(first + N, len(ids))]
    ).long()
    embed, said = model.get_input_embeddings(), []
    hidden = torch.cat([embed(ids[:first]), tokens, embed(ids[first + N :])])
    while len(said) < MOST:
        out = model.model.language_model(inputs_embeds=hidden[None], position_ids=places[None])
        said.append(model.lm_head(out.last_hidden_state[0, -1]).argmax())
        if said[-1] == model.generation_config.eos_token_id:
            break
        hidden = torch.cat([hidden, embed(said[-1])[None]])
        places = torch.cat([places, places[-1:] + 1])
    return reference.processor.decode(said, skip_special_tokens=True).strip()


@torch.inference_mode()
def test_positions_at_the_centre_are_whole_numbers(mini, reference, asked, tmp_path):
    prompts, token = asked(reference.processor, 24), reference.processor.image_token_id
    row = {"method": "divprune", "positions": "centre", "ratio": 0.5}
    calls = [call(prompts, token, ratio) for ratio in RATIOS]
    (said,) = run(tmp_path, [{"engine": engine(mini, row), "calls": calls}])
    for ratio, one in zip(RATIOS, said):
        assert one["texts"] == [by_hand(reference, *images, text, ratio) for images, text, _ in prompts]


def test_pieces_prefixes_and_two_pictures(mini, reference, asked, tmp_path):
    """Borders of pieces within pictures, two rates of the same pictures one after the other, both from the
    prefix cache afterwards, and two pictures a prompt; the engine in a process of its own."""
    prompts, token = asked(reference.processor, 8), reference.processor.image_token_id
    pairs = asked(reference.processor, 6, per=2)
    small = {"max_num_batched_tokens": 48, "block_size": 32, "limit_mm_per_prompt": {"image": 2}}
    calls = [call(prompts, token, ratio) for ratio in (0.5, 0.75, 0.5, 0.75)]
    calls += [call(pairs, token), call(pairs, token, 0.75)]
    job, row = {"engine": engine(mini, **small), "calls": calls}, {"method": "divprune", "ratio": 0.5}
    (said,) = run(tmp_path, [job], row, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    half, quarter = (expected(reference, prompts, {"method": "divprune", "ratio": r}) for r in (0.5, 0.75))
    assert half != quarter
    assert [one["texts"] for one in said[:4]] == [half, quarter, half, quarter]
    assert not any(said[0]["cached"]) and all(said[2]["cached"]) and all(said[3]["cached"])
    assert max(said[1]["cached"]) < 32  # no block of the other rate
    for one, ratio in zip(said[4:], (0.5, 0.75)):
        assert set(one["pictures"]) == {2 * kept(N, ratio)}
        assert one["texts"] == expected(reference, pairs, {"method": "divprune", "ratio": ratio})


def test_what_cannot_run_is_refused_in_one_sentence(mini, reference, asked, tmp_path):
    """Of a server whose variable names a row: other rows, classes and sizes, and a request's bad ratio."""
    qwen_folder.write_qwen(tmp_path / "qwen2")
    prompts, token = asked(reference.processor, 1), reference.processor.image_token_id
    refused = [
        (engine(mini, tensor_parallel_size=2), "tensor_parallel_size: 2: compression needs the whole model"),
        (engine(mini, {"method": "libra"}), "one length of a sequence for all layers"),
        (engine(mini, {"method": "divprun"}), "divprun"),
        (
            engine(tmp_path / "qwen2", max_model_len=512),
            "Qwen2VLForConditionalGeneration: this class cannot shorten pictures",
        ),
        (engine(mini, model_impl="transformers"), "this class cannot shorten pictures"),
        (engine(mini), "libra_ratio: 1.5"),
    ]
    calls = [call(prompts, token, 1.5)]
    jobs = [{"engine": one, "calls": calls, "refused": True} for one, _ in refused]
    said = run(tmp_path, jobs, {"method": "divprune"})
    for one, (_, sentence) in zip(said, refused):
        assert sentence in one
    # Without the variable vLLM's own class is in its place.
    unnamed = engine(mini, hf_overrides={"libra": {"method": "divprune"}})
    (one,) = run(tmp_path, [{"engine": unnamed, "calls": [], "refused": True}])
    assert f"name {LLAVA} or {QWEN}" in one


QWEN_RATIOS = (0, 0.5, 0.75)
QWEN_IDS = {"image": 90, "video": 91, "start": 92, "end": 93}


def write_qwen(folder: Path) -> None:
    """A tiny Qwen2.5-VL of random weights whose heads are of a size that vLLM's attention takes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "depth": 4, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=QWEN_IDS["image"], video_token_id=QWEN_IDS["video"],
        vision_start_token_id=QWEN_IDS["start"], vision_end_token_id=QWEN_IDS["end"],
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    qwen_folder.write_processor(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The model and its processor, prompts with pictures of different sizes, one and two of them, and what
    vLLM says to them with each row, ratio by ratio."""
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen(folder / "qwen")
    prompts = []
    for i, sizes in enumerate([[(48, 64)], [(104, 104)], [(96, 40)], [(64, 64), (32, 80)]]):
        images = [questions(4)[i][0].resize(size) for size in sizes]
        files = [folder / f"{i}-{j}.png" for j in range(len(images))]
        for image, file in zip(images, files):
            image.save(file)
        marks = " ".join(["<|vision_start|> <|image_pad|> <|vision_end|>"] * len(images))
        text = f"{marks} what is this answer"
        prompts.append((images, text, {"text": text, "files": [str(file) for file in files]}))
    calls = [call(prompts, QWEN_IDS["image"], ratio, endless=True) for ratio in QWEN_RATIOS]
    two = {"limit_mm_per_prompt": {"image": 2}}
    jobs = [{"engine": engine(folder / "qwen", row, **two), "calls": calls} for row in QUALIFIED.values()]
    said = dict(zip(QUALIFIED, run(folder, jobs)))
    model = AutoModelForImageTextToText.from_pretrained(folder / "qwen", dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder / "qwen"), prompts, said


@pytest.mark.parametrize("name", QUALIFIED)
def test_qwen_gives_the_same_ids(name, qwen):
    """In vLLM each picture has a compensation token of its own, in libra.attach all of a prompt have one:
    there, one picture a prompt."""
    model, processor, prompts, said = qwen
    if QUALIFIED[name].get("compensation"):
        prompts = prompts[:-1]
    whole = None
    for one, ratio in zip(said[name], QWEN_RATIOS):
        found = []
        with libra.attach(model, {**QUALIFIED[name], "ratio": ratio} if ratio else "vanilla"):
            for images, text, _ in prompts:
                inputs = processor(text=[text], images=images, return_tensors="pt")
                out = model.generate(
                    **inputs, max_new_tokens=MOST, min_new_tokens=MOST, do_sample=False, eos_token_id=None
                )
                found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        assert one["ids"][: len(found)] == found, ratio
        whole = whole or found
    assert found != whole


def test_the_name_that_a_server_goes_by_is_json():
    command = [sys.executable, "-m", "libra.vllm", "divprune"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["method"] == "divprune"
