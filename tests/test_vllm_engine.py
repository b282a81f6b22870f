"""The plug-in in vLLM itself: answers are those of libra.attach with the same row. Run by
scripts/test_vllm.sh."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "vLLM has an environment of its own: bash scripts/test_vllm.sh"
pytest.importorskip("vllm", reason=REASON)

import torch  # noqa: E402
from serve_client import Reference, questions  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from vllm_answers import run  # noqa: E402

import libra  # noqa: E402
from libra.budget import kept  # noqa: E402
from libra.rows import EMBEDDED  # noqa: E402
from llava.convert import convert  # noqa: E402

RATIOS = (0.25, 0.5, 0.75)
N, MOST = 256, 12
METHODS = {
    "libra": {"method": "libra-input", "compensation": "reserved"},
    "divprune": {"method": "divprune"},
    "visionzip": {"method": "visionzip"},  # in the tower, with its keys and the [CLS] token's own feature
}
MORE = {
    "hiprune": {"method": "hiprune"},  # two layers of the tower, and the grid
    "compact": {"method": "divprune", "positions": "compact"},
}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 8}


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


def expected(reference: Reference, asked: list, keys: dict | None) -> list[str]:
    """Answers of the same row by libra.attach; of the plain model for None."""
    c = libra.Compression.from_dict(keys or {"method": "vanilla"})
    with libra.attach(reference.model, c):
        return [reference.answer(text, images, MOST)[0].strip() for images, text, _ in asked]


def check_answers(mini, reference, asked, folder: Path, keys: dict, count: int) -> None:
    prompts, token = asked(reference.processor, count), reference.processor.image_token_id
    job = {
        "engine": {**ENGINE, "model": str(mini)},
        "calls": [call(prompts, token), *(call(prompts, token, ratio) for ratio in (0, *RATIOS))],
    }
    own, whole, *found = run(folder, job, {**keys, "ratio": 0.5})
    plain = expected(reference, prompts, None)
    assert whole["texts"] == plain and set(whole["pictures"]) == {N}
    assert own["texts"] == found[1]["texts"]  # the row's own ratio is 0.5
    different = 0
    for ratio, said in zip(RATIOS, found):
        assert set(said["pictures"]) == {kept(N, ratio) + (keys["method"] == "libra-input")}
        answers = expected(reference, prompts, {**keys, "ratio": ratio})
        wrong = [i for i, pair in enumerate(zip(said["texts"], answers)) if pair[0] != pair[1]]
        assert not wrong, (ratio, [(said["texts"][i], answers[i]) for i in wrong[:5]])
        different += answers != plain
    assert different  # so it matters which tokens are left


@pytest.mark.parametrize("method", [*METHODS, *MORE])
def test_answers_are_those_of_attach(method, mini, reference, asked, tmp_path):
    check_answers(mini, reference, asked, tmp_path, (METHODS | MORE)[method], 24)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_three_hundred_questions_have_the_answers_of_attach(method, mini, reference, asked, tmp_path):
    check_answers(mini, reference, asked, tmp_path, METHODS[method], 300)


def test_pieces_prefixes_and_two_pictures(mini, reference, asked, tmp_path):
    """Borders of pieces within pictures, two rates of the same pictures one after the other, both from the
    prefix cache afterwards, and two pictures a prompt; the engine in a process of its own."""
    prompts, token = asked(reference.processor, 8), reference.processor.image_token_id
    pairs = asked(reference.processor, 6, per=2)
    engine = {
        **ENGINE,
        "model": str(mini),
        "max_num_batched_tokens": 48,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
    }
    calls = [call(prompts, token, ratio) for ratio in (0.5, 0.75, 0.5, 0.75)]
    calls += [call(pairs, token), call(pairs, token, 0.75)]
    said = run(tmp_path, {"engine": engine, "calls": calls}, {"method": "divprune", "ratio": 0.5},
               VLLM_ENABLE_V1_MULTIPROCESSING="1")  # fmt: skip
    half, quarter = (expected(reference, prompts, {"method": "divprune", "ratio": r}) for r in (0.5, 0.75))
    assert half != quarter
    assert [one["texts"] for one in said[:4]] == [half, quarter, half, quarter]
    assert not any(said[0]["cached"]) and all(said[2]["cached"]) and all(said[3]["cached"])
    assert max(said[1]["cached"]) < 32  # no block of the other rate
    for one, ratio in zip(said[4:], (0.5, 0.75)):
        assert set(one["pictures"]) == {2 * kept(N, ratio)}
        assert one["texts"] == expected(reference, pairs, {"method": "divprune", "ratio": ratio})


@pytest.mark.parametrize(
    ("engine", "row", "sentence"),
    [
        ({"tensor_parallel_size": 2}, {"method": "divprune"}, "tensor_parallel_size: 2: compression needs"),
        ({}, {"method": "libra"}, "one length of a sequence for all layers"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(engine, row, sentence, mini, tmp_path):
    job = {"engine": {**ENGINE, "model": str(mini), **engine}, "calls": []}
    with pytest.raises(AssertionError, match=sentence):
        run(tmp_path, job, row)


QWEN_IDS = {"image": 90, "video": 91, "start": 92, "end": 93}


def write_qwen(folder: Path) -> None:
    """A tiny Qwen2.5-VL of random weights whose heads are of a size that vLLM's attention takes."""
    from qwen_folder import write_processor
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
    write_processor(folder)


@pytest.mark.parametrize("method", ["libra", "divprune", "visionzip", "hiprune"])
def test_qwen_gives_the_same_ids(method, asked, tmp_path):
    """Pictures of different sizes, one and two a prompt. In vLLM each picture has a compensation token of its
    own, in libra.attach all of a prompt have one: there, one picture a prompt."""
    folder = tmp_path / "qwen"
    write_qwen(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompts, second = [], [(32, 80)] if method != "libra" else []
    for i, sizes in enumerate([[(48, 64)], [(96, 40)], [(64, 64), *second], [(104, 104)]]):
        images = [questions(4)[i][0].resize(size) for size in sizes]
        files = [tmp_path / f"{i}-{j}.png" for j in range(len(images))]
        for image, file in zip(images, files):
            image.save(file)
        marks = " ".join(["<|vision_start|> <|image_pad|> <|vision_end|>"] * len(images))
        prompts.append((images, f"{marks} what is this answer", {"files": [str(file) for file in files]}))
    asked_of_vllm = [(images, text, {"text": text, **files}) for images, text, files in prompts]
    engine = {**ENGINE, "model": str(folder), "limit_mm_per_prompt": {"image": 2}}
    calls = [call(asked_of_vllm, QWEN_IDS["image"], ratio, endless=True) for ratio in (0, 0.5, 0.75)]
    own = (METHODS | MORE)[method]
    said = run(tmp_path / "job", {"engine": engine, "calls": calls}, {**own, "ratio": 0.5})
    for one, ratio in zip(said, (0, 0.5, 0.75)):
        with libra.attach(
            model, libra.Compression.from_dict({**own, "ratio": ratio}) if ratio else "vanilla"
        ):
            for (images, text, _), ids in zip(prompts, one["ids"]):
                inputs = processor(text=[text], images=images, return_tensors="pt")
                out = model.generate(
                    **inputs, max_new_tokens=MOST, min_new_tokens=MOST, do_sample=False, eos_token_id=None
                )
                assert out[0, inputs["input_ids"].shape[1] :].tolist() == ids, (ratio, text)


def test_the_name_that_a_server_goes_by_is_json():
    command = [sys.executable, "-m", "libra.vllm", "divprune"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["method"] == "divprune"
