"""README's first picture and the embedded model as transformers loads it."""

from pathlib import Path

import pytest

from libra.mini.benchmark import scene_sample
from libra.mini.huggingface import load, question
from llava.model.builder import load_pretrained_model
from mini import hello

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def loaded():
    return load()


def test_the_picture_says_what_the_models_answer(loaded):
    sample = scene_sample(hello.KIND, hello.NUMBER)
    plain, everything, _ = hello.seen(*loaded, sample, "mini/vanilla")
    fastv, kept, _ = hello.seen(*loaded, sample, "mini/fastv")
    ours, targets, ratio = hello.seen(*loaded, sample, "mini/r50")
    assert plain == ours == sample.answer != fastv
    assert [len(stage) for stage in everything + kept + targets] == [256, 128, 128, 64, 32]
    assert ratio < 0.5
    pixels = hello.shaded(sample.image, targets[0]).reshape(16, 6, 16, 6, 3).swapaxes(1, 2).reshape(256, -1)
    given = (
        hello.shaded(sample.image, list(range(256))).reshape(16, 6, 16, 6, 3).swapaxes(1, 2).reshape(256, -1)
    )
    assert (pixels[targets[0]] == given[targets[0]]).all()
    assert pixels.sum() < 0.7 * given.sum()


def test_it_answers_as_the_llava_checkpoint_does(loaded):
    model, processor = loaded
    inputs = question(processor, ROOT / "docs" / "images" / "scene.png", "describe the digits .")
    said = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    tokenizer, llava, _, _ = load_pretrained_model(
        str(ROOT / "mini" / "checkpoint"), None, "mini", device="cpu"
    )
    pixels = inputs["pixel_values"]
    ids = inputs["input_ids"]
    image = processor.image_token_id
    first = int((ids[0] == image).nonzero()[0])
    prompt = [*ids[0, :first].tolist(), -200, *ids[0][first:][ids[0][first:] != image].tolist()]
    ours = llava.generate(ids.new_tensor([prompt]), images=pixels, max_new_tokens=16, do_sample=False)[0]
    assert ours.tolist()[: len(said)] == said.tolist()[: len(ours)]
    with pytest.raises(ValueError, match="nothing.png"):
        question(processor, "nothing.png", "?")
